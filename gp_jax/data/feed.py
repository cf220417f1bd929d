"""Loads the micro-batches of a schedule onto the devices: in the background with grain, in exact order, each host its own rows."""

import bisect
import dataclasses
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh

from gp_jax.data.collate import Shape, TrainSample, lengths, train_batch
from gp_jax.data.record import BadRecord, Source
from gp_jax.data.samples import SampleMaker
from gp_jax.data.schedule import Schedule
from gp_jax.errors import GlimpseError
from gp_jax.sharding import BATCH_AXES, batch_sharding


@dataclass(frozen=True)
class LoadedBatch:
    """This process's rows of a micro-batch, in host memory."""

    number: int
    shape: Shape
    batch: Any  # a `trees` batch, numpy
    rows: tuple[int, ...]  # their indices in the global batch
    bad: tuple[str, ...] = ()  # error messages of records that could not be read: their rows are empty


class LoadMicroBatch(grain.transforms.Map):
    """Reads, decodes and pads a micro-batch; runs in background threads or processes. A record that cannot be read leaves its row empty and
    counts as a loss of 0, on any number of hosts."""

    def __init__(self, sources: Sequence[Source], maker: SampleMaker, schedule: Schedule, rows: Sequence[int], accumulation: int):
        self.sources, self.maker, self.schedule = sources, maker, schedule
        self.rows, self.accumulation = tuple(rows), accumulation

    def map(self, number: int) -> LoadedBatch:
        planned = self.schedule[number]
        samples: list[TrainSample | None] = []
        bad: list[str] = []
        for member in (planned.members[row] for row in self.rows if row < len(planned.members)):
            try:
                samples.append(self.sample(*member, planned.shape))
            except BadRecord as error:
                samples.append(None)
                bad.append(str(error))
        before = number % self.accumulation * self.schedule.batch  # samples in the step's earlier micro-batches
        numbers = [before + row for row in self.rows]
        batch = train_batch(samples, self.maker.config, len(self.rows), planned.shape, self.maker.glimpse_rows, numbers)
        return LoadedBatch(number, planned.shape, batch, self.rows, tuple(bad))

    def sample(self, source: int, record: int, shape: Shape) -> TrainSample:
        """A record's training sample. Raises: BadRecord, also when it needs a larger shape than the schedule measured."""
        found = self.sources[source][record]
        sample = self.maker.make(found, self.schedule.sources[source].suffix)
        needs = lengths(sample.prompt.slots.size, sample.prompt.ids.size, sample.answer.size, self.maker.glimpse_rows)
        if needs.slots > shape.slots or needs.prompt > shape.prompt or needs.tail > shape.tail:
            raise BadRecord(f"record {found.id}: its pictures or texts are larger than the index of {self.sources[source].name} says")
        return sample


class Numbers(grain.sources.RandomAccessDataSource):
    """A data source whose element i is i itself."""

    def __init__(self, end: int):
        self.end = end

    def __len__(self) -> int:
        return self.end

    def __getitem__(self, number: int) -> int:
        return int(number)


def load(loader: grain.transforms.Map, start: int, end: int, *, threads: int, prefetch: int, workers: int) -> Iterator[LoadedBatch]:
    """Micro-batches start .. end-1 in order, loaded ahead. workers: processes; 0: threads only."""
    data = grain.MapDataset.source(Numbers(end)).slice(slice(start, None)).map(loader)
    if workers:
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl.app.run parses
            flags.FLAGS.mark_as_parsed()
        stream = data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads))
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=max(1, prefetch // workers))
        return iter(stream.mp_prefetch(options, start_worker))
    return iter(data.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))


def start_worker(number: int, count: int) -> None:
    """Starts a loading process. It ignores signals that are sent to the whole process group: the training process handles them, still needs
    loaded batches until it stops, and ends its workers itself. When the training process dies, this one exits too."""
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, signal.SIG_IGN)

    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a loading process"

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()


def local_rows(mesh: Mesh | None, batch: int) -> tuple[int, ...]:
    """Rows of a global batch that this process's devices hold, ascending; on a TPU torus they need not be consecutive.

    Raises: GlimpseError when the batch does not divide evenly: every device would then compute the whole batch.
    """
    if mesh is None:
        return tuple(range(batch))
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch % parts:
        raise GlimpseError(
            f"batch_size={batch} is not a multiple of data x fsdp = {parts} devices: each would compute all of it "
            f"(e.g. --batch-size {parts}, with --accumulation as many times smaller)"
        )
    indices = batch_sharding(mesh, batch).addressable_devices_indices_map((batch,)).values()
    return tuple(sorted({row for index in indices if index is not None for row in range(batch)[index[0]]}))


class Placer:
    """Makes global arrays of the rows that each host has loaded."""

    def __init__(self, mesh: Mesh | None, batch: int):
        self.mesh, self.batch = mesh, batch

    def _place(self, local: np.ndarray, rows: Sequence[int], axis: int = 0) -> jax.Array:
        shape = (*local.shape[:axis], self.batch, *local.shape[axis + 1 :])
        sharding = batch_sharding(self.mesh, self.batch, axis)

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every array has a sample axis"
            wanted = range(self.batch)[index[axis]]  # consecutive rows, hence consecutive among this process's rows too
            low = bisect.bisect_left(rows, wanted.start)
            return local[(*index[:axis], slice(low, low + len(wanted)), *index[axis + 1 :])]

        return jax.make_array_from_callback(shape, sharding, part)

    def __call__(self, tree: Any, rows: Sequence[int]) -> Any:
        """A global batch, or a part of one. The sample axis is 1 in `positions` and 0 in all other arrays."""

        def place(name: str, value: Any) -> Any:
            return self(value, rows) if dataclasses.is_dataclass(value) else self._place(value, rows, 1 if name == "positions" else 0)

        return type(tree)(**{field.name: place(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree)})
