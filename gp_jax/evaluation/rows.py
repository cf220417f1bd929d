"""Answers added up: one row per plan."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.metrics import normalise
from gp_jax.evaluation.results import COMPILE, Prediction
from gp_jax.evaluation.statistics import Interval, bootstrap, paired_difference

DENSE = "dense"  # the plan that others are compared with


@dataclass(frozen=True)
class PlanRow:
    """A plan over all of its samples.

    metrics:           per metric the mean with its interval.
    differences:       per metric, mean difference to the plan "dense" over the `paired` samples that both answered; empty for dense.
    retention:         share of all visual tokens left in the decode cache, averaged over layers.
    prefill_retention: share that an average decoder layer saw in prefill.
    flops_ratio:       FLOPs over those of dense. kv_bytes: of an average answer.
    seconds, stages:   of an average answer, without compilation; NaN if it was not measured.
    agreement:         share of answers that are dense's own after `metrics.normalise`, right or wrong.
    """

    plan: str
    samples: int
    paired: int
    metrics: dict[str, Interval]
    differences: dict[str, Interval]
    retention: float
    prefill_retention: float
    flops_ratio: float | None
    kv_bytes: float | None
    seconds: float
    stages: dict[str, float]
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
    dense = plans.get(DENSE, {})
    return [_row(plan, own, dense, flops, kv_bytes, seed) for plan, own in plans.items()]


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


def _row(
    plan: str, own: Mapping[tuple, Prediction], dense: Mapping[tuple, Prediction], flops: Costs | None, kv_bytes: Costs | None, seed: int
) -> PlanRow:
    mine, pairs = list(own.values()), [(p, dense[key]) for key, p in own.items() if key in dense]
    metrics, differences = {}, {}
    for name in dict.fromkeys(name for p in mine for name in p.metrics):
        if values := [p.metrics[name] for p in mine if _has(p, name)]:
            metrics[name] = bootstrap(values, seed=seed)
        both = [(p.metrics[name], d.metrics[name]) for p, d in pairs if _has(p, name) and _has(d, name)]
        if both and plan != DENSE:
            differences[name] = paired_difference(*zip(*both, strict=True), seed=seed)
    total = sum(p.total for p in mine)
    timed = [p for p in mine if p.seconds]
    stages = dict.fromkeys(stage for p in timed for stage in p.seconds if stage != COMPILE)
    return PlanRow(
        plan=plan,
        samples=len(mine),
        paired=len(pairs),
        metrics=metrics,
        differences=differences,
        retention=sum(p.held for p in mine) / total if total else 1.0,
        prefill_retention=sum(p.prefill_retention * p.total for p in mine) / total if total else 1.0,
        flops_ratio=_ratio(flops, plan, pairs),
        kv_bytes=kv_bytes.get(plan) if isinstance(kv_bytes, Mapping) else kv_bytes and sum(map(kv_bytes, mine)) / len(mine),
        seconds=sum(p.time for p in timed) / len(timed) if timed else math.nan,
        stages={stage: sum(p.seconds.get(stage, 0.0) for p in timed) / len(timed) for stage in stages},
        agreement=sum(normalise(p.prediction) == normalise(d.prediction) for p, d in pairs) / len(pairs) if pairs else None,
    )


def _has(prediction: Prediction, name: str) -> bool:
    return math.isfinite(prediction.metrics.get(name, math.nan))


def _ratio(flops: Costs | None, plan: str, pairs: Sequence[tuple[Prediction, Prediction]]) -> float | None:
    """A plan's FLOPs over dense's, of the same samples."""
    if isinstance(flops, Mapping):
        return flops[plan] / flops[DENSE] if plan in flops and flops.get(DENSE) else None
    if flops is None or not pairs:
        return None
    return sum(flops(p) for p, _ in pairs) / sum(flops(d) for _, d in pairs)
