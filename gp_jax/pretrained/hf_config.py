"""Conversion of a Hugging Face `config.json` to a ModelConfig and back, by the model's family."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gp_jax.config import families
from gp_jax.config.families import Family
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.schema import checked
from gp_jax.errors import GlimpseError
from gp_jax.pretrained.fields import choice, read
from gp_jax.runtime.disk import read_json


def family_of_file(hf: Mapping[str, Any], where: str) -> Family:
    """The first family that reads the file. Raises: GlimpseError on an unknown model type."""
    known = tuple(dict.fromkeys(name for family in families.FAMILIES for name in family.file_types))
    name = choice(hf, "model_type", known, where)
    fitting = [family for family in families.FAMILIES if name in family.file_types]
    found = next((family for family in fitting if family.needs is None or hf.get(family.needs)), None)
    if found is None:
        raise GlimpseError(f"{where}: field '{fitting[0].needs}' is missing")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's `config.json`, with the configs that it refers to."""
    path = folder / "config.json"
    hf = read_json(path)
    complete = family_of_file(hf, str(path)).complete
    return complete.load()(hf, folder) if complete else dict(hf)


def model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dict and a `generation_config.json` dict.

    Raises: GlimpseError, naming file and field, on an unknown model type, a missing field, a value that is not of the field's type or
        outside its bounds, or an unsupported setting.
    """
    return checked(family_of_file(hf, where).read.load()(hf, generation or {}, where), where)


def glimpse_config(hf: Mapping[str, Any], model: ModelConfig, where: str = "config.json") -> GlimpseConfig:
    """Reads the glimpse's fields of a released `config.json` and validates them against `model`."""
    return read(GlimpseConfig, hf, where).validate(model, where)


def flat_hf_config(hf: Mapping[str, Any], glimpse: GlimpseConfig) -> dict[str, Any]:
    """`config.json` of a folder with a glimpse, in the layout that transformers and the released code read."""
    flat = family_of_file(hf, "config.json").flat
    base = flat.load()(hf) if flat else dict(hf)
    return base | {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(glimpse).items()}
