"""Compiling ahead of the first request: every program is run once on empty inputs of every bucket."""

from collections.abc import Callable, Iterator

import numpy as np

from gp_jax.inference.decoding import Rows
from gp_jax.inference.engine import Engine, Prefilled
from gp_jax.processing.layout import vision_input
from gp_jax.pruning.plan import Plan, merges
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.trees import KeepLimits, Sampling, Stream


class WarmUp:
    """Walks the stages as `Engine.prefill` and `Engine.decode` do, over all rungs up to the given lengths."""

    def __init__(
        self, engine: Engine, plan: Plan, settings: Callable[[int], Sampling], *, batch: int, patches: int, prompt: int, new_tokens: int
    ):
        ladders = engine.ladders
        self.engine, self.plan, self.settings = engine, plan, settings
        self.batches = ladders.batch.upto(batch)
        self.patch_rungs = tuple(rung for rung in ladders.patches.upto(patches) if engine.slots_of(rung))
        self.prompt_rungs, self.decode_rungs = ladders.prompt.upto(prompt), ladders.decode.upto(new_tokens)
        self.finished: set = set()

    def run(self, progress: Callable[[list], Iterator] = iter) -> None:
        """Compiles everything. `progress` wraps the list of (batch, prompt rung) steps."""
        vision = {}
        for batch, length in progress([(b, t) for b in self.batches for t in self.prompt_rungs]):
            for patches in self.patch_rungs:
                if (batch, patches) not in vision:
                    empty = vision_input([], self.engine.config, batch, self.engine.slots_of(patches))
                    empty = self.engine.split(empty, batch)
                    vision[batch, patches] = empty.without_pixels(), self.engine.see(empty, watch=self.engine.watch(self.plan))
            seen = [vision[batch, p] for p in self.patch_rungs if self.can_meet(p, length)]
            self.walk_text(batch, length)
            if self.plan and seen:
                self.walk_image(batch, length, seen)
            if not self.plan:
                for _, features in seen:
                    self.engine.embed(self.engine.prompt([], batch, length, 0), features)

    def can_meet(self, patches: int, length: int) -> bool:
        """Whether a sample of this patches rung can fit this prompt rung; window packing fills blocks more than half."""
        rungs, unit, block = self.engine.ladders.patches.rungs, self.engine.config.vision.merge_unit, self.engine.window
        below = rungs[rungs.index(patches) - 1] if patches != rungs[0] else 0
        return (below // unit // block - 1) * block // 2 < length

    def walk_text(self, batch: int, length: int) -> None:
        """A batch without images, or without a plan."""
        self.finish(self.engine.embed(self.engine.prompt([], batch, length, 0), None), batch, 0)

    def walk_image(self, batch: int, length: int, seen: list) -> None:
        """A batch with images, through all cuts."""
        look = self.engine.look(self.plan)
        prompt = self.engine.prompt([], batch, length, self.engine.glimpse_rows if look["glimpse"] else 0)
        for _, features in seen:
            stream = self.engine.embed(prompt, features)
        self.cut(stream, self.plan, 0, batch, look, seen)

    def cut(self, stream: Stream, plan: tuple[Cut, ...], low: int, batch: int, look: dict, seen: list) -> None:
        """The layers up to the next cut, the cut in every bucket, and what follows."""
        if not plan:
            return self.finish(stream, batch, low)
        engine, (cut, *rest) = self.engine, plan
        length = stream.valid.shape[1]
        stream = engine.run(stream, low=low, high=cut.after + 1, **look)
        for vision, features in seen:
            slots = vision.token_image.shape[1]
            zeros = np.zeros(batch, np.int32)
            limits = KeepLimits(np.float32(0), zeros, zeros, zeros, zeros, np.zeros((batch, slots), bool))
            given = np.zeros((batch, slots), np.float32) if cut.scorer == "given" else None
            limits, given = engine.split(limits, batch), engine.split(given, batch)
            _, keep, stays, _ = engine.score(stream, vision, features, cut=cut, limits=limits, given=given)
            merged = engine.merge(stream, vision, features, keep, cut=cut, limits=limits) if merges(cut) else stream
        for kept in (*(k for k in engine.ladders.kept.rungs if k < length), length):
            self.cut(engine.compact(merged, stays, cut=cut, length=kept), tuple(rest), cut.after + 1, batch, look, seen)
        return None

    def finish(self, stream: Stream, batch: int, low: int) -> None:
        """The last layers, the head, and decoding in every bucket; once per set of shapes."""
        key = (batch, low, stream.valid.shape, tuple(kv.valid.shape for kv in stream.kv))
        if key in self.finished:
            return
        self.finished.add(key)
        engine = self.engine
        stream = engine.run(stream, low=low, high=engine.config.text.num_hidden_layers)
        logits = engine.head(stream)
        prefix = engine.prefix(Prefilled(logits, stream, []), [0] * batch)
        for slots in self.decode_rungs:
            Rows.behind(engine, prefix, self.settings(batch), 1, np.zeros(batch, bool), slots).generate()
