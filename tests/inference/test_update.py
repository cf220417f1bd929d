"""New parameters behind a running engine: nothing compiles, memory does not grow, and every answer is that of the new model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_models import GLIMPSE, LADDERS, glimpse_weights, hf_model, inputs, save_glimpse

from gp_jax import GlimpseError, GlimpseVLM, Prune, inference_params, make_mesh
from gp_jax.runtime.clock import COMPILES

SHAPES = [[5, (4, 6), 7], [3, (2, 2), 9]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("update")
    model = hf_model()
    model.save_pretrained(folder / "base")
    save_glimpse(folder / "glimpse", model, GLIMPSE, glimpse_weights(GLIMPSE))
    return folder


def load(folder, mesh=None) -> GlimpseVLM:
    return GlimpseVLM.from_pretrained(folder / "base", folder / "glimpse", ladders=LADDERS, mesh=mesh)


def changed(params: dict, scale: float) -> dict:
    """Other parameters, all of them new arrays on the host."""
    return jax.tree.map(lambda x: np.asarray(x) * np.asarray(scale).astype(x.dtype), params)


def ask(vlm: GlimpseVLM) -> np.ndarray:
    return vlm.generate(**inputs(SHAPES), prune=Prune(fixed_remain_ratio=0.4), max_new_tokens=4, eos_token_id=None).first_logits


@pytest.mark.parametrize("mesh", [None, (1, 2, 1)], ids=str)
def test_an_updated_model_is_the_new_one(folder, mesh):
    mesh = None if mesh is None else make_mesh(*mesh, devices=jax.devices()[:2])
    vlm, fresh = load(folder, mesh), load(folder, mesh)
    first, new = ask(vlm), changed(inference_params(vlm.model), 1.25)
    fresh.update(new)
    before = COMPILES.count
    vlm.update(new)
    np.testing.assert_array_equal(ask(vlm), ask(fresh))
    assert np.abs(ask(vlm) - first).max() > 1e-3
    vlm.update({"predictor": inference_params(load(folder, mesh).model)["predictor"]})  # a part alone
    assert COMPILES.count == before


def test_a_hundred_updates_compile_nothing_and_keep_nothing(folder):
    vlm = load(folder)
    first = ask(vlm)
    original = changed(inference_params(vlm.model), 1.0)
    step = jax.jit(lambda params, scale: jax.tree.map(lambda x: x * scale.astype(x.dtype), params))
    vlm.update(step(inference_params(vlm.model), jnp.float32(1.0)))  # as an optimiser makes them: arrays on the device
    ask(vlm)
    before, held = COMPILES.count, sum(array.nbytes for array in jax.live_arrays())
    for number in range(100):
        vlm.update(step(inference_params(vlm.model), jnp.float32(1.01 if number % 2 else 1 / 1.01)))
        if number % 25 == 0:
            ask(vlm)
        assert sum(array.nbytes for array in jax.live_arrays()) <= held
    assert COMPILES.count == before
    vlm.update(original)
    np.testing.assert_array_equal(ask(vlm), first)


def test_an_array_that_is_there_already_is_not_copied(folder):
    vlm = load(folder)
    norm = inference_params(vlm.model)["decoder"]["norm"]["weight"] * 1
    vlm.update({"decoder": {"norm": {"weight": norm}}})
    assert inference_params(vlm.model)["decoder"]["norm"]["weight"].unsafe_buffer_pointer() == norm.unsafe_buffer_pointer()


@pytest.mark.quick
def test_what_does_not_fit_is_named_and_nothing_is_replaced(folder):
    vlm = load(folder)
    first = ask(vlm)
    norm = np.zeros_like(inference_params(vlm.model)["decoder"]["norm"]["weight"])
    with pytest.raises(GlimpseError, match="params must be nested dicts of arrays by name, as inference_params gives them, not list"):
        vlm.update([norm])
    for wrong, words in (
        ({"norm": {"weight": norm}, "norms": {"weight": norm}}, "decoder.norms.weight is not a parameter"),
        ({"norm": {"weight": norm[:-1]}}, r"decoder.norm.weight has the shape \(\d+,\) and type float32, this model's has"),
        ({"norm": {"weight": norm.astype(np.float16)}}, "decoder.norm.weight has the shape .* and type float16"),
        ({"norm": {"weight": None}}, "decoder.norm.weight has the shape None"),
    ):
        with pytest.raises(GlimpseError, match=words):
            vlm.update({"decoder": wrong})
    np.testing.assert_array_equal(ask(vlm), first)


def test_what_a_caller_writes_later_is_not_seen(folder):
    vlm = load(folder)
    staging = np.array(inference_params(vlm.model)["decoder"]["norm"]["weight"]) * 2
    raw = np.empty(staging.nbytes + 64, np.uint8)  # aligned, as XLA would take it without a copy
    begin = -raw.ctypes.data % 64
    aligned = raw[begin : begin + staging.nbytes].view(staging.dtype)
    aligned[...] = staging
    vlm.update({"decoder": {"norm": {"weight": aligned}}})
    aligned[...] = 0
    np.testing.assert_array_equal(inference_params(vlm.model)["decoder"]["norm"]["weight"], staging)


def test_a_state_of_flax_is_taken_too(folder):
    vlm = load(folder)
    first = ask(vlm)
    vlm.update(nnx.state(vlm.model))
    np.testing.assert_array_equal(ask(vlm), first)
