"""Linear, norms, gated MLP and activations as flax.nnx modules.

Weights keep Hugging Face's layout, (out, in): a checkpoint is loaded without a transposed copy, and on CPU the product is at
least as fast. Products accumulate in float32; norms compute in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gp_jax.errors import GlimpseError
from gp_jax.ops import dense
from gp_jax.ops.target import targets

WIDE = 3  # a single-row product puts a weight with in / out > 3 on the left

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def activation(name: str) -> Callable[[Array], Array]:
    """The activation that Hugging Face calls `name`. Raises: GlimpseError on an unknown one."""
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise GlimpseError(f"activation '{name}' is not supported (supported: {', '.join(ACTIVATIONS)})")
    return ACTIVATIONS[name]


def einsum(form: str, a: Array, b: Array, beside: jnp.dtype | None = None) -> Array:
    """A product accumulated and returned in float32. Float32 weights (`b`) use full-precision products, on TPU too.

    beside: type of the base model that computed `a`. If it has 16 bits, a TPU uses three bfloat16 passes instead of six: that keeps 16 bits
    of every factor, and compiles in half the time.
    """

    def exact(precision: str | None) -> Callable[[Array, Array], Array]:
        return partial(jnp.einsum, form, preferred_element_type=jnp.float32, precision=precision)

    if b.dtype != jnp.float32:
        return exact(None)(a, b)
    if beside is None or jnp.dtype(beside).itemsize > 2 or {"tpu", "xla"}.isdisjoint(targets()):  # xla: any platform
        return exact("highest")(a, b)
    return exact("high")(a, b) if targets() == ("tpu",) else jax.lax.platform_dependent(a, b, tpu=exact("high"), default=exact("highest"))


def xavier_uniform(key: Array, shape: tuple[int, int], dtype: jnp.dtype) -> Array:
    """Uniform in +-sqrt(6 / (in + out)), as the released code initialises its projections."""
    return nnx.initializers.xavier_uniform(in_axis=1, out_axis=0)(key, shape, dtype)


def product(x: Array, weight: Array, beside: jnp.dtype | None = None) -> Array:
    """x W^T with W (out, in), accumulated and returned in float32. beside: see `einsum`.

    On CPU a single row in bfloat16, as in decoding, is computed as two equal rows: XLA compiles a matrix-vector product in that type to a
    plain loop, ten times slower than a product of two rows. A weight with many more inputs than outputs is faster as the left factor.
    Programs that cannot run on a CPU keep the single row.
    """
    lone = weight.dtype == jnp.bfloat16 and x.size == x.shape[-1] and not {"cpu", "xla"}.isdisjoint(targets())  # xla: any platform
    if not lone:
        return einsum("...i,oi->...o", x, weight, beside)
    rows = jax.lax.optimization_barrier(jnp.broadcast_to(x.reshape(1, -1), (2, x.shape[-1])))
    if weight.shape[1] > WIDE * weight.shape[0]:
        y = jax.lax.dot_general(weight, rows, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)[:, 0]
    else:
        y = einsum("ri,oi->ro", rows, weight)[0]
    return y.reshape(*x.shape[:-1], -1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def widen(x: Array, weight: Array, beside: jnp.dtype | None) -> Array:
    """`product` for a weight with far fewer inputs than outputs. On CPU the left factor of a gradient is laid out anew, transposed: here
    that is the narrow x; in the gradient that JAX would derive it is the wide one of the output, which takes a third more of a step."""
    return product(x, weight, beside)


def _keep_factors(x: Array, weight: Array, beside: jnp.dtype | None) -> tuple[Array, tuple[Array, Array]]:
    return product(x, weight, beside), (x, weight)


def _widen_back(beside: jnp.dtype | None, kept: tuple[Array, Array], d_y: Array) -> tuple[Array, Array]:
    x, weight = kept
    d_weight = einsum("ri,ro->io", x.reshape(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]), beside)
    return einsum("...o,oi->...i", d_y, weight, beside).astype(x.dtype), d_weight.T.astype(weight.dtype)


widen.defvjp(_keep_factors, _widen_back)


def lookup(table: Array, ids: Array) -> Array:
    """Rows of a table: (V, D) and (...) int -> (..., D)."""
    return _lookup_16(table, ids) if table.dtype.itemsize == 2 else jnp.take(table, ids, axis=0)


@jax.custom_vjp
def _lookup_16(table: Array, ids: Array) -> Array:
    """For 16-bit floats. On CPU they are read as integers: otherwise XLA would convert the whole table to float32 to read a row."""

    def bits(table: Array, ids: Array) -> Array:
        rows = jnp.take(jax.lax.bitcast_convert_type(table, jnp.uint16), ids, axis=0)
        return jax.lax.bitcast_convert_type(rows, table.dtype)

    return jax.lax.platform_dependent(table, ids, cpu=bits, default=partial(jnp.take, axis=0))


def _keep_ids(table: Array, ids: Array) -> tuple[Array, tuple]:
    return _lookup_16(table, ids), (ids, table.shape)


def _add_rows(kept: tuple, d_rows: Array) -> tuple[Array, None]:
    ids, shape = kept
    return jnp.zeros(shape, d_rows.dtype).at[ids].add(d_rows), None


_lookup_16.defvjp(_keep_ids, _add_rows)


class LowRank(nnx.Module):
    """LoRA (arXiv 2106.09685): scale * B A dropout(x), in float32 beside weights of any type. A is (rank, in) and B (out, rank), as in
    PEFT."""

    def __init__(self, size_in: int, size_out: int, rank: int, scale: float, dropout: float, *, rngs: nnx.Rngs):
        bound = size_in**-0.5  # Kaiming's uniform distribution with a = sqrt(5), PEFT's choice
        self.lora_A = nnx.Param(jax.random.uniform(rngs.params(), (rank, size_in), jnp.float32, -bound, bound))
        self.lora_B = nnx.Param(jnp.zeros((size_out, rank), jnp.float32))
        self.scale, self.dropout = scale, dropout
        self.noise: Array | None = nnx.data(None)  # () PRNG key while dropout is on

    def __call__(self, x: Array) -> Array:
        """(..., in) -> (..., out) float32."""
        beside, x = x.dtype, x.astype(jnp.float32)
        if self.noise is not None and self.dropout > 0:
            kept = jax.random.bernoulli(self.noise, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), 0)
        return self.scale * widen(product(x, self.lora_A[...], beside), self.lora_B[...], beside)


class Linear(nnx.Module):
    """y = x W^T + b with W (out, in), accumulated in float32, returned in x's dtype; with an adapter, y + adapter(x)."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
        init: Callable | None = None,
        beside: jnp.dtype | None = None,
    ):
        init, self.beside = init or nnx.initializers.normal(0.02), beside
        self.weight = nnx.Param(init(rngs.params(), (size_out, size_in), dtype))
        self.bias = nnx.Param(jnp.zeros((size_out,), dtype)) if bias else None
        self.adapter: LowRank | None = None

    def __call__(self, x: Array) -> Array:
        return self.wide(x).astype(x.dtype)

    def wide(self, x: Array) -> Array:
        """The same, left in float32."""
        y = product(x, self.weight[...], self.beside)
        y = y if self.bias is None else y + self.bias[...].astype(jnp.float32)
        return y if self.adapter is None else y + self.adapter(x)


