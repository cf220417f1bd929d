"""The compiled engine: jitted programs per stage and bucket, chosen on the host.

    vision[S] -> embed[T,S] -> run[T] -> score[T,S] (-> merge[T,S]) -> compact[T,K] -> run[K] -> head[K] -> start[n] -> advance[K,n]

The vision tower and the decoder run block by block, `advance` in one piece: its loop must not wait for the host. The large programs
depend on one length each, so ladders of a and b rungs cost a + b large compilations, not a x b. Between
`score` and `compact` the host reads one number, how many rows the longest sample keeps, and picks the bucket.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from gp_jax.buckets import Ladders
from gp_jax.inference import sampling
from gp_jax.inference.requests import Batch, Pruning, make_batch
from gp_jax.inference.shared_programs import Parts
from gp_jax.inference.walk import Route, Scores, Stages, lengths
from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.params import replace_params
from gp_jax.processing.layout import Sample, prompt_input, slots_of, vision_input
from gp_jax.pruning.plan import Plan, needs_glimpse
from gp_jax.runtime.clock import COMPILES, Clock
from gp_jax.runtime.compilation_cache import ROOM, keep_compiled
from gp_jax.sharding import batch_sharding, fetch, put, replicated
from gp_jax.trees import Array, DecodeState, Prefix, PromptInput, Sampling, Stream, VisionFeatures, VisionInput

T = TypeVar("T")


class View(NamedTuple):
    """Pictures as the vision tower sees them."""

    vision: VisionInput  # without pixels
    features: VisionFeatures


@dataclass
class Prefilled:
    """A batch after prefill. `logits` and `stream` are None when only scores were asked for."""

    batch: Batch
    stream: Stream | None
    logits: Array | None  # (B, V) of the first new token
    scores: Scores  # per cut: logits (B, M), keep (B, M)


class Engine(Stages):
    """Compiles on first use and keeps what it compiled."""

    call: Parts

    def __init__(
        self,
        model: LVLM,
        ladders: Ladders | None = None,
        mesh: Mesh | None = None,
        attention: str = "auto",
        parts: Parts | None = None,
    ):
        """parts: how functions become programs."""
        super().__init__(model, parts or Parts(mesh), attention)
        self.ladders, self.mesh = ladders or Ladders(), mesh
        keep_compiled()
        self.glimpse_rows = model.glimpse_config.rows if model.glimpse_config else 0
        self.window = model.config.vision.window_side**2

    def update(self, params: Mapping[str, Any]) -> None:
        """Takes new parameters, all of them or some, without compiling and without a second copy: each one replaces the old one as soon as
        it is placed, and an array that lies where the old one lay is taken as it is.

        Args: params: nested dicts of arrays, as `inference_params` gives them: equal names, shapes and types.
        Raises: GlimpseError that names the parameter, before anything is replaced.
        """
        replace_params(self.model, params)

    def start(self, prefix: Prefix, settings: Sampling, active: Array, limit: Array, *, slots: int, logprobs: bool) -> DecodeState:
        """The state of rows behind their first token."""
        bare = dataclasses.replace(prefix, kv=())  # the program does not depend on the lengths of the caches
        with COMPILES.naming(f"the first token of {active.size} row(s)"):
            return self.call(sampling.start, self.model, bare, settings, active, limit, slots=slots, logprobs=logprobs)

    def advance(self, kv: tuple, state: DecodeState, settings: Sampling, steps: Array) -> DecodeState:
        """Generates; `state` is used up."""
        with COMPILES.naming(f"decoding of {lengths(state.tokens.shape, 'new tokens')}"):
            return self.call(sampling.advance, self.model, kv, state, settings, steps, donate=(1,))

    def vision_slots(self, samples: Sequence[Sample]) -> int:
        """Vision slots M of the bucket, a multiple of the attention window; 0 when no sample has an image."""
        longest = max((sample.slots.size for sample in samples), default=0)
        return self.slots_of(self.ladders.patches.fit(longest * self.config.vision.merge_unit)) if longest else 0

    def slots_of(self, patches: int) -> int:
        """Vision slots of a patches rung."""
        return slots_of(patches, self.config)

    def split(self, tree: T, samples: int, axis: int = 0) -> T:
        """Host arrays to the devices, samples (along `axis`) split over the mesh; scalars are replicated."""
        split, whole = batch_sharding(self.mesh, samples, axis), replicated(self.mesh)
        return jax.tree.map(lambda x: put(x, split if np.ndim(x) > axis else whole), tree)

    def place(self, tree: T) -> T:
        """Host arrays to the devices, the same on each."""
        return jax.tree.map(lambda x: put(x, replicated(self.mesh)), tree)

    def place_settings(self, settings: Sampling) -> Sampling:
        """Sampling settings to the devices: what belongs to rows is split with them, the tokens that end a row are not."""
        whole = self.place({"eos": settings.eos, "pad": settings.pad})
        return dataclasses.replace(self.split(dataclasses.replace(settings, eos=None, pad=None), settings.seed.size), **whole)

    def fetch(self, tree: Any) -> Any:
        """Device arrays as numpy, the same and whole in every process: what the host decides by them is decided alike everywhere."""
        return fetch(tree, self.mesh)

    def read(self, need: Array) -> int:
        """A number that the host needs to go on; it waits for it."""
        return int(self.fetch(need))

    def prompt(self, samples: Sequence[Sample], batch: int, length: int, rows: int) -> PromptInput:
        """Padded prompts on the devices."""
        prompt = prompt_input(samples, self.config, batch, length, rows)
        positions = self.split(prompt.positions, batch, axis=1)
        rest = {name: self.split(getattr(prompt, name), batch) for name in ("ids", "valid", "image_slot", "glimpse_row", "tap_row")}
        return PromptInput(positions=positions, **rest)

    def batch(self, samples: Sequence[Sample], pruning: Pruning) -> Batch:
        """Samples in the engine's buckets. Raises: GlimpseError, before any device work, when there are too many or one is too long."""
        return make_batch(samples, pruning, self.ladders.batch.fit(len(samples)), self.vision_slots(samples))

    def rows(self, plan: Plan) -> int:
        """Glimpse rows behind a prompt."""
        return self.glimpse_rows if needs_glimpse(plan) else 0

    def length(self, batch: Batch) -> int:
        """Prompt rows T of the bucket. Raises: GlimpseError when a prompt is beyond its ladder."""
        return self.ladders.prompt.fit(max(sample.ids.size for sample in batch.samples) + self.rows(batch.plan))

    # The engine's choice of a length behind a cut (see `walk.Choice`): the host reads what is needed and takes the smallest rung.

    def rungs(self, need: Array, length: int) -> tuple[int]:
        """The one length to go on with."""
        return (self.ladders.kept_for(self.read(need), length),)

    def branch(self, need: Array, rungs: Sequence[int], rest: Callable[[int], T]) -> T:
        """Goes on with the first."""
        return rest(rungs[0])

    def view(self, batch: Batch) -> View | None:
        """What the vision tower sees in a batch's pictures; None when there are none."""
        if not batch.slots:
            return None
        vision = self.split(vision_input(batch.samples, self.config, batch.size, batch.slots), batch.size)
        features = self.see(vision, watch=self.watch(batch.plan))
        return View(vision.without_pixels(), features)

    def prefill(self, batch: Batch, clock: Clock | None = None, scores_only: bool = False, view: View | None = None) -> Prefilled:
        """Everything up to the first answer token's logits; or up to the last cut's scores.

        Args: view: of the same pictures, where it is known already.
        Raises: GlimpseError, before any device work, when a length is beyond its ladder.
        """
        lap = (clock or Clock()).lap
        samples, plan, size = batch.samples, batch.plan, batch.size
        prompt = self.prompt(samples, size, self.length(batch), self.rows(plan))
        ROOM.make(COMPILES.count)
        vision, features = view or self.view(batch) or (None, None)
        lap("vision", features)
        rules = [(self.split(cut.limits, size), self.split(cut.given, size)) for cut in batch.cuts]

        def finish(stream: Stream | None, logits: Array | None, scores: Scores) -> Prefilled:
            return Prefilled(batch, stream, logits, scores)

        return self.walk(self.embed(prompt, features), Route(plan, rules, vision, features, self, finish, scores_only, lap))

    def prefix(self, filled: Prefilled) -> Prefix:
        """A batch that was read, for rows to go on with."""
        assert filled.stream is not None and filled.logits is not None, "only scores were asked for"
        return Prefix(filled.stream.kv, filled.logits, *self.split((filled.batch.next_positions,), filled.batch.size))
