"""Makes training samples of records: chat template, tokens, pictures, evidence. On the host only; picklable for worker processes."""

import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from gp_jax.data.collate import TrainSample, lengths
from gp_jax.data.formats import LONGEST
from gp_jax.data.masks import evidence, known
from gp_jax.data.record import BadRecord, Entry, Record
from gp_jax.data.schedule import Length
from gp_jax.errors import GlimpseError, one_line, reason, some
from gp_jax.processing.images import decode
from gp_jax.processing.layout import read_samples
from gp_jax.processing.looks import FirstSize, first_look, first_plots
from gp_jax.processing.qwen import Processor
from gp_jax.processing.windows import pack_windows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZED_AT_ONCE = 2048


@dataclass(frozen=True)
class LookSizes:
    """Which records are seen at the size of a first look: a share of them, at one of several shares of their visual tokens. It depends on
    a record's id alone, so that every epoch, process and stage agrees."""

    records: float
    shares: tuple[float, ...]
    least: int
    seed: int

    def of(self, name: str) -> FirstSize | None:
        """The size of a first look for the record with this id; None: its pictures are seen as they are."""
        random = np.random.default_rng([self.seed, zlib.crc32(name.encode("utf-8", "replace"))])
        if random.random() >= self.records:
            return None
        return FirstSize(self.shares[random.integers(len(self.shares))], None, self.least)


def question_text(question: str, suffix: str) -> str:
    """The question with its suffix on a line of its own."""
    return f"{question}\n{suffix}" if suffix else question


