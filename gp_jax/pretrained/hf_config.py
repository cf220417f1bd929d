"""Hugging Face `config.json` to our config and back: one table of the kinds of files that there are."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.schema import checked
from gp_jax.pretrained import llava, qwen
from gp_jax.pretrained.fields import choice, read, refuse_if
from gp_jax.pretrained.tower import with_tower
from gp_jax.runtime.disk import read_json


@dataclass(frozen=True)
class Kind:
    """A kind of `config.json`.

    model_types: as the file names it. needs: a field by which it differs from another kind of the same name.
    read: (file, generation_config, where) -> config. flat: the file as it stands beside a glimpse.
    complete: (file, its folder) -> the file with what it only refers to.
    """

    model_types: tuple[str, ...]
    read: Callable[[Mapping[str, Any], Mapping[str, Any], str], ModelConfig]
    flat: Callable[[Mapping[str, Any]], dict[str, Any]] = dict
    needs: str | None = None
    complete: Callable[[Mapping[str, Any], Path], dict[str, Any]] = lambda hf, folder: dict(hf)


KINDS = (
    Kind(("qwen2_5_vl", "qwen2_5_vl_gp"), qwen.read_model, qwen.flat),
    Kind(
        ("llava", "llava_llama", "llava_llama_gp"), llava.read_original, llava.flat_original, needs="mm_vision_tower", complete=with_tower
    ),
    Kind(("llava", "llava_next"), llava.read_model),
)
MODEL_TYPES = tuple(dict.fromkeys(name for kind in KINDS for name in kind.model_types))


def kind_of(hf: Mapping[str, Any], where: str) -> Kind:
    """The first kind that fits. Raises: GlimpseError on an unknown model type."""
    name = choice(hf, "model_type", MODEL_TYPES, where)
    kinds = [kind for kind in KINDS if name in kind.model_types]
    found = next((kind for kind in kinds if kind.needs is None or hf.get(kind.needs)), None)
    refuse_if(found is None, f"{where}: field '{kinds[0].needs}' is missing")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`, complete."""
    path = folder / "config.json"
    hf = read_json(path)
    return kind_of(hf, str(path)).complete(hf, folder)


def model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dict and a `generation_config.json` dict.

    Raises: GlimpseError, naming file and field, on an unknown model type, a missing field, a value that is not of the field's type or
        outside its bounds, or an unsupported setting.
    """
    return checked(kind_of(hf, where).read(hf, generation or {}, where), where)


def glimpse_config(hf: Mapping[str, Any], model: ModelConfig, where: str = "config.json") -> GlimpseConfig:
    """Reads the glimpse's fields of a released `config.json` and validates them against `model`."""
    return read(GlimpseConfig, hf, where).validate(model, where)


def flat_hf_config(hf: Mapping[str, Any], glimpse: GlimpseConfig) -> dict[str, Any]:
    """`config.json` of a folder that holds a glimpse: as transformers and the released code read it."""
    flat = kind_of(hf, "config.json").flat(hf)
    return flat | {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(glimpse).items()}
