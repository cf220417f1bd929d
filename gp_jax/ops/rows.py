"""Attention on a CPU: some queries of one group of heads at a time, with all the keys they may see.

A tile of scores is small enough for a core's cache, and there is no running maximum as in `blockwise`, which pays off where a row of
scores is short. Causal queries come in quarters, each with the keys up to its end: 5/8 of the square. Where the queries of a tile are
of one image, which keys they see is said by the product that makes the scores, not by a mask over them.

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
NOBODY = -1  # segment of rows that see nothing and that nobody sees


def rows_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """See `attention.attend`; causal needs as many queries as keys. Holds one tile of scores at a time, float32."""
    return per_device(_rows, q, k, v, q_segment, kv_segment, causal=causal)


def _rows(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """One device's share."""
    q_segment, kv_segment, length = jnp.asarray(q_segment), jnp.asarray(kv_segment), q.shape[2]
    if not causal:
        heads = q.shape[1] // k.shape[1]
        return _part(q, k, v, q_segment, kv_segment, None, TILE_BYTES // (4 * heads * k.shape[2])).astype(v.dtype)
    ends = [length * part // PARTS for part in range(PARTS + 1)]
    parts = [
        _part(q[:, :, low:high], k[:, :, :high], v[:, :, :high], q_segment[:, low:high], kv_segment[:, :high], low, CAUSAL_TILE)
        for low, high in itertools.pairwise(ends)
        if high > low
    ]
    return jnp.concatenate(parts, axis=2).astype(v.dtype)


def _part(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, first: int | None, most: int) -> Array:
    """Queries in tiles of at most `most`. first: the row of the first one, where key 0 is row 0 of a causal prompt; None: not causal.

    Returns: float32, since XLA for CPUs writes a tile of a 16-bit result by converting the whole of it, there and back.
    """
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    tiles = -(-length // max(1, most))
    tile = -(-length // tiles)
    rest = tiles * tile - length
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rest), (0, 0))).reshape(batch * groups, heads // groups, tiles, tile, width)
    q_segment = jnp.pad(q_segment, ((0, 0), (0, rest)), constant_values=NOBODY).reshape(batch, tiles, tile)
    places = None if first is None else first + jnp.arange(tiles * tile).reshape(tiles, tile)

    def one_group(group: tuple[Array, ...]) -> Array:
        queries, key, value, own, seen = group

        def one_tile(some: tuple[Array, ...]) -> Array:
            query, own, place = some
            return _tile(query[None], key[None, None], value[None, None], own, seen, place)[0]

        return jax.lax.map(one_tile, (jnp.moveaxis(queries, 1, 0), own, places))

    own, seen = (jnp.repeat(x, groups, axis=0) for x in (q_segment, kv_segment))
    out = jax.lax.map(one_group, (q, *(x.reshape(batch * groups, *x.shape[2:]) for x in (k, v)), own, seen))
    out = jnp.moveaxis(out, 1, 2)  # (B K, G, tiles, tile, V)
    return out.reshape(batch, heads, tiles * tile, -1)[:, :, :length]


def _mask(own: Array, seen: Array, place: Array | None) -> Array:
    """Who sees whom. place: rows of causal queries. Returns: (1, tile, S) bool."""
    mask = (own[:, None] == seen) & (seen > NOBODY)
    return (mask if place is None else mask & (place[:, None] >= jnp.arange(seen.size)))[None]


@jax.custom_vjp
def _tile(q: Array, k: Array, v: Array, own: Array, seen: Array, place: Array | None) -> Array:
    """`dense_attention` of one tile, q (1, G, tile, H), whose mask is said by segments, own (tile,) and seen (S,), and rows. float32."""
    return _forward(q, k, v, own, seen, place)[0]


def _forward(q: Array, k: Array, v: Array, own: Array, seen: Array, place: Array | None) -> tuple[Array, Array]:
    def masked() -> tuple[Array, Array]:
        return dense.forward(q, k, v, _mask(own, seen, place))

    def of_one_image() -> tuple[Array, Array]:
        out, log_total = dense.forward(q, k, v, None, hidden=(seen != image)[None])
        return jnp.where(own[:, None] > NOBODY, out, 0.0), log_total

    if place is not None:
        return masked()
    image = jnp.max(own)
    return jax.lax.cond(jnp.all((own == image) | (own <= NOBODY)) & (image > NOBODY) & jnp.any(seen == image), of_one_image, masked)


def _keep(*operands: Array) -> tuple[Array, tuple]:
    out, log_total = _forward(*operands)
    kept = (checkpoint_name(x, dense.NAME) for x in (out.astype(operands[2].dtype), log_total))
    return out, (*operands, *kept)


def _backward(kept: tuple, d_out: Array) -> tuple[Array, Array, Array, None, None, None]:
    q, k, v, own, seen, place, out, log_total = kept
    return *dense.backward((q, k, v, _mask(own, seen, place), out, log_total), d_out.astype(v.dtype))[:3], None, None, None


_tile.defvjp(_keep, _backward)
