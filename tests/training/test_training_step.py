"""The training step against the released code's losses and gradients, and what must not change its result."""

import json

import jax
import numpy as np
import optax
import pytest
import train_tools as tools

from gp_jax import GlimpseError, GlimpseVLM, make_mesh
from gp_jax.data.collate import split_answer
from gp_jax.pretrained.params import checkpoint_name, flat_params
from gp_jax.runtime.clock import COMPILES
from gp_jax.tiny import make_checkpoint

CASES = ("single", "wide")
PARTS = {"language": "lm_loss", "dice": "dice", "bce": "bce", "loss": "loss"}


@pytest.fixture(scope="module")
def shallow_folder(golden_folder, tmp_path_factory):
    """Two layers of the golden model's sizes, which compile sooner: where no golden number is compared."""
    config = json.loads((golden_folder / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "selected_layers": [0], "reduce_layer": 0, "le_layers": [0, 1], "selected_visual_layers": [1]}
    config["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    folder = tmp_path_factory.mktemp("shallow")
    make_checkpoint(folder, hf_config=config)
    return folder


@pytest.fixture(scope="module")
def shallow(shallow_folder):
    return GlimpseVLM.from_pretrained(shallow_folder, glimpse=shallow_folder)


@pytest.fixture(scope="module")
def plain(golden_vlm):
    """The golden model's step, compiled once for several tests."""
    return tools.make_step(golden_vlm.model)


def gradients(step, *micro_batches, counts) -> tuple[dict, dict]:
    """Metric sums and gradients by released name, of a step of several micro-batches."""
    state, gathered = step.start()
    for micro in micro_batches:
        gathered = step.accumulate(gathered, state, micro, counts)
    grads = {checkpoint_name(path): np.asarray(value) for path, value in flat_params(gathered.grads).items()}
    return {name: float(value) for name, value in gathered.sums.items()}, grads


@pytest.mark.parametrize("case", CASES)
def test_golden_losses_and_gradients(golden_vlm, golden, plain, case):
    sample, step = tools.golden_sample(golden_vlm, golden, case), plain
    sums, grads = gradients(step, tools.batch(golden_vlm, [sample]), counts=tools.counts(sample))
    for ours, theirs in PARTS.items():
        np.testing.assert_allclose(sums[ours], golden[f"{case}.train.{theirs}"], atol=1e-5, rtol=0, err_msg=ours)
    prefix = f"{case}.train.grad."
    tools.assert_close(grads, {name[len(prefix) :]: value for name, value in golden.items() if name.startswith(prefix)}, 1e-4)
    state, _ = step.start()
    _, logits = step.evaluate(state, tools.batch(golden_vlm, [sample]), tools.counts(sample))
    logits = np.asarray(logits)[0, sample.prompt.slot_of_token]
    np.testing.assert_allclose(logits, golden[f"{case}.train.mask_logits"][0], atol=1e-4, rtol=0)
    keep, wanted = logits > 0, sample.reference
    hit = (keep & wanted).sum()
    for name, value in {
        "precision": hit / keep.sum() if keep.any() else 0,
        "recall": hit / wanted.sum(),
        "f1": 2 * hit / (keep.sum() + wanted.sum()),
        "iou": hit / (keep | wanted).sum(),
        "retention": keep.mean(),
    }.items():
        assert abs(sums[name] - value) < 1e-6, name


def test_batch_equals_its_samples_padding_and_micro_batches_change_nothing(golden_vlm, golden, plain):
    """Different samples together, and each in a micro-batch beside an empty row: the same losses and gradients."""
    samples = [tools.golden_sample(golden_vlm, golden, case) for case in CASES]
    counts, step = tools.counts(*samples), plain
    together = gradients(step, tools.batch(golden_vlm, samples), counts=counts)
    apart = gradients(step, *(tools.batch(golden_vlm, [sample]) for sample in samples), counts=counts)
    assert together[0] == pytest.approx(apart[0], abs=1e-5)
    tools.assert_close(together[1], apart[1], 1e-5)
    tokens = np.array([sample.answer.size for sample in samples])
    language = np.array([float(golden[f"{case}.train.lm_loss"]) for case in CASES])
    assert together[0]["language"] == pytest.approx((language * tokens).sum() / tokens.sum(), abs=1e-5)
    assert together[0]["dice"] == pytest.approx(np.mean([float(golden[f"{case}.train.dice"]) for case in CASES]), abs=1e-5)


def test_eight_devices_equal_one(shallow_folder, shallow, golden):
    samples = [tools.golden_sample(shallow, golden, case) for case in CASES] * 2  # a row for each of data x fsdp
    adam = dict(optimizer=optax.adamw(1e-3))
    one, losses = tools.make_step(shallow.model, **adam), []
    mesh = make_mesh(2, 2, 2)
    vlm = GlimpseVLM.from_pretrained(shallow_folder, glimpse=shallow_folder, mesh=mesh)
    for step in (one, tools.make_step(vlm.model, mesh=mesh, **adam)):
        state, gathered = step.start()
        curve = []
        for _ in range(3):
            gathered = step.accumulate(gathered, state, tools.batch(shallow, samples, size=4), tools.counts(*samples))
            state, gathered, metrics = step.update(state, gathered)
            curve.append(float(metrics["loss"]))
        losses.append(curve)
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-5)
    assert losses[0][-1] < losses[0][0], "it learns"


def test_dropout_belongs_to_the_sample_not_to_its_batch(shallow, golden):
    samples = [tools.golden_sample(shallow, golden, case) for case in CASES]
    counts = tools.counts(*samples)
    model = tools.with_glimpse(shallow.model, le_dropout_prob=0.5)
    step = tools.make_step(model, seed=3)
    together = gradients(step, tools.batch(shallow, samples), counts=counts)
    apart = gradients(step, *(tools.batch(shallow, [s], first=i) for i, s in enumerate(samples)), counts=counts)
    tools.assert_close(together[1], apart[1], 1e-5)
    step.seed = 4
    other = gradients(step, tools.batch(shallow, samples), counts=counts)
    without = gradients(tools.make_step(shallow.model), tools.batch(shallow, samples), counts=counts)
    assert len({together[0]["loss"], other[0]["loss"], without[0]["loss"]}) == 3


def test_one_compilation_per_shape(shallow, golden):
    from gp_jax.data.collate import Shape

    samples = [tools.golden_sample(shallow, golden, case) for case in CASES]
    step, counts = tools.make_step(shallow.model), tools.counts(*samples)
    state, gathered = step.start()
    small, large = tools.SHAPE, Shape(128, 112, 32)

    def go(shape, members):
        nonlocal state, gathered
        gathered = step.accumulate(gathered, state, tools.batch(shallow, members, size=2, shape=shape), counts)
        state, gathered, _ = step.update(state, gathered)
        step.evaluate(state, tools.batch(shallow, members, size=2, shape=shape), counts)

    go(small, samples)
    go(large, samples)
    before = COMPILES.count
    for shape, members in ((small, samples[:1]), (large, samples[::-1]), (small, samples), (large, samples[1:])):
        go(shape, members)
    assert COMPILES.count == before
    assert step.programs["accumulate"]._cache_size() == 2 and step.programs["update"]._cache_size() == 1


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered(shallow, golden):
    sample = tools.golden_sample(shallow, golden, "single")
    step = tools.make_step(shallow.model, optimizer=optax.adamw(1e-3))
    good, counts = tools.batch(shallow, [sample]), tools.counts(sample)
    broken = tools.batch(shallow, [sample])
    broken.vision.patches[0, 0, 0] = np.inf
    state, gathered = step.start()
    gathered = step.accumulate(gathered, state, good, counts)
    state, gathered, metrics = step.update(state, gathered)
    assert int(metrics["bad"]) == -1 and int(state.step) == 1
    before = jax.tree.map(np.asarray, (state.params, state.opt))
    for batch in (broken, good):
        gathered = step.accumulate(gathered, state, batch, counts)
        state, gathered, metrics = step.update(state, gathered)
        assert int(metrics["bad"]) == 1 and int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, (state.params, state.opt)))


