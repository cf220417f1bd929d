"""Small training set-ups for tests."""

import numpy as np
import optax
from flax import nnx

from gp_jax.data.collate import Shape, TrainSample, split_answer, train_batch
from gp_jax.processing.layout import read_samples
from gp_jax.training.settings import LossConfig
from gp_jax.training.step import Counts, TrainingStep

SHAPE = Shape(slots=128, prompt=96, tail=16)  # holds every golden sample: one shape, few compilations


def golden_sample(vlm, golden, case: str) -> TrainSample:
    """A golden case as a training sample."""
    ids, labels = (golden[f"{case}.train.{name}"][0] for name in ("input_ids", "labels"))
    start = split_answer(ids, labels)
    prompt = read_samples(vlm.config, ids[None, :start], None, golden[f"{case}.pixel_values"], golden[f"{case}.image_grid_thw"])[0]
    return TrainSample(prompt, ids[start:], golden[f"{case}.train.ref_mask"].reshape(-1))


def make_step(model, optimizer=None, **options) -> TrainingStep:
    """A step with plain gradient descent, so that an update is the negative gradient."""
    return TrainingStep(model, optimizer or optax.sgd(1.0), lambda count: 1.0, options.pop("loss", LossConfig()), **options)


def counts(*samples: TrainSample) -> Counts:
    """Denominators of a step with these samples."""
    return Counts(np.float32(sum(s.answer.size for s in samples)), np.float32(max(1, sum(s.prompt.count > 0 for s in samples))))


def batch(vlm, samples, size: int = 2, shape: Shape = SHAPE, first: int = 0):
    """A padded batch; always two rows unless said otherwise, so that compilations are shared."""
    return train_batch(samples, vlm.config, size, shape, vlm.model.glimpse_config.rows, range(first, first + size))


def with_glimpse(model, **changes) -> nnx.Module:
    """The same model under changed glimpse settings that need no other parameters."""
    import dataclasses

    graph, state = nnx.split(model)
    copy = nnx.merge(graph, state)
    copy.glimpse_config = dataclasses.replace(model.glimpse_config, **changes)
    return copy


def assert_close(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float) -> None:
    """Every gradient is within `tolerance` of its norm."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        error = np.linalg.norm(found[name] - value) / max(np.linalg.norm(value), 1e-6)
        np.testing.assert_allclose(error, 0, atol=tolerance, err_msg=name)
