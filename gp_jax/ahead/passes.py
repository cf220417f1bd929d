"""Requests whose programs are compiled, and the passes through the engine that a plan answers them with."""

from dataclasses import dataclass, replace
from typing import Any

from gp_jax.buckets import Ladders
from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.config.vision import Vision
from gp_jax.flops import Cost, Workload, first_look, segments, stages
from gp_jax.processing.looks import FirstSize, check_parts
from gp_jax.processing.windows import split_windows
from gp_jax.pruning.plan import Plan
from gp_jax.pruning.scorers.scorer import Cut


@dataclass(frozen=True)
class Request:
    """A batch of equal requests. retention: share of the visual tokens that the cut keeps; look_share: share of them that a first look has;
    seen: share of the vision windows that a second look sees."""

    batch: int = 8
    visual_tokens: int = 4096
    prompt_tokens: int = 64
    answer_tokens: int = 128
    retention: float = 0.111
    look_share: float = 0.25
    seen: float = 0.25

    def grid(self, vision: Vision) -> tuple[int, int]:
        """About a square of whole attention windows, (rows, columns) in visual tokens, with at least as many."""
        side = vision.window_side
        columns = max(side, int(self.visual_tokens**0.5) // side * side)
        return -(-self.visual_tokens // columns), columns

    def workload(self, vision: Vision, ladders: Ladders | None) -> Workload:
        """The same as `flops` counts it."""
        rows, columns = self.grid(vision)
        work = Workload.of(vision, [(rows, columns)], self.prompt_tokens, self.answer_tokens, self.batch)
        return Workload(work.patches, work.visual, work.text, work.new_tokens, work.batch, work.grids, ladders)


@dataclass(frozen=True)
class Pass:
    """One way through the engine. ends: with its scores, as a first look does; kept: rows behind each cut."""

    work: Workload
    plan: Plan
    kept: tuple[int, ...] = ()
    ends: bool = False

    def slots(self, vision: Vision) -> int:
        """Vision slots of its bucket."""
        return segments(vision, self.work)[1][0] // vision.merge_unit


def passes(name: str, request: Request, config: ModelConfig, glimpse: GlimpseConfig, work: Workload) -> list[Pass]:
    """What a plan runs: dense; glimpse; look, a first look and the second. work: of the whole pictures.

    Raises: GlimpseError when the model's pictures have no parts.
    """
    if name == "dense":
        return [Pass(work, ())]
    plan, kept, vision = (Cut(glimpse.reduce_layer, "glimpse"),), int(request.retention * work.visual), config.vision
    if name == "glimpse":
        return [Pass(work, plan, (work.text + kept,))]
    check_parts(config)
    (grid,), side = work.grids, vision.window_side
    small = (side, side) if vision.overviews else FirstSize(request.look_share, None, 1).of(grid)
    first = replace(Workload.of(vision, [small], work.text, 1, work.batch), ladders=work.ladders)
    sizes = [window.size for window in split_windows([grid], side)[0]]
    sizes = sizes[: max(1, round(request.seen * len(sizes)))]
    seen = work.seeing(vision, [[side * side, *sizes] if vision.overviews else sizes])
    return [Pass(first, plan, ends=True), Pass(seen, plan, (seen.text + min(kept, seen.visual),))]


def costs_of(config: ModelConfig, glimpse: GlimpseConfig, steps: list[Pass], itemsize: int) -> dict[str, Cost]:
    """Costs from sizes, per stage of the last pass; what a first look costs is added to its stages."""
    last = steps[-1]
    options: dict[str, Any] = dict(triangle=True, itemsize=itemsize)
    cuts = [(cut.after, (kept - last.work.text + 0.5) / last.work.visual) for cut, kept in zip(last.plan, last.kept, strict=True)]
    cuts = [(after, min(1.0, share)) for after, share in cuts]
    found = dict(stages(config, glimpse if cuts else None, last.work, cuts, **options))
    for step in steps[:-1]:
        looked = stages(config, glimpse, step.work, [(glimpse.reduce_layer, 1.0)], **options)
        for name in ("vision", "merger"):
            found[name] += looked[name]
        read = first_look(config, glimpse, step.work, **options) + (looked["vision"] + looked["merger"]) * -1
        found["decoder prefill"] += read
    return found
