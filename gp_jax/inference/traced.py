"""The whole way from pixels to tokens as one traced program, its buckets chosen on the device.

    see -> embed -> run(0, c) -> score -> | lax.switch over `kept` rungs: compact -> run(c, L) -> head -> lax.while_loop: decode_step |

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
from gp_jax.inference.walk import Route, Scores, Stages
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.ranking import to_front
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.plan import Plan
from gp_jax.trees import KeepLimits, Prefix, PromptInput, Sampling, Stream, VisionFeatures, VisionInput

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
    model: LVLM, plan: Plan, buckets: Ladders, settings: Sampling, max_new_tokens: int, inputs: Mapping[str, Array]
) -> dict[str, Array]:
    """The body of `inference_fn`, which says what goes in and comes out."""
    inputs = dict(inputs) | {"positions": jnp.moveaxis(inputs["positions"], 1, 0)}
    vision, prompt = _read(VisionInput, inputs), _read(PromptInput, inputs)
    rules = [(_read(KeepLimits, inputs, f"cut{i}_"), inputs.get(f"cut{i}_given")) for i in range(len(plan))]
    stages, present = Stages(model), vision.token_image >= 0
    # Samples fill whole attention windows: several rungs may come to the same slots, and short ones to none.
    vision_rungs = sorted({slots_of(rung, model.config) for rung in buckets.patches.rungs} - {0})
    used = jnp.max(jnp.where(present, jnp.arange(present.shape[1]) + 1, 0))
    features = at_rung(vision_rungs, used, partial(_see, stages, plan, vision))

    def finish(stream: Stream | None, logits: Array | None, scores: Scores) -> dict[str, Array]:
        assert stream is not None and logits is not None, "a walk to the end"
        importance, keep = scores[-1] if scores else (jnp.full(present.shape, -jnp.inf), present)
        done = _decode(model, Prefix(stream.kv, logits, inputs["next_position"]), prompt, settings, max_new_tokens)
        return done | {"first_logits": logits, "logits": importance, "keep": keep}

    def prefill(length: int) -> dict[str, Array]:
        """The prompt in `length` rows, and all that follows."""
        rows = {f.name: getattr(prompt, f.name) for f in fields(PromptInput)}
        short = PromptInput(**{name: x if name == "tap_row" else x[..., :length] for name, x in rows.items()})
        return stages.walk(stages.embed(short, features), Route(plan, rules, vision, features, OnDevice(buckets), finish))

    done = at_rung(buckets.prompt.rungs, jnp.max(jnp.sum(prompt.valid, axis=1)), prefill)
    return _in_prompt_order(done, prompt.image_slot, present.shape[1])


def _read(tree: type[Tree], inputs: Mapping[str, Array], prefix: str = "") -> Tree:
    return tree(*(inputs[prefix + f.name] for f in fields(tree)))


def _see(stages: Stages, plan: Plan, vision: VisionInput, slots: int) -> VisionFeatures:
    """The vision tower on the first `slots` slots, its results padded to all of them."""
    every, unit = vision.token_image.shape[1], stages.config.vision.merge_unit
    part = {f.name: slots * (unit if f.name.startswith("patch") else 1) for f in fields(VisionInput)}
    features = stages.see(VisionInput(*(getattr(vision, name)[:, :size] for name, size in part.items())), stages.watch(plan))
    by_slot = replace(features, line_break=None)  # which is the model's, no slot's
    padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, every - slots)] + [(0, 0)] * (x.ndim - 2)), by_slot)
    return replace(padded, line_break=features.line_break)


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
    keep, logits = (take_rows(done.pop(name), jnp.maximum(slot, 0)) for name in ("keep", "logits"))
    keep, importance = keep & (slot >= 0), jnp.where(slot >= 0, 1 / (1 + jnp.exp(-logits)), 0.0)
    count, total = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (keep, slot >= 0))
    return done | {"kept": count, "visual_tokens": total, "keep": keep, "importance": importance}
