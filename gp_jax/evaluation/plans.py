"""Named ways to prune, to be compared on one engine: what `Prune` each of them is.

dense               nothing is pruned
glimpse             the glimpse with its own threshold; glimpse-11.1: at most so many percent stay; glimpse-fixed-11.1: exactly so many;
                    glimpse-above-30: another threshold, what it holds important with more than so many percent stays
oracle              exactly the visual tokens that the evidence boxes touch
nothing             no visual token is kept after the cut: how much of the answer had leaked into the text before it

As many as the glimpse keeps of the same sample; with a number behind a dash (visionzip-11.1) that percentage instead; with
`-pooled` behind the name (visionzip-pooled) one percentage for all samples, with which the totals match:

random              by lot, at the glimpse's cut; random-1, random-2: other seeds; random-0-11.1: seed 0, that percentage
attention           by the last prompt token's attention at the glimpse's cut: nothing is trained
fastv, pyramiddrop, visionzip, divprune, cdpruner, vscan
                    the published methods, each with its own cuts (gp_jax/scorers); so many are left behind the last of them
downsample          the picture itself is scaled down to so many visual tokens, or as near as whole rows and columns come
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np

from gp_jax.config.model import GlimpseConfig
from gp_jax.errors import GlimpseError, printable
from gp_jax.pruning.plan import PUBLISHED
from gp_jax.pruning.rule import Prune

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
    *(f"{n}-pooled" for n in ("random", "random-SEED", *AT_RATIO)),
)
POOLED = "pooled"


@dataclass(frozen=True)
class EvalPlan:
    """A plan by name.

    rule: (reference masks of a batch, retention: a share, one per sample, or None) -> what generation takes; None: nothing is pruned.
    matched: keeps as many tokens as the plan `glimpse`, which must run before it: of every sample (`matching.sample_ratio`), or of all
        together (`matching.pooled_ratio`). None: its share is `ratio`.
    shrink: pictures are scaled to that share of their visual tokens.
    prunes: some of a picture's visual tokens go, so that asking which is sensible.
    """

    name: str
    rule: Callable[[Sequence[np.ndarray], float | Sequence[float] | None], Prune | None]
    matched: Literal["sample", "pooled"] | None = None
    ratio: float | None = None
    shrink: bool = False
    prunes: bool = True


def make_plan(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan by its name. Raises: GlimpseError with the nearest name for an unknown one, or when it needs a glimpse and there is none."""
    plain = name.removesuffix(f"-{POOLED}")
    plan = _at_ratio(name, plain, glimpse) or _by_rule(plain, glimpse)
    if plain == name:
        return plan
    if plan.matched is None:
        raise GlimpseError(f"plan '{name}': only plans that match the glimpse can be pooled, '{plain}' does not")
    return dataclasses.replace(plan, matched="pooled")


def _at_ratio(name: str, plain: str, glimpse: GlimpseConfig | None) -> EvalPlan | None:
    """Plans that are told how much to keep; None: `plain`, the name without -pooled, is none of them."""
    kind, dash, value = plain.partition("-")
    after = glimpse.reduce_layer if glimpse else None
    if kind == "random":
        number, dash, percent = value.partition("-") if dash else ("0", "", "")
        rule = partial(_rule, method=kind, seed=_seed(name, number), after=after)
        value = percent
    elif kind in AT_RATIO:
        rule = partial(_rule, method=kind, **({"after": after} if kind == "attention" else {}))
    else:
        return None
    share = _number(name, value, 0, 100) / 100 if dash else None
    plan = EvalPlan(name, rule, matched=None if dash else "sample", ratio=share)
    if kind == "downsample":
        return dataclasses.replace(plan, rule=lambda masks, ratio: None, shrink=True, prunes=False)
    return plan


def _rule(masks: Sequence[np.ndarray], ratio: float | Sequence[float] | None, **settings) -> Prune:
    return Prune(fixed_remain_ratio=ratio, **settings)


def _by_rule(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """Plans that know themselves how much to keep."""
    kind, _, value = name.partition("-")
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
    plans = {
        "dense": EvalPlan(name, lambda masks, ratio: None, prunes=False),
        "oracle": EvalPlan(name, lambda masks, ratio: Prune(reference_masks=masks, after=after)),
        "nothing": EvalPlan(name, lambda masks, ratio: Prune(method="nothing", min_remain_num=0, after=after)),
    }
    if name not in plans:
        known = [*plans, *AT_RATIO, "glimpse", "random", *(f"{n}-{POOLED}" for n in ("random", *AT_RATIO))]
        near = difflib.get_close_matches(name, known, n=1)
        raise GlimpseError(f"plan '{name}' is unknown" + (f", did you mean '{near[0]}'?" if near else "") + f" (plans: {', '.join(NAMES)})")
    return plans[name]


def _number(name: str, value: str, low: float, high: float) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not low <= number <= high:
        raise GlimpseError(f"plan '{name}': '{value}' is not a number in {low}..{high}{_pooled_hint(name, value)}")
    return number


def _seed(name: str, value: str) -> int:
    if not (value.isascii() and value.isdecimal() and len(value) <= 10 and int(value) <= 2**31):
        hint = _pooled_hint(name, value) or " (11.1 % by lot: random-0-11.1)"
        raise GlimpseError(f"plan '{printable(name, 80)}': the seed is not a whole number in 0..2**31{hint}")
    return int(value)


def _pooled_hint(name: str, value: str) -> str:
    near = name.endswith(f"-{value}") and difflib.get_close_matches(value, [POOLED])
    return f", did you mean '{name.removesuffix(value)}{POOLED}'?" if near else ""


def make_plans(names: Sequence[str], glimpse: GlimpseConfig | None, resizable: bool = True) -> list[EvalPlan]:
    """Plans in the order in which they can run. resizable: the model takes pictures with fewer visual tokens.

    Raises: GlimpseError, also when one must match the glimpse's retention without it, or shrink pictures of a model with a fixed number.
    """
    plans = [make_plan(name, glimpse) for name in dict.fromkeys(names)]
    if not resizable and (shrinking := next((p.name for p in plans if p.shrink), None)):
        raise GlimpseError(f"plan '{shrinking}': this model's pictures cannot be given with fewer visual tokens; leave it out of --plans")
    if any(plan.matched for plan in plans) and "glimpse" not in names:
        raise GlimpseError(f"plan '{next(p.name for p in plans if p.matched)}' keeps as many as the plan 'glimpse' does: name that one too")
    return sorted(plans, key=lambda plan: plan.matched is not None)
