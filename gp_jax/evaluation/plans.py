"""Named ways to prune, to be compared on one engine: what `Prune` each of them is.

dense               nothing is pruned
glimpse             the glimpse with its own threshold; glimpse-11.1: at most so many percent stay; glimpse-fixed-11.1: exactly so many;
                    glimpse-above-30: another threshold, what it holds important with more than so many percent stays
oracle              exactly the visual tokens that the evidence boxes touch
nothing             no visual token is kept after the cut: how much of the answer had leaked into the text before it

As many as the glimpse keeps, over all samples; with a number behind a dash (visionzip-11.1) that percentage instead:

random              by lot, at the glimpse's cut; random-1, random-2: other seeds; random-0-11.1: seed 0, that percentage
attention           by the last prompt token's attention at the glimpse's cut: nothing is trained
fastv, pyramiddrop, visionzip, divprune, cdpruner, vscan
                    the published methods, each with its own cuts (gp_jax/scorers); so many are left behind the last of them
downsample          the picture itself is scaled down to so many visual tokens
"""

import difflib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from gp_jax.config import GlimpseConfig
from gp_jax.errors import GlimpseError
from gp_jax.glimpse.select import Prune
from gp_jax.plan import PUBLISHED

DEFAULT = ("dense", "glimpse", "glimpse-11.1", "oracle", "attention", "random", "nothing")
AT_RATIO = ("attention", *PUBLISHED, "downsample")  # plans that take how much to keep
NAMES = (
    "dense",
    "glimpse",
    "glimpse-PERCENT",
    "glimpse-fixed-PERCENT",
    "glimpse-above-PERCENT",
    "oracle",
    "nothing",
    "random",
    "random-SEED",
    "random-SEED-PERCENT",
    *(f"{n}[-PERCENT]" for n in AT_RATIO),
)


@dataclass(frozen=True)
class EvalPlan:
    """A plan by name.

    rule: (reference masks of a batch, retention) -> what generation takes; None: nothing is pruned.
    matched: as many tokens as the plan `glimpse` keeps (`matching_ratio`), which therefore must run before it; else it is `ratio`.
    shrink: pictures are scaled to that share of their visual tokens.
    prunes: some of a picture's visual tokens go, so that asking which is sensible.
    """

    name: str
    rule: Callable[[Sequence[np.ndarray], float | None], Prune | None]
    matched: bool = False
    ratio: float | None = None
    shrink: bool = False
    prunes: bool = True


