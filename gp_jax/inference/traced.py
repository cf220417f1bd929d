"""The whole way from pixels to tokens as one traced program, its buckets chosen on the device.

    see -> embed -> run(0, c) -> score -> | lax.switch over `kept` rungs: compact -> run(c, L) -> head -> lax.while_loop: decode_step |

With two looks, what is seen is chosen first:

    see -> embed -> run(0, r) -> score, at the size of a first look -> windows -> see -> ...

`engine` has a program per stage and reads one number in between; both take the same walk (`walk`).

B samples, M vision slots, T prompt rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.buckets import Ladders
from gp_jax.inference import sampling
from gp_jax.inference.look_inputs import PREFIX, FirstBuckets
from gp_jax.inference.walk import Route, Scores, Stages
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.ranking import to_front
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.look import choose
from gp_jax.pruning.plan import Plan, look_plan
from gp_jax.trees import KeepLimits, LookLimits, Prefix, PromptInput, Sampling, Stream, VisionFeatures, VisionInput

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Tree = TypeVar("Tree", bound="DataclassInstance")


def at_rung(rungs: Sequence[int], need: Array, branch: Callable[[int], T]) -> T:
    """`branch` of the smallest rung that holds `need`, chosen on the device."""
    if len(rungs) == 1:
        return branch(rungs[0])
    return jax.lax.switch(jnp.searchsorted(jnp.array(rungs), need), [partial(branch, rung) for rung in rungs])


@dataclass(frozen=True)
class OnDevice:
    """Every length behind a cut is traced, the device takes one (see `walk.Choice`)."""

    buckets: Ladders

    def rungs(self, need: Array, length: int) -> Sequence[int]:
        """All rungs below `length`, and it."""
        return self.buckets.kept_rungs(length)

    def branch(self, need: Array, rungs: Sequence[int], rest: Callable[[int], T]) -> T:
        """The smallest that holds `need`."""
        return at_rung(rungs, need, rest)


def answer(
    model: LVLM,
    plan: Plan,
    buckets: Ladders,
    settings: Sampling,
    max_new_tokens: int,
    inputs: Mapping[str, Array],
    first: FirstBuckets | None = None,
) -> dict[str, Array]:
    """The body of `inference_fn`, which says what goes in and comes out. first: sizes of a first look, None: pictures are seen whole."""
    inputs = _positions_first(inputs, "positions")
    vision, prompt, stages = _read(VisionInput, inputs), _read(PromptInput, inputs), Stages(model)
    present = seen = vision.token_image >= 0
    if first is not None:
        inputs = _positions_first(inputs, PREFIX + "positions")
        seen = present & _second_look(stages, vision.token_window, first, buckets, inputs)
    # Samples fill whole attention windows: several rungs may come to the same slots, and short ones to none.
    vision_rungs = sorted({slots_of(rung, model.config) for rung in buckets.patches.rungs} - {0})
    vision, features = _see(stages, stages.watch(plan), vision, seen, vision_rungs)
    rules = [(_limits(inputs, f"cut{i}_", seen), inputs.get(f"cut{i}_given")) for i in range(len(plan))]

    def finish(stream: Stream | None, logits: Array | None, scores: Scores) -> dict[str, Array]:
        assert stream is not None and logits is not None, "a walk to the end"
        importance, keep = scores[-1] if scores else (jnp.full(present.shape, -jnp.inf), seen)
        done = _decode(model, Prefix(stream.kv, logits, inputs["next_position"]), prompt, settings, max_new_tokens)
        return done | {"first_logits": logits, "logits": importance, "keep": keep, "seen": seen}

    stays = _rows_that_stay(prompt, seen, inputs.get(PREFIX + "line"))

    def prefill(length: int) -> dict[str, Array]:
        """The prompt in `length` rows, and all that follows."""
        short = _shorter(prompt, stays, length)
        return stages.walk(stages.embed(short, features), Route(plan, rules, vision, features, OnDevice(buckets), finish))

    done = at_rung(buckets.prompt.rungs, jnp.max(jnp.sum(stays, axis=1)), prefill)
    return _in_prompt_order(done, prompt.image_slot, present.shape[1])


def _positions_first(inputs: Mapping[str, Array], name: str) -> dict[str, Array]:
    return dict(inputs) | {name: jnp.moveaxis(inputs[name], 1, 0)}


def _limits(inputs: Mapping[str, Array], prefix: str, seen: Array) -> KeepLimits:
    """The keep rule of a cut, whose numbers are of whole pictures: none is more than what is seen."""
    rule, count = _read(KeepLimits, inputs, prefix), jnp.sum(seen, axis=1, dtype=jnp.int32)
    return replace(rule, **{name: jnp.minimum(getattr(rule, name), count) for name in ("cap_trigger", "cap", "floor", "fixed")})


def _second_look(stages: Stages, window: Array, first: FirstBuckets, buckets: Ladders, inputs: Mapping[str, Array]) -> Array:
    """Takes the first look. window: (B, M) int, of every vision slot, -1 padding. Returns: (B, M) bool, the slots of windows to see."""
    vision, prompt, plan = _read(VisionInput, inputs, PREFIX), _read(PromptInput, inputs, PREFIX), look_plan(stages.glimpse_config)
    vision, features = _see(stages, (), vision, vision.token_image >= 0, first.slots)
    zeros = jnp.zeros(window.shape[0], jnp.int32)
    rule = KeepLimits(jnp.float32(0), zeros, zeros, zeros, zeros, jnp.zeros(vision.token_image.shape, bool))

    def look(length: int) -> Array:
        short = _shorter(prompt, prompt.valid, length)
        route = Route(plan, [(rule, None)], vision, features, OnDevice(buckets), lambda stream, logits, scores: scores[-1][0], True)
        return stages.walk(stages.embed(short, features), route)

    logits = at_rung(first.prompt, jnp.max(jnp.sum(prompt.valid, axis=1)), look)
    source, windows, batch = inputs[PREFIX + "source"], first.windows, jnp.arange(window.shape[0])[:, None]
    carried = jnp.where(source >= 0, take_rows(logits, jnp.maximum(source, 0)), -jnp.inf)
    place = jnp.where(window >= 0, window, windows)
    score = jnp.full((window.shape[0], windows), -jnp.inf).at[batch, place].max(carried, mode="drop")
    limits = _read(LookLimits, inputs, PREFIX)
    chosen = choose(score, inputs[PREFIX + "places"], inputs[PREFIX + "choose"], limits) | inputs[PREFIX + "always"]
    return (window >= 0) & take_rows(chosen, jnp.maximum(window, 0))


def _rows_that_stay(prompt: PromptInput, seen: Array, line: Array | None) -> Array:
    """(B, T) bool: prompt rows without the visual tokens that are not seen, and without line breaks behind lines of which nothing is.

    Args: seen: (B, M) bool; line: (B, T) int, see INPUTS; None: everything is seen.
    """
    visual = prompt.image_slot >= 0
    stays = prompt.valid & (~visual | take_rows(seen, jnp.maximum(prompt.image_slot, 0)))
    if line is None:
        return stays
    batch, length = jnp.arange(line.shape[0])[:, None], line.shape[1]
    lines = jnp.zeros(line.shape, bool).at[batch, jnp.where(line >= 0, line, length)].max(visual & stays, mode="drop")
    breaks = ~visual & (line >= 0)
    return stays & (~breaks | take_rows(lines, jnp.maximum(line, 0)))


def _shorter(prompt: PromptInput, stays: Array, length: int) -> PromptInput:
    """The rows that stay, in `length` rows."""
    order = to_front(stays, length)
    valid = take_rows(stays, order)
    return PromptInput(
        ids=take_rows(prompt.ids, order),
        positions=jax.vmap(take_rows, (0, None))(prompt.positions, order),
        valid=valid,
        image_slot=jnp.where(valid, take_rows(prompt.image_slot, order), -1),
        glimpse_row=jnp.where(valid, take_rows(prompt.glimpse_row, order), -1),
        tap_row=jnp.argmax(order == prompt.tap_row[:, None], axis=-1),
    )


def _read(tree: type[Tree], inputs: Mapping[str, Array], prefix: str = "") -> Tree:
    return tree(*(inputs[prefix + f.name] for f in fields(tree)))


def _see(
    stages: Stages, watch: tuple[int, ...], vision: VisionInput, seen: Array, rungs: Sequence[int]
) -> tuple[VisionInput, VisionFeatures]:
    """The vision tower on the blocks of windows that hold something to see, in the smallest rung of slots that holds them.

    Args: seen: (B, M) bool, whole windows. Returns: the input without pixels, whose other slots are empty, and the features of all slots.
    """
    (batch, slots), unit, block = seen.shape, stages.config.vision.merge_unit, stages.config.vision.window_side**2
    used = jnp.any(seen.reshape(batch, -1, block), axis=-1)  # blocks
    hidden = {"token_image": -1, "token_window": -1, "patch_image": -1, "patch_window": -1}
    parts = {f.name: getattr(vision, f.name) for f in fields(VisionInput)}
    by_patch = jnp.repeat(seen, unit, axis=1)
    parts |= {n: jnp.where(by_patch if n.startswith("patch") else seen, parts[n], empty) for n, empty in hidden.items()}
    place = jnp.cumsum(used, axis=1) - 1  # of a block among those that are used
    place = (jnp.maximum(place, 0)[..., None] * block + jnp.arange(block)).reshape(batch, slots)

    def tower(size: int) -> VisionFeatures:
        order = to_front(used, size // block)

        def some(x: Array) -> Array:
            blocks = x.reshape(batch, slots // block, -1, *x.shape[2:])
            return take_rows(blocks, order).reshape(batch, -1, *x.shape[2:])

        found = stages.see(VisionInput(**{name: some(x) for name, x in parts.items()}), watch)
        by_slot = replace(found, line_break=None)  # which is the model's, no slot's
        spread = jax.tree.map(lambda x: take_rows(x, jnp.minimum(place, size - 1)), by_slot)
        return replace(spread, line_break=found.line_break)

    features = at_rung(rungs, jnp.max(jnp.sum(used, axis=1)) * block, tower)
    return VisionInput(**{**parts, "patches": None}), features


def _decode(model: LVLM, prefix: Prefix, prompt: PromptInput, settings: Sampling, max_new_tokens: int) -> dict[str, Array]:
    """All tokens of every answer, and how many they are."""
    active, most = jnp.any(prompt.valid, axis=1), jnp.int32(max_new_tokens)
    state = sampling.start(model, prefix, settings, active, most, max_new_tokens)
    state = sampling.advance(model, prefix.kv, state, settings, most)
    ends = jnp.any(state.tokens[..., None] == settings.eos, axis=-1)
    lengths = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, state.step)
    return {"tokens": state.tokens, "lengths": jnp.where(active, lengths, 0).astype(jnp.int32)}


def _in_prompt_order(done: dict[str, Any], slot: Array, slots: int) -> dict[str, Array]:
    """Outputs for the caller, whose visual tokens lie picture by picture, row by row. slot: (B, T), see `PromptInput.image_slot`."""
    rows = to_front(slot >= 0, slots)
    slot = take_rows(slot, rows)
    keep, seen, logits = (take_rows(done.pop(name), jnp.maximum(slot, 0)) for name in ("keep", "seen", "logits"))
    keep, seen = keep & (slot >= 0), seen & (slot >= 0)
    importance = jnp.where(seen, 1 / (1 + jnp.exp(-logits)), 0.0)
    count, total = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (keep, slot >= 0))
    return done | {"kept": count, "visual_tokens": total, "keep": keep, "seen": seen, "importance": importance}
