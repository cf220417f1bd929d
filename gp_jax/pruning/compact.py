"""Compaction: surviving rows move to the front of a shorter, static length. Order, positions and values stay."""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.trees import LayerKV


def take_rows(x: Array, order: Array, axis: int = 1) -> Array:
    """Gathers along `axis` per sample; axis 0 of x is the sample. Whole rows are copied, not elements."""
    return jax.vmap(lambda rows, index: jnp.take(rows, index, axis=axis - 1))(x, order)


def take_kv(kv: LayerKV, order: Array, valid: Array) -> LayerKV:
    """A layer's cache after compaction; `valid` is that of the compacted rows."""
    return LayerKV(take_rows(kv.key, order, 2), take_rows(kv.value, order, 2), valid)