def make_plan(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan by its name. Raises: GlimpseError with the nearest name for an unknown one, or when it needs a glimpse and there is none."""
    kind, dash, value = name.partition("-")
    after = glimpse.reduce_layer if glimpse else None
    if kind == "glimpse":
        if glimpse is None:
            raise GlimpseError(f"plan '{name}' needs a glimpse (--glimpse)")
        own = Prune.from_config(glimpse)
        if not value:
            return EvalPlan(name, lambda masks, ratio: own)
        word, _, percent = value.partition("-")
        if word in ("fixed", "above"):
            share = _number(name, percent, 0, 100) / 100
            given = {"fixed_remain_ratio": share} if word == "fixed" else {"reduce_threshold": share}
            return EvalPlan(name, lambda masks, ratio: Prune(**given))
        cap = _number(name, value, 0, 100) / 100
        return EvalPlan(name, lambda masks, ratio: Prune(reduce_threshold=own.reduce_threshold, max_remain_ratio=cap))
    if kind == "random":
        number, fixed, percent = value.partition("-")
        seed = _seed(name, number) if dash else 0
        share = _number(name, percent, 0, 100) / 100 if fixed else None

        def by_lot(masks: Sequence[np.ndarray], ratio: float | None) -> Prune:
            return Prune(method="random", seed=seed, fixed_remain_ratio=ratio, after=after)

        return EvalPlan(name, by_lot, matched=not fixed, ratio=share)
    if kind in AT_RATIO:
        share = _number(name, value, 0, 100) / 100 if dash else None
        make = partial(EvalPlan, name, matched=not dash, ratio=share)
        if kind == "downsample":
            return make(rule=lambda masks, ratio: None, shrink=True, prunes=False)
        place = {"after": after} if kind == "attention" else {}
        return make(rule=lambda masks, ratio: Prune(method=kind, fixed_remain_ratio=ratio, **place))
    plans = {
        "dense": EvalPlan(name, lambda masks, ratio: None, prunes=False),
        "oracle": EvalPlan(name, lambda masks, ratio: Prune(reference_masks=masks, after=after)),
        "nothing": EvalPlan(name, lambda masks, ratio: Prune(method="nothing", min_remain_num=0, after=after)),
    }
    if name not in plans:
        near = difflib.get_close_matches(name, [*plans, *AT_RATIO, "glimpse", "random"], n=1)
        raise GlimpseError(f"plan '{name}' is unknown" + (f", did you mean '{near[0]}'?" if near else "") + f" (plans: {', '.join(NAMES)})")
    return plans[name]


def shrunk_grid(grid: tuple[int, int], ratio: float) -> tuple[int, int]:
    """(rows, columns) of visual tokens, at most `ratio` of the grid's and at least one, near in number and in shape."""
    rows, columns = grid
    target = max(1, int(ratio * rows * columns))

    def misfit(r: int) -> float:
        c = min(columns, target // r)
        return abs(math.log(c * rows / (r * columns))) + math.log(target / (r * c))

    best = min(range(1, min(rows, target) + 1), key=misfit)
    return best, min(columns, target // best)


def matching_ratio(grids: Sequence[Sequence[tuple[int, int]]], kept: int, shrink: bool = False) -> float:
    """The ratio with which max(1, int(ratio * N)) of every sample's N visual tokens add up to `kept`, or as near to it as a ratio comes.

    The mean share will not do: rounding down loses half a token of every sample. Of two ratios as near the larger is taken.
    Args: grids: per sample the (rows, columns) of its pictures. shrink: count what is left of the pictures scaled down instead.
    """
    totals = np.array([sum(rows * columns for rows, columns in own) for own in grids], np.int64)
    sizes = Counter(grid for own in grids for grid in own)

    def amount(ratio: float) -> int:
        if shrink:
            return sum(count * math.prod(shrunk_grid(grid, ratio)) for grid, count in sizes.items())
        return int(np.maximum(np.minimum(totals, 1), (ratio * totals).astype(np.int64)).sum())

    low, high = 1e-6, 1.0
    if amount(low) >= kept:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if amount(middle) >= kept else (middle, high)
    return low if kept - amount(low) < amount(high) - kept else high


def _number(name: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not low <= number <= high:
        raise GlimpseError(f"plan '{name}': '{value}' is not a number in {low}..{high}")
    return number


def _seed(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and int(value) <= 2**31):
        raise GlimpseError(f"plan '{name}': the seed '{value}' is not a whole number in 0..2**31 (11.1 % by lot: random-0-11.1)")
    return int(value)


def make_plans(names: Sequence[str], glimpse: GlimpseConfig | None, resizable: bool = True) -> list[EvalPlan]:
    """Plans in the order in which they can run. resizable: the model takes pictures with fewer visual tokens.

    Raises: GlimpseError, also when one must match the glimpse's retention without it, or shrink pictures of a model with a fixed number.
    """
    plans = [make_plan(name, glimpse) for name in dict.fromkeys(names)]
    if not resizable and (shrinking := next((p.name for p in plans if p.shrink), None)):
        raise GlimpseError(f"plan '{shrinking}': this model's pictures cannot be given with fewer visual tokens; leave it out of --plans")
    if any(plan.matched for plan in plans) and "glimpse" not in names:
        raise GlimpseError(f"plan '{next(p.name for p in plans if p.matched)}' keeps as many as the plan 'glimpse' does: name that one too")
    return sorted(plans, key=lambda plan: plan.matched)
