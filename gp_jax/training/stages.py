"""The stages of `train.py`: the facts and functions that the loop needs of each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from etils import epath

from gp_jax.training.base_losses import SHOWN as BASE_SHOWN
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.build import Progress, Run, build
from gp_jax.training.export import export_run
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.scenes_base import build_base, describe_base, export_base_run, summary_base, validate_base
from gp_jax.training.settings import TrainConfig
from gp_jax.training.step import TrainState
from gp_jax.training.validation import validate

LAST_GOOD = "last_good"  # folder for the last finite state of a run that failed


@dataclass(frozen=True)
class Stage:
    """A run and the functions of its stage."""

    run: Any  # config, mesh, feed, step, steps, identity
    # (state, step, folder, log, progress, stopped) -> means, None when it was stopped; None: there is nothing to validate on
    validate: Callable[..., dict[str, float] | None] | None
    export: Callable[..., str]  # (state, folder) -> a text that names what it wrote
    begin_with: Callable[..., str]  # (state, folder) -> the option with which another run starts from this state
    describe: Callable[[], str]
    losses: tuple[str, ...]  # metrics that are named when one is not finite
    shown: tuple[str, ...]  # metrics beside the progress bar
    validation_shown: tuple[str, ...]
    summary: Callable[[dict[str, float]], dict[str, float]] = dict  # a meter's means -> the values to log
    # (state, gathered, step, batches, phase, stopped) -> the same and metrics, None when it was stopped; None: gradients of the batches
    take: Callable[..., tuple[Any, Any, dict[str, Any]] | None] | None = None


def build_stage(config: TrainConfig | BaseConfig | PlusConfig, progress: Progress, tell: Callable[[str], None]) -> Stage:
    """Builds a configuration's run and its stage. Raises: GlimpseError that names what is wrong."""
    if isinstance(config, PlusConfig):
        from gp_jax.training.plus.stage import plus_stage  # its HTTP client is slow to import

        return Stage(**plus_stage(config, progress, tell))
    if isinstance(config, BaseConfig):
        base = build_base(config)
        return Stage(
            run=base,
            validate=partial(validate_base, base),
            export=partial(export_base_run, base),
            begin_with=lambda state, folder: f"--start {folder}",
            describe=partial(describe_base, base),
            losses=("language", "dense"),
            shown=BASE_SHOWN,
            validation_shown=BASE_SHOWN,
            summary=summary_base,
        )
    run = build(config, progress)
    return Stage(
        run=run,
        validate=partial(validate, run) if run.validation is not None else None,
        export=partial(export_run, run),
        begin_with=partial(begin_with_glimpse, run),
        describe=partial(describe, run),
        losses=("language", "dice", "bce"),
        shown=("loss", "language", "dice", "bce", "iou"),
        validation_shown=("loss", "language", "dice", "f1", "iou", "retention"),
    )


def begin_with_glimpse(run: Run, state: TrainState, folder: epath.Path) -> str:
    """Exports the glimpse of a run that cannot continue. Returns: the option of train.py that starts from it."""
    export_run(run, state, folder / LAST_GOOD)
    return f"--glimpse-from {folder / LAST_GOOD / 'export'}"


def describe(run: Run) -> str:
    """Describes a run in a few lines."""
    schedule = run.feed.schedule
    size = sum(leaf.size for leaf in jax.tree.leaves(run.step.params))
    left_out = [
        f"left out of {what}: {feed.left_out()}"
        for what, feed in (("training", run.feed), ("validation", run.validation))
        if feed is not None and feed.left_out()
    ]
    shapes = ", ".join(f"{b.slots}/{b.prompt}/{b.tail}" for b in schedule.buckets)
    lines = (
        f"{schedule.samples} records, {schedule.padding:.1%} padding; shapes (visual/prompt/answer rows): {shapes}",
        *left_out,
        f"{run.steps} steps of {run.config.batch_size} x {run.config.accumulation} samples, {size / 1e6:.2f} M trainable parameters, "
        f"{jax.device_count()} device(s) in {jax.process_count()} process(es)",
    )
    return "\n".join(lines)
