"""From rollouts, or reference answers, to the micro-batches of an update.

B questions of a micro-batch, G completions of each, C tokens of a completion, M vision slots.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from gp_jax.inference.engine import Engine
from gp_jax.inference.logprobs import masked_prompt
from gp_jax.training.plus.losses import PlusBatch
from gp_jax.training.plus.rollouts import Rollout
from gp_jax.trees import Completions


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Completions of a rollout with what their loss needs; arrays by completion."""

    advantage: np.ndarray  # (N,) float32
    weight: np.ndarray  # (N, C) float32, C as long as the longest possible


def micro_batch(engine: Engine, rollout: Rollout, members: Sequence[int], size: int, slots: int, weighted: Weighted) -> PlusBatch:
    """Some questions of a rollout, with all their completions.

    Args: members: their places in the rollout; size: B, rows beyond the members are empty; slots: C.
    """
    asked = [rollout.questions[place] for place in members]
    group = len(rollout.tokens) // len(rollout.questions)
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
    prompt, length = masked_prompt(engine, rollout.batch, rollout.masks, rollout.view, members, size)
    placed = engine.split((Completions(ids, valid), weight, advantage, sampled, number), size)
    return PlusBatch(prompt, *placed[:4], None, placed[4], rollout.batch.plan, length)
