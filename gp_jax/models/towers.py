"""Which tower a vision config stands for."""

import jax.numpy as jnp
from flax import nnx

from gp_jax.config.vision import ClipConfig, Vision, VisionConfig
from gp_jax.models.clip import ClipTower
from gp_jax.models.vision import VisionTower

TOWERS = {VisionConfig: VisionTower, ClipConfig: ClipTower}


def make_tower(config: Vision, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """A tower with random weights."""
    return TOWERS[type(config)](config, dtype=dtype, rngs=rngs)
