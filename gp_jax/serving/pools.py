"""Pools of rows by capacity, in one memory budget.

A pool holds rows whose prompts have at most `capacity` rows of cache. It has one of a few sizes, for each of which its programs are
compiled ahead. It grows when a request finds no place in it, and shrinks when another pool needs the memory, or when it has been half
empty for a while: a step over fewer rows is cheaper. So the budget follows what is asked for.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax

from gp_jax.inference import sampling
from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine
from gp_jax.serving.jobs import BEST, Job
from gp_jax.serving.lengths import Lengths
from gp_jax.trees import LayerKV, Prefix

PATIENCE = 64  # visits that a pool may be half empty


def widened(engine: Engine, kv: Sequence[LayerKV], capacity: int) -> tuple[LayerKV, ...]:
    """Caches at one length. Layers of one length share a program. On a mesh all of them take it, so that all are split alike."""
    same = engine.mesh is None
    return tuple(
        layer if same and layer.valid.shape[1] == capacity else engine.call(sampling.widened, layer, length=capacity) for layer in kv
    )


class Pool:
    """Rows of one capacity. jobs: per place who has it."""

    def __init__(self, engine: Engine, capacity: int, slots: int, sizes: Sequence[int], place: int):
        """sizes: ascending; place: bytes of one place."""
        self.engine, self.capacity, self.slots, self.sizes, self.place = engine, capacity, slots, sizes, place
        self.rows: Rows | None = None
        self.jobs: list[Job | None] = []
        self.calm = 0  # visits in a row in which a smaller size would do

    @property
    def size(self) -> int:
        """Places."""
        return len(self.jobs)

    @property
    def running(self) -> list[tuple[int, Job]]:
        """Places that are taken, and by whom."""
        return [(place, job) for place, job in enumerate(self.jobs) if job is not None]

    @property
    def next_size(self) -> int | None:
        """The size above this one."""
        return next((size for size in self.sizes if size > self.size), None)

    @property
    def torn(self) -> bool:
        """Whether a program that failed has left arrays behind that cannot be used."""
        if self.rows is None:
            return bool(self.jobs)
        arrays = jax.tree.leaves((self.rows.kv, self.rows.state))
        return not self.rows.kv or self.rows.prompts != self.size or any(array.is_deleted() for array in arrays)

    def least_size(self) -> int:
        """The smallest size that holds what is running; 0 when nothing is."""
        count = len(self.running)
        return next(size for size in (0, *self.sizes) if size >= count)

    def resize(self, size: int) -> None:
        """Takes another size; running rows move to the front."""
        taken = self.running
        places = [place for place, _ in taken] + [-1] * (size - len(taken))
        if size == 0:
            self.rows = None
        elif self.rows is None:
            lengths = [self.capacity] * self.engine.config.text.num_hidden_layers
            self.rows = Rows.empty(self.engine, size, lengths, self.slots, logprobs=True, best=BEST)
        else:
            self.rows.resize(places)
        self.jobs = [*(job for _, job in taken), *[None] * (size - len(taken))]
        self.calm = 0

    def widen(self, prefix: Prefix) -> Prefix:
        """A prompt's caches at the length of this pool."""
        return dataclasses.replace(prefix, kv=widened(self.engine, prefix.kv, self.capacity))

    def insert(self, job: Job, prefix: Prefix) -> int:
        """Puts a request in a free place. Returns: the place."""
        assert self.rows is not None, "a pool with a free place"
        place = self.jobs.index(None)
        self.rows.insert(self.widen(prefix), place, job.settings, job.max_new_tokens)
        self.jobs[place] = job
        return place

    def free(self, place: int) -> None:
        """Ends a row and frees its place."""
        assert self.rows is not None, "a pool with rows"
        self.jobs[place] = None
        self.rows.free(place)

    def drop(self) -> list[Job]:
        """Forgets all rows, whose arrays may be unusable. Returns: the requests that lose them."""
        lost = [job for _, job in self.running]
        self.rows, self.jobs = None, []
        return lost


class Pools:
    """All pools of a server."""

    def __init__(self, engine: Engine, lengths: Lengths):
        parts = zip(lengths.capacities, lengths.sizes, lengths.place, strict=True)
        self.pools = [Pool(engine, capacity, lengths.slots, sizes, place) for capacity, sizes, place in parts]
        self.budget = lengths.budget

    def __iter__(self) -> Iterator[Pool]:
        return iter(self.pools)

    @property
    def held(self) -> int:
        """Bytes of all pools."""
        return sum(pool.size * pool.place for pool in self.pools)

    @property
    def used(self) -> int:
        """Bytes of the places that are taken."""
        return sum(len(pool.running) * pool.place for pool in self.pools)

    @property
    def running(self) -> int:
        """Requests that are being answered."""
        return sum(len(pool.running) for pool in self.pools)

    def find(self, prefix: Prefix) -> Pool | None:
        """A pool with a free place for this prompt, after what has to grow and shrink; None: there is no room now.

        A running pool of the next capacity is joined before an idle one is begun: one step over more rows costs less than two steps.
        """
        need = max(layer.valid.shape[1] for layer in prefix.kv)
        fitting = [pool for pool in self.pools if pool.capacity >= need]
        own, others = fitting[0], fitting[1:]
        if None in own.jobs:
            return own
        if not own.size and others and others[0].running and None in others[0].jobs:
            return others[0]
        if self._grow(own):
            return own
        for pool in others:
            if None in pool.jobs:
                return pool
        return None

    def _grow(self, pool: Pool) -> bool:
        """Lets a pool grow by a size, at the cost of places that others do not use. Returns: whether there is memory for it."""
        size = pool.next_size
        if size is None:
            return False
        needed = (size - pool.size) * pool.place
        if self.held + needed > self.budget:
            for other in self.pools:
                if other is not pool and other.least_size() < other.size:
                    other.resize(other.least_size())
        if self.held + needed > self.budget:
            return False
        pool.resize(size)
        return True

    def settle(self) -> None:
        """Called at every visit: pools that have been half empty for long shrink."""
        for pool in self.pools:
            least = pool.least_size()
            pool.calm = pool.calm + 1 if least < pool.size else 0
            if pool.calm > PATIENCE and least:
                pool.resize(least)
