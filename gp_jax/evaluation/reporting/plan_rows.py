"""Answers added up: one row per plan."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.metrics import normalise
from gp_jax.evaluation.reporting.statistics import Interval, Spread, bootstrap, paired_difference, spread
from gp_jax.evaluation.results import Prediction
from gp_jax.runtime.clock import COMPILE

DENSE = "dense"  # the plan that others are compared with
GLIMPSE = "glimpse"  # the plan that is compared with all others
PHASES = {"processing": ("processing",), "vision": ("look", "vision"), "prefill": ("glimpse", "finish"), "decode": ("decode",)}


@dataclass(frozen=True)
class PlanRow:
    """A plan over all of its samples.

    metrics:           per metric the mean with its interval, over the samples that have it.
    differences:       per metric, mean difference to the plan "dense" over samples that have it from both; empty for dense. `paired`:
                       samples that both answered.
    leads:             per metric, mean difference of the plan "glimpse" to this one, likewise; empty for glimpse.
    retention:         share of all visual tokens left in the decode cache, averaged over layers.
    sample_retention:  the mean over samples of each one's share, in which a small picture counts as much as a large one.
    task_retention:    the mean over tasks of that mean in each; None with one task.
    prefill_retention: share that an average decoder layer saw in prefill.
    vision_retention:  share of all visual tokens that the vision tower saw, without those of a first look.
    flops_ratio:       FLOPs over those of dense. kv_bytes: of an average answer.
    seconds:           of an answer, over the `timed` ones: median and quartiles; None if none was. stages, phases: likewise, of
                       every stage of `clock.STAGES`, and of `PHASES`.
    first_calls:       seconds that first calls took more, of all answers together; not in the other times.
    tokens:            generated ones of an average answer. peak: bytes of memory at most, of one process; None if it is not known.
    agreement:         share of answers that are dense's own after `metrics.normalise`, right or wrong.
    """

    plan: str
    samples: int
    paired: int
    metrics: dict[str, Interval]
    differences: dict[str, Interval]
    leads: dict[str, Interval]
    retention: float
    sample_retention: float
    task_retention: float | None
    prefill_retention: float
    vision_retention: float
    flops_ratio: float | None
    kv_bytes: float | None
    seconds: Spread | None
    stages: dict[str, Spread]
    phases: dict[str, Spread]
    first_calls: float
    tokens: float
    peak: int | None
    agreement: float | None


Costs = Callable[[Prediction], float] | Mapping[str, float]  # of an answer, or of an average answer per plan


def aggregate(predictions: Iterable[Prediction], flops: Costs | None = None, kv_bytes: Costs | None = None, seed: int = 0) -> list[PlanRow]:
    """One row per plan, in the order in which plans first appear. flops, kv_bytes: absolute numbers.

    Raises: GlimpseError where a plan answers a sample twice.
    """
    plans: dict[str, dict[tuple[str, str], Prediction]] = {}
    for prediction in predictions:
        own, key = plans.setdefault(prediction.plan, {}), (prediction.task, prediction.sample)
        if key in own:
            raise GlimpseError(f"plan '{prediction.plan}' answers {' '.join(key)} twice")
        own[key] = prediction
    return [_row(plan, own, plans, flops, kv_bytes, seed) for plan, own in plans.items()]


def breakdown(
    predictions: Sequence[Prediction],
    by: Literal["family", "task"] = "family",
    flops: Costs | None = None,
    kv_bytes: Costs | None = None,
    seed: int = 0,
) -> dict[str, list[PlanRow]]:
    """`aggregate` of every family or task by itself, in the order in which they first appear. A mapping's costs are all the same."""
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(getattr(prediction, by), []).append(prediction)
    return {name: aggregate(members, flops, kv_bytes, seed) for name, members in groups.items()}


Answers = Mapping[tuple[str, str], Prediction]  # of a plan, by task and sample


