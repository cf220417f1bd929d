"""Fields of a `config.json`, each checked against its type in `gp_jax.config`: an untrusted JSON file may hold anything."""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

from pydantic import Field

from gp_jax.config.model import TextConfig
from gp_jax.config.schema import LARGEST, Several, TokenId, checked, hints, one
from gp_jax.errors import GlimpseError, shown

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
Section = dict[str, Any]
TokenOrNone = Annotated[int, Field(ge=-1, le=LARGEST)]  # -1: none, as in old Llama checkpoints


def refuse_if(condition: bool, message: str) -> None:
    if condition:
        raise GlimpseError(message)


def present(source: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that are set in a file; null counts as missing."""
    return {name: value for name, value in source.items() if value is not None}


def value(source: Mapping[str, Any], name: str, kind: Any, where: str, default: Any = ...) -> Any:
    """A field of this type; null counts as missing. Raises: GlimpseError, naming file and field, when it is missing or something else."""
    if source.get(name) is not None:
        return one(kind, source[name], name, where)
    refuse_if(default is ..., f"{where}: field '{name}' is missing")
    return default


def choice(source: Mapping[str, Any], name: str, known: Iterable[str], where: str, default: Any = ...) -> str:
    """A field that holds one of these words; null counts as missing. Raises: GlimpseError that names file, field and words."""
    found, known = value(source, name, str, where, default), tuple(known)
    refuse_if(found not in known, f"{where}: {name} {shown(found)} is not supported (supported: {', '.join(known)})")
    return found


def read(kind: type[T], source: Mapping[str, Any], where: str, names: Mapping[str, str] | None = None, **given: Any) -> T:
    """A dataclass of the fields of a JSON object; null counts as missing where a field cannot be None.

    Args: names: of fields with another name in the object; given: fields that are not in it.
    Raises: GlimpseError that names file and field.
    """
    names, found, types = names or {}, dict(given), hints(cast(Any, kind))
    for field in dataclasses.fields(kind):
        name, none = names.get(field.name, field.name), type(None) in get_args(types[field.name])
        if field.name not in given and name in source and (none or source[name] is not None):
            found[field.name] = source[name]
        missing = field.name not in found and field.default is dataclasses.MISSING
        refuse_if(missing, f"{where}: field '{name}' is missing")
    return checked(kind(**found), where, names)


def text_config(
    text: Mapping[str, Any],
    top: Mapping[str, Any],
    where: str,
    above: str,
    *,
    defaults: Mapping[str, Any],
    axes: int,
    bias: bool,
    **own: Any,
) -> TextConfig:
    """A decoder of the Qwen2 / Llama / Qwen3 kind.

    Args: text: the object with its fields; top: the whole file; where, above: their names in messages; defaults: of missing fields; axes:
        of its rope, 3 for M-RoPE; bias: whether queries, keys and values have one; own: what the family's decoder has and others do not
        (`head_size`, `qk_norm`, `mrope_interleaved`).
    """
    # If both descriptions of the rope are there, the older one is used, as in transformers.
    name = "rope_scaling" if value(text, "rope_scaling", Section, where, {}) else "rope_parameters"
    rope = value(text, name, Section, where, {})
    choice(rope, "rope_type" if rope.get("rope_type") is not None else "type", ("default", "mrope"), f"{where}: {name}", "default")
    found = {
        "num_key_value_heads": text.get("num_attention_heads"),
        **defaults,
        **present(text),
        "mrope_section": rope.get("mrope_section"),
    }
    found |= present({"rope_theta": rope.get("rope_theta")})
    own = {"head_size": None, "qk_norm": False, "mrope_interleaved": False} | own
    tied = [value(source, "tie_word_embeddings", bool, place, False) for source, place in ((top, above), (text, where))]
    config = read(TextConfig, found, where, tie_word_embeddings=any(tied), attention_bias=bias, **own)
    width, heads, kv_heads, section = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.mrope_section
    refuse_if(not config.head_size and width % heads != 0, f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}")
    refuse_if(heads % kv_heads != 0, f"{where}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    name = "head_dim" if config.head_size else "hidden_size / num_attention_heads"
    odd = f"{where}: head width {config.head_dim} ({name}) is not even, as a rope needs"
    refuse_if(config.head_dim % 2 != 0, odd)
    fits = (len(section) == axes and sum(section) == config.head_dim // 2) if axes > 1 else not section
    half = f"must be {axes} numbers that add up to half the head width ({config.head_dim // 2})" if axes > 1 else "is for other models"
    refuse_if(not fits, f"{where}: mrope_section={shown(list(section))} {half}")
    return config


def check_window(side: int, most: int, field: str, where: str) -> None:
    """Raises: GlimpseError unless an attention window has 1 to `most` visual tokens on a side: memory takes the fourth power of it."""
    refuse_if(side < 1, f"{where}: {field} is smaller than one visual token")
    refuse_if(side > most, f"{where}: {field} holds {side} x {side} visual tokens, supported are {most} x {most}")


def token(source: Mapping[str, Any], name: str, vocabulary: int, where: str, default: Any = ...) -> Any:
    """A token id that a prompt may hold."""
    found = value(source, name, TokenId, where, default)
    refuse_if(found is not None and found >= vocabulary, f"{where}: {name}={found} is not in the vocabulary of {vocabulary} tokens")
    return found


def end_and_pad(generation: Mapping[str, Any], *sources: Mapping[str, Any], vocabulary: int, where: str) -> dict[str, Any]:
    """`eos_token_ids` and `pad_token_id` of a ModelConfig, each from the first of these files that names it.

    All of them are checked. If the padding id is not a token of this model, the first end id is used instead: padding is never read.
    """
    places = ((generation, str(Path(where).with_name("generation_config.json"))), *((source, where) for source in sources))

    def first(name: str, *kinds: Any) -> tuple[Any, str]:
        found = [(value(source, name, kinds[isinstance(source.get(name), list | tuple)], place, None), place) for source, place in places]
        return next(((one, place) for one, place in found if one is not None), (None, where))

    ends, place = first("eos_token_id", TokenOrNone, Several[TokenOrNone])
    pad, _ = first("pad_token_id", TokenOrNone, TokenOrNone)
    ends = tuple(end for end in (ends if isinstance(ends, tuple) else (ends,)) if end not in (None, -1))
    unknown = f"{place}: eos_token_id={max(ends, default=0)} is not in the vocabulary of {vocabulary} tokens"
    refuse_if(max(ends, default=0) >= vocabulary, unknown)
    return dict(eos_token_ids=ends, pad_token_id=pad if pad is not None and 0 <= pad < vocabulary else ends[0] if ends else 0)
