"""From rollouts, or reference answers, to the micro-batches of an update.

B questions of a micro-batch, G completions of each, C tokens of a completion, M vision slots.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from gp_jax.inference.engine import Engine
from gp_jax.sharding import constrained
from gp_jax.training.plus.losses import PlusBatch
from gp_jax.training.plus.rollouts import Rollout
from gp_jax.trees import Array, Completions, MaskedPrompt, VisionFeatures, VisionInput


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Completions of a rollout with what their loss needs; arrays by completion."""

    advantage: np.ndarray  # (N,) float32
    weight: np.ndarray  # (N, C) float32, C as long as the longest possible


def pick(vision: VisionInput, features: VisionFeatures, rows: Array, slots: int) -> tuple[VisionInput, VisionFeatures]:
    """Some samples of a view, in fewer vision slots. A program of the engine. rows: (b,) int; slots: static."""
    unit = vision.patch_hw.shape[1] // vision.token_hw.shape[1]
    values: dict[str, Any] = {"patches": None}
    for field in dataclasses.fields(vision)[1:]:
        length = slots * unit if field.name.startswith("patch_") else slots
        values[field.name] = constrained(getattr(vision, field.name)[rows, :length], "batch")
    tokens = constrained(features.tokens[rows, :slots], "batch")
    return VisionInput(**values), dataclasses.replace(features, tokens=tokens, conditions=(), received={}, keys={})


def micro_batch(engine: Engine, rollout: Rollout, members: Sequence[int], size: int, slots: int, weighted: Weighted) -> PlusBatch:
    """Some questions of a rollout, with all their completions.

    Args: members: their places in the rollout; size: B, rows beyond the members are empty; slots: C.
    """
    asked = [rollout.questions[place] for place in members]
    prompts, group = [question.sample.prompt for question in asked], len(rollout.tokens) // len(rollout.questions)
    ids = np.full((size, group, slots), engine.config.pad_token_id, np.int32)
    valid, sampled = np.zeros(ids.shape, bool), np.zeros(ids.shape, np.float32)
    weight, advantage = np.zeros(ids.shape, np.float32), np.zeros((size, group), np.float32)
    for row, place in enumerate(members):
        for turn in range(group):
            own = place * group + turn
            count = len(rollout.tokens[own])
            ids[row, turn, :count], valid[row, turn, :count] = rollout.tokens[own], True
            sampled[row, turn, :count] = rollout.sampled[own]
            weight[row, turn], advantage[row, turn] = weighted.weight[own, :slots], weighted.advantage[own]
    number = np.full(size, -1, np.int32)
    number[: len(asked)] = [question.number for question in asked]
    prompt, length = masked_prompt(engine, rollout, members, size)
    own = (Completions(ids, valid), weight, advantage, sampled)
    completions, weight, advantage, sampled = engine.split(own, size)
    return PlusBatch(prompt, completions, weight, advantage, sampled, None, engine.split(number, size), rollout.batch.plan, length)


def masked_prompt(engine: Engine, rollout: Rollout, members: Sequence[int], size: int) -> tuple[MaskedPrompt, int]:
    """The prompts of some questions of a rollout, and the length that holds the longest of them behind the cut."""
    prompts = [rollout.questions[place].sample.prompt for place in members]
    ladders = engine.ladders
    length = ladders.prompt.fit(max(prompt.ids.size for prompt in prompts))
    staying = [prompt.ids.size - int((~rollout.masks[p]).sum()) for prompt, p in zip(prompts, members, strict=True)]
    rows = np.array([*members, *[members[0]] * (size - len(members))], np.int32)
    slots, (vision, features) = engine.vision_slots(prompts), (None, None)
    if slots and rollout.view is not None:
        (vision, features) = engine.call(pick, *rollout.view, engine.place(rows), slots=slots)
    given, limits = np.zeros((size, slots), np.float32), None
    if rollout.batch.cuts:
        cut = rollout.batch.cuts[0]
        assert cut.given is not None, "masks are given"
        given = cut.given[rows, :slots]
        own = {name: getattr(cut.limits, name)[rows] for name in ("cap_trigger", "cap", "floor", "fixed")}
        limits = dataclasses.replace(cut.limits, always=cut.limits.always[rows, :slots], **own)
    position = np.zeros(size, np.int32)
    position[: len(prompts)] = [prompt.next_position for prompt in prompts]
    given, limits, position = engine.split((given, limits, position), size)
    prompt = engine.prompt(prompts, size, length, 0)
    return MaskedPrompt(vision, features, prompt, given, limits, position), ladders.kept_for(max(staying), length)


