"""Losses, gradients and whole steps of GlimpsePrune+ against the released trainer."""

from functools import partial

import jax
import numpy as np
import plus_tools as tools
import pytest

from gp_jax.models.adapter import module_names
from gp_jax.pretrained.params import flat_params
from gp_jax.training.optim import learning_rate, optimizer
from gp_jax.training.plus.advantages import advantages, token_weights
from gp_jax.training.plus.losses import METRICS, policy_losses, policy_terms
from gp_jax.training.plus.settings import PolicyConfig
from gp_jax.training.settings import OptimConfig
from gp_jax.training.step import StepPrograms
from gp_jax.trees import Completions

OPTIM = OptimConfig(learning_rate=2e-3, warmup_ratio=0.5, schedule="cosine")


@pytest.fixture(scope="module")
def golden_plus(shared):
    return tools.load(shared)


def make_step(vlm, config: PolicyConfig) -> StepPrograms:
    losses = partial(policy_losses, config=config, remat=True, attention="auto")
    return StepPrograms(vlm.model, lambda path, _: "adapter" in path, losses, METRICS, optimizer(OPTIM, 6), learning_rate(OPTIM, 6))


def released_names(tree) -> dict[str, np.ndarray]:
    """Values of an adapter by PEFT's names."""
    theirs = {ours: name for name, ours in module_names(6)}
    found = {}
    for path, value in flat_params(tree).items():
        module, _, half = path.rsplit(".", 2)
        found[f"{theirs[module]}.{half}.weight"] = np.asarray(value)
    return found


@pytest.mark.parametrize("mode", ["exact", "released"])
def test_released_loss_and_gradients(golden_plus, mode):
    vlm, golden = golden_plus
    step = make_step(vlm, config := PolicyConfig(mode=mode, **tools.PRESET))
    batches, counts = tools.step_batches(vlm, golden, ["A", "B"], config)
    for number, name in enumerate("AB"):
        np.testing.assert_allclose(batches[number].advantage[0], golden[f"{name}.advantages"], atol=1e-5)
    state, gathered = step.start()
    for batch in batches:
        gathered = step.accumulate(gathered, state, batch, counts)
    assert float(gathered.sums["loss"]) == pytest.approx(float(golden[f"both.{mode}.loss"]), abs=1e-5)
    if mode == "exact":
        assert float(gathered.sums["largest_rollout_gap"]) < 1e-5
    for name, found in released_names(gathered.grads).items():
        wanted = golden[f"both.{mode}.grad.{name}"]
        assert np.linalg.norm(found - wanted) <= 1e-4 * np.linalg.norm(wanted), name


def test_six_released_steps(golden_plus):
    """Losses, gradient norms, learning rates and the adapter in the end."""
    vlm, golden = golden_plus
    step = make_step(vlm, config := PolicyConfig(mode="released", **tools.PRESET))
    state, gathered = step.start()
    start, order = released_names(state.params), [str(name) for name in golden["run.order"]]
    for number in range(6):
        batches, counts = tools.step_batches(vlm, golden, order[2 * number : 2 * number + 2], config)
        for batch in batches:
            gathered = step.accumulate(gathered, state, batch, counts)
        state, gathered, metrics = step.update(state, gathered)
        for ours, theirs, tolerance in (
            ("loss", "kd_loss", 1e-4),
            ("grad_norm", "grad_norm", 1e-3),
            ("learning_rate", "learning_rate", 1e-8),
        ):
            assert float(metrics[ours]) == pytest.approx(float(golden[f"run.{theirs}"][number]), abs=tolerance), (number, ours)
    for name, found in released_names(state.params).items():
        wanted = golden[f"run.adapter.{name}"]
        assert np.linalg.norm(found - wanted) <= 0.02 * np.linalg.norm(wanted - start[name]), name


def test_an_update_makes_better_completions_likelier(golden_plus):
    vlm, golden = golden_plus
    step = make_step(vlm, config := PolicyConfig(**tools.PRESET | {"beta": 0.0, "loss": "dapo"}))
    (batch,), counts = tools.step_batches(vlm, golden, ["A"], config)
    state, gathered = step.start()
    before = np.asarray(step.evaluate(state, batch, counts)[1]).sum(axis=-1)
    for _ in range(3):
        state, gathered, _ = step.update(state, step.accumulate(gathered, state, batch, counts))
    change = np.asarray(step.evaluate(state, batch, counts)[1]).sum(axis=-1) - before
    assert (change * batch.advantage).sum() > 0.1


