"""GlimpsePrune in JAX: dynamic visual token pruning for large vision-language models (arXiv 2508.01548)."""

import importlib
from typing import TYPE_CHECKING

from gp_jax.errors import GlimpseError
from gp_jax.version import __version__

if TYPE_CHECKING:
    from gp_jax.buckets import Ladder, Ladders
    from gp_jax.exporting.inputs import artifact_inputs
    from gp_jax.glimpse.select import Prune
    from gp_jax.inference import inference_buckets, inference_fn, inference_params
    from gp_jax.results import Answer, Generation
    from gp_jax.sharding import make_mesh
    from gp_jax.vlm import GlimpseVLM

# Loaded on first use: `gp-jax --help` and its checks of files need no JAX.
_HOMES = {
    "Answer": "gp_jax.results",
    "Generation": "gp_jax.results",
    "GlimpseVLM": "gp_jax.vlm",
    "Ladder": "gp_jax.buckets",
    "Ladders": "gp_jax.buckets",
    "Prune": "gp_jax.glimpse.select",
    "artifact_inputs": "gp_jax.exporting.inputs",
    "inference_buckets": "gp_jax.inference",
    "inference_fn": "gp_jax.inference",
    "inference_params": "gp_jax.inference",
    "make_mesh": "gp_jax.sharding",
}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'gp_jax' has no attribute '{name}'")


__all__ = [
    "Answer",
    "Generation",
    "GlimpseError",
    "GlimpseVLM",
    "Ladder",
    "Ladders",
    "Prune",
    "__version__",
    "artifact_inputs",
    "inference_buckets",
    "inference_fn",
    "inference_params",
    "make_mesh",
]
