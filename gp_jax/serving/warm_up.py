"""Compiles every program of a server before it takes requests: prefill of every plan, and what every pool does at each of its sizes."""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import jax
import numpy as np

from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine
from gp_jax.inference.requests import sampling_settings
from gp_jax.inference.warmup import WarmUp
from gp_jax.processing.layout import vision_input
from gp_jax.pruning.plan import Plan
from gp_jax.serving.jobs import BEST
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.pools import widened
from gp_jax.serving.vision_cache import paste
from gp_jax.trees import Prefix, VisionFeatures

Bar = Callable[[list], Iterable]


class PrefillWarmUp(WarmUp):
    """Prefill of one plan. Instead of decoding, caches are brought to the lengths of all pools that can hold them.

    prefixes: by capacity, a prompt at this length."""

    def __init__(self, engine: Engine, lengths: Lengths, plan: Plan, settings: Callable):
        reader = Engine(engine.model, lengths.ladders, engine.mesh, engine.attention, engine.call)
        super().__init__(reader, plan, settings, 1, None, None, None)
        self.capacities, self.prefixes, self.rows_engine = lengths.capacities, dict[int, Prefix](), engine

    def decode(self, prefix: Prefix) -> None:
        need = max(layer.valid.shape[1] for layer in prefix.kv)
        for capacity in self.capacities:
            if capacity >= need:
                self.prefixes.setdefault(capacity, dataclasses.replace(prefix, kv=widened(self.engine, prefix.kv, capacity)))


def warm_up(engine: Engine, lengths: Lengths, plans: Iterable[Plan], pictures: int, bar: Bar = iter) -> None:
    """Compiles everything. plans: all that requests may have, the empty one among them; pictures: most of a request; bar: wraps a list
    of steps."""
    settings = partial(sampling_settings, engine.config, 0.0, 0, 1.0, 0, "auto")
    prefixes: dict[int, Prefix] = {}
    for plan in plans:
        prefill = PrefillWarmUp(engine, lengths, plan, settings)
        prefill.run(bar)
        prefixes |= prefill.prefixes
        if pictures > 1 and prefill.patch_rungs:
            _pasting(prefill)
    for capacity, sizes in bar(list(zip(lengths.capacities, lengths.sizes, strict=True))):
        _pool(engine, prefixes[capacity], capacity, sizes, lengths.slots, settings())


def _pool(engine: Engine, prefix: Prefix, capacity: int, sizes: tuple[int, ...], slots: int, settings: Any) -> None:
    """A pool's programs: each size becomes those that may follow it, with rows that were inserted, have generated and were freed."""
    layers = engine.config.text.num_hidden_layers

    def use(rows: Rows) -> None:
        for _ in range(2):  # what a program gives may be laid out in another way than what it took at first
            rows.insert(prefix, 0, settings, 1)
            rows.generate()
            rows.free(0)
            for more in ((), ("logprobs",), ("logprobs", "best")):
                rows.read("tokens", "step", "done", "broken", *more)

    for number, size in enumerate(sizes):
        use(Rows.empty(engine, size, [capacity] * layers, slots, logprobs=True, best=BEST))
        for other in sizes[: number + 2]:  # a pool grows by one size, and shrinks to any
            if other != size:
                rows = Rows.empty(engine, size, [capacity] * layers, slots, logprobs=True, best=BEST)
                rows.insert(prefix, 0, settings, 1)
                rows.resize([0] + [-1] * (other - 1))
                use(rows)


def _pasting(prefill: PrefillWarmUp) -> None:
    """Pictures of every size on prompts of every size. One picture fills at most what the prompt has."""
    engine = prefill.engine
    first = prefill.patch_rungs[0]
    empty = engine.split(vision_input([], engine.config, 1, engine.slots_of(first)), 1)
    like = engine.see(empty, watch=engine.watch(prefill.plan))
    rungs = sorted({engine.slots_of(rung) for rung in prefill.patch_rungs})

    def features(slots: int) -> VisionFeatures:
        def of(x: Any) -> Any:
            return np.zeros((1, slots, *x.shape[2:]), x.dtype) if x.ndim > 1 else x

        return engine.split(jax.tree.map(of, like), 1)

    for slots in rungs:
        source = engine.place(np.full(slots, -1, np.int32))
        for own in rungs:
            if own <= slots:
                page = prefill.rows_engine.call(paste, None, features(own), source, slots=slots)
                prefill.rows_engine.call(paste, page, features(own), source, slots=slots)