def test_other_groups(golden_plus):
    """Equal rewards, and two score functions."""
    vlm, golden = golden_plus
    config = PolicyConfig(**tools.PRESET)
    for name in "AB":
        flat = advantages(golden[f"{name}.flat.rewards"].tolist(), [0] * 4, [False] * 4, config)
        assert flat.flat.all() and not flat.values.any() and flat.counted.all()
        two = advantages(golden[f"{name}.two.rewards"].sum(axis=1).tolist(), [0] * 4, [False] * 4, config)
        np.testing.assert_allclose(two.values, golden[f"{name}.two.advantages"], atol=1e-5)


@pytest.mark.quick
def test_statistics_by_question():
    """Any order of groups; what is missing is in no statistic; groups of one are left out; what is dropped is still counted."""
    rewards, groups = [1.0, 0.0, None, 5.0, 1.0, 2.0, 2.0, 7.0], [0, 1, 0, 2, 1, 3, 3, 0]
    found = advantages(rewards, groups, [False] * 8, PolicyConfig(flat_groups="drop"))
    assert found.missing.tolist() == [False, False, True, False, False, False, False, False]
    assert found.flat.tolist() == [False] * 5 + [True, True, False]
    assert found.counted.tolist() == [True, True, False, False, True, False, False, True]
    np.testing.assert_allclose(found.values[[0, 7]], [-3 / (18**0.5 + 1e-4), 3 / (18**0.5 + 1e-4)], rtol=1e-5)
    assert advantages(rewards, groups, [True] * 8, PolicyConfig(cut_completions="drop")).counted.sum() == 0
    np.testing.assert_allclose(advantages(rewards, groups, [False] * 8, PolicyConfig(loss="dr_grpo")).values[[0, 7]], [-3, 3])


@pytest.mark.quick
@pytest.mark.parametrize("loss", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_token_weights(loss):
    valid = np.arange(5) < np.array([[5], [1], [2], [4]])
    counted = np.array([True, True, False, True])
    found = token_weights(valid, counted, PolicyConfig(loss=loss, max_new_tokens=5))
    wanted = {
        "grpo": [1 / 15] * 5 + [1 / 3] + [1 / 12] * 4,
        "gspo": [1 / 15] * 5 + [1 / 3] + [1 / 12] * 4,
        "dapo": [1 / 10] * 10,
        "dr_grpo": [1 / 15] * 10,
    }[loss]
    np.testing.assert_allclose(found[valid & counted[:, None]], wanted, rtol=1e-6)
    assert not found[~valid].any() and not found[2].any()


class Fake:
    """The parts of a batch that the policy loss reads."""

    def __init__(self, old, sampled, advantage, valid):
        self.old, self.sampled, self.advantage, self.completions = old, sampled, advantage, Completions(None, valid)


@pytest.mark.quick
def test_clipping_and_importance():
    """Ratios beyond the bounds have no gradient where the advantage would push them further, and weights are capped."""
    old, advantage = np.zeros((1, 2, 2), np.float32), np.array([[1.0, -1.0]], np.float32)
    logp = np.log(np.array([[[1.5, 1.1], [0.5, 0.9]]], np.float32))
    valid = np.ones((1, 2, 2), bool)
    batch = Fake(old, old, advantage, valid)
    config = PolicyConfig(loss="grpo", epsilon=0.2, epsilon_high=0.28, importance_cap=0)
    terms, clipped = policy_terms(logp, batch, config)
    np.testing.assert_allclose(terms[0], [[-1.28, -1.1], [0.8, 0.9]], rtol=1e-6)
    assert clipped.tolist() == [[[True, False], [True, False]]]
    slope = jax.grad(lambda x: policy_terms(x, batch, config)[0].sum())(logp)
    assert (np.asarray(slope)[0, :, 0] == 0).all() and (np.asarray(slope)[0, :, 1] != 0).all()
    weighted, _ = policy_terms(
        logp, Fake(old, np.log(np.float32([[[0.1, 2.0], [1.0, 1.0]]])), advantage, valid), PolicyConfig(importance_cap=2)
    )
    np.testing.assert_allclose(weighted[0, 0], [-1.28 * 2, -1.1 / 2], rtol=1e-5)


@pytest.mark.quick
def test_gspo_has_one_ratio_per_completion():
    logp = np.log(np.array([[[1.2, 0.9, 7.0]]], np.float32))
    valid = np.array([[[True, True, False]]])
    batch = Fake(np.zeros_like(logp), np.zeros_like(logp), np.ones((1, 1), np.float32), valid)
    terms, _ = policy_terms(logp, batch, PolicyConfig(loss="gspo", importance_cap=0))
    np.testing.assert_allclose(terms[0, 0, :2], -((1.2 * 0.9) ** 0.5), rtol=1e-6)
