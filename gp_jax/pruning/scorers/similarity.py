"""Cosines between visual tokens, computed in slices: the matrix of all pairs is never in memory.

Functions of one sample: M slots, C channels. `jax.vmap` makes them functions of a batch.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.trees import VisionInput

SLICE = 256  # rows of the similarity matrix at a time
EXACT = "highest"


def unit(x: Array) -> Array:
    """Rows of length one, float32; rows of zeros stay zero."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)


def cosines(x: Array, row: Array) -> Array:
    """Of unit rows x (M, C) and a unit row (C,). Returns: (M,)."""
    return jnp.einsum("mc,c->m", x, row, precision=EXACT)


def closest_other(x: Array, present: Array) -> Array:
    """Cosine of every unit row to the one most like it among the other present ones. Returns: (M,), -inf where there is none."""
    slot = jnp.arange(x.shape[0])

    def one(args: tuple[Array, Array]) -> Array:
        row, own = args
        return jnp.max(jnp.where(present & (slot != own), cosines(x, row), -jnp.inf))

    return jax.lax.map(one, (x, slot), batch_size=SLICE)


def nearest(x: Array, targets: Array) -> Array:
    """The target most like every unit row. targets: (M,) bool. Returns: (M,) int slots; 0 where there is no target."""
    return jax.lax.map(lambda row: jnp.argmax(jnp.where(targets, cosines(x, row), -jnp.inf)), x, batch_size=SLICE)


def collect(tokens: Array, home: Array, members: Array) -> tuple[Array, Array]:
    """Sums tokens (M, D) of `members` (M,) bool into the slots `home` (M,). Returns: sums (M, D) float32, how many (M, 1) float32."""
    members = members[:, None].astype(jnp.float32)
    sums = jnp.zeros(tokens.shape, jnp.float32).at[home].add(members * tokens.astype(jnp.float32))
    return sums, jnp.zeros((tokens.shape[0], 1), jnp.float32).at[home].add(members)


def raster(vision: VisionInput) -> Array:
    """Slots in the order of the prompt (image, row, column), padding behind. Returns: (B, M) int."""
    image = jnp.where(vision.token_image >= 0, vision.token_image, jnp.iinfo(jnp.int32).max)
    return jnp.lexsort((vision.token_hw[..., 1], vision.token_hw[..., 0], image), axis=-1)


def back(order: Array) -> Array:
    """The inverse of `raster`: the place of every slot in that order. Returns: (B, M) int."""
    return jnp.argsort(order, axis=-1)
