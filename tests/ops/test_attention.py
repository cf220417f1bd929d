"""Every attention kernel that runs here against the plain formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gp_jax import GlimpseError
from gp_jax.ops import rows
from gp_jax.ops.attention import KERNELS, attend, choose, einsum_attention
from gp_jax.ops.blockwise import tile_size
from gp_jax.ops.layers import rematerialised
from gp_jax.sharding import make_mesh

RUNNABLE = ["blockwise", "rows", "split_batch", "splash_interpret"]


def operands(length: int, keys: int | None = None, heads: int = 4, kv_heads: int = 2, width: int = 20, value: int = 12, batch: int = 2):
    rng, keys = np.random.default_rng(0), keys or length
    q, k, v = (
        jnp.array(rng.normal(size=(batch, n, s, w)), jnp.float32)
        for n, s, w in ((heads, length, width), (kv_heads, keys, width), (kv_heads, keys, value))
    )
    segment = np.sort(rng.integers(0, 3, (batch, length)), axis=1)
    segment[0, length - length // 5 :] = -1
    return q, k, v, jnp.array(segment)


@pytest.mark.parametrize("name", RUNNABLE)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("length", [7, 300, 1100])
def test_kernel_equals_einsum(name, causal, length):
    q, k, v, segment = operands(length)
    expected = einsum_attention(q, k, v, segment, segment, causal=causal)
    found = jax.jit(partial(attend, causal=causal, implementation=name))(q, k, v, segment, segment)
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_rows_take_other_keys_than_queries_unless_causal():
    q, k, v, segment = operands(300, keys=40)
    seen = segment[:, :280:7]
    np.testing.assert_allclose(
        attend(q, k, v, segment, seen, implementation="rows"), einsum_attention(q, k, v, segment, seen, causal=False), atol=2e-6
    )
    with pytest.raises(GlimpseError, match="'rows' is, where causal, for attention among the same rows"):
        attend(q, k, v, segment, seen, causal=True, implementation="rows")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_rows_in_tiles_of_one_image_or_several(monkeypatch, dtype, images, causal):
    """Tiles with queries of one image need no mask, those of several do, and padding may stand in both."""
    monkeypatch.setattr(rows, "TILE_BYTES", 16 * 4 * 2 * 149)  # 16 queries, of 149
    q, k, v = (x.astype(dtype) for x in operands(149)[:3])
    own = jnp.arange(149) * images // 140
    segment = jnp.stack([jnp.where(own < images, own, -1), jnp.full(149, -2)])
    seen = segment.at[0].set(jnp.where(segment[0] == 1, -2, segment[0]))  # no key is of the second image

    def result(name):
        return jax.jit(partial(attend, causal=causal, implementation=name))(q, k, v, segment, seen).astype(jnp.float32)

    def gradients(name):
        attention = rematerialised(partial(attend, causal=causal, implementation=name))
        return jax.jit(jax.grad(lambda *x: (attention(*x, segment, seen).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2)))(q, k, v)

    out, expected = result("rows"), result("einsum")
    np.testing.assert_allclose(out, expected, atol=2e-6 if dtype == jnp.float32 else 0.02)
    assert out[0].any() and (out[1] == 0).all() and (out[0][:, segment[0] == 1] == 0).all()
    for a, b in zip(gradients("rows"), gradients("einsum"), strict=True):
        away, most = np.linalg.norm((a - b).astype(np.float32)), np.linalg.norm(b.astype(np.float32))
        assert a.dtype == dtype and away < most * (1e-5 if dtype == jnp.float32 else 0.02)


def test_tiles_of_one_image_do_without_their_mask(monkeypatch):
    q, k, v, _ = operands(149)
    segment = jnp.where(jnp.arange(149) < 130, 0, -1)[None].repeat(2, 0)
    expected = attend(q, k, v, segment, segment, implementation="einsum")
    monkeypatch.setattr(rows, "_mask", lambda own, seen, place: jnp.zeros((own.size, seen.size), bool))  # whoever asks it sees nothing
    np.testing.assert_allclose(attend(q, k, v, segment, segment, implementation="rows"), expected, atol=2e-6)
    assert (attend(q, k, v, segment.at[:, 100:].set(1), segment, implementation="rows") == 0).all(), "several images ask it"


def test_16_bit_tiles_are_moved_as_they_are(monkeypatch):
    """XLA for CPUs would convert all queries, keys or outputs to float32 for every tile."""
    monkeypatch.setattr(rows, "TILE_BYTES", 16 * 4 * 2 * 150)  # 10 tiles of 15 queries, of 2 heads each
    q, k, v = (x.astype(jnp.bfloat16) for x in operands(150)[:3])
    segment = jnp.zeros((2, 150), jnp.int32)
    text = jax.jit(partial(attend, implementation="rows")).lower(q, k, v, segment, segment).compile().as_text()
    assert "u16[4,10,2,15,12]" in text
    assert not any(f"f32[4,{whole}]" in text for whole in ("10,2,15,20", "10,2,15,12", "150,20", "150,12"))


@pytest.mark.quick
@pytest.mark.parametrize("length", [3, 300, 512, 513, 1100, 1152, 5000])
def test_equal_tiles(length):
    size = tile_size(length)
    tiles = -(-length // size)
    assert size <= 512 and tiles == -(-length // 512) and tiles * size - length < 64 * tiles


@pytest.mark.quick
def test_einsum_is_the_formula():
    q, k, v, segment = operands(9)
    out = np.asarray(einsum_attention(q, k, v, segment, segment, causal=True))
    for b in range(2):
        for n in range(4):
            for t in range(9):
                seen = [s for s in range(t + 1) if segment[b, s] == segment[b, t] >= 0]
                if not seen:
                    np.testing.assert_array_equal(out[b, n, t], 0)
                    continue
                scores = np.array([float(q[b, n, t] @ k[b, n // 2, s]) / 20**0.5 for s in seen])
                weights = np.exp(scores - scores.max())
                expected = sum(w * np.asarray(v[b, n // 2, s]) for w, s in zip(weights / weights.sum(), seen, strict=True))
                np.testing.assert_allclose(out[b, n, t], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["einsum", *RUNNABLE])
def test_fully_masked_rows_are_zero(name):
    q, k, v, _ = operands(256)
    segment = jnp.full((2, 256), -1)
    assert (attend(q, k, v, segment, segment, causal=False, implementation=name) == 0).all()


@pytest.mark.parametrize("name", ["blockwise", "rows"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_gradients(causal, name):
    q, k, v, segment = operands(600)

    def gradients(name):
        loss = lambda *x: (attend(*x, segment, segment, causal=causal, implementation=name) ** 2).sum()  # noqa: E731
        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    for a, b in zip(gradients(name), gradients("einsum"), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        assert jnp.isfinite(a).all()


def test_blockwise_memory_is_linear():
    """Temporary memory of the compiled program at 16 times the length: about 16 times, where scores would take 256 times."""

    def temporary(length: int) -> int:
        x = jax.ShapeDtypeStruct((1, 2, length, 16), jnp.float32)
        segment = jax.ShapeDtypeStruct((1, length), jnp.int32)
        call = jax.jit(lambda q, k, v, s: attend(q, k, v, s, s, causal=True, implementation="blockwise"))
        return call.lower(x, x, x, segment).compile().memory_analysis().temp_size_in_bytes

    small, large = temporary(2048), temporary(32768)
    assert large < 20 * small
    assert large < 32768 * 32768 * 2 * 4 / 50


@pytest.mark.parametrize("name", ["splash_interpret", "rows"])
@pytest.mark.parametrize("tensor", [2, 4], ids=["heads divide", "more devices than key-value heads"])
def test_kernel_is_split_over_a_mesh(tensor, name):
    mesh = make_mesh(8 // 2 // tensor, 2, tensor)
    q, k, v, segment = operands(256, batch=4, value=20)
    with jax.set_mesh(mesh):
        out = jax.jit(lambda *x: attend(*x, segment, segment, causal=True, implementation=name))(q, k, v)
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(("data", "fsdp"), "tensor"))
    assert out.sharding.is_equivalent_to(spread, out.ndim)
    np.testing.assert_allclose(out, einsum_attention(q, k, v, segment, segment, causal=True), atol=2e-6)


def test_unknown_kernel():
    q, k, v, segment = operands(7)
    with pytest.raises(GlimpseError, match="'flash' is unknown .*splash"):
        attend(q, k, v, segment, segment, implementation="flash")
    with pytest.raises(GlimpseError, match="needs rows that are one valid prefix"):
        attend(q, k, v, segment, segment, implementation="cudnn")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("backend", "dtype", "length", "prefix", "causal", "expected"),
    [
        ("cpu", jnp.float32, 64, False, False, "einsum"),
        ("cpu", jnp.float32, 8192, False, False, "blockwise"),
        ("cpu", jnp.float32, 8192, True, True, "blockwise"),
        ("cpu", jnp.float32, 1024, True, True, "rows"),
        ("cpu", jnp.float32, 256, True, True, "einsum"),
        ("cpu", jnp.float32, 2304, False, False, "rows"),
        ("cpu", jnp.bfloat16, 2304, False, False, "rows"),
        ("tpu", jnp.bfloat16, 8192, False, False, "splash"),
        ("tpu", jnp.bfloat16, 64, False, False, "einsum"),
        ("gpu", jnp.bfloat16, 8192, True, True, "cudnn"),
        ("gpu", jnp.bfloat16, 8192, False, False, "blockwise"),
        ("gpu", jnp.float32, 1024, True, True, "einsum"),
    ],
)
def test_choice_by_backend(monkeypatch, backend, dtype, length, prefix, causal, expected):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    x = jax.ShapeDtypeStruct((1, 2, length, 64), dtype)
    assert choose(x, x, prefix, causal) == expected
    assert expected in KERNELS
