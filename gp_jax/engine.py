"""The compiled engine: one jitted program per stage and bucket, chosen on the host.

    vision[S] -> embed[T,S] -> run[T] -> score[T,S] (-> merge[T,S]) -> compact[T,K] -> run[K] -> head[K] -> start[n] -> advance[K,n]

The large programs depend on one length each, so ladders of a and b rungs cost a + b large compilations, not a x b. Between
`score` and `compact` the host reads one number, how many rows the longest sample keeps, and picks the bucket.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from gp_jax import pipeline, sampling
from gp_jax.buckets import Ladders
from gp_jax.clock import Clock
from gp_jax.compiled import keep_compiled
from gp_jax.layout import Sample, prompt_input, slots_of, vision_input
from gp_jax.lvlm import LVLM
from gp_jax.plan import Plan, merges, needs_glimpse, tapped_layers, watched_blocks
from gp_jax.scorers.scorer import Cut
from gp_jax.sharding import batch_sharding, replicated
from gp_jax.trees import KeepLimits, PromptInput, Sampling, Stream, VisionFeatures, VisionInput


@dataclass(frozen=True)
class CutInput:
    """What a request brings to one cut. B is already the batch bucket, M the bucket of vision slots."""

    limits: KeepLimits
    given: np.ndarray | None  # (B, M) float32 logits for the scorer "given"


@dataclass
class Prefilled:
    """A batch after prefill. `logits` and `stream` are None when only scores were asked for."""

    logits: jax.Array | None  # (B, V) of the first new token
    stream: Stream | None
    scores: list[tuple[jax.Array, jax.Array]]  # per cut: logits (B, M), keep (B, M)
    plan: Plan = ()  # the cuts that were made


class Engine:
    """Compiles on first use and keeps what it compiled."""

    def __init__(self, model: LVLM, ladders: Ladders | None = None, mesh: Mesh | None = None, attention: str = "auto"):
        self.ladders, self.mesh, self.config, self.attention = ladders or Ladders(), mesh, model.config, attention
        keep_compiled()
        self.glimpse_config = model.glimpse_config
        self.glimpse_rows = model.glimpse_config.rows if model.glimpse_config else 0
        self.window = model.config.vision.window_side**2
        graph, state = nnx.split(model)

        def program(function: Callable, static: tuple[str, ...] = (), donate: tuple[int, ...] = ()) -> Callable:
            def call(state, *args, **kwargs):
                return function(nnx.merge(graph, state), *args, **kwargs)

            compiled = jax.jit(call, static_argnames=static, donate_argnums=donate)

            def run(*args, **kwargs):
                with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
                    return compiled(state, *args, **kwargs)

            return run

        # cuDNN takes valid prefixes only, which vision rows, packed by windows, are not.
        self.see = program(partial(pipeline.see, implementation="auto" if attention == "cudnn" else attention), static=("watch",))
        self.embed = program(pipeline.embed)
        self._layers = program(partial(pipeline.run, implementation=attention), static=("low", "high", "taps", "glimpse"))
        self.score = program(pipeline.score, static=("cut",))
        self.merge = program(pipeline.merge, static=("cut",))
        self._compact = jax.jit(pipeline.compact, static_argnames=("cut", "length"))
        self.head = program(pipeline.head)
        self.start = program(sampling.start, static=("slots",))
        self.advance = program(sampling.advance, donate=(2,))

    def look(self, plan: Plan) -> dict[str, object]:
        """What `run` must record for a plan's scorers."""
        return {"taps": tapped_layers(plan, self.glimpse_config), "glimpse": needs_glimpse(plan)}

    def watch(self, plan: Plan) -> tuple[int, ...]:
        """Vision blocks that `see` must record for a plan's scorers."""
        return watched_blocks(plan, self.config.vision)

    def run(self, stream: Stream, low: int, high: int, **look: object) -> Stream:
        """Layers low .. high-1. Caches so far, whose lengths may differ, stay outside: the program depends on one length."""
        done = self._layers(dataclasses.replace(stream, kv=()), low=low, high=high, **look)
        return dataclasses.replace(done, kv=stream.kv + done.kv)

    def compact(self, stream: Stream, stays: jax.Array, cut: Cut, length: int) -> Stream:
        """Applies a cut. A cache that it leaves alone stays outside."""
        if cut.past:
            return self._compact(stream, stays, cut=cut, length=length)
        done = self._compact(dataclasses.replace(stream, kv=()), stays, cut=cut, length=length)
        return dataclasses.replace(done, kv=stream.kv)

    def vision_slots(self, samples: Sequence[Sample]) -> int:
        """Vision slots M of the bucket, a multiple of the attention window; 0 when no sample has an image."""
        longest = max((sample.slots.size for sample in samples), default=0)
        return self.slots_of(self.ladders.patches.fit(longest * self.config.vision.merge_unit)) if longest else 0

    def slots_of(self, patches: int) -> int:
        """Vision slots of a patches rung."""
        return slots_of(patches, self.config)

    def split(self, tree: object, samples: int, axis: int = 0) -> object:
        """Host arrays to the devices, samples (along `axis`) split over the mesh; scalars are replicated."""
        split, whole = batch_sharding(self.mesh, samples, axis), replicated(self.mesh)
        return jax.tree.map(lambda x: jax.device_put(x, split if np.ndim(x) > axis else whole), tree)

    def place(self, tree: object) -> object:
        """Host arrays to the devices, the same on each."""
        return jax.device_put(tree, replicated(self.mesh))

    def prompt(self, samples: Sequence[Sample], batch: int, length: int, rows: int) -> PromptInput:
        """Padded prompts on the devices."""
        prompt = prompt_input(samples, self.config, batch, length, rows)
        positions = self.split(prompt.positions, batch, axis=1)
        rest = {name: self.split(getattr(prompt, name), batch) for name in ("ids", "valid", "image_slot", "glimpse_row", "tap_row")}
        return PromptInput(positions=positions, **rest)

    def prefill(
        self, samples: Sequence[Sample], plan: Plan, cuts: Sequence[CutInput], clock: Clock | None = None, stop_at_scores: bool = False
    ) -> Prefilled:
        """Everything up to the first answer token's logits; or up to the last cut's scores.

        Raises: GlimpseError, before any device work, when a length is beyond its ladder.
        """
        clock = clock or Clock()
        batch, slots = self.ladders.batch.fit(len(samples)), self.vision_slots(samples)
        plan = plan if slots else ()  # without an image there is nothing to prune
        look = self.look(plan)
        rows = self.glimpse_rows if look["glimpse"] else 0
        length = self.ladders.prompt.fit(max(sample.ids.size for sample in samples) + rows)
        prompt = self.prompt(samples, batch, length, rows)
        vision: VisionInput | None = None
        features: VisionFeatures | None = None
        if slots:
            vision = self.split(vision_input(samples, self.config, batch, slots), batch)
            features = self.see(vision, watch=self.watch(plan))
        clock.lap("vision", features)
        stream, low, scores = self.embed(prompt, features), 0, []
        for cut, given in zip(plan, cuts, strict=True):
            stream, low = self.run(stream, low=low, high=cut.after + 1, **look), cut.after + 1
            limits, logits = self.split(given.limits, batch), self.split(given.given, batch)
            logits, keep, stays, need = self.score(stream, vision, features, cut=cut, limits=limits, given=logits)
            scores.append((logits, keep))
            if not (stop_at_scores and cut is plan[-1]):
                if merges(cut):
                    stream = self.merge(stream, vision, features, keep, cut=cut, limits=limits)
                length = self.ladders.kept_for(int(need), length)
                stream = self.compact(stream, stays, cut=cut, length=length)
            clock.lap("glimpse", (stream, scores))
        if stop_at_scores:
            return Prefilled(None, None, scores, plan)
        stream = self.run(stream, low=low, high=self.config.text.num_hidden_layers)
        logits = self.head(stream)
        clock.lap("finish", logits)
        return Prefilled(logits, stream, scores, plan)

    def decode(
        self, filled: Prefilled, next_positions: Sequence[int], settings: Sampling, max_new_tokens: int, stream: bool
    ) -> Iterator[np.ndarray]:
        """Generates.

        Args: next_positions: per sample the position of its first new token.
        Yields: tokens so far, (samples, steps) int32: after every token if `stream`, else once.
        """
        batch, count = filled.logits.shape[0], len(next_positions)
        active, position = np.zeros(batch, bool), np.zeros(batch, np.int32)
        active[:count], position[:count] = True, next_positions
        settings = self.place(settings)
        active, position = self.split((active, position), batch)
        kv = filled.stream.kv
        state = self.start(filled.logits, settings, active, position, slots=self.ladders.decode.fit(max_new_tokens))
        steps, ended = 1, np.asarray(state.done).all()
        while steps < max_new_tokens and not ended:
            if stream:
                yield np.array(state.tokens)[:count, :steps]
            state = self.advance(kv, state, settings, np.int32(steps + 1 if stream else max_new_tokens))
            steps, ended = int(state.step), np.asarray(state.done).all()
        yield np.array(state.tokens)[:count, :steps]
