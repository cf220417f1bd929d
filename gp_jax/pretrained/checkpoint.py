"""A model on disk or on the Hub: base, glimpse and adapter are found and checked first, then loaded."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.errors import GlimpseError, shown
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained import files, params
from gp_jax.pretrained.adapters import ADAPTER_FILES, StoredAdapter
from gp_jax.pretrained.hf_config import glimpse_config, model_config, read_config
from gp_jax.pretrained.misfits import check_quantised
from gp_jax.pretrained.tower import base_source
from gp_jax.runtime.disk import read_json

DTYPES = ("float32", "bfloat16", "float16")
ALL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.pt")


@dataclass(frozen=True)
class Checkpoint:
    """hf: the base's `config.json`; glimpse: its settings, glimpse_source: its tensors."""

    name: str
    folder: Path
    hf: dict[str, Any]
    config: ModelConfig
    base: files.TensorSource
    glimpse: GlimpseConfig | None
    glimpse_source: files.TensorSource | None
    adapter: StoredAdapter | None

    @classmethod
    def find(
        cls, name: str | os.PathLike, glimpse: str | os.PathLike | None = None, adapter: str | os.PathLike | None = None
    ) -> "Checkpoint":
        """Args: as of `GlimpseVLM.from_pretrained`. Raises: GlimpseError that names the file, field or keys at fault."""
        name, glimpse, adapter = files.parts_of(name, glimpse, adapter)
        folder = files.find_model(name, ALL_FILES)
        beside = None if adapter is None else files.find_folder(adapter, ADAPTER_FILES)
        if beside is None or beside.resolve() != folder.resolve():
            files.check_merged(folder)
        hf = read_config(folder)
        check_quantised(hf, folder / "config.json")
        generation = read_json(folder / "generation_config.json", required=False)
        config = model_config(hf, generation, str(folder / "config.json"))
        home = folder if glimpse is None else files.find_folder(glimpse, ("*.json", files.GLIMPSE_TENSORS, files.GLIMPSE_TORCH))
        settings = source = None
        if glimpse is not None or files.has_glimpse(home):
            source = files.glimpse_source(home)
            settings = glimpse_config(read_json(home / "config.json"), config, str(home / "config.json"))
        added = None if beside is None else StoredAdapter.open(beside, config)
        return cls(str(name), folder, hf, config, base_source(folder, config), settings, source, added)

    def load(self, dtype: jnp.dtype | None = None, mesh: Mesh | None = None, progress: Callable[[list], Iterable] = iter) -> LVLM:
        """The model, with its adapter beside the weights. Args: as of `params.load`."""
        model = params.load(self.config, self.glimpse, self.base, self.glimpse_source, dtype=dtype, mesh=mesh, progress=progress)
        if self.adapter is not None:
            self.adapter.attach(model, mesh)
        return model

    @property
    def nested(self) -> bool:
        """Whether the base's keys are those of transformers' own modules."""
        return any(key.startswith("model.language_model.") for key in self.base.shapes)


def dtype_of(dtype: Any) -> jnp.dtype | None:
    """The type of a base's weights by its name; None: as stored. Raises: GlimpseError for another one."""
    if dtype is not None and str(dtype) not in DTYPES and getattr(dtype, "__name__", "") not in DTYPES:
        raise GlimpseError(f"dtype={shown(dtype)} is not one of {', '.join(DTYPES)}")
    return None if dtype is None else jnp.dtype(dtype)
