"""Attention on a CPU: one tile of queries of one group of heads at a time, with all keys that they may see.

A tile of scores fits into a core's cache, and there is no running maximum as in `blockwise`, so this is faster where rows of scores are
short. Causal queries are split into quarters, each with the keys up to its end: 5/8 of the full square. In other cases, if all queries of a
tile are of one image, the mask is folded into the product (`dense.forward`), which saves a pass over the scores.

Letters as in `attention`: B batch, N query heads, K key-value heads, G = N / K, T queries, S keys, H head width, V value width.
"""

import itertools

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from gp_jax.ops import dense
from gp_jax.ops.kernels import per_device

PARTS = 4
CAUSAL_TILE = 272  # queries
TILE_BYTES = 8 * 2**20  # of float32 scores


def rows_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """See `attention.attend`; causal needs as many queries as keys. Holds one tile of scores at a time, float32."""
    return per_device(_rows, q, k, v, q_segment, kv_segment, causal=causal)


def _rows(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """One device's share."""
    q_segment, kv_segment, length = jnp.asarray(q_segment), jnp.asarray(kv_segment), q.shape[2]
    if not causal:
        heads = q.shape[1] // k.shape[1]
        return _part(q, k, v, q_segment, kv_segment, None, TILE_BYTES // (4 * heads * k.shape[2]))
    ends = [length * part // PARTS for part in range(PARTS + 1)]
    parts = [
        _part(q[:, :, low:high], k[:, :, :high], v[:, :, :high], q_segment[:, low:high], kv_segment[:, :high], low, CAUSAL_TILE)
        for low, high in itertools.pairwise(ends)
        if high > low
    ]
    return jnp.concatenate(parts, axis=2)


def _part(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, first: int | None, most: int) -> Array:
    """Queries in tiles of at most `most`. first: row of the first query in a causal prompt, key 0 being row 0; None: not causal."""
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    tiles = -(-length // max(1, most))
    tile = -(-length // tiles)
    rest = tiles * tile - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rest), (0, 0))).reshape(batch * groups, heads // groups, tiles, tile, width)
    q_segment = jnp.pad(q_segment, ((0, 0), (0, rest)), constant_values=-1).reshape(batch, tiles, tile)
    own, seen = (jnp.repeat(x, groups, axis=0) for x in (q_segment, kv_segment))
    places = None if first is None else first + jnp.arange(tiles * tile).reshape(tiles, tile)
    out = _groups(jnp.moveaxis(q, 2, 1), *(x.reshape(batch * groups, *x.shape[2:]) for x in (k, v)), own, seen, places)
    return jnp.moveaxis(out, 1, 2).reshape(batch, heads, tiles * tile, -1)[:, :, :length]


@jax.custom_vjp
def _groups(q: Array, k: Array, v: Array, own: Array, seen: Array, places: Array | None) -> Array:
    """P = B K groups of heads, one after the other, tile by tile. The mask is given by the segments `own` of queries and `seen` of keys,
    and by the rows (`places`) of causal queries.

    Args: q: (P, tiles, G, tile, H); k: (P, S, H); v: (P, S, V); own: (P, tiles, tile), seen: (P, S), places: (tiles, tile).
    Returns: (P, tiles, G, tile, V), dtype of v.
    """
    return _forward(q, k, v, own, seen, places)[0]


def _forward(q: Array, k: Array, v: Array, own: Array, seen: Array, places: Array | None) -> tuple[Array, Array]:
    """Returns: the output, and see `dense.forward`, (P, tiles, G, tile) float32."""

    def group(parts: tuple[Array, ...]) -> tuple[Array, Array]:
        queries, key, value, segments, seen = parts

        def tile(parts: tuple[Array, ...]) -> tuple[Array, Array]:
            query, segment, place = parts
            one, keys, values = (_floats(x, as_in.dtype)[None] for x, as_in in ((query, q), (key[None], k), (value[None], v)))
            out, log_total = _tile(one, keys, values, segment, seen, place)
            return _bits(out[0].astype(v.dtype)), log_total[0]

        return jax.lax.map(tile, (queries, segments, places))

    out, log_total = jax.lax.map(group, (*map(_bits, (q, k, v)), own, seen))
    return _floats(out, v.dtype), log_total


def _bits(x: Array) -> Array:
    """16-bit floats as integers. To read or write a slice of 16-bit floats, XLA on CPU would convert the whole array to float32."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def _floats(x: Array, dtype: jnp.dtype) -> Array:
    """The inverse of `_bits`."""
    return jax.lax.bitcast_convert_type(x, dtype)


def _mask(own: Array, seen: Array, place: Array | None) -> Array:
    """The mask of a tile: own (tile,), seen (S,), place (tile,). Returns: (tile, S) bool."""
    mask = (own[:, None] == seen) & (seen >= 0)
    return mask if place is None else mask & (place[:, None] >= jnp.arange(seen.size))


def _tile(q: Array, k: Array, v: Array, own: Array, seen: Array, place: Array | None) -> tuple[Array, Array]:
    """`dense.forward` of one tile, q (1, G, tile, H)."""

    def masked() -> tuple[Array, Array]:
        return dense.forward(q, k, v, _mask(own, seen, place)[None])

    def of_one_image() -> tuple[Array, Array]:
        out, log_total = dense.forward(q, k, v, None, hidden=(seen != image)[None])
        return jnp.where(own[:, None] >= 0, out, 0.0), log_total

    if place is not None:
        return masked()
    image = jnp.max(own)
    return jax.lax.cond(jnp.all((own == image) | (own < 0)) & (image >= 0) & jnp.any(seen == image), of_one_image, masked)


def _keep(*operands: Array) -> tuple[Array, tuple]:
    out, log_total = (checkpoint_name(x, dense.NAME) for x in _forward(*operands))
    return out, (*operands, out, log_total)


def _backward(kept: tuple, d_out: Array) -> tuple[Array, Array, Array, None, None, None]:
    q, k, v, own, seen, places, out, log_total = kept

    def group(parts: tuple[Array, ...]) -> tuple[Array, ...]:
        key, value, seen, *by_tile = parts

        def tile(totals: tuple[Array, Array], parts: tuple[Array, ...]) -> tuple[tuple[Array, Array], Array]:
            query, segment, out, log_total, d_out, place = parts
            operands = (x[None] for x in (query, key[None], value[None], _mask(segment, seen, place), out, log_total))
            d_query, d_key, d_value = dense.backward(tuple(operands), d_out[None])
            return (totals[0] + d_key[0, 0], totals[1] + d_value[0, 0]), d_query[0]

        zeros = jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32)
        totals, d_queries = jax.lax.scan(tile, zeros, (*by_tile, places))
        return d_queries, *totals

    found = jax.lax.map(group, (k, v, seen, q, own, out, log_total, d_out))
    return *(d.astype(x.dtype) for d, x in zip(found, (q, k, v), strict=True)), None, None, None


_groups.defvjp(_keep, _backward)