class SampleMaker:
    """Makes training samples of records, and measures their lengths without reading pictures."""

    def __init__(
        self,
        processor: Processor,
        glimpse_rows: int,
        max_visual_tokens: int | None = None,
        released_boxes: bool = False,
        looks: LookSizes | None = None,
    ):
        """Args: max_visual_tokens: larger pictures are scaled down to this many visual tokens per picture; released_boxes: see
        `masks.evidence`; looks: which records are seen at the size of a first look, None: none."""
        self.released_boxes, self.looks = released_boxes, looks
        self.processor = processor.limited(max_visual_tokens) if max_visual_tokens else processor
        self.config, self.glimpse_rows = processor.config, glimpse_rows
        self._framings: dict[int, Counter[int]] = {}  # by number of pictures

    @property
    def _tokenizer(self) -> "PreTrainedTokenizerBase":
        tokenizer = self.processor.tokenizer
        assert tokenizer is not None, "samples are made of tokens"
        return tokenizer

    @cached_property
    def _end(self) -> int:
        """The token that ends an answer."""
        tokenizer = self.processor.tokenizer
        end = tokenizer.eos_token_id if tokenizer is not None else None
        if end is None:
            end = next(iter(self.config.eos_token_ids), None)
        if end is None:
            raise GlimpseError("the model has no end-of-sequence token: answers would have no end")
        return end

    @cached_property
    def _own(self) -> frozenset[int]:
        """Tokens that structure a conversation: the special tokens of a rendered prompt, picture placeholders and ends of answers.
        No question and no answer may contain one. The special tokens of other models are plain text here."""
        prompt, tokenizer = self.processor.tokenize([self.processor.chat(1, "?")])[0], self._tokenizer
        special = {*tokenizer.all_special_ids, *(id for id, token in tokenizer.added_tokens_decoder.items() if token.special)}
        pictures = (self.config.image_token_id, self.config.video_token_id)
        own = (*(set(prompt) & special), *pictures, *self.config.eos_token_ids, self._end)
        return frozenset(token for token in own if token is not None)

    def _framing(self, images: int) -> Counter[int]:
        """How often each of these tokens occurs in a prompt with this number of pictures."""
        if images not in self._framings:
            prompt = self.processor.tokenize([self.processor.chat(images, "?")])[0]
            self._framings[images] = Counter(token for token in prompt if token in self._own)
        return self._framings[images]

    def _fault(self, prompt: Sequence[int], answer: Sequence[int], images: int) -> str | None:
        """Why these tokens of a prompt and an answer cannot be trained on; None when they can."""
        found = Counter(token for token in prompt if token in self._own)
        for part, wrong in (("question", found - self._framing(images)), ("answer", Counter(t for t in answer if t in self._own))):
            if wrong:
                token, tokenizer = next(iter(wrong)), self._tokenizer
                name = tokenizer.convert_ids_to_tokens(token) if 0 <= token < len(tokenizer) else "of a picture"
                return f"its {part} holds the model's own token {name}"
        if max([*answer, *(token for token in prompt if token != self.config.image_token_id)]) >= self.config.text.vocab_size:
            return "it becomes tokens that are not in the model's vocabulary"
        return None

    def measure(
        self, entries: Sequence[Entry], suffix: str, progress: Callable[[Iterable], Iterable] = iter, strict: bool = True
    ) -> list[Length | str]:
        """Lengths of records, without reading their pictures. strict: a record that cannot be trained on is an error; otherwise the reason
        is returned in place of its length.

        Raises: GlimpseError that names the first few such records.
        """
        found: list[Length | str] = []
        for start in progress(range(0, len(entries), TOKENIZED_AT_ONCE)):
            part = entries[start : start + TOKENIZED_AT_ONCE]
            try:
                found += self._measure(part, suffix)
            except GlimpseError:  # one of the records is at fault: find it
                found += [self._measure_one(entry, suffix) for entry in part]
        bad = [f"{entry.id} ({length})" for entry, length in zip(entries, found, strict=True) if isinstance(length, str)]
        if bad and strict:
            raise GlimpseError(f"{len(bad)} of {len(entries)} records cannot be trained on: {some(bad)}")
        return found

    def _measure_one(self, entry: Entry, suffix: str) -> Length | str:
        try:
            return self._measure([entry], suffix)[0]
        except GlimpseError as error:
            return one_line(error)

    def _measure(self, entries: Sequence[Entry], suffix: str) -> list[Length | str]:
        short = [entry for entry in entries if max(len(entry.question), len(entry.answer)) <= LONGEST]
        prompts = [self.processor.chat(len(entry.sizes), question_text(entry.question, suffix)) for entry in short]
        answers, tokenize = [entry.answer.strip() for entry in short], self.processor.tokenize
        found: list[Length | str] = []
        tokens = zip(tokenize(prompts), tokenize(answers, prompts=False), strict=True) if short else iter(())
        for entry in entries:
            if max(len(entry.question), len(entry.answer)) > LONGEST:
                found.append(f"it has more than {LONGEST} characters")
                continue
            prompt, answer = next(tokens)
            if fault := self._fault(prompt, answer, len(entry.sizes)):
                found.append(fault)
                continue
            plots = [self.processor.plot(width, height) for width, height in entry.sizes]
            if size := self.looks.of(entry.id) if self.looks else None:
                plots = first_plots(self.config, plots, size) or plots
            visual = sum(rows * columns for plot in plots for rows, columns in plot.grids)
            slots = pack_windows([grid for plot in plots for grid in plot.seen], self.config.vision.window_side)[0].size
            rows = sum(plot.rows.size for plot in plots)
            shape = lengths(slots, len(prompt) - len(plots) + rows, len(answer) + 1, self.glimpse_rows)
            found.append(Length(shape, len(answer) + 1, visual))
        return found

    def make(self, record: Record, suffix: str = "") -> TrainSample:
        """A record's training sample. Raises: BadRecord that names the record."""
        try:
            images = [decode(encoded, f"picture {i + 1}") for i, encoded in enumerate(record.images)]
            prepared = self.processor([images], [question_text(record.question, suffix)])
            answer = self.processor.tokenize([record.answer.strip()], prompts=False)[0]
            prompt = read_samples(self.config, **prepared.inputs)[0]
            size, grids, views = self.looks.of(record.id) if self.looks else None, None, 1
            if size and (short := first_look(self.config, prompt, size)):
                prompt, views = short, 1 + self.config.vision.overviews  # an overview stands for both views of a picture
                grids = [grid for grid in short.grids for _ in range(views)]
            places = ([image.size for image in images], self.processor)
            parts = evidence(record, *places, self.released_boxes, grids)[::views]
            told = known(record, *places, grids)[::views] if any(record.masks) else []
        except (OSError, MemoryError):
            raise
        except Exception as error:  # whatever is wrong with one record, the run continues without it
            raise BadRecord(f"record {record.id}: {reason(error)}") from error
        reference = np.concatenate([part.reshape(-1) for part in parts]) if parts else np.zeros(0, bool)
        sure = np.concatenate([part.reshape(-1) for part in told]) if told else None
        return TrainSample(prompt, np.array([*answer, self._end], np.int32), reference, sure)
