"""Generation row by row, as engines of the field shape it: read a prompt, insert it, generate for all rows, free a row.

    rows = Rows.empty(engine, prompts=8, lengths=[2048] * layers, slots=256)
    prefix = engine.prefix(engine.prefill(samples, plan, cuts), positions)
    rows.insert(prefix, 3, settings, max_new_tokens=64)           at place 3 of 8; what was there is forgotten
    rows.generate()                                               one more token for every row that has not ended
    tokens, step, done = rows.read("tokens", "step", "done")
    rows.free(3)

    rows = Rows.behind(engine, prefix, settings, ...)             every prompt of a batch at once, its cache shared and not copied

Requests of any age and kind stand side by side, each as if it were alone. P prompts, R rows (R / P of each), n new tokens at most.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from gp_jax.errors import GlimpseError
from gp_jax.inference import sampling
from gp_jax.inference.engine import Engine
from gp_jax.inference.requests import ending
from gp_jax.trees import DecodeState, LayerKV, Prefix, Sampling

PER_ROW = ("temperature", "top_k", "top_p", "seed", "number", "noted")  # of `Sampling`


def check_finite(broken: np.ndarray, steps: int) -> None:
    """Raises: GlimpseError when a row's logits were not finite in one of its first `steps` steps. broken: (R,) bool."""
    if broken.any():
        which, where = int(np.argmax(broken)) + 1, "for the first new token" if steps == 1 else f"among the first {steps} new tokens"
        raise GlimpseError(
            f"sample {which} of {broken.size}: the model's logits {where} are not finite numbers: its weights or its config make no sense, "
            "or its dtype is too narrow for them"
        )


def check_room(max_new_tokens: int, slots: int) -> None:
    """Raises: GlimpseError unless new tokens fit the slots of rows."""
    if not 1 <= max_new_tokens <= slots:
        raise GlimpseError(f"max_new_tokens={max_new_tokens} is not in 1..{slots}, the slots of these rows")


