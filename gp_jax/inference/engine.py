"""The compiled engine: jitted programs per stage and bucket, chosen on the host.

    vision[S] -> embed[T,S] -> run[T] -> score[T,S] (-> merge[T,S]) -> compact[T,K] -> run[K] -> head[K] -> start[n] -> advance[K,n]

The vision tower and the decoder run block by block, `advance` in one piece: its loop must not wait for the host. The large programs
depend on one length each, so ladders of a and b rungs cost a + b large compilations, not a x b. Between
`score` and `compact` the host reads one number, how many rows the longest sample keeps, and picks the bucket.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import Mesh

from gp_jax import pipeline
from gp_jax.buckets import Ladders
from gp_jax.inference import sampling
from gp_jax.inference.shared_programs import Parts
from gp_jax.models.lvlm import LVLM
from gp_jax.processing.layout import Sample, prompt_input, slots_of, vision_input
from gp_jax.pruning.plan import Plan, merges, needs_glimpse, tapped_layers, watched_blocks
from gp_jax.pruning.scorers.glimpse import importance
from gp_jax.pruning.scorers.scorer import Cut
from gp_jax.runtime.clock import COMPILES, Clock
from gp_jax.runtime.compilation_cache import ROOM, keep_compiled
from gp_jax.sharding import batch_sharding, fetch, put, replicated
from gp_jax.trees import DecodeState, KeepLimits, Prefix, PromptInput, Sampling, Stream, VisionFeatures, VisionInput


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


def score(model: LVLM, *args: object, cut: Cut) -> tuple:
    """`pipeline.score` with what is static named."""
    return pipeline.score(model, *args[:3], cut, *args[3:])


def last_head(_: None, heads: jax.Array) -> jax.Array:
    """Keeps the last head: it alone decides. (heads, B, M) -> (B, M)."""
    return heads[-1]


def merge(model: LVLM, *args: object, cut: Cut) -> Stream:
    """`pipeline.merge` likewise."""
    return pipeline.merge(model, *args[:4], cut, *args[4:])


def compact(_: None, stream: Stream, stays: jax.Array, cut: Cut, length: int) -> Stream:
    """`pipeline.compact`, which needs no part of the model."""
    return pipeline.compact(stream, stays, cut, length)


class Engine:
    """Compiles on first use and keeps what it compiled."""

    def __init__(
        self,
        model: LVLM,
        ladders: Ladders | None = None,
        mesh: Mesh | None = None,
        attention: str = "auto",
        parts: Parts | None = None,
    ):
        self.ladders, self.mesh, self.config, self.attention = ladders or Ladders(), mesh, model.config, attention
        keep_compiled()
        self.glimpse_config = model.glimpse_config
        self.glimpse_rows = model.glimpse_config.rows if model.glimpse_config else 0
        self.window = model.config.vision.window_side**2
        self.model, self.call = model, parts or Parts(mesh)
        # cuDNN takes valid prefixes only, which vision rows, packed by windows, are not.
        self.vision_attention = "auto" if attention == "cudnn" else attention

    def see(self, vision: VisionInput, watch: tuple[int, ...] = ()) -> VisionFeatures:
        """The vision tower."""
        return pipeline.see(self.model, vision, self.vision_attention, watch=watch, call=self.call)

    def embed(self, prompt: PromptInput, features: VisionFeatures | None) -> Stream:
        """The prompt before layer 0."""
        return self.call(pipeline.embed, self.model, prompt, features)

    def look(self, plan: Plan) -> dict[str, object]:
        """What `run` must record for a plan's scorers."""
        return {"taps": tapped_layers(plan, self.glimpse_config), "glimpse": needs_glimpse(plan)}

    def watch(self, plan: Plan) -> tuple[int, ...]:
        """Vision blocks that `see` must record for a plan's scorers."""
        return watched_blocks(plan, self.config.vision)

    def run(self, stream: Stream, low: int, high: int, **look: object) -> Stream:
        """Layers low .. high-1, which use the stream's hidden states up. Caches so far, whose lengths may differ, stay outside: the
        programs depend on one length."""
        return pipeline.run(self.model, stream, low, high, implementation=self.attention, call=self.call, **look)

    def score(
        self, stream: Stream, vision: VisionInput, features: VisionFeatures, *, cut: Cut, limits: KeepLimits, given: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Ranks the visual tokens at a cut."""
        stream = dataclasses.replace(stream, kv=())  # no scorer looks at the caches
        logits = None
        if cut.scorer == "glimpse":  # whose predictor runs block by block
            logits = self.call(last_head, None, importance(self.model, stream, vision, features, call=self.call))
            stream = dataclasses.replace(stream, taps={})
        return self.call(score, self.model, stream, vision, features, limits, given, logits, cut=cut)

    def merge(
        self, stream: Stream, vision: VisionInput, features: VisionFeatures, keep: jax.Array, *, cut: Cut, limits: KeepLimits
    ) -> Stream:
        """Lets kept tokens take in dropped ones."""
        return self.call(merge, self.model, stream, vision, features, keep, limits, cut=cut)

    def compact(self, stream: Stream, stays: jax.Array, cut: Cut, length: int) -> Stream:
        """Applies a cut. A cache that it leaves alone stays outside."""
        kv = stream.kv if cut.past else ()
        done = self.call(compact, None, dataclasses.replace(stream, kv=kv), stays, cut=cut, length=length)
        return done if cut.past else dataclasses.replace(done, kv=stream.kv)

    def head(self, stream: Stream) -> jax.Array:
        """Logits of the first new token."""
        return self.call(pipeline.head, self.model, dataclasses.replace(stream, kv=(), taps={}))

    def start(self, prefix: Prefix, settings: Sampling, active: jax.Array, limit: np.ndarray, *, slots: int, logprobs: bool) -> DecodeState:
        """The state of rows behind their first token."""
        return self.call(sampling.start, self.model, prefix, settings, active, limit, slots=slots, logprobs=logprobs)

    def advance(self, kv: tuple, state: DecodeState, settings: Sampling, steps: np.ndarray) -> DecodeState:
        """Generates; `state` is used up."""
        return self.call(sampling.advance, self.model, kv, state, settings, steps, donate=(1,))

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
        return jax.tree.map(lambda x: put(x, split if np.ndim(x) > axis else whole), tree)

    def place(self, tree: object) -> object:
        """Host arrays to the devices, the same on each."""
        return jax.tree.map(lambda x: put(x, replicated(self.mesh)), tree)

    def fetch(self, tree: object) -> object:
        """Device arrays as numpy, the same and whole in every process: what the host decides by them is decided alike everywhere."""
        return fetch(tree, self.mesh)

    def read(self, need: jax.Array) -> int:
        """A number that the host needs to go on; it waits for it."""
        return int(self.fetch(need))

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
        ROOM.make(COMPILES.count)
        vision: VisionInput | None = None
        features: VisionFeatures | None = None
        if slots:
            vision = self.split(vision_input(samples, self.config, batch, slots), batch)
            features = self.see(vision, watch=self.watch(plan))
            vision = vision.without_pixels()
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
                length = self.ladders.kept_for(self.read(need), length)
                stream = self.compact(stream, stays, cut=cut, length=length)
            clock.lap("glimpse", (stream, scores))
        if stop_at_scores:
            return Prefilled(None, None, scores, plan)
        stream = self.run(stream, low=low, high=self.config.text.num_hidden_layers)
        logits = self.head(stream)
        clock.lap("finish", logits)
        return Prefilled(logits, stream, scores, plan)

    def prefix(self, filled: Prefilled, next_positions: Sequence[int]) -> Prefix:
        """A batch that was read, for rows to go on with. next_positions: per sample the position of its first new token."""
        batch = filled.logits.shape[0]
        position = np.zeros(batch, np.int32)
        position[: len(next_positions)] = next_positions
        return Prefix(filled.stream.kv, filled.logits, *self.split((position,), batch))
