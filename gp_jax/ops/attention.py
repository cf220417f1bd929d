"""`attend`, the entry point for attention. It chooses among several kernels, all equal to `einsum_attention` up to rounding.

All kernels use the same mask: query t sees key s iff both have the same segment number, that number is not negative, and, if
causal, s <= t. A query that sees no key gets zeros, never NaN.

Letters: B batch, N query heads, K key-value heads, G = N / K, T queries, S keys, H head width, V value width.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import mlir

from gp_jax.errors import GlimpseError
from gp_jax.ops.blockwise import blockwise_attention
from gp_jax.ops.dense import dense_attention
from gp_jax.ops.kernels import cudnn_attention, per_device, splash_attention
from gp_jax.ops.rows import rows_attention
from gp_jax.ops.slices import in_slices
from gp_jax.ops.target import PLATFORMS, targets

SCORE_BYTES = 64 * 2**20  # the most attention scores that einsum may hold; larger problems go to a tiled kernel
CPU_SCORE_BYTES = 8 * 2**20  # the same on a CPU: scores that exceed its caches are read and written several times
ROWS = range(512, 4097)  # lengths for which `rows` is the fastest kernel on a CPU
SHORT = 128  # up to this number of queries and keys the scores of a sample are one tile, and only the batch is split


def visible(q_segment: Array, kv_segment: Array, causal: bool) -> Array:
    """The rule above as a mask. Returns: (B, T, S) bool."""
    mask = (q_segment[:, :, None] == kv_segment[:, None, :]) & (kv_segment >= 0)[:, None, :]
    if causal:
        mask &= jnp.arange(q_segment.shape[1])[:, None] >= jnp.arange(kv_segment.shape[1])[None, :]
    return mask


def einsum_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """The plain formula; the reference for every other kernel. Holds all scores, (B, N, T, S) float32."""
    return dense_attention(q, k, v, visible(q_segment, kv_segment, causal))


def split_batch(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """einsum_attention over slices of the batch, for many short rows (attention windows)."""
    return per_device(_split_batch, q, k, v, q_segment, kv_segment, causal=causal, windows=not causal)


def _split_batch(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """One device's share."""
    least = -(-q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * 4 // SCORE_BYTES)
    return in_slices(partial(einsum_attention, causal=causal), (q, k, v, q_segment, kv_segment), least)


KERNELS: dict[str, Callable[..., Array]] = {
    "einsum": einsum_attention,
    "split_batch": split_batch,
    "blockwise": blockwise_attention,
    "rows": rows_attention,
    "splash": splash_attention,
    "splash_interpret": partial(splash_attention, interpret=True),
    "cudnn": cudnn_attention,
}


def choose(q: Array, k: Array, prefix: bool, causal: bool = False, backend: str | None = None) -> str:
    """The kernel for these operands. backend: the program's; None: the (first) platform that programs are traced for."""
    batch, heads, length, _ = q.shape
    backend = backend or targets()[0]
    score_bytes = batch * heads * length * k.shape[2] * 4
    if max(length, k.shape[2]) <= SHORT:
        return "einsum" if score_bytes <= SCORE_BYTES else "split_batch"
    if backend == "tpu" and length >= SHORT:
        return "splash"
    if backend == "gpu" and prefix and length >= SHORT and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] == k.shape[-1] <= 128:
        return "cudnn"
    if backend != "cpu":
        return "einsum" if score_bytes <= SCORE_BYTES else "blockwise"
    if causal and length == k.shape[2] and length in ROWS:
        return "rows"
    if score_bytes <= CPU_SCORE_BYTES or max(length, k.shape[2]) < ROWS.start:  # blockwise would hold as much in its one tile
        return "einsum"
    return "rows" if not causal and length in ROWS and k.shape[2] in ROWS else "blockwise"


# Chooses the kernel when a program is lowered, not when it is traced. `jax.lax.platform_dependent` would lower every branch for every
# platform of a `jax.export`, which fails for a Pallas kernel; the lowering rules of a primitive are used for their own platform only.
platform_attention = Primitive("platform_attention")


@platform_attention.def_abstract_eval
def _shape(q, k, v, q_segment, kv_segment, **_):
    return jax.core.ShapedArray((*q.shape[:3], v.shape[3]), v.dtype)


@platform_attention.def_impl
def _run(*operands, **options):
    return jax.jit(partial(platform_attention.bind, **options))(*operands)


def _lowered(platform: str | None):
    def kernel(*operands, names, causal):
        return KERNELS[dict(names)[platform or "cuda"]](*operands, causal=causal)

    return mlir.lower_fun(kernel, multiple_results=False)


for _platform in (None, *PLATFORMS):  # None: any other, e.g. rocm
    mlir.register_lowering(platform_attention, _lowered(_platform), platform=_platform)


def attend(
    q: Array,
    k: Array,
    v: Array,
    q_segment: Array,
    kv_segment: Array,
    *,
    causal: bool = False,
    prefix: bool = False,
    implementation: str = "auto",
) -> Array:
    """softmax(q k^T / sqrt(H)) v with grouped heads and segments.

    Args:
        q: (B, N, T, H); k: (B, K, S, H); v: (B, K, S, V), N a multiple of K.
        q_segment: (B, T) int, kv_segment: (B, S) int; negative means padding.
        causal: query t sees keys 0..t only.
        prefix: the caller guarantees that segments are one valid prefix per row (0, then padding), which cuDNN needs.
        implementation: a key of KERNELS, or "auto" to choose by backend and size. For programs that are lowered for several
            platforms the choice is made per platform, at lowering (without cuDNN, whose support can be queried on a GPU only).
    Returns: (B, N, T, V), dtype of v.
    Raises: GlimpseError on an unknown implementation.
    """
    if implementation == "auto" and len(targets()) > 1:
        names = tuple((platform, choose(q, k, prefix, causal, platform)) for platform in PLATFORMS)
        if len({name for _, name in names}) > 1:
            return platform_attention.bind(q, k, v, q_segment, kv_segment, names=names, causal=causal)
        implementation = names[0][1]
    elif implementation == "auto":
        implementation = choose(q, k, prefix, causal)
    if implementation not in KERNELS:
        raise GlimpseError(f"attention implementation '{implementation}' is unknown (known: auto, {', '.join(KERNELS)})")
    if implementation == "rows" and causal and q.shape[2] != k.shape[2]:
        raise GlimpseError("attention implementation 'rows' is, where causal, for attention among the same rows")
    if implementation == "cudnn" and not prefix:
        raise GlimpseError("attention implementation 'cudnn' needs rows that are one valid prefix each (prefix=True)")
    return KERNELS[implementation](q, k, v, q_segment, kv_segment, causal=causal)
