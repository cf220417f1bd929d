"""Optimiser and schedule, straight from optax."""

import math

import optax

from gp_jax.errors import GlimpseError
from gp_jax.settings import OptimConfig


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
    if config.schedule not in after:
        raise GlimpseError(f"optim.schedule='{config.schedule}' is not one of {', '.join(after)}")
    main = after[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warm), main], [warm]) if warm else main


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip of the global norm."""
    adamw = optax.adamw(learning_rate(config, steps), b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay)
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
