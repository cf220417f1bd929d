"""The released LLaVA training step: losses and gradients, with its log-softmax map over the answer's keys too."""

import numpy as np
import pytest
import train_tools as tools

from gp_jax import GlimpseVLM
from gp_jax.data.collate import Shape, TrainSample, split_answer
from gp_jax.pretrained.params import checkpoint_name, flat_params
from gp_jax.processing.layout import read_samples
from gp_jax.training.settings import LossConfig

PARTS = {"language": "le_loss", "dice": "dice", "bce": "bce", "loss": "loss"}
SHAPE = Shape(slots=64, prompt=96, tail=16)


@pytest.fixture(scope="module")
def vlm(shared):
    return GlimpseVLM.from_pretrained(shared / "goldens" / "llava_gp")


@pytest.fixture(scope="module")
def golden(shared):
    with np.load(shared / "goldens" / "llava_gp" / "golden.npz") as file:
        return dict(file)


def training_samples(vlm, golden, case: str) -> list[TrainSample]:
    made = []
    for b, mask in enumerate(golden[f"{case}.train.attention_mask"].astype(bool)):
        ids, labels = (golden[f"{case}.train.{name}"][b][mask] for name in ("input_ids", "labels"))
        start = split_answer(ids, labels)
        prompt = read_samples(vlm.config, ids[None, :start], None, golden[f"{case}.pixel_values"][b : b + 1])[0]
        made.append(TrainSample(prompt, ids[start:], golden[f"{case}.train.ref_mask"][b].reshape(-1)))
    return made


@pytest.fixture(scope="module")
def released(vlm):
    return tools.make_step(vlm.model, loss=LossConfig(answer_in_denominator=True))


@pytest.mark.parametrize("case", ["img_a", "batch2"])
def test_golden_losses_and_gradients(vlm, golden, released, case):
    samples = training_samples(vlm, golden, case)
    counts, batch = tools.counts(*samples), tools.batch(vlm, samples, shape=SHAPE)
    state, gathered = released.start()
    gathered = released.accumulate(gathered, state, batch, counts)
    for ours, theirs in PARTS.items():
        np.testing.assert_allclose(gathered.sums[ours], golden[f"{case}.train.{theirs}"], atol=1e-5, rtol=0, err_msg=ours)
    found = {checkpoint_name(path): np.asarray(value) for path, value in flat_params(gathered.grads).items()}
    prefix = f"{case}.train.grad."
    wanted = {name[len(prefix) :]: value for name, value in golden.items() if name.startswith(prefix)}
    tools.assert_close(found, wanted, 1e-4)
    state, _ = released.start()
    _, logits = released.evaluate(state, batch, counts)
    logits = np.stack([np.asarray(logits)[b, sample.prompt.slot_of_token] for b, sample in enumerate(samples)])
    np.testing.assert_allclose(logits, golden[f"{case}.train.mask_logits"][:, 0], atol=1e-4, rtol=0)


def test_causal_map_is_the_maps_of_inference(vlm, golden):
    """Without the flag the glimpse does not see the answer: training sees the importance that inference computes."""
    step, samples = tools.make_step(vlm.model), training_samples(vlm, golden, "img_a")
    state, _ = step.start()
    _, logits = step.evaluate(state, tools.batch(vlm, samples, shape=SHAPE), tools.counts(*samples))
    np.testing.assert_allclose(np.asarray(logits)[0, samples[0].prompt.slot_of_token], golden["img_a.mask_logits"][0], atol=1e-4, rtol=0)
