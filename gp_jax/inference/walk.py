"""The one walk from a prompt to its first answer token:

    run(0, c) -> score (-> merge) -> compact -> run(c, L) -> head,        with score and compact at every cut c of a plan

The engine, the traced function and the warm-up all take it. They differ in how a function is called (`call`: as a program, or directly
while a larger one is traced) and in how the length behind a cut is chosen (`Choice`).

B samples, T stream rows, M vision slots, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from gp_jax import pipeline
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import at_once
from gp_jax.pruning.plan import SCORERS, Plan, merges, needs_glimpse, tapped_layers, watched_blocks
from gp_jax.pruning.scorers.scorer import Cut, Scoring
from gp_jax.runtime.clock import COMPILES
from gp_jax.trees import Array, KeepLimits, PromptInput, Stream, VisionFeatures, VisionInput

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Scores = tuple[tuple[Array, Array], ...]  # per cut: logits (B, M) float32, keep (B, M) bool


class Choice(Protocol):
    """How the length behind a cut is chosen."""

    def rungs(self, need: Array, length: int) -> Sequence[int]:
        """The lengths to go on with. need: () int, rows of the longest sample that stay; length: rows before the cut."""

    def branch(self, need: Array, rungs: Sequence[int], rest: Callable[[int], T]) -> T:
        """Goes on where there are several lengths. rest: all that follows, with a length."""


class Finish(Protocol[T_co]):
    """What becomes of the end of a walk. stream, logits (B, V) of the first new token: None where only scores were asked for."""

    def __call__(self, stream: Stream | None, logits: Array | None, scores: Scores) -> T_co: ...


def lengths(shape: Sequence[int], what: str) -> str:
    """Sizes in words, e.g. "4 x 1,024 patches"."""
    samples, length = shape
    return (f"{samples} x " if samples > 1 else "") + f"{length:,} {what}"


def ignore(stage: str, result: Any) -> None:
    """For walks that nobody times."""


@dataclass(frozen=True)
class Route(Generic[T]):
    """What a walk needs beside its stream."""

    plan: Plan
    rules: Sequence[tuple[KeepLimits, Array | None]]  # per cut: limits, and logits (B, M) for scorers that rank by the request's
    vision: VisionInput | None
    features: VisionFeatures | None
    choice: Choice
    finish: Finish[T]
    scores_only: bool = False  # end with the last cut's scores
    lap: Callable[[str, Any], None] = ignore  # told the name of every stage that ends, and its result


class Stages:
    """The functions of `pipeline` for one model, called in one way. What a function does not need of a stream stays outside of it, so
    that programs depend on as few lengths as they can."""

    def __init__(self, model: LVLM, call: Callable = at_once, attention: str = "auto"):
        """call: see `ops.layers.at_once`."""
        self.model, self.call, self.attention = model, call, attention
        self.config, self.glimpse_config = model.config, model.glimpse_config
        # cuDNN takes valid prefixes only, which vision rows, packed by windows, are not.
        self.vision_attention = "auto" if attention == "cudnn" else attention

    def see(self, vision: VisionInput, watch: tuple[int, ...] = ()) -> VisionFeatures:
        """The vision tower."""
        samples, slots = vision.token_image.shape
        with COMPILES.naming(f"vision for {lengths((samples, slots * self.config.vision.merge_unit), 'patches')}"):
            return pipeline.see(self.model, vision, self.vision_attention, watch=watch, call=self.call)

    def embed(self, prompt: PromptInput, features: VisionFeatures | None) -> Stream:
        """The prompt before layer 0."""
        return pipeline.embed(self.model, prompt, features, self.call)

    def look(self, plan: Plan) -> dict[str, Any]:
        """What `run` must record for a plan's scorers."""
        return {"taps": tapped_layers(plan, self.glimpse_config), "glimpse": needs_glimpse(plan)}

    def watch(self, plan: Plan) -> tuple[int, ...]:
        """Vision blocks that `see` must record for a plan's scorers."""
        return watched_blocks(plan, self.config.vision)

    def run(self, stream: Stream, low: int, high: int, taps: tuple[int, ...] = (), glimpse: bool = False) -> Stream:
        """Layers low .. high-1, which overwrite the stream's hidden states."""
        with COMPILES.naming(f"layers {low} to {high - 1} for {lengths(stream.valid.shape, 'rows')}"):
            return pipeline.run(self.model, stream, low, high, taps, glimpse, self.attention, self.call)

    def score(
        self, stream: Stream, vision: VisionInput, features: VisionFeatures, *, cut: Cut, limits: KeepLimits, given: Array | None
    ) -> tuple[Array, Array, Array, Array]:
        """Ranks the visual tokens at a cut; see `pipeline.score`."""
        stream = dataclasses.replace(stream, kv=(), deepstack={})  # no scorer looks at the caches
        logits, scorer = None, SCORERS[cut.scorer]
        with COMPILES.naming(f"the scores of {cut.scorer} for {lengths(stream.valid.shape, 'rows')}"):
            if scorer.in_parts:
                logits = scorer.score(Scoring(self.model, cut, stream, vision, features, limits, given, self.call))
                stream = dataclasses.replace(stream, taps={})
            return self.call(pipeline.score, self.model, stream, vision, features, cut, limits, given, logits)

    def merge(self, stream: Stream, vision: VisionInput, features: VisionFeatures, keep: Array, *, cut: Cut, limits: KeepLimits) -> Stream:
        """Lets kept tokens take in dropped ones."""
        merged = self.call(pipeline.merge, self.model, dataclasses.replace(stream, deepstack={}), vision, features, keep, cut, limits)
        return dataclasses.replace(merged, deepstack=stream.deepstack)

    def compact(self, stream: Stream, stays: Array, *, cut: Cut, length: int) -> Stream:
        """Applies a cut. A cache that it leaves alone stays outside."""
        kv = stream.kv if cut.past else ()
        done = self.call(pipeline.compact, dataclasses.replace(stream, kv=kv, deepstack={}), stays, cut, length=length)
        return dataclasses.replace(done, kv=done.kv if cut.past else stream.kv, deepstack=stream.deepstack)

    def head(self, stream: Stream) -> Array:
        """Logits of the first new token."""
        return self.call(pipeline.head, self.model, dataclasses.replace(stream, kv=(), taps={}, deepstack={}))

    def walk(self, stream: Stream, route: Route[T], scores: Scores = ()) -> T:
        """From behind the cuts that `scores` are of (none: from layer 0) to the end.

        Nothing here keeps a stream that was cut: its caches would take memory beside the shorter ones.
        """
        plan, look = route.plan, self.look(route.plan)
        low = plan[len(scores) - 1].after + 1 if scores else 0
        for cut, (limits, given) in zip(plan[len(scores) :], route.rules[len(scores) :], strict=True):
            assert route.vision is not None and route.features is not None, "a plan without an image"
            stream, low = self.run(stream, low, cut.after + 1, **look), cut.after + 1
            logits, keep, stays, need = self.score(stream, route.vision, route.features, cut=cut, limits=limits, given=given)
            scores = (*scores, (logits, keep))
            if route.scores_only and len(scores) == len(plan):
                route.lap("glimpse", scores)
                return route.finish(None, None, scores)
            if merges(cut):
                stream = self.merge(stream, route.vision, route.features, keep, cut=cut, limits=limits)
            rungs = route.choice.rungs(need, stream.valid.shape[1])
            if len(rungs) > 1:
                return route.choice.branch(need, rungs, self._behind(stream, stays, cut, route, scores))
            stream = self.compact(stream, stays, cut=cut, length=rungs[0])
            route.lap("glimpse", (stream, scores))
        stream = self.run(stream, low, self.config.text.num_hidden_layers)
        logits = self.head(stream)
        route.lap("finish", logits)
        return route.finish(stream, logits, scores)

    def _behind(self, stream: Stream, stays: Array, cut: Cut, route: Route[T], scores: Scores) -> Callable[[int], T]:
        return lambda length: self.walk(self.compact(stream, stays, cut=cut, length=length), route, scores)
