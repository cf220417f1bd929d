"""GlimpsePrune in JAX: dynamic visual token pruning for large vision-language models (arXiv 2508.01548)."""

import importlib
from typing import TYPE_CHECKING

from gp_jax.errors import GlimpseError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gp_jax.ahead.artifact.inputs import artifact_inputs
    from gp_jax.buckets import Ladder, Ladders
    from gp_jax.inference.decoding import Rows
    from gp_jax.inference.function import inference_buckets, inference_fn, inference_params
    from gp_jax.inference.requests import sampling_settings
    from gp_jax.inference.results import Answer, Generation
    from gp_jax.pruning.look import Look
    from gp_jax.pruning.rule import Prune
    from gp_jax.sharding import make_mesh
    from gp_jax.vlm import GlimpseVLM

# Loaded on first use: `gp-jax --help` and its checks of files need no JAX.
_HOMES = {
    "Answer": "gp_jax.inference.results",
    "Generation": "gp_jax.inference.results",
    "GlimpseVLM": "gp_jax.vlm",
    "Ladder": "gp_jax.buckets",
    "Ladders": "gp_jax.buckets",
    "Look": "gp_jax.pruning.look",
    "Prune": "gp_jax.pruning.rule",
    "Rows": "gp_jax.inference.decoding",
    "artifact_inputs": "gp_jax.ahead.artifact.inputs",
    "inference_buckets": "gp_jax.inference.function",
    "inference_fn": "gp_jax.inference.function",
    "inference_params": "gp_jax.inference.function",
    "make_mesh": "gp_jax.sharding",
    "sampling_settings": "gp_jax.inference.requests",
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
    "Look",
    "Prune",
    "Rows",
    "__version__",
    "artifact_inputs",
    "inference_buckets",
    "inference_fn",
    "inference_params",
    "make_mesh",
    "sampling_settings",
]
