"""Compiling ahead of the first request: every program is run once on empty inputs of every bucket."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine, Prefilled
from gp_jax.inference.requests import Batch
from gp_jax.inference.shared_programs import Kind, Parts, signature
from gp_jax.inference.walk import Route, Scores
from gp_jax.processing.layout import vision_input
from gp_jax.pruning.plan import SCORERS, Plan, needs_glimpse
from gp_jax.trees import Array, KeepLimits, Prefix, Sampling, Stream, VisionFeatures, VisionInput

T = TypeVar("T")


class Once(Parts):
    """Runs a program once for arguments of the same shapes, and answers later calls with what it gave then: values do not matter here."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.given: dict[tuple, Any] = {}

    def execute(self, program: Callable, function: Callable, kind: Kind | None, leaves: tuple, args: tuple, static: dict) -> Any:
        """Runs a program again only if another one has overwritten what it gave."""
        key = signature(program, kind, leaves, args, static)
        if key not in self.given or any(array.is_deleted() for array in jax.tree.leaves(self.given[key])):
            self.given[key] = super().execute(program, function, kind, leaves, args, static)
        return self.given[key]

    @contextlib.contextmanager
    def forgetting(self) -> Iterator[None]:
        """Lets go of what is given from here on, at the end."""
        before = set(self.given)
        yield
        for key in self.given.keys() - before:
            del self.given[key]


class WarmUp:
    """Takes the walk of requests on empty ones, over all rungs up to the given lengths."""

    def __init__(
        self,
        engine: Engine,
        plan: Plan,
        settings: Callable[[int], Sampling],
        batch: int,
        patches: int | None,
        prompt: int | None,
        new_tokens: int | None,
    ):
        """settings: of this many rows; batch, patches, prompt, new_tokens: the largest lengths; None: the ladder's end."""
        ladders, self.once = engine.ladders, Once(engine.mesh, engine.call.programs)
        self.engine = Engine(engine.model, ladders, engine.mesh, engine.attention, self.once)
        self.plan, self.settings = plan, settings
        self.decoded: set = set()  # shapes of caches whose decoding was compiled
        self.batches = ladders.batch.upto(batch)
        patch_rungs, self.prompt_rungs, self.decode_rungs = (
            ladder.rungs if most is None else ladder.upto(most)
            for ladder, most in ((ladders.patches, patches), (ladders.prompt, prompt), (ladders.decode, new_tokens))
        )
        self.patch_rungs = tuple(rung for rung in patch_rungs if engine.slots_of(rung))

    def run(self, progress: Callable[[list], Iterable] = iter) -> None:
        """Compiles everything. `progress` wraps the list of (batch, prompt rung) steps."""
        seen: dict[tuple[int, int], tuple[VisionInput, VisionFeatures]] = {}
        for batch, length in progress([(b, t) for b in self.batches for t in self.prompt_rungs]):
            self.once.given.clear()  # frees what other lengths gave
            for patches in self.patch_rungs:
                if (batch, patches) not in seen:
                    empty = self.engine.split(vision_input([], self.engine.config, batch, self.engine.slots_of(patches)), batch)
                    seen[batch, patches] = empty.without_pixels(), self.engine.see(empty, watch=self.engine.watch(self.plan))
            self.walk((), batch, length, None, None)  # a batch without images
            for patches in self.patch_rungs:
                if self.can_meet(patches, length):
                    self.walk(self.plan, batch, length, *seen[batch, patches])

    def can_meet(self, patches: int, length: int) -> bool:
        """Whether a sample of this patches rung can fit this prompt rung; window packing fills blocks more than half."""
        rungs, unit, block = self.engine.ladders.patches.rungs, self.engine.config.vision.merge_unit, self.engine.window
        below = rungs[rungs.index(patches) - 1] if patches != rungs[0] else 0
        return (below // unit // block - 1) * block // 2 < length

    def walk(self, plan: Plan, batch: int, length: int, vision: VisionInput | None, features: VisionFeatures | None) -> None:
        """An empty batch through all cuts, each in every bucket, and decoding."""
        engine, slots = self.engine, 0 if vision is None else vision.token_image.shape[1]
        empty = Batch([], plan, [], np.zeros(batch, np.int32), batch, slots)

        def finish(stream: Stream | None, logits: Array | None, scores: Scores) -> None:
            assert stream is not None, "a walk to the end"
            shapes = batch, tuple(kv.valid.shape for kv in stream.kv)
            if shapes in self.decoded:
                return
            self.decoded.add(shapes)
            self.decode(engine.prefix(Prefilled(empty, stream, logits, scores)))

        rows = engine.glimpse_rows if needs_glimpse(plan) else 0
        stream = engine.embed(engine.prompt([], batch, length, rows), features)
        rules = [self.rule(cut.scorer, batch, slots) for cut in plan]
        engine.walk(stream, Route(plan, rules, vision, features, self, finish))

    def decode(self, prefix: Prefix) -> None:
        """What follows a prompt whose caches have these lengths."""
        batch = prefix.logits.shape[0]
        for rung in self.decode_rungs:
            with self.once.forgetting():
                Rows.behind(self.engine, prefix, self.settings(batch), 1, np.zeros(batch, bool), rung).generate()

    def rule(self, scorer: str, batch: int, slots: int) -> tuple[KeepLimits, Array | None]:
        """A cut's numbers, which do not matter."""
        zeros = np.zeros(batch, np.int32)
        limits = KeepLimits(np.float32(0), zeros, zeros, zeros, zeros, np.zeros((batch, slots), bool))
        return self.engine.split((limits, np.zeros((batch, slots), np.float32) if SCORERS[scorer].given else None), batch)

    # The choice of a length behind a cut (see `walk.Choice`): all of them, one after another.

    def rungs(self, need: Array, length: int) -> Sequence[int]:
        """Every length that a request may go on with."""
        return self.engine.ladders.kept_rungs(length)

    def branch(self, need: Array, rungs: Sequence[int], rest: Callable[[int], T]) -> T:
        """Goes on with each. What the programs behind one give is let go before the next. Returns: what the last one gave."""
        for rung in rungs:
            with self.once.forgetting():
                last = rest(rung)
        return last
