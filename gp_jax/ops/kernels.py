"""Adapters to attention kernels of libraries: Pallas splash attention on TPU, cuDNN flash attention on GPU."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask
from jax.sharding import PartitionSpec

LANES = 128  # width of a TPU vector register; lengths and head widths are padded to multiples of it
TILES = (512, 256, 128)


def _pad(x: Array, axis: int, fill: int = 0) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, -x.shape[axis] % LANES)
    return jnp.pad(x, pad, constant_values=fill)


def _splash(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool, interpret: bool) -> Array:
    """Splash attention on one device's share of the batch and the heads."""
    batch, heads, length, width = q.shape
    kv_heads, value_width = k.shape[1], v.shape[-1]
    q = _pad(_pad(q * jnp.asarray(width**-0.5, q.dtype), 2), 3).reshape(batch, kv_heads, heads // kv_heads, -1, width + -width % LANES)
    k, v = (_pad(_pad(x, 2), 3) for x in (k, v))
    q_segment, kv_segment = _pad(q_segment, 1, -1), _pad(kv_segment, 1, -1)
    shape = (q.shape[3], k.shape[2])
    mask = splash_mask.CausalMask(shape) if causal else splash_mask.FullMask(shape)
    q_tile, kv_tile = (next(t for t in TILES if size % t == 0) for size in shape)
    kernel = splash.make_splash_mqa_single_device(
        mask=splash_mask.MultiHeadMask([mask] * (heads // kv_heads)),
        block_sizes=splash.BlockSizes(
            block_q=q_tile,
            block_kv=kv_tile,
            block_kv_compute=kv_tile,
            block_q_dkv=q_tile,
            block_kv_dkv=kv_tile,
            block_kv_dkv_compute=kv_tile,
            block_q_dq=q_tile,
            block_kv_dq=kv_tile,
        ),
        interpret=interpret,
    )

    def one_sample(q, k, v, q_segment, kv_segment):
        segments = splash.SegmentIds(q=q_segment, kv=kv_segment)
        return jax.vmap(lambda q, k, v: kernel(q, k, v, segments))(q, k, v)

    out = jax.vmap(one_sample)(q, k, v, q_segment, kv_segment)
    out = out.reshape(batch, heads, shape[0], -1)[:, :, :length, :value_width]
    return jnp.where((q_segment[:, :length] >= 0)[:, None, :, None], out, 0)


def per_device(
    kernel: Callable,
    q: Array,
    k: Array,
    v: Array,
    q_segment: Array,
    kv_segment: Array,
    *,
    causal: bool,
    interpret: bool | None = None,
    windows: bool = False,
) -> Array:
    """Under a mesh (`jax.set_mesh`) each device runs the kernel on its own samples and heads. XLA cannot partition a Pallas call, and for
    a loop over slices of the batch it would gather the whole batch. windows: the samples are attention windows, which lie on the devices
    as `models.vision.spread_windows` splits them, with all their heads, where they divide."""
    options = {"causal": causal} | ({} if interpret is None else {"interpret": interpret})
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, q_segment, kv_segment, **options)
    names = tuple(a for a in ("data", "fsdp", "tensor") if a in mesh.axis_names)
    if windows and q.shape[0] % math.prod(mesh.shape[a] for a in names) == 0:
        spec = PartitionSpec(names)
        return jax.shard_map(partial(kernel, **options), in_specs=spec, out_specs=spec, check_vma=False)(q, k, v, q_segment, kv_segment)
    tensor = mesh.shape.get("tensor", 1)
    if k.shape[1] % tensor and tensor % k.shape[1] == 0 and q.shape[1] % tensor == 0:
        # More devices than key-value heads: each device gets a share of a head's queries and a copy of its keys and values.
        k, v = (jnp.repeat(x, tensor // k.shape[1], axis=1) for x in (k, v))
    axes = tuple(a for a in names if a != "tensor")
    samples = axes if q.shape[0] % math.prod(mesh.shape[a] for a in axes) == 0 else None
    heads = "tensor" if "tensor" in mesh.axis_names and k.shape[1] % tensor == 0 else None
    wide, flat = PartitionSpec(samples, heads), PartitionSpec(samples)
    local = partial(kernel, **options)
    return jax.shard_map(local, in_specs=(wide, wide, wide, flat, flat), out_specs=wide, check_vma=False)(q, k, v, q_segment, kv_segment)


def splash_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool, interpret: bool = False) -> Array:
    """Pallas splash attention. See `attention.attend`; every valid query must see a key, e.g. its own."""
    return per_device(_splash, q, k, v, q_segment, kv_segment, causal=causal, interpret=interpret)


def cudnn_attention(q: Array, k: Array, v: Array, q_segment: Array, kv_segment: Array, *, causal: bool) -> Array:
    """cuDNN flash attention for rows that are one valid prefix each (`prefix` of `attention.attend`), bf16 or f16."""
    lengths = [jnp.sum(segment >= 0, axis=-1, dtype=jnp.int32) for segment in (q_segment, kv_segment)]
    out = jax.nn.dot_product_attention(
        *(jnp.swapaxes(x, 1, 2) for x in (q, k, v)),
        is_causal=causal,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        implementation="cudnn",
    )
    return jnp.where((q_segment >= 0)[:, None, :, None], jnp.swapaxes(out, 1, 2), 0)
