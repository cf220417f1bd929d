"""Attention with all its scores, under any mask, and its own backward pass.

The backward pass recomputes the scores, once as queries x keys and once as keys x queries: two more products with a short inner axis, but
no score matrix is kept or transposed. On CPU the transposes of automatic differentiation would take longer than all products together.

Letters: B batch, N query heads, K key-value heads, G = N / K, T queries, S keys, H head width, V value width.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

NAME = "attention"  # of the values that rematerialised blocks keep: they are small, and save recomputing the scores
LOWEST = float(jnp.finfo(jnp.float32).min)
HIDDEN = -1e30  # the logit of a hidden key; becomes -inf in float16


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Batched (leading axis) matrix product over one axis of each, accumulated in float32; the rows are a's, the columns b's.

    Not an einsum: that may swap its operands and transpose the result, which for scores takes longer than the product. Float32 operands use
    full-precision products, on TPU too.
    """
    dims = (((contract[0],), (contract[1],)), ((0,), (0,)))
    exact = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=exact, preferred_element_type=jnp.float32)


def _rows(x: Array, groups: int) -> Array:
    """(B, N, T, ...) -> (B * K, G * T, ...): the queries that share a key-value head are rows of one matrix."""
    batch, heads, length = x.shape[:3]
    return x.reshape(batch * groups, heads // groups * length, *x.shape[3:])


@jax.custom_vjp
def dense_attention(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """softmax(q k^T / sqrt(H)) v. A query that sees nothing gets zeros.

    Args: q: (B, N, T, H); k: (B, K, S, H); v: (B, K, S, V); mask: (B, T, S) bool, what a query sees.
    Returns: (B, N, T, V), dtype of v.
    """
    return forward(q, k, v, mask)[0].astype(v.dtype)


def forward(q: Array, k: Array, v: Array, mask: Array | None, hidden: Array | None = None) -> tuple[Array, Array]:
    """See `dense_attention`. With mask None every query sees the same keys: all except `hidden` (B, S) bool. At least one must be visible.

    Returns, float32: the output, and the logarithm of every row's sum of exponentials, (B, N, T).
    """
    (batch, heads, length, width), groups, size = q.shape, k.shape[1], v.shape[3]
    summed = mask is None and v.dtype.itemsize == 2
    if mask is None:  # the mask is folded into an extra column of the product, which saves a pass over the scores
        q = _with_column(q, 1.0)
        assert hidden is not None, "without a mask the hidden keys are named"
        k = _with_column(k, jnp.where(hidden, HIDDEN, 0.0)[:, None, :, None])
    if summed:  # a column of ones makes the product sum the weights, so no float32 weights are kept (with a mask that is slower)
        v = _with_column(v, 1.0)
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    logits = _product(_rows(q, groups), keys, (2, 2)).reshape(batch, heads, length, -1)
    if mask is None:
        peak = jnp.max(logits, axis=-1, keepdims=True)
    else:
        logits = jnp.where(mask[:, None], logits, -jnp.inf)
        peak = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), LOWEST)
    weights = jnp.exp((logits - peak) * width**-0.5)
    out = _product(_rows(weights.astype(v.dtype), groups), values, (2, 1)).reshape(batch, heads, length, -1)
    out, total = (out[..., :size], out[..., size:]) if summed else (out, jnp.sum(weights, axis=-1, keepdims=True))
    total = jnp.where(total > 0, total, 1.0)
    out = out / total  # the output is normalised: it is smaller than the weights
    return out, (peak * width**-0.5 + jnp.log(total))[..., 0]


def _with_column(x: Array, value: Array | float) -> Array:
    """(B, N, T, H) -> (B, N, T, H + 1)."""
    return jnp.concatenate([x, jnp.broadcast_to(value, (*x.shape[:3], 1)).astype(x.dtype)], axis=-1)


def _keep(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple]:
    out, log_total = forward(q, k, v, mask)
    out, log_total = (checkpoint_name(x, NAME) for x in (out.astype(v.dtype), log_total))
    return out, (q, k, v, mask, out, log_total)


def backward(kept: tuple, d_out: Array) -> tuple[Array, Array, Array]:
    """kept: q, k, v, mask and what `forward` returned, the output in v's dtype. Returns: gradients of q, k and v, float32."""
    # The barrier delays the recomputation until the gradient is there; otherwise XLA may schedule it early, for all layers at once.
    (q, k, v, mask, out, log_total), d_out = jax.lax.optimization_barrier((kept, d_out))
    (batch, heads, length, width), groups = q.shape, k.shape[1]
    scale = width**-0.5
    lean = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    rows, d_rows = _rows(q, groups), _rows(d_out, groups)
    keys, values = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    by_query, by_key = (batch, groups, heads // groups, length, k.shape[2]), (batch, groups, k.shape[2], heads // groups, length)

    p = _product(rows, keys, (2, 2)).reshape(by_query) * scale - log_total.reshape(*by_query[:4], 1)
    p = jnp.where(mask[:, None, None], jnp.exp(p), 0.0)
    d_logits = p * (_product(d_rows, values, (2, 2)).reshape(by_query) - lean.reshape(*by_query[:4], 1)) * scale
    d_q = _product(d_logits.reshape(len(rows), -1, by_query[-1]).astype(q.dtype), keys, (2, 1))

    # The barrier hides from XLA that these products are transposes of the ones above: it would compute them once and transpose them.
    rows, d_rows, keys, values = jax.lax.optimization_barrier((rows, d_rows, keys, values))
    p = _product(keys, rows, (2, 2)).reshape(by_key) * scale - log_total.reshape(batch, groups, 1, *by_key[3:])
    p = jnp.where(jnp.swapaxes(mask, 1, 2)[:, None, :, None], jnp.exp(p), 0.0)
    d_v = _product(p.reshape(len(rows), by_key[2], -1).astype(v.dtype), d_rows, (2, 1))
    d_logits = p * (_product(values, d_rows, (2, 2)).reshape(by_key) - lean.reshape(batch, groups, 1, *by_key[3:])) * scale
    d_k = _product(d_logits.reshape(len(rows), by_key[2], -1).astype(k.dtype), rows, (2, 1))
    return d_q.reshape(q.shape), d_k.reshape(k.shape), d_v.reshape(v.shape)


def _backward(kept: tuple, d_out: Array) -> tuple[Array, Array, Array, None]:
    d_q, d_k, d_v = (d.astype(x.dtype) for d, x in zip(backward(kept, d_out), kept, strict=False))
    return d_q, d_k, d_v, None


dense_attention.defvjp(_keep, _backward)