def test_bfloat16_base(shallow_folder, shallow, golden):
    """The frozen base in bfloat16: parameters, gradients and losses stay float32 and near."""
    sample = tools.golden_sample(shallow, golden, "single")
    vlm = GlimpseVLM.from_pretrained(shallow_folder, glimpse=shallow_folder, dtype="bfloat16")
    sums, grads = gradients(tools.make_step(vlm.model), tools.batch(vlm, [sample]), counts=tools.counts(sample))
    exact, _ = gradients(tools.make_step(shallow.model), tools.batch(shallow, [sample]), counts=tools.counts(sample))
    for name in ("language", "dice", "bce", "loss"):
        assert sums[name] == pytest.approx(exact[name], rel=0.05), name
    assert all(value.dtype == np.float32 and np.isfinite(value).all() and value.any() for value in grads.values())


def test_only_the_glimpse_has_optimiser_state(golden_vlm):
    step = tools.make_step(golden_vlm.model, optimizer=optax.adamw(1e-3))
    state, _ = step.start()
    trainable = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt) if leaf.ndim)
    assert moments == 2 * trainable
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(state.params))
    names = {checkpoint_name(path).split(".")[0] for path in flat_params(state.params)}
    assert names == {"learnable_embeddings", "le_proj", "le_norm", "attn_fuser"}


@pytest.mark.parametrize(
    "ids, labels", [([1, 2, 3], [-100, -100, -100]), ([1, 2, 3], [1, 2, 3]), ([1, 2, 3], [-100, 2, -100]), ([1, 2, 3], [-100, 9, 3])]
)
def test_labels_must_be_a_prompt_and_an_answer(ids, labels):
    with pytest.raises(GlimpseError, match="must be -100 on the prompt"):
        split_answer(np.array(ids), np.array(labels))
