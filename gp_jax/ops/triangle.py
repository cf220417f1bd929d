"""Causal attention of a prompt on a CPU: a part of the queries sees a prefix of the keys, one group of heads at a time.

A quarter of the queries after the other, each with the keys up to its end, computes 5/8 of the square. A tile of scores is small enough
for a core's cache, and there is no running maximum as in `blockwise`, which pays off where a row of scores is short.

Letters as in `attention`: B batch, N query heads, K key-value heads, G = N / K, T queries and keys, H head width, V value width.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.ops.dense import dense_attention

PARTS = 4
TILE = 272  # queries


def triangle_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool = True) -> Array:
    """See `attention.attend`, for causal attention with as many queries as keys. Holds (G, 272, T) scores at a time, float32."""
    length = q.shape[2]
    ends = [length * part // PARTS for part in range(PARTS + 1)]
    parts = [
        _part(q[:, :, low:high], k[:, :, :high], v[:, :, :high], q_segment[:, low:high], kv_segment[:, :high], low)
        for low, high in itertools.pairwise(ends)
        if high > low
    ]
    return jnp.concatenate(parts, axis=2)


def _part(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, first: int) -> Array:
    """Queries that begin at row `first`, keys that begin at row 0."""
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    tiles = -(-length // TILE)
    tile = -(-length // tiles)
    rest = tiles * tile - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rest), (0, 0))).reshape(batch * groups, heads // groups, tiles, tile, width)
    q_segment = jnp.pad(q_segment, ((0, 0), (0, rest)), constant_values=-1).reshape(batch, tiles, tile)
    keys, values = (x.reshape(batch * groups, 1, *x.shape[2:]) for x in (k, v))

    def one(number: Array) -> Array:
        pair, place = number // tiles, number % tiles
        sample = pair // groups
        own, seen = q_segment[sample, place], kv_segment[sample]
        rows = first + place * tile + jnp.arange(tile)
        mask = (own[:, None] == seen) & (seen >= 0) & (rows[:, None] >= jnp.arange(seen.size))
        return dense_attention(q[pair, :, place][None], keys[pair][None], values[pair][None], mask[None])[0]

    out = jax.lax.map(one, jnp.arange(batch * groups * tiles))  # (B K tiles, G, tile, V)
    out = jnp.moveaxis(out.reshape(batch, groups, tiles, heads // groups, tile, -1), 2, 3)
    return out.reshape(batch, heads, tiles * tile, -1)[:, :, :length]
