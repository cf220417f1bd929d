"""Training samples to padded arrays, numpy on the host. See `trees.TrainBatch` for the shapes."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gp_jax.config.model import ModelConfig
from gp_jax.errors import GlimpseError
from gp_jax.processing.layout import Sample, prompt_input, vision_input
from gp_jax.trees import TailInput, TrainBatch


@dataclass(frozen=True)
class TrainSample:
    """A prompt, the answer to learn and the mask of evidence."""

    prompt: Sample
    answer: np.ndarray  # (a,) int, a > 0: token ids, the end of the turn included
    reference: np.ndarray  # (N,) bool over visual tokens, in prompt order
    known: np.ndarray | None = None  # (N,) bool: whether it is known if they are evidence; None: of all


@dataclass(frozen=True)
class Shape:
    """A bucket: the lengths of all arrays of a batch."""

    slots: int  # vision slots M
    prompt: int  # prompt rows T
    tail: int  # tail rows U


def lengths(slots: int, prompt: int, answer: int, glimpse_rows: int) -> Shape:
    """The smallest shape that holds a sample with these vision slots, prompt tokens and answer tokens (see `train_batch`)."""
    return Shape(slots, prompt if glimpse_rows else prompt - 1, max(1, glimpse_rows) + answer)


def split_answer(ids: np.ndarray, labels: np.ndarray, where: str = "labels") -> int:
    """Where the answer starts, from labels as trainers write them (-100, or another negative number: no loss).

    Raises: GlimpseError unless the labels are a prompt without loss followed by the ids themselves.
    """
    start = int(np.argmax(labels >= 0))
    if labels.shape != ids.shape or start == 0 or not np.array_equal(labels[start:], ids[start:]):
        raise GlimpseError(f"{where}: must be -100 on the prompt and the token ids on the answer behind it")
    return start


def tail_input(samples: Sequence[TrainSample | None], config: ModelConfig, batch: int, length: int, glimpse_rows: int) -> TailInput:
    """The lead rows and the answers, left-aligned. Positions continue after the prompt, on all axes."""
    shape, lead = (batch, length), max(1, glimpse_rows)
    ids = np.full(shape, config.pad_token_id, np.int32)
    targets, valid = np.full(shape, -1, np.int32), np.zeros(shape, bool)
    positions = np.zeros((config.position_axes, *shape), np.int32)
    for b, sample in enumerate(samples):
        if sample is None:
            continue
        rows = lead + sample.answer.size  # the last row predicts nothing; its key counts in the denominator of the released training
        ids[b, :lead] = (config.eos_token_ids or (config.pad_token_id,))[0] if glimpse_rows else sample.prompt.ids[-1]
        ids[b, lead:rows] = sample.answer
        targets[b, lead - 1 : rows - 1] = sample.answer
        valid[b, :rows] = True
        positions[:, b, :rows] = sample.prompt.next_position - (0 if glimpse_rows else 1) + np.arange(rows)
    return TailInput(ids, positions, valid, targets)


def without_last(sample: Sample) -> Sample:
    """The prompt without its last token: without glimpse rows that token is the first row of the tail."""
    return dataclasses.replace(sample, ids=sample.ids[:-1], positions=sample.positions[:, :-1], image_token=sample.image_token[:-1])


def train_batch(
    samples: Sequence[TrainSample | None], config: ModelConfig, batch: int, shape: Shape, glimpse_rows: int, numbers: Sequence[int]
) -> TrainBatch:
    """Pads samples to `batch` rows of a bucket. A row without a sample has weight 0.

    Args: numbers: the index of every sample within its optimiser step.
    """
    whole = [None if sample is None else sample.prompt for sample in samples]
    prompts = whole if glimpse_rows else [None if prompt is None else without_last(prompt) for prompt in whole]
    reference, number = np.zeros((batch, shape.slots), bool), np.full(batch, -1, np.int32)
    known = np.ones_like(reference)
    for b, sample in enumerate(samples):
        if sample is None:
            continue
        reference[b, sample.prompt.slot_of_token[sample.reference]] = True
        number[b] = numbers[b]
        if sample.known is not None:
            known[b, sample.prompt.slot_of_token] = sample.known
    return TrainBatch(
        vision=vision_input(whole, config, batch, shape.slots),
        prompt=prompt_input(prompts, config, batch, shape.prompt, 0),
        tail=tail_input(samples, config, batch, shape.tail, glimpse_rows),
        reference=reference,
        known=known,
        number=number,
    )