class RMSNorm(nnx.Module):
    """x / rms(x) * weight (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float, *, dtype: jnp.dtype):
        self.weight, self.eps = nnx.Param(jnp.ones((size,), dtype)), eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (self.weight[...].astype(jnp.float32) * y).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / std * weight + bias, eps 1e-5 as in torch.nn.LayerNorm."""

    def __init__(self, size: int, *, dtype: jnp.dtype, eps: float = 1e-5):
        self.weight, self.bias, self.eps = nnx.Param(jnp.ones((size,), dtype)), nnx.Param(jnp.zeros((size,), dtype)), eps

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.weight[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GatedMLP(nnx.Module):
    """down(act(gate x) * up x). The values between the products are computed in float32 and rounded once."""

    def __init__(self, size: int, inner: int, act: str, **options: Any):
        """options: of `Linear`."""
        self.gate_proj = Linear(size, inner, **options)
        self.up_proj = Linear(size, inner, **options)
        self.down_proj = Linear(inner, size, **options)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        return self.down_proj((self.act(self.gate_proj.wide(x)) * self.up_proj.wide(x)).astype(x.dtype))


def rematerialised(block: Callable) -> Callable:
    """A block whose backward pass keeps the outputs of matrix products and of attention and recomputes the rest, attention scores included.
    That saves most of the memory (scores are quadratic in the length) and costs little time (most time is in the products)."""
    rules = jax.checkpoint_policies
    policy = rules.save_from_both_policies(rules.dots_with_no_batch_dims_saveable, rules.save_only_these_names(dense.NAME))
    return jax.checkpoint(block, policy=policy)


def at_once(function: Callable, *args: Any, donate: tuple[int, ...] = (), **static: Any) -> Any:
    """The default way for a stage to call a function: directly. Jitted, the whole stage is then one program with its layers unrolled, as in
    training. `shared_programs.Parts` may be passed instead: it makes a separate program of the function. A part of the model, if there is
    one, is the first of `args`; the program may overwrite the other arguments that `donate` numbers."""
    return function(*args, **static)
