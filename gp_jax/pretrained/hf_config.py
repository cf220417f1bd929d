"""Hugging Face `config.json` to our config and back.

Two layouts exist: flat (text fields at the top; transformers 4, the released GlimpsePrune folders, the Hub) and nested
(`text_config`; transformers 5). Both are read; a folder that holds a glimpse is written flat, which all of them read.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gp_jax.config import GlimpseConfig, ModelConfig, TextConfig, VisionConfig
from gp_jax.errors import GlimpseError
from gp_jax.ops.layers import activation

MODEL_TYPES = ("qwen2_5_vl", "qwen2_5_vl_gp")
# What transformers takes for fields that a file leaves out; the 32B model on the Hub leaves some out.
VISION_DEFAULTS = {"depth": 32, "num_heads": 16, "fullatt_block_indexes": (7, 15, 23, 31)}


def _mapping(value: Any, name: str, where: str) -> Mapping[str, Any]:
    """Raises: GlimpseError unless `value` is a JSON object."""
    if not isinstance(value, Mapping):
        raise GlimpseError(f"{where}: {name}={value!r} must be an object")
    return value


def _activation(name: Any, field: str, where: str) -> None:
    """Raises: GlimpseError, naming file and field, unless the activation exists."""
    try:
        activation(name)
    except GlimpseError as error:
        raise GlimpseError(f"{where}: {field}: {error}") from error


def _get(source: Mapping[str, Any], name: str, where: str, default: Any = ...) -> Any:
    """A field; null counts as missing where there is no default."""
    value = source.get(name, default)
    if value is ... or (value is None and default is ...):
        raise GlimpseError(f"{where}: field '{name}' is missing")
    return value


def _typed(config: Any, where: str) -> Any:
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
            "tuple[str, ...]": lambda v: isinstance(v, tuple) and all(isinstance(x, str) for x in v),
        }[kind]
        if not ok(value):
            raise GlimpseError(f"{where}: {field.name}={value!r} must be {kind}")
    return config


def _sizes(source: Mapping[str, Any], names: tuple[str, ...], where: str) -> list[int]:
    """Positive integers by name."""
    values = [_get(source, name, where) for name in names]
    for name, value in zip(names, values, strict=True):
        _no(not isinstance(value, int) or isinstance(value, bool) or value < 1, f"{where}: {name}={value!r} must be a positive integer")
    return values


def _no(condition: bool, message: str) -> None:
    if condition:
        raise GlimpseError(message)


def _text_from_hf(text: Mapping[str, Any], top: Mapping[str, Any], where: str) -> TextConfig:
    rope = _mapping(text.get("rope_parameters") or text.get("rope_scaling") or {}, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "default"))
    _no(kind not in ("default", "mrope"), f"{where}: rope type '{kind}' is not supported (supported: default, mrope)")
    _no(bool(text.get("use_sliding_window")), f"{where}: use_sliding_window=true is not supported")
    names = ("num_attention_heads", "hidden_size", "vocab_size", "intermediate_size", "num_hidden_layers")
    heads, width, vocabulary, inner, layers = _sizes(text, names, where)
    kv_heads = heads if text.get("num_key_value_heads") is None else _sizes(text, ("num_key_value_heads",), where)[0]
    _no(width % heads != 0, f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}")
    _no(heads % kv_heads != 0, f"{where}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    section = rope.get("mrope_section", ())
    _no(
        not isinstance(section, list | tuple) or not all(isinstance(n, int) for n in section),
        f"{where}: mrope_section={section!r} must be integers",
    )
    section = tuple(section)
    _no(
        len(section) != 3 or sum(section) != width // heads // 2,
        f"{where}: mrope_section={list(section)} must be 3 numbers that add up to half the head width ({width // heads // 2})",
    )
    config = TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=_get(text, "rms_norm_eps", where, 1e-6),
        rope_theta=rope.get("rope_theta") or text.get("rope_theta") or 1e6,
        mrope_section=section,
        tie_word_embeddings=bool(top.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        hidden_act=_get(text, "hidden_act", where, "silu"),
    )
    _activation(config.hidden_act, "hidden_act", where)
    return _typed(config, where)


def _vision_from_hf(vision: Mapping[str, Any], where: str) -> VisionConfig:
    where = f"{where}: vision_config"
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    fields = {f.name: f for f in dataclasses.fields(VisionConfig)}
    values = {name: _get(vision, name, where, ... if f.default is dataclasses.MISSING else f.default) for name, f in fields.items()}
    full = values["fullatt_block_indexes"]
    values |= {"in_channels": channels, "fullatt_block_indexes": tuple(full) if isinstance(full, list) else full}
    _sizes(values, tuple(name for name, f in fields.items() if f.type in (int, "int")), where)
    config = _typed(VisionConfig(**values), where)
    _activation(config.hidden_act, "hidden_act", where)
    _no(
        config.hidden_size % config.num_heads != 0,
        f"{where}: hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}",
    )
    _no(config.head_dim % 4 != 0, f"{where}: head width {config.head_dim} is not divisible by 4, as a 2-D rope needs")
    _no(config.window_side < 1, f"{where}: window_size={config.window_size} is smaller than one visual token")
    return config


def model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dict, flat or nested, and a `generation_config.json` dict.

    Raises: GlimpseError on an unknown model type, a missing field or an unsupported setting.
    """
    kind = hf.get("model_type")
    _no(kind not in MODEL_TYPES, f"{where}: model_type '{kind}' is not supported (supported: {', '.join(MODEL_TYPES)})")
    text, generation = _mapping(hf.get("text_config") or hf, "text_config", where), generation or {}
    vision = _vision_from_hf(VISION_DEFAULTS | dict(_mapping(_get(hf, "vision_config", where), "vision_config", where)), where)
    decoder = _text_from_hf(text, hf, where)
    _no(
        vision.out_hidden_size != decoder.hidden_size,
        f"{where}: vision_config.out_hidden_size={vision.out_hidden_size} differs from hidden_size={decoder.hidden_size}",
    )

    def token(name: str) -> Any:
        return next((source[name] for source in (generation, hf, text) if source.get(name) is not None), None)

    eos = token("eos_token_id")
    eos = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pad = token("pad_token_id")
    config = ModelConfig(
        model_type="qwen2_5_vl",
        vision=vision,
        text=decoder,
        image_token_id=_get(hf, "image_token_id", where),
        video_token_id=hf.get("video_token_id"),
        eos_token_ids=eos,
        pad_token_id=pad if pad is not None else (eos[0] if eos else 0),
    )
    for name in ("image_token_id", "video_token_id", "eos_token_ids", "pad_token_id"):
        ids = getattr(config, name)
        ids = ids if isinstance(ids, tuple) else () if ids is None else (ids,)
        _no(not all(isinstance(i, int) for i in ids), f"{where}: {name}={getattr(config, name)!r} must be token ids")
    return config


