"""From rewards to advantages and loss weights, on the host: group statistics by question, whatever the layout of a step.

N completions of a step, C tokens of a completion.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gp_jax.training.plus.settings import PolicyConfig


@dataclass(frozen=True)
class Advantages:
    """Of the completions of a step."""

    values: np.ndarray  # (N,) float32; 0 where there is none
    counted: np.ndarray  # (N,) bool: counts in the loss
    flat: np.ndarray  # (N,) bool: of a group whose rewards are all equal
    missing: np.ndarray  # (N,) bool: no reward


def advantages(rewards: Sequence[float | None], groups: Sequence[int], cut: Sequence[bool], config: PolicyConfig) -> Advantages:
    """(reward - mean) / (std + epsilon) within every group, std with n - 1; for dr_grpo reward - mean.

    A completion without a reward (None) is in no statistic and not in the loss; a group with fewer than 2 rewards is left out.
    Args: rewards, groups, cut: of every completion: its reward, the number of its question, whether it was cut at the limit.
    """
    values = np.array([np.nan if reward is None else reward for reward in rewards], np.float64)
    group, cut_off = np.asarray(groups), np.asarray(cut, bool)
    missing = ~np.isfinite(values)
    out, flat, counted = np.zeros(values.size), np.zeros(values.size, bool), np.zeros(values.size, bool)
    for number in np.unique(group):
        own = np.flatnonzero((group == number) & ~missing)
        if own.size < 2:
            continue
        found = values[own]
        spread = found.std(ddof=1)
        flat[own] = np.ptp(found) == 0
        out[own] = 0.0 if np.ptp(found) == 0 else found - found.mean()
        if config.loss != "dr_grpo":
            out[own] /= spread + config.std_epsilon
        counted[own] = True
    if config.flat_groups == "drop":
        counted &= ~flat
    if config.cut_completions == "drop":
        counted &= ~cut_off
    return Advantages(np.where(counted, out, 0).astype(np.float32), counted, flat, missing)


def token_weights(valid: np.ndarray, counted: np.ndarray, config: PolicyConfig) -> np.ndarray:
    """The weight of every token's loss, so that a step's loss is a plain sum. valid: (N, C) bool; counted: (N,) bool.

    Returns: (N, C) float32; all 0 when nothing counts.
    """
    used = valid & counted[:, None]
    completions = max(1, int(counted.sum()))
    if config.loss == "dapo":
        return (used / max(1, int(used.sum()))).astype(np.float32)
    if config.loss == "dr_grpo":
        return (used / (completions * config.max_new_tokens)).astype(np.float32)
    return (used / np.maximum(used.sum(axis=1, keepdims=True), 1) / completions).astype(np.float32)