class Rows:
    """Rows that generate: prompts' caches, what changes from token to token, and how tokens are chosen."""

    def __init__(self, engine: Engine, kv: tuple[LayerKV, ...], state: DecodeState, settings: Sampling, placed: Sampling, own: bool):
        """placed: the settings on the devices. own: the prompts' caches belong to these rows alone, so inserting may overwrite them."""
        self.engine, self.kv, self.state, self.settings, self.placed, self.own = engine, kv, state, settings, placed, own

    @classmethod
    def behind(
        cls,
        engine: Engine,
        prefix: Prefix,
        settings: Sampling,
        max_new_tokens: int,
        active: Sequence[bool] | np.ndarray | None = None,
        slots: int | None = None,
        logprobs: bool = False,
    ) -> Self:
        """Rows that continue a batch of prompts, with their first token chosen. The prompts' caches are shared, not copied.

        Args:
            settings: of R rows, a multiple of the prefix's prompts: neighbouring rows go on with the same one.
            active: (R,) bool, false on rows that only fill the batch; None: all. slots: n; None: the ladder's rung for max_new_tokens.
            logprobs: note the log-probability of every token.
        """
        count, prompts = settings.seed.size, prefix.logits.shape[0]
        active = np.ones(count, bool) if active is None else np.asarray(active, bool)
        slots = slots or engine.ladders.decode.fit(max_new_tokens)
        check_room(max_new_tokens, slots)
        if count % prompts or active.size != count:
            raise GlimpseError(f"settings of {count} rows and active of {active.size}: both must be a multiple of the {prompts} prompts")
        placed = engine.place_settings(settings)
        (going,) = engine.split((active,), count)
        state = engine.start(prefix, placed, going, np.int32(max_new_tokens), slots=slots, logprobs=logprobs)
        return cls(engine, prefix.kv, state, settings, placed, own=False)

    @classmethod
    def empty(
        cls,
        engine: Engine,
        prompts: int,
        lengths: Sequence[int],
        slots: int,
        copies: int = 1,
        eos: Sequence[int] | None = None,
        logprobs: bool = False,
        best: int = 0,
    ) -> Self:
        """Free rows: none continues a prompt yet.

        Args: prompts: P; lengths: per decoder layer the rows that a prompt may have in its cache; slots: n; copies: R / P; eos: tokens
            that end a row, None: the checkpoint's; logprobs, best: see `sampling.blank`.
        """
        config, batch = engine.config.text, prompts * copies
        settings = Sampling(
            temperature=np.zeros(batch, np.float32),
            top_k=np.zeros(batch, np.int32),
            top_p=np.ones(batch, np.float32),
            seed=np.zeros(batch, np.int32),
            number=np.arange(batch, dtype=np.int32),
            noted=np.zeros(batch, np.int32),
            eos=ending(engine.config.eos_token_ids if eos is None else eos),
            pad=np.int32(engine.config.pad_token_id),
        )
        nothing, dtype = engine.split(np.zeros(prompts, bool), prompts), str(engine.model.decoder.embed_tokens.dtype)
        shape: dict[str, Any] = dict(heads=config.num_key_value_heads, width=config.head_dim, dtype=dtype)

        def cache(length: int) -> LayerKV:
            return engine.call(sampling.empty_cache, nothing, length=length, **shape)

        placed = engine.place_settings(settings)
        state = engine.call(sampling.blank, engine.model, placed, slots=slots, logprobs=logprobs, best=best)
        return cls(engine, tuple(map(cache, lengths)), state, settings, placed, own=True)

    def insert(self, prefix: Prefix, prompt: int, settings: Sampling, max_new_tokens: int, sample: int = 0) -> None:
        """Puts a prompt in the place of another; its rows begin with their first token.

        Args: prompt: the place, 0 .. P - 1; settings: of its R / P rows, but the tokens that end one are those of all rows; sample: of
            the prefix's batch.
        Raises: GlimpseError when an argument is out of range, or when the prompt or what it may generate is longer than the place.
        """
        copies = self.settings.seed.size // self._check_place(prompt)
        check_room(max_new_tokens, self.state.tokens.shape[1])
        if not 0 <= sample < prefix.logits.shape[0]:
            raise GlimpseError(f"sample={sample} is not one of the {prefix.logits.shape[0]} prompts that were read together")
        if settings.seed.size != copies:
            raise GlimpseError(f"settings are of {settings.seed.size} rows, a place has {copies}")
        for layer, (old, new) in enumerate(zip(self.kv, prefix.kv, strict=True)):
            if new.valid.shape[1] > old.valid.shape[1]:
                raise GlimpseError(f"layer {layer}: a prompt of {new.valid.shape[1]} rows does not fit a place of {old.valid.shape[1]}")
        own = slice(prompt * copies, (prompt + 1) * copies)
        changed = {name: getattr(self.settings, name).copy() for name in PER_ROW}  # arrays on the device may alias these
        for name, values in changed.items():
            values[own] = getattr(settings, name)
        self.settings = dataclasses.replace(self.settings, **changed)
        self.placed = self.engine.place_settings(self.settings)
        at, most, of = map(np.int32, (prompt, max_new_tokens, sample))
        call, donate, self.own = self.engine.call, (0,) if self.own else (), True
        self.kv = call(sampling.place, self.kv, prefix.kv, at, of, donate=donate)
        bare = dataclasses.replace(prefix, kv=())
        self.state = call(sampling.enter, self.state, bare, self.placed, at, most, of, copies=copies, donate=(0,))

    def generate(self, steps: int = 1) -> None:
        """Generates `steps` more tokens for every row, or fewer when all have ended."""
        self.state = self.engine.advance(self.kv, self.state, self.placed, np.int32(steps))

    def run(self, count: int, most: int, stream: bool) -> Iterator[np.ndarray]:
        """Generates for the first `count` rows until all have ended. most: new tokens of a row.

        Yields: tokens so far, (count, steps) int32: after every token if `stream`, else once.
        Raises: GlimpseError that names a sample whose logits are not finite: there is no token to choose.
        """
        while True:
            step, done, broken = self.read("step", "done", "broken")
            steps = int(step[:count].max())
            check_finite(broken[:count], steps)
            if stream or done.all():
                yield np.array(self.read("tokens")[0][:count, :steps])
            if done.all():
                return
            self.generate(1 if stream else most)

    def free(self, prompt: int) -> None:
        """Ends the rows of a prompt: its place can be taken."""
        copies = self.settings.seed.size // self._check_place(prompt)
        rows = np.arange(self.settings.seed.size) // copies == prompt
        (ended,) = self.engine.split((rows,), rows.size)
        self.state = self.engine.call(sampling.free, self.state, ended, donate=(0,))

    def resize(self, places: Sequence[int]) -> None:
        """Goes on with the prompts of these places only, in this order; -1: a free place.

        Arrays are replaced one after another: beside the old rows and the new ones nothing is held longer than a layer.
        Raises: GlimpseError when there is no such place.
        """
        copies = self.settings.seed.size // self.prompts
        for place in places:
            if place != -1:
                self._check_place(place)
        prompts = np.asarray(places, np.int32)
        rows = np.where(prompts[:, None] >= 0, prompts[:, None] * copies + np.arange(copies), -1).reshape(-1).astype(np.int32)
        pick, at, of = self.engine.call, self.engine.place(prompts), self.engine.place(rows)
        kv, new_kv, bare = list(self.kv), list(self.state.new_kv), dataclasses.replace(self.state, new_kv=())
        self.kv, self.state = (), bare
        for layer, old in enumerate(kv):
            kv[layer] = LayerKV(*pick(sampling.picked, (old.key, old.value, old.valid), at))
            new_kv[layer] = pick(sampling.picked, new_kv[layer], of)
        self.kv, self.own = tuple(kv), True
        self.state = dataclasses.replace(pick(sampling.picked_state, bare, of), new_kv=tuple(new_kv))
        taken = np.maximum(rows, 0)
        self.settings = dataclasses.replace(self.settings, **{name: getattr(self.settings, name)[taken] for name in PER_ROW})
        self.placed = self.engine.place_settings(self.settings)

    def _check_place(self, prompt: int) -> int:
        """Number of places. Raises: GlimpseError unless `prompt` is one of them."""
        if not 0 <= prompt < self.prompts:
            raise GlimpseError(f"prompt={prompt} is not one of the {self.prompts} places")
        return self.prompts

    @property
    def prompts(self) -> int:
        """Number of places for prompts, P."""
        return self.kv[0].valid.shape[0]

    def read(self, *names: str) -> tuple[np.ndarray, ...]:
        """Fields of the state on the host, such as tokens (R, n), step, done and broken (R,): one wait for all."""
        return self.engine.fetch(tuple(getattr(self.state, name) for name in names))
