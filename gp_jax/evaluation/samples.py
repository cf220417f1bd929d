"""A task's records as the model is asked about them. One that cannot be asked is named, counted and left out; the rest goes on."""

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

    grids: (rows, columns) of the visual tokens of its pictures as they are; evidence: a mask over each.
    """

    number: int
    record: Record
    pictures: list[Image.Image]
    question: str
    grids: tuple[tuple[int, int], ...]
    evidence: list[np.ndarray]

    @property
    def reference(self) -> list[np.ndarray]:
        """What the plan "oracle" keeps: the evidence, or everything where there is none."""
        return self.evidence if any(mask.any() for mask in self.evidence) else [np.ones_like(mask) for mask in self.evidence]


class Samples:
    """left_out: why, by id, for records that this process could not ask about."""

    def __init__(self, processor: Processor, task: Task):
        self.processor, self.task = processor, task
        self.number = {entry.id: number for number, entry in enumerate(task.entries)}
        self.left_out: dict[str, str] = {}
        self._checked: set[int] = set()

    def say(self, line: str) -> None:
        """A line from the first process."""
        if jax.process_index() == 0:
            tqdm.write(printable(f"{self.task.name}: {line}"))

    def leave_out(self, number: int, why: str) -> None:
        """Names a record that cannot be asked about."""
        name = self.task.entries[number].id
        self.left_out[name] = why
        tqdm.write(printable(f"{self.task.name}: {name} is left out: {why}"))

    @cached_property
    def grids(self) -> list[tuple[tuple[int, int], ...] | None]:
        """Of every record's pictures, (rows, columns) of visual tokens, by their sizes; None where they cannot be (and are left out)."""
        found = []
        for number, entry in enumerate(self.task.entries):
            try:
                found.append(tuple(grid for size in entry.sizes for grid in self.processor.plot(*size).grids))
            except Exception as error:  # a library's own errors on sizes that it cannot use
                found.append(None)
                self.leave_out(number, reason(error))
        return found

    def batches(self, size: int) -> list[list[int]]:
        """Record numbers, equal sizes together: batches need little padding."""
        largest = [max(grids or (), default=(0, 0)) for grids in self.grids]
        order = sorted(range(len(largest)), key=lambda n: (largest[n][0] * largest[n][1], n))
        return [order[start : start + size] for start in range(0, len(order), size)]

    def current(self, prediction: Prediction) -> bool:
        """Whether a saved answer is about the record of that id as it is now: rows without an id of their own are called by their line.

        Its reference, its pictures' sizes, where they and their evidence came from, and numbers of visual tokens that can be count too.
        """
        number = self.number[prediction.sample]
        entry, made_from = self.task.entries[number], self.task.made_from(number)
        grids, own = self.grids[number] or (), prediction.grids
        total, there = (sum(rows * columns for rows, columns in one) for one in (grids, own))
        return (
            (prediction.question.strip(), prediction.answer.strip()) == (entry.question.strip(), entry.answer.strip())
            and prediction.sizes in ((), tuple(tuple(size) for size in entry.sizes))
            and (not prediction.made_from or not made_from or prediction.made_from == made_from)
            and (own == grids or (prediction.plan.startswith("downsample") and prediction.kept == there))
            and (prediction.total, prediction.kept) == (total, len(prediction.keep))
            and max(prediction.keep, default=-1) < there
            and all(after < self.processor.config.text.num_hidden_layers for after, _ in prediction.cuts)
        )

    def load(self, number: int) -> LoadedRecord:
        """A record, its pictures and its prompt. Raises: whatever is wrong with any of them, found before it joins a batch."""
        record = self.task.source[number]
        pictures = [decode(image, f"picture {i + 1}") for i, image in enumerate(record.images)]
        question = question_text(record.question, self.task.suffix)
        plots = [self.processor.plot(*picture.size) for picture in pictures]
        if number not in self._checked:  # by another plan
            self.processor.check(question, plots)
            self._checked.add(number)
        grids = tuple(grid for plot in plots for grid in plot.grids)
        return LoadedRecord(
            number, record, pictures, question, grids, evidence(record, [picture.size for picture in pictures], self.processor)
        )

    def loaded(self, numbers: Sequence[int]) -> Iterator[LoadedRecord]:
        """Those that can be asked about; others are named and left out."""
        for number in numbers:
            if self.task.entries[number].id not in self.left_out:
                try:
                    yield self.load(number)
                except Exception as error:  # pictures, tokenizers and templates of strangers
                    self.leave_out(number, reason(error))

    def unanswered(self, predictions: Sequence[Prediction]) -> Mapping[str, str]:
        """Why, per row and record without an answer under every plan, whichever process found out."""
        answered, found = {p.sample for p in predictions}, dict(self.task.left_out)
        for number, entry in enumerate(self.task.entries):
            if entry.id not in answered:
                list(self.loaded([number]))
                found[entry.id] = self.left_out.get(entry.id, "another process could not answer it under every plan, and said why")
        return found
