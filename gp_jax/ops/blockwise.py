"""Tiled attention with an online softmax (arXiv 2205.14135, 2112.05682) in plain XLA: memory is linear in the length.

Tiles that are hidden (above the diagonal, or of other images) are skipped, and tiles that are visible as a whole need no mask. The
choice is a conditional, which XLA executes as a branch on CPU. Differentiable; the backward pass recomputes each tile.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

TILE, STEP = 512, 64


def tile_size(length: int) -> int:
    """The size of the fewest equal tiles of at most 512 rows that hold `length` rows, a multiple of 64: there is little padding."""
    return min(length, -(-length // -(-length // TILE) // STEP) * STEP)


def _tiles(x: Array, axis: int, size: int, fill: int = 0) -> Array:
    """Pads `axis` to a multiple of `size` and moves tiles to the front: (tiles, ..., size, ...)."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % size)
    x = jnp.pad(x, pad, constant_values=fill)
    x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


HIDDEN, MIXED, FULL = range(3)


def _tile_kinds(q_tiles: Array, kv_tiles: Array, causal: bool, q_size: int, kv_size: int) -> Array:
    """How each (query tile, key tile) pair is computed, by the ranges of its segments: not at all, with a mask, or without.

    Args: q_tiles: (nq, B, q_size), kv_tiles: (nk, B, kv_size). Returns: (nq, nk) int, HIDDEN, MIXED or FULL.
    """
    big = jnp.iinfo(jnp.int32).max

    def span(tiles):
        return jnp.min(jnp.where(tiles >= 0, tiles, big), -1), jnp.min(tiles, -1), jnp.max(tiles, -1)

    (q_low, q_min, q_high), (kv_low, kv_min, kv_high) = span(q_tiles), span(kv_tiles)  # (n, B)
    seen = jnp.any((q_low[:, None] <= kv_high[None]) & (kv_low[None] <= q_high[:, None]), axis=-1)
    full = jnp.all(
        (q_min == q_high)[:, None] & (kv_min == kv_high)[None] & (q_min[:, None] == kv_min[None]) & (q_min >= 0)[:, None], axis=-1
    )
    if causal:
        first_key, last_key = jnp.arange(seen.shape[1]) * kv_size, (jnp.arange(seen.shape[1]) + 1) * kv_size - 1
        first_query, last_query = jnp.arange(seen.shape[0]) * q_size, (jnp.arange(seen.shape[0]) + 1) * q_size - 1
        seen &= first_key[None] <= last_query[:, None]
        full &= last_key[None] <= first_query[:, None]
    return jnp.where(full, FULL, jnp.where(seen, MIXED, HIDDEN))


def blockwise_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """See `attention.attend`. Holds one tile of scores at a time, at most (B, N, 512, 512) float32."""
    batch, heads, length, width = q.shape
    groups, exact = heads // k.shape[1], "highest" if q.dtype == jnp.float32 else None
    q_size, kv_size = tile_size(length), tile_size(k.shape[2])
    q_tiles = _tiles(q.reshape(batch, k.shape[1], groups, length, width), 3, q_size)
    k_tiles, v_tiles = _tiles(k, 2, kv_size), _tiles(v, 2, kv_size)
    q_segments, kv_segments = _tiles(q_segment, 1, q_size, -1), _tiles(kv_segment, 1, kv_size, -1)
    kinds = _tile_kinds(q_segments, kv_segments, causal, q_size, kv_size)

    def add_tile(carry, key_tile, query, q_seg, q_index, masked):
        out, peak, total = carry
        key, value, kv_seg, kv_index = key_tile
        logits = jnp.einsum("bkgth,bksh->bkgts", query, key, preferred_element_type=jnp.float32, precision=exact) * width**-0.5
        if masked:
            mask = (q_seg[:, :, None] == kv_seg[:, None, :]) & (kv_seg >= 0)[:, None, :]
            if causal:
                rows, columns = q_index * q_size + jnp.arange(q_size), kv_index * kv_size + jnp.arange(kv_size)
                mask &= rows[:, None] >= columns[None, :]
            logits = jnp.where(mask[:, None, None], logits, -jnp.inf)
        new_peak = jnp.maximum(peak, jnp.max(logits, axis=-1))
        weights = jnp.exp(logits - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        added = jnp.einsum("bkgts,bksv->bkgtv", weights.astype(value.dtype), value, preferred_element_type=jnp.float32, precision=exact)
        return out * shrink[..., None] + added, new_peak, total * shrink + jnp.sum(weights, axis=-1)

    def one_query_tile(tile):
        query, q_seg, q_kinds, q_index = tile
        shape = query.shape[:-1]
        start = (
            jnp.zeros((*shape, v.shape[-1]), jnp.float32),
            jnp.full(shape, jnp.finfo(jnp.float32).min),
            jnp.zeros(shape, jnp.float32),
        )

        @jax.checkpoint
        def step(carry, key_tile):
            *key_tile, kind = key_tile
            mixed, full = (partial(add_tile, key_tile=key_tile, query=query, q_seg=q_seg, q_index=q_index, masked=m) for m in (True, False))
            return jax.lax.switch(kind, [lambda c: c, mixed, full], carry), None

        (out, _, total), _ = jax.lax.scan(step, start, (k_tiles, v_tiles, kv_segments, jnp.arange(k_tiles.shape[0]), q_kinds))
        return out / jnp.where(total > 0, total, 1.0)[..., None]  # float32: XLA on CPU writes a 16-bit tile by converting all of them

    tiles = jax.lax.map(one_query_tile, (q_tiles, q_segments, kinds, jnp.arange(q_tiles.shape[0])))  # (nq, B, K, G, q, V)
    out = jnp.moveaxis(tiles, 0, 3).reshape(batch, heads, -1, v.shape[-1])
    return out[:, :, :length].astype(v.dtype)
