"""The order of training: which records form which micro-batch, in which shape. Only index arithmetic, equal on every host.

All hosts plan the same global micro-batches and each loads its own rows, so shapes agree without communication. The position in the
data is one number, that of the micro-batch, and a run resumes exactly from it.
"""

import bisect
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gp_jax.data.collate import Shape
from gp_jax.data.sampling import mixture, sample
from gp_jax.data.settings import DataSource
from gp_jax.data.shapes import bucket_of, fit_shapes, padding
from gp_jax.errors import GlimpseError


@dataclass(frozen=True)
class Length:
    """The lengths of a record."""

    shape: Shape
    answer: int  # answer tokens
    visual: int  # visual tokens


@dataclass(frozen=True)
class MicroBatch:
    """members: (source, record) pairs, at most the batch size; the other rows are padding."""

    shape: Shape
    members: tuple[tuple[int, int], ...]


class Schedule:
    """An endless sequence of micro-batches, epoch after epoch; `schedule[number]` is one of them."""

    def __init__(
        self, sources: Sequence[DataSource], lengths: Sequence[Sequence[Length | str]], *, batch: int, shapes: int, window: int, seed: int
    ):
        """Args: lengths: per source and record; a text says why a record is left out; batch: samples of a micro-batch; shapes: number of
        buckets at most; window: vision slots of an attention window."""
        self.sources, self.lengths, self.batch, self.seed = sources, lengths, batch, seed
        self.members: list[np.ndarray] = []
        self.left_out: dict[str, list[tuple[int, int]]] = {}  # reason -> (source, record) pairs
        for number, (source, own) in enumerate(zip(sources, lengths, strict=True)):
            chosen = sample(len(own), source.sampling, source.seed)
            self.members.append(np.array([i for i in chosen if isinstance(own[i], Length)], int))
            for record in chosen:
                if not isinstance(own[record], Length):
                    self.left_out.setdefault(own[record], []).append((number, int(record)))
        needs = [lengths[s][i].shape for s, own in enumerate(self.members) for i in own]
        if not needs:
            reasons = "; ".join(f"{len(records)} are left out because {reason}" for reason, records in self.left_out.items())
            raise GlimpseError(f"no record is left of {', '.join(f'{s.path} ({s.split})' for s in sources)}: {reasons or 'there is none'}")
        for source, members in zip(sources, self.members, strict=True):
            if source.weight is not None and not members.size:  # records of other sources would be repeated in its place
                raise GlimpseError(f"data source {source.path} ({source.split}): weight={source.weight}, but none of its records is left")
        self.buckets = fit_shapes(needs, shapes, window)
        self.padding = padding(needs, self.buckets)
        self.samples = len(needs)
        self._starts = [0]  # number of the first micro-batch of every epoch that has been planned
        self._plans: dict[int, list[MicroBatch]] = {}
        self._lock = threading.RLock()  # loading threads use the schedule too

    def __getstate__(self) -> dict:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.RLock())

    def _length(self, source: int, record: int) -> Length:
        """The length of a record that is not left out."""
        length = self.lengths[source][record]
        assert isinstance(length, Length), "members have lengths"
        return length

    def _epoch(self, epoch: int) -> list[MicroBatch]:
        """The micro-batches of an epoch; the newest two plans are kept."""
        with self._lock:
            if epoch not in self._plans:
                self._plans[epoch] = self._plan(epoch)
                while len(self._plans) > 2:
                    del self._plans[next(iter(self._plans))]
            return self._plans[epoch]

    def _plan(self, epoch: int) -> list[MicroBatch]:
        """Plans an epoch: records join the queue of their bucket, and a full queue is a micro-batch. The remaining records of all queues
        share micro-batches in larger buckets."""
        queues: dict[Shape, list] = {bucket: [] for bucket in self.buckets}
        planned = []
        for source, record in mixture(self.members, self.sources, self.seed, epoch):
            bucket = bucket_of(self._length(source, record).shape, self.buckets)
            queues[bucket].append((source, record))
            if len(queues[bucket]) == self.batch:
                planned.append(MicroBatch(bucket, tuple(queues[bucket])))
                queues[bucket] = []
        rest = sorted((self._length(s, r).shape.prompt, s, r) for queue in queues.values() for s, r in queue)
        while rest:  # the longest records together
            group, rest = rest[-self.batch :], rest[: -self.batch]
            shapes = [bucket_of(self._length(s, r).shape, self.buckets) for _, s, r in group]
            largest = next(b for b in self.buckets[::-1] if b in shapes)
            if all(b.slots <= largest.slots and b.tail <= largest.tail for b in shapes):
                planned.append(MicroBatch(largest, tuple((s, r) for _, s, r in group)))
            else:
                planned += [MicroBatch(b, ((s, r),)) for b, (_, s, r) in zip(shapes, group, strict=True)]
        return planned

    def epoch_end(self, epochs: int) -> int:
        """Number of micro-batches in the first `epochs` epochs."""
        with self._lock:
            while len(self._starts) <= epochs:
                self._starts.append(self._starts[-1] + len(self._epoch(len(self._starts) - 1)))
            return self._starts[epochs]

    def __getitem__(self, number: int) -> MicroBatch:
        epoch = max(0, bisect.bisect_right(self._starts, number) - 1)
        while self.epoch_end(epoch + 1) <= number:
            epoch += 1
        return self._epoch(epoch)[number - self._starts[epoch]]

    def counts(self, numbers: Sequence[int]) -> tuple[int, int]:
        """Number of answer tokens, and of samples with visual tokens, in these micro-batches: the denominators of a step's losses."""
        own = [self._length(s, r) for number in numbers for s, r in self[number].members]
        return sum(length.answer for length in own), sum(length.visual > 0 for length in own)

    def tokens(self, number: int) -> int:
        """Number of prompt and answer tokens in a micro-batch, without padding."""
        own = [self._length(s, r) for s, r in self[number].members]
        return sum(length.shape.prompt + length.shape.tail for length in own)
