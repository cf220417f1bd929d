"""Fields of a `config.json`, checked one by one: JSON from strangers may hold anything."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gp_jax.config import TextConfig
from gp_jax.errors import GlimpseError
from gp_jax.ops.layers import activation


def mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    """Raises: GlimpseError unless `value` is a JSON object."""
    if not isinstance(value, Mapping):
        raise GlimpseError(f"{where}: {name}={value!r} must be an object")
    return value


def check_activation(name: Any, field: str, where: str) -> None:
    """Raises: GlimpseError, naming file and field, unless the activation exists."""
    try:
        activation(name)
    except GlimpseError as error:
        raise GlimpseError(f"{where}: {field}: {error}") from error


def get(source: Mapping[str, Any], name: str, where: str, default: Any = ...) -> Any:
    """A field; null counts as missing where there is no default."""
    value = source.get(name, default)
    if value is ... or (value is None and default is ...):
        raise GlimpseError(f"{where}: field '{name}' is missing")
    return value


def typed(config: Any, where: str) -> Any:
    """A dataclass whose fields hold what they are annotated with; JSON may hold anything."""
    for field in dataclasses.fields(config):
        value, kind = getattr(config, field.name), str(field.type).split(" |")[0].removeprefix("<class '").removesuffix("'>")
        if value is None and "None" in str(field.type):
            continue
        ok = {
            "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
            "float": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
            "bool": lambda v: isinstance(v, bool),
            "str": lambda v: isinstance(v, str),
            "tuple[int, ...]": lambda v: isinstance(v, tuple) and all(isinstance(x, int) for x in v),
            "tuple[tuple[int, int], ...]": lambda v: isinstance(v, tuple) and all(isinstance(x, tuple) and len(x) == 2 for x in v),
            "tuple[str, ...]": lambda v: isinstance(v, tuple) and all(isinstance(x, str) for x in v),
        }[kind]
        if not ok(value):
            raise GlimpseError(f"{where}: {field.name}={value!r} must be {kind}")
    return config


def sizes(source: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[int]:
    """Positive integers by name."""
    values = [get(source, name, where) for name in names]
    for name, value in zip(names, values, strict=True):
        refuse_if(
            not isinstance(value, int) or isinstance(value, bool) or value < 1, f"{where}: {name}={value!r} must be a positive integer"
        )
    return values


def refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise GlimpseError(message)


def text_config(text: Mapping[str, Any], top: Mapping[str, Any], where: str, *, theta: float, axes: int, bias: bool) -> TextConfig:
    """A decoder of the Qwen2 / Llama kind.

    Args: text: where its fields are; top: the whole file; theta: of a rope that names none; axes: of its rope, 3 for M-RoPE; bias: of
        queries, keys and values.
    """
    rope = mapping(text.get("rope_parameters") or text.get("rope_scaling") or {}, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    refuse_if(kind not in ("default", "mrope"), f"{where}: rope type '{kind}' is not supported (supported: default, mrope)")
    names = ("num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers")
    heads, width, vocabulary, inner, layers = sizes(text, names, where)
    kv_heads = heads if text.get("num_key_value_heads") is None else sizes(text, ("num_key_value_heads",), where)[0]
    refuse_if(width % heads != 0, f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}")
    refuse_if(heads % kv_heads != 0, f"{where}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    section = rope.get("mrope_section", ())
    whole = isinstance(section, list | tuple) and all(isinstance(n, int) for n in section)
    refuse_if(not whole, f"{where}: mrope_section={section!r} must be integers")
    section = tuple(section)
    fits = (len(section) == axes and sum(section) == width // heads // 2) if axes > 1 else not section
    half = f"must be {axes} numbers that add up to half the head width ({width // heads // 2})" if axes > 1 else "is for other models"
    refuse_if(not fits, f"{where}: mrope_section={list(section)} {half}")
    config = TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=get(text, "rms_norm_eps", where, 1e-6),
        rope_theta=rope.get("rope_theta") or text.get("rope_theta") or theta,
        mrope_section=section,
        tie_word_embeddings=bool(top.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        attention_bias=bias,
        hidden_act=get(text, "hidden_act", where, "silu"),
    )
    check_activation(config.hidden_act, "hidden_act", where)
    return typed(config, where)


def end_and_pad(*sources: Mapping[str, Any]) -> dict[str, Any]:
    """`eos_token_ids` and `pad_token_id` of a ModelConfig, each from the first of these files that names it."""

    def token(name: str) -> Any:
        return next((source[name] for source in sources if source.get(name) is not None), None)

    eos, pad = token("eos_token_id"), token("pad_token_id")
    eos = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    return dict(eos_token_ids=eos, pad_token_id=pad if pad is not None else (eos[0] if eos else 0))
