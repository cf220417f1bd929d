"""Log-probabilities of completions: the released numbers, the sampler's own, and what must not change them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import plus_tools as tools
import pytest
from flax import nnx

from gp_jax import GlimpseError
from gp_jax.inference import logprobs as module
from gp_jax.models.adapter import without_adapter
from gp_jax.trees import Completions

# Compiled once per shape, as in training, not operation by operation.
logprobs = nnx.jit(module.logprobs, static_argnames=("plan", "length", "mode", "reference", "temperature", "remat"))


@pytest.fixture(scope="module")
def golden_plus(shared):
    return tools.load(shared)


@pytest.mark.parametrize("mode", ["exact", "released"])
@pytest.mark.parametrize("group", ["A", "B"])
def test_released_numbers(golden_plus, group, mode):
    vlm, golden = golden_plus
    made, plan, length = tools.prompt(vlm, golden, group)
    completions = Completions(golden[f"{group}.completion_ids"][None], golden[f"{group}.completion_mask"][None].astype(bool))
    for model, reference, name in ((vlm.model, False, "logps"), (without_adapter(vlm.model), True, "ref_logps")):
        found = np.asarray(logprobs(model, made, completions, plan, length, mode=mode, reference=reference))[0, ..., 0]
        np.testing.assert_allclose(found, golden[f"{group}.{mode}.{name}"], atol=1e-4, rtol=0, err_msg=name)


def test_predicted_masks(golden_plus):
    """Under the mask that the frozen base's glimpse predicts."""
    vlm, golden = golden_plus
    for group in "AB":
        predicted = golden | {f"{group}.ref_mask": golden[f"{group}.pred.keep"].reshape(golden[f"{group}.ref_mask"].shape)}
        made, plan, length = tools.prompt(vlm, predicted, group)
        completions = Completions(golden[f"{group}.completion_ids"][None], golden[f"{group}.completion_mask"][None].astype(bool))
        for mode in ("exact", "released"):
            found = np.asarray(logprobs(vlm.model, made, completions, plan, length, mode=mode))[0, ..., 0]
            np.testing.assert_allclose(found, golden[f"{group}.pred.{mode}.logps"], atol=1e-4, rtol=0)


def test_padding_and_rematerialisation_change_nothing(golden_plus):
    vlm, golden = golden_plus
    made, plan, length = tools.prompt(vlm, golden, "A")
    ids, valid = golden["A.completion_ids"][None], golden["A.completion_mask"][None].astype(bool)
    plain = np.asarray(logprobs(vlm.model, made, Completions(ids, valid), plan, length))
    wide = Completions(np.pad(ids, ((0, 0), (0, 2), (0, 5))), np.pad(valid, ((0, 0), (0, 2), (0, 5))))
    padded = np.asarray(logprobs(vlm.model, made, wide, plan, length + 16, remat=True))
    np.testing.assert_allclose(padded[:, :4, :12], plain, atol=1e-5, rtol=0)
    assert not padded[:, 4:].any() and not padded[:, :, 12:].any()


def test_entropy_and_temperature(golden_plus):
    """Of the first token, against its whole distribution."""
    vlm, golden = golden_plus
    made, plan, length = tools.prompt(vlm, golden, "B")
    count = vlm.config.text.vocab_size
    every = Completions(np.arange(count)[None, :, None], np.ones((1, count, 1), bool))
    for temperature in (1.0, 0.5):
        found = np.asarray(logprobs(vlm.model, made, every, plan, length, temperature=temperature))[0, :, 0]
        assert np.exp(found[:, 0]).sum() == pytest.approx(1, abs=1e-5)
        np.testing.assert_allclose(found[:, 1], -(np.exp(found[:, 0]) * found[:, 0]).sum(), rtol=1e-5)


def test_sliced_logits_equal_whole_ones(golden_plus, monkeypatch):
    vlm, golden = golden_plus
    made, plan, length = tools.prompt(vlm, golden, "A")
    completions = Completions(golden["A.completion_ids"][None], golden["A.completion_mask"][None].astype(bool))
    whole = np.asarray(logprobs(vlm.model, made, completions, plan, length))
    monkeypatch.setattr(module, "LOGITS_BYTES", 4 * 600 * 4 * 3)
    again = np.asarray(module.logprobs(vlm.model, made, completions, plan, length))
    np.testing.assert_allclose(again, whole, rtol=1e-6, atol=1e-6)


def test_unpruned_is_the_plain_model(golden_plus):
    """Without a cut: the logits of one pass over prompt and completion through the ordinary engine."""
    vlm, golden = golden_plus
    made, _, length = tools.prompt(vlm, golden, "A")
    done = vlm.generate(**tools.inputs(golden, "A"), prune=None, max_new_tokens=6, eos_token_id=None)
    completions = Completions(jnp.asarray(done.tokens)[None], jnp.ones((1, 1, 6), bool))
    found = np.asarray(logprobs(vlm.model, dataclasses.replace(made), completions, (), length))[0, 0]
    assert (found[:, 0] > -np.log(vlm.config.text.vocab_size)).all(), "greedy tokens are likelier than chance"


def test_the_front_door(golden_plus):
    """Prompts of different length together, and the sampler's own log-probabilities of what it sampled."""
    from gp_jax import Prune
    from gp_jax.inference.decoding import Rows
    from gp_jax.inference.requests import sampling_settings

    vlm, golden = golden_plus
    for name in "AB":
        given, mask = tools.inputs(golden, name), [golden[f"{name}.ref_mask"]]
        ids, valid = golden[f"{name}.completion_ids"][None], golden[f"{name}.completion_mask"][None]
        found = vlm.logprobs(**given, completion_ids=ids, completion_mask=valid, prune=Prune(reference_masks=mask))
        np.testing.assert_allclose(found[0], golden[f"{name}.exact.logps"], atol=1e-4, rtol=0)
        settings = sampling_settings(vlm.config, 0.7, 0, 1.0, 3, None, rows=4)
        rows = Rows.behind(vlm.engine, vlm.prefill(**given, prune=Prune(reference_masks=mask)), settings, 7, logprobs=True)
        rows.generate(6)
        tokens, sampled = rows.read("tokens", "logprobs")
        exact = vlm.logprobs(**given, completion_ids=tokens[None, :, :7], prune=Prune(reference_masks=mask), temperature=0.7)
        np.testing.assert_allclose(exact[0], sampled[0][:, :7], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completion_ids": np.zeros((2, 3), int)}, "completion_ids must be"),
        ({"completion_ids": np.full((1, 2, 3), 10**6)}, "ids outside"),
        ({"completion_mask": np.array([[[0, 1, 1], [1, 1, 1]]])}, "completion_mask"),
        ({"mode": "exakt"}, "mode"),
        ({"temperature": 0}, "temperature=0"),
        ({"prune": "auto"}, "reference_masks"),
        ({"completion": 1}, "logprobs does not take completion"),
    ],
)
def test_bad_arguments(golden_plus, changes, said):
    vlm, golden = golden_plus
    with pytest.raises(GlimpseError, match=said):
        vlm.logprobs(**tools.inputs(golden, "A"), **{"completion_ids": np.ones((1, 2, 3), int)} | changes)