def _row(plan: str, own: Answers, plans: Mapping[str, Answers], flops: Costs | None, kv_bytes: Costs | None, seed: int) -> PlanRow:
    mine, dense, glimpse = list(own.values()), plans.get(DENSE, {}), plans.get(GLIMPSE, {})
    pairs = [(p, dense[key]) for key, p in own.items() if key in dense]
    rivals = [(glimpse[key], p) for key, p in own.items() if key in glimpse]
    metrics: dict[str, Interval] = {}
    differences: dict[str, Interval] = {}
    leads: dict[str, Interval] = {}
    for name in dict.fromkeys(name for p in mine for name in p.metrics):
        if values := [p.metrics[name] for p in mine if _has(p, name)]:
            metrics[name] = bootstrap(values, seed=seed)
        for table, couples, itself in ((differences, pairs, DENSE), (leads, rivals, GLIMPSE)):
            both = [(p.metrics[name], q.metrics[name]) for p, q in couples if _has(p, name) and _has(q, name)]
            if both and plan != itself:
                table[name] = paired_difference([one for one, _ in both], [other for _, other in both], seed=seed)
    total = sum(p.total for p in mine)
    timed = [p for p in mine if p.timed]
    stages = {stage: (stage,) for p in timed for stage in p.seconds if stage != COMPILE}
    return PlanRow(
        plan=plan,
        samples=len(mine),
        paired=len(pairs),
        metrics=metrics,
        differences=differences,
        leads=leads,
        retention=sum(p.held for p in mine) / total if total else 1.0,
        sample_retention=sum(map(_share, mine)) / len(mine),
        task_retention=_task_retention(mine),
        prefill_retention=sum(p.prefill_retention * p.total for p in mine) / total if total else 1.0,
        vision_retention=sum(p.viewed for p in mine) / total if total else 1.0,
        flops_ratio=_ratio(flops, plan, pairs),
        kv_bytes=kv_bytes.get(plan) if isinstance(kv_bytes, Mapping) else kv_bytes and sum(map(kv_bytes, mine)) / len(mine),
        seconds=spread([p.time for p in timed]),
        stages=_spreads(timed, stages),
        phases=_spreads(timed, PHASES),
        first_calls=sum(p.first_calls for p in mine),
        tokens=sum(p.tokens for p in mine) / len(mine),
        peak=_peak(mine),
        agreement=sum(normalise(p.prediction) == normalise(d.prediction) for p, d in pairs) / len(pairs) if pairs else None,
    )


def _spreads(predictions: Sequence[Prediction], parts: Mapping[str, Sequence[str]]) -> dict[str, Spread]:
    """Of the seconds of some stages together, by name; empty without predictions."""
    found = {name: spread([sum(p.seconds.get(stage, 0.0) for stage in stages) for p in predictions]) for name, stages in parts.items()}
    return {name: own for name, own in found.items() if own}


def _peak(predictions: Sequence[Prediction]) -> int | None:
    """The most of all answers; None where that of one is not known: it may have been the most."""
    peaks = [p.peak for p in predictions if p.peak is not None]
    return max(peaks) if len(peaks) == len(predictions) else None


def _share(prediction: Prediction) -> float:
    """Of a sample's visual tokens, what the decode cache holds."""
    return prediction.held / prediction.total if prediction.total else 1.0


def _task_retention(predictions: Sequence[Prediction]) -> float | None:
    """How the paper adds up: every sample counts the same in its task, every task the same in all."""
    tasks: dict[str, list[float]] = {}
    for p in predictions:
        tasks.setdefault(p.task, []).append(_share(p))
    return sum(sum(shares) / len(shares) for shares in tasks.values()) / len(tasks) if len(tasks) > 1 else None


def _has(prediction: Prediction, name: str) -> bool:
    return math.isfinite(prediction.metrics.get(name, math.nan))


def _ratio(flops: Costs | None, plan: str, pairs: Sequence[tuple[Prediction, Prediction]]) -> float | None:
    """A plan's FLOPs over dense's, of the same samples."""
    if isinstance(flops, Mapping):
        return flops[plan] / flops[DENSE] if plan in flops and flops.get(DENSE) else None
    if flops is None or not pairs:
        return None
    return sum(flops(p) for p, _ in pairs) / sum(flops(d) for _, d in pairs)
