"""The whole way from pixels to tokens as one traced program, its buckets chosen on the device.

    see -> embed -> run(0, c) -> score -> | lax.switch over `kept` rungs: compact -> run(c, L) -> head -> lax.while_loop: decode_step |

`engine` has a program per stage and looks at one number in between; both call the same functions of `pipeline` and `sampling`.

B samples, M vision slots, T prompt rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax import pipeline
from gp_jax.buckets import Ladders
from gp_jax.inference import sampling
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.ranking import to_front
from gp_jax.processing.layout import slots_of
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.plan import Plan, merges, needs_glimpse, tapped_layers, watched_blocks
from gp_jax.trees import KeepLimits, Prefix, PromptInput, Sampling, Stream, VisionFeatures, VisionInput


def at_rung(rungs: Sequence[int], need: Array, branch: Callable[[int], Any]) -> Any:
    """`branch` of the smallest rung that holds `need`, chosen on the device."""
    if len(rungs) == 1:
        return branch(rungs[0])
    return jax.lax.switch(jnp.searchsorted(jnp.array(rungs), need), [partial(branch, rung) for rung in rungs])


class Program:
    """The function's body, with a model in its hands."""

    def __init__(self, model: LVLM, plan: Plan, buckets: Ladders, settings: Sampling, max_new_tokens: int):
        self.model, self.plan, self.buckets, self.settings, self.max_new_tokens = model, plan, buckets, settings, max_new_tokens
        self.look = {"taps": tapped_layers(plan, model.glimpse_config), "glimpse": needs_glimpse(plan)}

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """See `inference_fn`."""
        inputs = dict(inputs) | {"positions": jnp.moveaxis(inputs["positions"], 1, 0)}
        vision, self.prompt = (tree(*(inputs[f.name] for f in fields(tree))) for tree in (VisionInput, PromptInput))
        self.vision, self.next_position = vision, inputs["next_position"]
        self.rules = [
            (KeepLimits(*(inputs[f"cut{i}_{f.name}"] for f in fields(KeepLimits))), inputs.get(f"cut{i}_given"))
            for i in range(len(self.plan))
        ]
        slots = jnp.arange(vision.token_image.shape[1]) + 1
        used = jnp.max(jnp.where(vision.token_image >= 0, slots, 0))
        # Samples fill whole attention windows: several rungs may come to the same slots, and short ones to none.
        rungs = sorted({slots_of(rung, self.model.config) for rung in self.buckets.patches.rungs} - {0})
        self.features = at_rung(rungs, used, self.see)
        done = at_rung(self.buckets.prompt.rungs, jnp.max(jnp.sum(self.prompt.valid, axis=1)), self.prefill)
        return self.in_prompt_order(done)

    def see(self, slots: int) -> VisionFeatures:
        """The vision tower on the first so many slots, its results padded to all of them."""
        every, config = self.vision.token_image.shape[1], self.model.config.vision
        part = {f.name: slots * (config.merge_unit if f.name.startswith("patch") else 1) for f in fields(VisionInput)}
        vision = VisionInput(*(getattr(self.vision, name)[:, :size] for name, size in part.items()))
        features = pipeline.see(self.model, vision, watch=watched_blocks(self.plan, config))
        by_slot = replace(features, line_break=None)  # which is the model's, no slot's
        padded = jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, every - slots)] + [(0, 0)] * (x.ndim - 2)), by_slot)
        return replace(padded, line_break=features.line_break)

    def prefill(self, length: int) -> dict[str, Array]:
        """The prompt in so many rows, and all that follows."""
        rows = {f.name: getattr(self.prompt, f.name) for f in fields(PromptInput)}
        prompt = PromptInput(**{name: x if name == "tap_row" else x[..., :length] for name, x in rows.items()})
        everything = self.vision.token_image >= 0
        scores = jnp.full(everything.shape, -jnp.inf), everything
        return self.cut(pipeline.embed(self.model, prompt, self.features), 0, 0, scores)

    def cut(self, stream: Stream, number: int, low: int, scores: tuple[Array, Array]) -> dict[str, Array]:
        """The layers up to the cut of that number, the cut in the smallest rung that holds its survivors, and all that follows."""
        if number == len(self.plan):
            return self.finish(stream, low, scores)
        cut, (limits, given) = self.plan[number], self.rules[number]
        stream = pipeline.run(self.model, stream, low, cut.after + 1, **self.look)
        logits, keep, stays, need = pipeline.score(self.model, stream, self.vision, self.features, cut, limits, given)
        if merges(cut):
            stream = pipeline.merge(self.model, stream, self.vision, self.features, keep, cut, limits)
        length = stream.valid.shape[1]
        rungs = [*(rung for rung in self.buckets.kept.rungs if rung < length), length]

        def rest(rung: int) -> dict[str, Array]:
            return self.cut(pipeline.compact(stream, stays, cut, rung), number + 1, cut.after + 1, (logits, keep))

        return at_rung(rungs, need, rest)

    def finish(self, stream: Stream, low: int, scores: tuple[Array, Array]) -> dict[str, Array]:
        """The last layers and the answer."""
        settings, active = self.settings, jnp.any(self.prompt.valid, axis=1)
        stream = pipeline.run(self.model, stream, low, self.model.config.text.num_hidden_layers)
        logits = pipeline.head(self.model, stream)
        most, prefix = jnp.int32(self.max_new_tokens), Prefix(stream.kv, logits, self.next_position)
        state = sampling.start(self.model, prefix, settings, active, most, self.max_new_tokens)
        state = sampling.advance(self.model, stream.kv, state, settings, most)
        ends = jnp.any(state.tokens[..., None] == settings.eos, axis=-1)
        lengths = jnp.where(jnp.any(ends, axis=1), jnp.argmax(ends, axis=1) + 1, state.step)
        return {
            "tokens": state.tokens,
            "lengths": jnp.where(active, lengths, 0).astype(jnp.int32),
            "first_logits": logits,
            "logits": scores[0],
            "keep": scores[1],
        }

    def in_prompt_order(self, done: dict[str, Array]) -> dict[str, Array]:
        """Outputs for the caller, whose visual tokens lie picture by picture, row by row."""
        slot = self.prompt.image_slot
        rows = to_front(slot >= 0, self.vision.token_image.shape[1])
        slot = take_rows(slot, rows)
        keep, logits = (take_rows(done.pop(name), jnp.maximum(slot, 0)) for name in ("keep", "logits"))
        keep, importance = keep & (slot >= 0), jnp.where(slot >= 0, 1 / (1 + jnp.exp(-logits)), 0.0)
        count, total = (jnp.sum(x, axis=1, dtype=jnp.int32) for x in (keep, slot >= 0))
        return done | {"kept": count, "visual_tokens": total, "keep": keep, "importance": importance}
