"""Why a checkpoint does not fit a model, in one readable line: counts of keys, the first few groups, and the likely cause."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from gp_jax.config import families
from gp_jax.errors import GlimpseError, printable, some
from gp_jax.pretrained.names import Names

QUANTISED = "the checkpoint is quantised ({}), which is not supported; use the weights that it was made from"
# Causes by patterns of keys.
KINDS = (
    (r"\.(W_q|codes|codebooks)$|\.weight\._(data|scale|shift)$", QUANTISED.format("HQQ, AQLM or quanto")),
    (r"\.(qweight|qzeros|g_idx|scales)$", QUANTISED.format("AWQ or GPTQ")),
    (r"\.(weight_packed|weight_shape|weight_zero_point)$", QUANTISED.format("compressed-tensors")),
    (r"\.(weight_scale|weight_scale_inv|input_scale|activation_scale)$", QUANTISED.format("fp8 or int8 with scales")),
    (r"\.(absmax|nested_absmax|quant_map|nested_quant_map|SCB|weight_format)$|\.quant_state\.", QUANTISED.format("bitsandbytes")),
    (r"lora_|\.base_layer\.|\.modules_to_save\.", "it holds a LoRA adapter that is not merged into its base (peft: merge_and_unload)"),
)
# Models that are not supported, by their keys.
OTHERS = (
    (r"visual\.blocks\.\*\.mlp\.fc1\.", "Qwen2-VL"),
    (r"^(thinker|talker)\.", "Qwen2.5-Omni"),
    (r"^mlp1\.|^vision_model\.", "InternVL"),
)
LOOKED_AT = 4000  # keys that are examined; real checkpoints have fewer


def check_quantised(hf: Mapping[str, Any], where: object) -> None:
    """Raises: GlimpseError for a `config.json` of quantised weights, before any weights are read."""
    text = hf.get("text_config")
    for source in (hf, text if isinstance(text, Mapping) else {}):
        settings = source.get("quantization_config") or source.get("compression_config")
        if settings:
            named = settings.get("quant_method") if isinstance(settings, Mapping) else None
            raise GlimpseError(f"{where}: quantization_config: {QUANTISED.format(printable(named or 'by an unknown method', 40))}")


def misfits(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], optional: set[str]) -> list[str]:
    """Descriptions of missing, unknown and mis-shaped keys of a source. Empty if all keys fit."""
    missing = [k for k in wanted if k not in found and k not in optional]
    unknown = [k for k in found if k not in wanted]
    wrong = {k: f" {list(found[k])}, expected {list(s)}" for k, s in wanted.items() if k in found and tuple(found[k]) != s}
    kinds = (("missing", dict.fromkeys(missing, "")), ("unknown", dict.fromkeys(unknown, "")), ("mis-shaped", wrong))
    return [f"{len(names)} {kind}: {some(_grouped(names))}" for kind, names in kinds if names]


def starred(key: str) -> str:
    """A key with its layer's number replaced by "*"."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", key)


def _grouped(names: Mapping[str, str]) -> list[str]:
    """Groups keys that differ only in the layer's number. names: key -> text that follows it in the message."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in sorted(names):
        groups.setdefault((starred(key), names[key]), []).append(key)
    return [f"{own[0] if len(own) == 1 else f'{pattern} ({len(own)} times)'}{more}" for (pattern, more), own in groups.items()]


def cause(found: Iterable[str], wanted: Iterable[str], names: Names | None = None, model_type: str = "") -> str:
    """The likely reason why keys do not fit, to append to the error; empty if none is known. names: of the base model."""
    found, wanted = [starred(key) for key in list(found)[:LOOKED_AT]], {starred(key) for key in wanted}
    unknown = [key for key in found if key not in wanted]
    for pattern, said in KINDS:
        if any(re.search(pattern, key) for key in unknown):
            return f". Likely cause: {said}"
    if prefix := _prefix(unknown, wanted, names):
        return f". Likely cause: its keys begin with '{printable(prefix, 60)}', which must be taken off"
    for style in (wanted, {names.nested_key(key) for key in wanted} if names else set()):
        if prefix := _prefix(style - set(found), set(found), None):
            return f". Likely cause: its keys lack the beginning '{printable(prefix, 60)}'"
    others = [(family.key, family.title) for family in families.FAMILIES if model_type not in family.model_types]
    for pattern, title in (*others, *OTHERS) if names else ():
        if any(re.search(pattern, key) for key in unknown):
            return f". Likely cause: the weights are {title}, config.json says model_type '{model_type}'"
    if names and wanted and not any(re.search(r"visual\.|vision", key) for key in found):
        return ". Likely cause: the file holds a language model alone, without a vision tower"
    return ""


def _prefix(keys: Iterable[str], wanted: set[str], names: Names | None) -> str | None:
    """The prefix that turns most of the keys into wanted ones when it is removed; None: there is none."""
    keys = list(keys)
    seen: Counter[str] = Counter()
    for key in keys:
        for place in [match.end() for match in re.finditer(r"\.", key[:200])][:12]:
            rest = key[place:]
            if rest in wanted or (names and names.canonical(rest) in wanted):
                seen[key[:place]] += 1
                break
    prefix, count = seen.most_common(1)[0] if seen else (None, 0)
    return prefix if 2 * count > len(keys) else None
