"""Ranking without sorting.

On TPU a sort over a prompt compiles longer than a decoder layer, and it exchanges data between chips that hold parts of the prompt. Here
the threshold between two ranks is found by bisection, and new positions by cumulative sums.

B samples, M values or rows.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

LOWEST = jnp.iinfo(jnp.int32).min


def as_integers(x: Array) -> Array:
    """float32 as int32 in the same order. NaN is the smallest of all, -0.0 is 0.0."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(jnp.isnan(x), LOWEST, jnp.where(bits < 0, LOWEST - bits, bits))


def smallest(holds: Callable[[Array], Array], rows: int) -> Array:
    """Per row the smallest int32 for which `holds`, which is false up to some number and true from there on. Returns: (rows, 1)."""

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, without overflow
        right = holds(middle)
        return jnp.where(right, low, middle + 1), jnp.where(right, middle, high)

    ends = (jnp.full((rows, 1), limit, jnp.int32) for limit in (LOWEST, jnp.iinfo(jnp.int32).max))
    return jax.lax.fori_loop(0, 32, halve, tuple(ends))[1]


def best(values: Array, among: Array, count: Array) -> Array:
    """The `count` largest values of every sample; of equal ones the first.

    Args: values: (B, M) float32; among: (B, M) bool, which take part; count: (B,) int, more than there are: all, less than one: none.
    Returns: (B, M) bool.
    """
    order, count = as_integers(values), count[:, None]

    def above(edge: Array) -> Array:
        return (order > edge) & among

    edge = smallest(lambda edge: jnp.sum(above(edge), axis=-1, keepdims=True) < count, values.shape[0])
    better, equal = above(edge), (order == edge) & among
    return better | (equal & (jnp.cumsum(equal, axis=-1) <= count - jnp.sum(better, axis=-1, keepdims=True)))


def to_front(stays: Array, length: int) -> Array:
    """Row numbers of the rows that stay, in order, then of the others, in order, the first `length`.

    (B, M) bool -> (B, min(length, M)) int32.
    """
    length, count = min(length, stays.shape[1]), jnp.sum(stays, axis=-1, keepdims=True)
    place = jnp.where(stays, jnp.cumsum(stays, axis=-1), count + jnp.cumsum(~stays, axis=-1)) - 1
    numbers = jnp.arange(stays.shape[1], dtype=jnp.int32)

    def one(place: Array) -> Array:
        return jnp.zeros(length, jnp.int32).at[place].set(numbers, mode="drop", unique_indices=True)

    return jax.vmap(one)(place)
