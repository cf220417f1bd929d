"""Named ways to prune, to be compared on one engine: what `Prune` each of them is.

dense               nothing is pruned
glimpse             the glimpse with its own threshold; glimpse-11.1: at most so many percent stay
oracle              exactly the visual tokens that the evidence boxes touch
attention           as many as the glimpse keeps, by the last prompt token's attention at the cut: nothing is trained
random              as many as the glimpse keeps, by lot; random-1, random-2: other seeds
nothing             no visual token is kept after the cut: how much of the answer had leaked into the text before it
"""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gp_jax.config import GlimpseConfig
from gp_jax.errors import GlimpseError
from gp_jax.glimpse.select import Prune

DEFAULT = ("dense", "glimpse", "glimpse-11.1", "oracle", "attention", "random", "nothing")
NAMES = ("dense", "glimpse", "glimpse-PERCENT", "oracle", "attention", "random", "random-SEED", "nothing")


@dataclass(frozen=True)
class EvalPlan:
    """A plan by name.

    rule: (reference masks of a batch, retention to match) -> what generation takes; None: nothing is pruned.
    matched: it keeps as many as the plan `glimpse` does on average, which therefore must run before it.
    """

    name: str
    rule: Callable[[Sequence[np.ndarray], float | None], Prune | None]
    matched: bool = False


def make_plan(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan by its name. Raises: GlimpseError with the nearest name for an unknown one, or when it needs a glimpse and there is none."""
    kind, _, value = name.partition("-")
    after = glimpse.reduce_layer if glimpse else None
    if kind == "glimpse":
        if glimpse is None:
            raise GlimpseError(f"plan '{name}' needs a glimpse (--glimpse)")
        own = Prune.from_config(glimpse)
        if not value:
            return EvalPlan(name, lambda masks, ratio: own)
        cap = _number(name, value, 0, 100) / 100
        return EvalPlan(name, lambda masks, ratio: Prune(reduce_threshold=own.reduce_threshold, max_remain_ratio=cap))
    if kind == "random":
        seed = int(_number(name, value, 0, 2**31)) if value else 0
        return EvalPlan(name, lambda masks, ratio: Prune(method="random", seed=seed, fixed_remain_ratio=ratio, after=after), matched=True)
    plans = {
        "dense": EvalPlan(name, lambda masks, ratio: None),
        "oracle": EvalPlan(name, lambda masks, ratio: Prune(reference_masks=masks, after=after)),
        "attention": EvalPlan(name, lambda masks, ratio: Prune(method="attention", fixed_remain_ratio=ratio, after=after), matched=True),
        "nothing": EvalPlan(name, lambda masks, ratio: Prune(method="nothing", min_remain_num=0, after=after)),
    }
    if name not in plans:
        near = difflib.get_close_matches(name, [*plans, "glimpse", "random"], n=1)
        raise GlimpseError(f"plan '{name}' is unknown" + (f", did you mean '{near[0]}'?" if near else "") + f" (plans: {', '.join(NAMES)})")
    return plans[name]


def _number(name: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not low <= number <= high:
        raise GlimpseError(f"plan '{name}': '{value}' is not a number in {low}..{high}")
    return number


def make_plans(names: Sequence[str], glimpse: GlimpseConfig | None) -> list[EvalPlan]:
    """Plans in the order in which they can run. Raises: GlimpseError, also when one must match the glimpse's retention without it."""
    plans = [make_plan(name, glimpse) for name in dict.fromkeys(names)]
    if any(plan.matched for plan in plans) and "glimpse" not in names:
        raise GlimpseError(f"plan '{next(p.name for p in plans if p.matched)}' keeps as many as the plan 'glimpse' does: name that one too")
    return sorted(plans, key=lambda plan: plan.matched)
