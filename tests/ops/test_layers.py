"""Products, lookups and slices of rows: what they promise on this machine, and what they ask of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gp_jax.ops.layers import einsum, lookup, product
from gp_jax.ops.slices import in_slices
from gp_jax.ops.target import targeting


def traced(weight: jnp.dtype, beside: jnp.dtype | None, *platforms: str) -> str:
    with targeting(*platforms):
        return str(jax.make_jaxpr(lambda x, w: einsum("i,oi->o", x, w, beside))(jnp.ones(4), jnp.ones((3, 4), weight)))


def test_float32_weights_have_float32_products():
    for platforms in (("cpu",), ("tpu",), ("gpu",), ("cpu", "tpu", "cuda"), ("xla",)):
        for beside in (None, jnp.float32):
            assert "HIGHEST" in (found := traced(jnp.float32, beside, *platforms)) and "Precision.HIGH)" not in found
        assert "HIGH" not in traced(jnp.bfloat16, jnp.bfloat16, *platforms)


def test_three_passes_beside_16_bits_on_a_tpu_alone():
    """The engine, whose programs are for one platform, and an exported function, whose program is for several, ask for the same."""
    found = {platform: traced(jnp.float32, jnp.bfloat16, platform) for platform in ("cpu", "gpu", "tpu")}
    assert "Precision.HIGH)" in found["tpu"] and "HIGHEST" not in found["tpu"]
    assert all("HIGHEST" in found[platform] and "Precision.HIGH)" not in found[platform] for platform in ("cpu", "gpu"))
    with targeting("cpu", "tpu", "cuda"):
        both = jax.jit(lambda x, w: einsum("i,oi->o", x, w, jnp.bfloat16)).trace(jnp.ones(4), jnp.ones((3, 4)))
    for platform, text in (("tpu", "HIGH,"), ("cpu", "HIGHEST,"), ("cuda", "HIGHEST,")):
        assert f"precision = [{text}" in both.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("shape", [(7,), (1, 7), (1, 1, 7), (2, 1, 7)])
@pytest.mark.parametrize("out", [2, 5, 40], ids=["wide", "square", "high"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_of_a_lone_row(shape, out, dtype):
    x, weight = (jax.random.normal(jax.random.key(n), s, dtype) for n, s in enumerate((shape, (out, 7))))
    expected = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
    found = jax.jit(product)(x, weight)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_rows_of_a_table_and_their_gradient(dtype):
    table, ids = jax.random.normal(jax.random.key(0), (7, 5), dtype), jnp.array([[1, 1, 6], [0, 1, -1]])
    weights = jnp.arange(30.0).reshape(2, 3, 5)
    np.testing.assert_array_equal(jax.jit(lookup)(table, ids), table[ids])
    ours, plain = (jax.grad(lambda t, take=take: jnp.sum(take(t, ids) * weights))(table) for take in (lookup, lambda t, ids: t[ids]))
    np.testing.assert_array_equal(ours, plain)
    assert ours.dtype == dtype and np.isnan(lookup(table, jnp.array([7])).astype(jnp.float32)).all(), "past the end: seen at once"


@pytest.mark.parametrize("count", [1, 7, 8, 17, 47])
@pytest.mark.parametrize("least", [1, 2, 3, 8, 9])
def test_slices_give_what_all_at_once_gives(count, least):
    rows = (jnp.arange(count * 3.0).reshape(count, 3), jnp.arange(count))
    sizes = []

    def function(x, number):
        sizes.append(len(x))
        return jnp.cumsum(x, axis=1) * number[:, None]

    np.testing.assert_array_equal(in_slices(function, rows, least), jnp.cumsum(rows[0], axis=1) * rows[1][:, None])
    assert max(sizes) <= -(-count // min(least, count)), "at least so many"
