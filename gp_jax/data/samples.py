"""Records to training samples: chat template, tokens, pictures, evidence. Host only; picklable for worker processes."""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import numpy as np

from gp_jax.data.collate import TrainSample, lengths
from gp_jax.data.masks import evidence
from gp_jax.data.record import Entry, Record
from gp_jax.data.schedule import Length
from gp_jax.errors import GlimpseError
from gp_jax.images import decode
from gp_jax.layout import pack_windows, read_samples
from gp_jax.processing import Processor

TOKENIZED_AT_ONCE = 2048


def question_text(question: str, suffix: str) -> str:
    """The question as the model reads it."""
    return f"{question}\n{suffix}" if suffix else question


class SampleMaker:
    """Makes what the training step needs of a record, and says beforehand how long it will be."""

    def __init__(self, processor: Processor, glimpse_rows: int, max_visual_tokens: int | None = None, released_boxes: bool = False):
        """Args: max_visual_tokens: larger pictures are scaled down to this many visual tokens per picture; released_boxes: see
        `masks.evidence`."""
        self.released_boxes = released_boxes
        self.processor = processor.limited(max_visual_tokens) if max_visual_tokens else processor
        self.config, self.glimpse_rows = processor.config, glimpse_rows

    @cached_property
    def _end(self) -> int:
        """The token that ends an answer."""
        tokenizer = self.processor.tokenizer
        end = tokenizer.eos_token_id if tokenizer is not None else None
        if end is None:
            end = next(iter(self.config.eos_token_ids), None)
        if end is None:
            raise GlimpseError("the model has no end-of-sequence token: answers could not end")
        return end

    def _texts(self, entries: Sequence[Entry], suffix: str) -> tuple[list[str], list[str]]:
        prompts = [self.processor.chat(len(entry.sizes), question_text(entry.question, suffix)) for entry in entries]
        return prompts, [entry.answer.strip() for entry in entries]

    def measure(self, entries: Sequence[Entry], suffix: str, progress: Callable[[Iterable], Iterable] = iter) -> list[Length]:
        """Lengths of records, without their pictures."""
        found: list[Length] = []
        for start in progress(range(0, len(entries), TOKENIZED_AT_ONCE)):
            part = entries[start : start + TOKENIZED_AT_ONCE]
            prompts, answers = self._texts(part, suffix)
            tokenize = self.processor.tokenize
            for entry, prompt, answer in zip(part, tokenize(prompts), tokenize(answers, prompts=False), strict=True):
                plots = [self.processor.plot(width, height) for width, height in entry.sizes]
                visual = sum(rows * columns for plot in plots for rows, columns in plot.grids)
                slots = pack_windows([grid for plot in plots for grid in plot.seen], self.config.vision.window_side)[0].size
                tokens, rows = len(answer) + 1, sum(plot.rows.size for plot in plots)
                shape = lengths(slots, len(prompt) - len(plots) + rows, tokens, self.glimpse_rows)
                found.append(Length(shape, tokens, visual))
        return found

    def make(self, record: Record, suffix: str = "") -> TrainSample:
        """A record's training sample. Raises: GlimpseError that names the record."""
        try:
            images = [decode(encoded, f"picture {i + 1}") for i, encoded in enumerate(record.images)]
            prepared = self.processor([images], [question_text(record.question, suffix)])
            answer = self.processor.tokenize([record.answer.strip()], prompts=False)[0]
            prompt = read_samples(self.config, **prepared.inputs)[0]
            parts = evidence(record, [image.size for image in images], self.processor, self.released_boxes)
        except GlimpseError as error:
            raise GlimpseError(f"record {record.id}: {error}") from error
        reference = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, bool)
        return TrainSample(prompt, np.array([*answer, self._end], np.int32), reference)
