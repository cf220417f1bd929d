"""Loads a task's records as questions to the model. Records that cannot be asked are reported, counted and left out."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from gp_jax.data.masks import evidence
from gp_jax.data.record import Record
from gp_jax.data.samples import question_text
from gp_jax.errors import printable, reason
from gp_jax.evaluation.results import Prediction
from gp_jax.evaluation.tasks import Task
from gp_jax.processing.images import decode
from gp_jax.processing.qwen import Processor


@dataclass(frozen=True)
class LoadedRecord:
    """A record that can be asked about.

    grids: (rows, columns) of visual tokens per picture, at its original size; evidence: a mask per grid.
    """

    number: int
    record: Record
    pictures: list[Image.Image]
    question: str
    grids: tuple[tuple[int, int], ...]
    evidence: list[np.ndarray]

    @property
    def reference(self) -> list[np.ndarray]:
        """The masks that the plan "oracle" keeps: the evidence, or everything if there is none."""
        return self.evidence if any(mask.any() for mask in self.evidence) else [np.ones_like(mask) for mask in self.evidence]


class Samples:
    """The records of a task. left_out: record id -> reason, for records that this process could not ask about."""

    def __init__(self, processor: Processor, task: Task):
        self.processor, self.task = processor, task
        self.number = {entry.id: number for number, entry in enumerate(task.entries)}
        self.left_out: dict[str, str] = {}
        self._checked: set[int] = set()

    def say(self, line: str) -> None:
        """Prints a line, in the first process."""
        if jax.process_index() == 0:
            tqdm.write(printable(f"{self.task.name}: {line}"))

    def leave_out(self, number: int, why: str) -> None:
        """Reports a record that cannot be asked about."""
        name = self.task.entries[number].id
        self.left_out[name] = why
        tqdm.write(printable(f"{self.task.name}: {name} is left out: {why}"))

    @cached_property
    def grids(self) -> list[tuple[tuple[int, int], ...] | None]:
        """Per record, the (rows, columns) of visual tokens of its pictures, from their sizes; None for impossible sizes (left out)."""
        found: list[tuple[tuple[int, int], ...] | None] = []
        for number, entry in enumerate(self.task.entries):
            try:
                found.append(tuple(grid for size in entry.sizes for grid in self.processor.plot(*size).grids))
            except Exception as error:  # libraries raise different errors for sizes that they do not support
                found.append(None)
                self.leave_out(number, reason(error))
        return found

    def batches(self, size: int) -> list[list[int]]:
        """Batches of record numbers, similar sizes together, so that batches need little padding."""
        largest = [max(grids or (), default=(0, 0)) for grids in self.grids]
        order = sorted(range(len(largest)), key=lambda n: (largest[n][0] * largest[n][1], n))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def current(self, prediction: Prediction) -> bool:
        """Whether a saved answer is still about the record with its id: a row without an id is named by its line, which may change.

        This compares the reference, the sizes and digests of pictures and evidence, and whether the numbers of visual tokens are possible.
        """
        number = self.number[prediction.sample]
        entry, made_from = self.task.entries[number], self.task.made_from(number)
        grids, own = self.grids[number] or (), prediction.grids
        total, there = (sum(rows * columns for rows, columns in one) for one in (grids, own))
        return (
            (prediction.question.strip(), prediction.answer.strip()) == (entry.question.strip(), entry.answer.strip())
            and prediction.sizes in ((), tuple(tuple(size) for size in entry.sizes))
            and (not prediction.made_from or not made_from or prediction.made_from == made_from)
            and (own == grids or (prediction.plan.startswith(("downsample", "look-first")) and prediction.viewed == there))
            and (prediction.total, prediction.kept) == (total, len(prediction.keep))
            and max(prediction.keep, default=-1) < there
            and all(after < self.processor.config.text.num_hidden_layers for after, _ in prediction.cuts)
        )

    def load(self, number: int) -> LoadedRecord:
        """Loads a record, its pictures and its prompt. Raises: any error in one of them, before the record joins a batch."""
        record = self.task.source[number]
        pictures = [decode(image, f"picture {i + 1}") for i, image in enumerate(record.images)]
        question = question_text(record.question, self.task.suffix)
        plots = [self.processor.plot(*picture.size) for picture in pictures]
        if number not in self._checked:  # otherwise another plan has checked it
            self.processor.check(question, plots)
            self._checked.add(number)
        grids = tuple(grid for plot in plots for grid in plot.grids)
        return LoadedRecord(
            number, record, pictures, question, grids, evidence(record, [picture.size for picture in pictures], self.processor)
        )

    def loaded(self, numbers: Sequence[int]) -> Iterator[LoadedRecord]:
        """Loads the records that can be asked about; others are reported and left out."""
        for number in numbers:
            if self.task.entries[number].id not in self.left_out:
                try:
                    yield self.load(number)
                except Exception as error:  # pictures, tokenizers and templates may come from anywhere
                    self.leave_out(number, reason(error))

    def unanswered(self, predictions: Sequence[Prediction]) -> Mapping[str, str]:
        """The reason per row or record that is not answered under every plan, from any process."""
        answered, found = {p.sample for p in predictions}, dict(self.task.left_out)
        for number, entry in enumerate(self.task.entries):
            if entry.id not in answered:
                list(self.loaded([number]))
                found[entry.id] = self.left_out.get(entry.id, "another process could not answer it under every plan, and said why")
        return found
