"""The attention that every key receives, computed in slices of queries so that not all scores are in memory at once."""

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import Array

from gp_jax.ops.attention import SCORE_BYTES, visible


def attention_received(q: Array, k: Array, segment: Array) -> Array:
    """softmax(q k^T / sqrt(H)) inside segments, mean over heads, summed over queries.

    Args: q, k: (B, N, S, H); segment: (B, S) int, negative means padding.
    Returns: (B, S) float32, zeros for padding.
    """
    batch, heads, length, width = q.shape
    rows = max(1, min(length, SCORE_BYTES // (batch * heads * length * 4)))
    rows = next(n for n in range(rows, 0, -1) if length % n == 0)
    exact = "highest" if q.dtype == jnp.float32 else None
    slices = rearrange(q, "b n (c r) h -> c b n r h", r=rows), rearrange(segment, "b (c r) -> c b r", r=rows)

    def add(total: Array, part: tuple[Array, Array]) -> tuple[Array, None]:
        queries, own = part
        logits = jnp.einsum("bnrh,bnsh->bnrs", queries, k, preferred_element_type=jnp.float32, precision=exact) * width**-0.5
        mask = visible(own, segment, causal=False)[:, None]
        weights = jnp.where(mask, jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1), 0)
        return total + jnp.sum(jnp.mean(weights, axis=1), axis=1), None

    return jax.lax.scan(add, jnp.zeros((batch, length), jnp.float32), slices)[0]