def glimpse_config(hf: Mapping[str, Any], model: ModelConfig, where: str = "config.json") -> GlimpseConfig:
    """Reads the glimpse's fields of a released `config.json` and validates them against `model`."""
    values = {}
    for field in dataclasses.fields(GlimpseConfig):
        required = field.default is dataclasses.MISSING
        value = _get(hf, field.name, where, ... if required else field.default)
        values[field.name] = tuple(value or ()) if isinstance(value, list | tuple) or field.name == "anchor_positions" else value
    config = _typed(GlimpseConfig(**values), where)
    _activation(config.attn_fuse_hidden_act, "attn_fuse_hidden_act", where)
    return config.validate(model)


def flat_hf_config(hf: Mapping[str, Any], glimpse: GlimpseConfig) -> dict[str, Any]:
    """`config.json` of a folder that holds a glimpse: flat, so that transformers 4 and 5 and the released code read it."""
    flat = {k: v for k, v in hf.items() if k != "text_config"}
    flat |= {k: v for k, v in (hf.get("text_config") or {}).items() if k not in ("model_type", "rope_parameters")}
    rope = (hf.get("text_config") or hf).get("rope_parameters")
    if rope:
        flat["rope_theta"] = rope.get("rope_theta", 1e6)
        flat["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
        flat.pop("rope_parameters", None)
    flat["model_type"] = "qwen2_5_vl"
    flat["vision_config"] = {**hf["vision_config"], "model_type": "qwen2_5_vl"}
    flat["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings") or (hf.get("text_config") or {}).get("tie_word_embeddings"))
    return flat | {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(glimpse).items()}
