"""Attention on a CPU: some queries of one group of heads at a time, with all the keys they may see.

A tile of scores is small enough for a core's cache, and there is no running maximum as in `blockwise`, which pays off where a row of
scores is short. Causal queries come in quarters, each with the keys up to its end: 5/8 of the square.

Letters as in `attention`: B batch, N query heads, K key-value heads, G = N / K, T queries, S keys, H head width, V value width.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.ops.dense import dense_attention
from gp_jax.ops.kernels import per_device

PARTS = 4
CAUSAL_TILE = 272  # queries
TILE_BYTES = {4: 8 * 2**20, 2: 5.2 * 2**20}  # of float32 scores, by the width of the operands


def rows_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """See `attention.attend`; causal needs as many queries as keys. Holds one tile of scores at a time, float32."""
    return per_device(_rows, q, k, v, q_segment, kv_segment, causal=causal)


def _rows(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """One device's share."""
    q_segment, kv_segment, length = jnp.asarray(q_segment), jnp.asarray(kv_segment), q.shape[2]
    if not causal:
        heads = q.shape[1] // k.shape[1]
        return _part(q, k, v, q_segment, kv_segment, None, int(TILE_BYTES[q.dtype.itemsize] / (4 * heads * k.shape[2])))
    ends = [length * part // PARTS for part in range(PARTS + 1)]
    parts = [
        _part(q[:, :, low:high], k[:, :, :high], v[:, :, :high], q_segment[:, low:high], kv_segment[:, :high], low, CAUSAL_TILE)
        for low, high in itertools.pairwise(ends)
        if high > low
    ]
    return jnp.concatenate(parts, axis=2)


def _part(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, first: int | None, most: int) -> Array:
    """Queries in tiles of at most `most`. first: the row of the first one, where key 0 is row 0 of a causal prompt; None: not causal."""
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    tiles = -(-length // max(1, most))
    tile = -(-length // tiles)
    rest = tiles * tile - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rest), (0, 0))).reshape(batch * groups, heads // groups, tiles, tile, width)
    q_segment = jnp.pad(q_segment, ((0, 0), (0, rest)), constant_values=-1).reshape(batch, tiles, tile)
    keys, values = (x.reshape(batch * groups, 1, *x.shape[2:]) for x in (k, v))

    def one(number: Array) -> Array:
        pair, place = number // tiles, number % tiles
        sample = pair // groups
        own, seen = q_segment[sample, place], kv_segment[sample]
        mask = (own[:, None] == seen) & (seen >= 0)
        if first is not None:
            rows = first + place * tile + jnp.arange(tile)
            mask &= rows[:, None] >= jnp.arange(seen.size)
        return dense_attention(q[pair, :, place][None], keys[pair][None], values[pair][None], mask[None])[0]

    out = jax.lax.map(one, jnp.arange(batch * groups * tiles))  # (B K tiles, G, tile, V)
    out = jnp.moveaxis(out.reshape(batch, groups, tiles, heads // groups, tile, -1), 2, 3)
    return out.reshape(batch, heads, tiles * tile, -1)[:, :, :length]
