"""Optimiser and learning-rate schedule, built from optax."""

import math
from typing import Any

import jax
import optax
import optax.contrib

from gp_jax.config.choices import check_choice
from gp_jax.training.settings import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0, then the schedule to `end_ratio` of the peak at `steps`; the same numbers as transformers' Trainer."""
    warm = math.ceil(config.warmup_ratio * steps)
    rest = max(1, steps - warm)
    peak, end = config.learning_rate, config.learning_rate * config.end_ratio
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, config.end_ratio),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }
    check_choice("optim.schedule", config.schedule, after)
    main = after[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), main], [warm]) if warm else main


MUON_RMS = 0.2  # root mean square of a Muon update at learning rate 1: that of AdamW (arXiv 2502.16982)
NOT_MUON = ("embed_tokens", "head")  # rows of a table, and class vectors, need not be orthogonal to each other


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW or Muon, after clipping the global gradient norm."""
    rate = learning_rate(config, steps)
    makers = {
        "adamw": lambda: optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay),
        "muon": lambda: optax.contrib.muon(
            rate,
            weight_decay=config.weight_decay,
            adam_b1=config.b1,
            adam_b2=config.b2,
            consistent_rms=MUON_RMS,
            muon_weight_dimension_numbers=matrices,
        ),
    }
    check_choice("optim.name", config.name, makers)
    made = makers[config.name]()
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), made) if config.clip_norm else made


def matrices(params: Any) -> Any:
    """The parameters that Muon updates: weights of linear layers, (out, in). None: updated by AdamW."""

    def choose(path: tuple, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        names = [str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path]
        return optax.contrib.MuonDimensionNumbers(1, 0) if leaf.ndim == 2 and not any(name in NOT_MUON for name in names) else None

    return jax.tree_util.tree_map_with_path(choose, params)
