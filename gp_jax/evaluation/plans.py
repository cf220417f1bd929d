"""Plans: named ways to prune, which are compared on one engine, and the `Prune` of each.

dense               nothing is pruned
glimpse             the glimpse with its own threshold; glimpse-11.1: at most 11.1 % are kept; glimpse-fixed-11.1: exactly 11.1 %;
                    glimpse-above-30: the tokens whose importance is above 30 %
oracle              exactly the visual tokens that the evidence boxes touch
nothing             no visual token is kept after the cut: shows how much the text rows have read from the picture before it

look                two looks (`pruning.look`): a first one at few visual tokens chooses the vision windows that are seen; then as glimpse
look-oracle         the windows that the evidence boxes touch are seen, without a first look
look-random         random windows are seen, without a first look: as many as floor says
look-first          the first look alone: the picture at its size, then as glimpse

The last four with any settings of a look, shares in percent (-share25 -tokens64 -least16 -above5 -margin1 -floor10 -cap60 -sure50
-sureoff), -seed3 (of look-random) and -keep11.1 (keep at most that percentage): look-share6.25-above10-margin1

The following plans keep as many visual tokens of each sample as the glimpse does; with a percentage after a dash (visionzip-11.1) they
keep that percentage; with `-pooled` (visionzip-pooled) one percentage for all samples, with which the totals match:

random              random tokens, at the glimpse's cut; random-1, random-2: other seeds; random-0-11.1: seed 0, that percentage
attention           ranked by the attention of the last prompt token at the glimpse's cut; needs no training
fastv, pyramiddrop, visionzip, divprune, cdpruner, vscan
                    the published methods, each with its own cuts (gp_jax/pruning/scorers); the number holds after the last cut
downsample          the picture is scaled down to that number of visual tokens, or the nearest with whole rows and columns
"""

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from gp_jax.config.model import GlimpseConfig
from gp_jax.errors import GlimpseError, printable
from gp_jax.pruning.look import Look
from gp_jax.pruning.plan import PUBLISHED
from gp_jax.pruning.rule import Prune

DEFAULT = ("dense", "glimpse", "glimpse-11.1", "oracle", "attention", "random", "nothing")
AT_RATIO = ("attention", *PUBLISHED, "downsample")  # plans with a parameter for how much to keep
NAMES = (
    "dense",
    "glimpse",
    "glimpse-PERCENT",
    "glimpse-fixed-PERCENT",
    "glimpse-above-PERCENT",
    "oracle",
    "nothing",
    "look[-oracle|-random|-first][-SETTINGS]",
    "random",
    "random-SEED",
    "random-SEED-PERCENT",
    *(f"{n}[-PERCENT]" for n in AT_RATIO),
    *(f"{n}-pooled" for n in ("random", "random-SEED", *AT_RATIO)),
)
POOLED = "pooled"
LOOKS = ("oracle", "random", "first")
LOOK_SETTINGS = {  # word -> field of `Look`, whether it is a whole number; else it is a percentage
    "share": ("share", False),
    "tokens": ("tokens", True),
    "least": ("least", True),
    "above": ("threshold", False),
    "margin": ("margin", True),
    "floor": ("floor", False),
    "cap": ("cap", False),
    "sure": ("sure", False),
}
LOOK_WORDS = (*(f"{word}{'N' if whole else 'PERCENT'}" for word, (_, whole) in LOOK_SETTINGS.items()), "sureoff", "seedN", "keepPERCENT")


@dataclass(frozen=True)
class EvalPlan:
    """A plan and its name.

    rule: (reference masks of a batch, share to keep: one, one per sample, or None) -> `prune` for generation; None: nothing is pruned.
    matched: keep as many tokens as the plan `glimpse`, which must run before it: "sample": of every sample (`matching.sample_ratio`);
        "pooled": of all samples together (`matching.pooled_ratio`). None: the share to keep is `ratio`.
    shrink: pictures are scaled down to the share to keep instead of pruned.
    prunes: whether visual tokens of a picture are removed, so that there are metrics of which ones.
    parts: only parts of pictures are seen.
    """

    name: str
    rule: Callable[[Sequence[Sequence[np.ndarray]], float | Sequence[float] | None], Prune | None]
    matched: Literal["sample", "pooled"] | None = None
    ratio: float | None = None
    shrink: bool = False
    prunes: bool = True
    parts: bool = False


def make_plan(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan by its name. Raises: GlimpseError for an unknown name, with the most similar one, or when a needed glimpse is missing."""
    plain = name.removesuffix(f"-{POOLED}")
    plan = look_plan(plain, glimpse) if plain.split("-")[0] == "look" else _at_ratio(name, plain, glimpse) or _by_rule(plain, glimpse)
    if plain == name:
        return plan
    if plan.matched is None:
        raise GlimpseError(f"plan '{name}': only plans that match the glimpse can be pooled, '{plain}' does not")
    return dataclasses.replace(plan, matched="pooled")


def _at_ratio(name: str, plain: str, glimpse: GlimpseConfig | None) -> EvalPlan | None:
    """A plan with a parameter for how much to keep; None when `plain`, the name without -pooled, is not one of these plans."""
    kind, dash, value = plain.partition("-")
    after = glimpse.reduce_layer if glimpse else None
    if kind == "random":
        number, dash, percent = value.partition("-") if dash else ("0", "", "")
        rule = partial(_rule, method=kind, seed=_seed(name, number), after=after)
        value = percent
    elif kind in AT_RATIO:
        rule = partial(_rule, method=kind, after=after) if kind == "attention" else partial(_rule, method=kind)
    else:
        return None
    share = _number(name, value, 0, 100) / 100 if dash else None
    plan = EvalPlan(name, rule, matched=None if dash else "sample", ratio=share)
    if kind == "downsample":
        return dataclasses.replace(plan, rule=lambda masks, ratio: None, shrink=True, prunes=False)
    return plan


def _rule(masks: Sequence[Sequence[np.ndarray]], ratio: float | Sequence[float] | None, **settings: Any) -> Prune:
    return Prune(fixed_remain_ratio=tuple(ratio) if isinstance(ratio, Sequence) else ratio, **settings)


def _by_rule(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan whose own rule decides how much to keep."""
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
            given: dict[str, Any] = {"fixed_remain_ratio": share} if word == "fixed" else {"reduce_threshold": share}
            return EvalPlan(name, lambda masks, ratio: Prune(**given))
        cap = _number(name, value, 0, 100) / 100
        return EvalPlan(name, lambda masks, ratio: Prune(reduce_threshold=own.reduce_threshold, max_remain_ratio=cap))
    plans = {
        "dense": EvalPlan(name, lambda masks, ratio: None, prunes=False),
        "oracle": EvalPlan(name, lambda masks, ratio: Prune(reference_masks=masks, after=after)),
        "nothing": EvalPlan(name, lambda masks, ratio: Prune(method="nothing", min_remain_num=0, after=after)),
    }
    if name not in plans:
        known = [*plans, *AT_RATIO, "glimpse", "look", "random", *(f"{n}-{POOLED}" for n in ("random", *AT_RATIO))]
        near = difflib.get_close_matches(name, known, n=1)
        raise GlimpseError(f"plan '{name}' is unknown" + (f", did you mean '{near[0]}'?" if near else "") + f" (plans: {', '.join(NAMES)})")
    return plans[name]


def look_plan(name: str, glimpse: GlimpseConfig | None) -> EvalPlan:
    """A plan with two looks, by its name. Raises: GlimpseError."""
    if glimpse is None:
        raise GlimpseError(f"plan '{name}' needs a glimpse (--glimpse)")
    kind, *words = name.split("-")[1:] or [""]
    kind, words = (kind, words) if kind in LOOKS else ("", name.split("-")[1:])
    found: dict[str, Any] = {}
    rule = Prune.from_config(glimpse)
    for word in words:
        match = re.fullmatch(r"([a-z]+?)(off|[0-9.]+)", word)
        if match is None or match[1] not in (*LOOK_SETTINGS, "keep", "seed") or (match[2] == "off" and match[1] != "sure"):
            raise GlimpseError(f"plan '{printable(name, 80)}': '{printable(word, 80)}' is not one of {', '.join(LOOK_WORDS)}")
        if match[1] == "keep":
            rule = dataclasses.replace(rule, max_remain_ratio=_number(name, match[2], 0, 100) / 100)
        elif match[1] == "seed":
            found["random"] = _seed(name, match[2])
        else:
            field, whole = LOOK_SETTINGS[match[1]]
            found[field] = None if match[2] == "off" else _seed(name, match[2]) if whole else _number(name, match[2], 0, 100) / 100
    if kind == "random":
        found.setdefault("random", 0)
    elif "random" in found:
        raise GlimpseError(f"plan '{name}': only look-random has a seed")
    look = Look(**found)
    if kind == "first":
        return EvalPlan(name, lambda masks, ratio: rule, ratio=look.share, shrink=True, prunes=False)
    if kind == "oracle":
        return EvalPlan(name, lambda masks, ratio: dataclasses.replace(rule, look=dataclasses.replace(look, windows=masks)), parts=True)
    return EvalPlan(name, lambda masks, ratio: dataclasses.replace(rule, look=look), parts=True)


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
        hint = _pooled_hint(name, value) or " (random 11.1 %: random-0-11.1)"
        raise GlimpseError(f"plan '{printable(name, 80)}': the seed is not a whole number in 0..2**31{hint}")
    return int(value)


def _pooled_hint(name: str, value: str) -> str:
    near = name.endswith(f"-{value}") and difflib.get_close_matches(value, [POOLED])
    return f", did you mean '{name.removesuffix(value)}{POOLED}'?" if near else ""


def make_plans(names: Sequence[str], glimpse: GlimpseConfig | None, resizable: bool = True, parts: bool = True) -> list[EvalPlan]:
    """Plans in the order in which they can run. resizable: whether the model takes pictures with fewer visual tokens; parts: whether it can
    see parts of them alone.

    Raises: GlimpseError for a wrong name, for a plan that must match the plan `glimpse` without it, or that must shrink pictures which are
    not resizable.
    """
    plans = [make_plan(name, glimpse) for name in dict.fromkeys(names)]
    if not resizable and (shrinking := next((p.name for p in plans if p.shrink), None)):
        raise GlimpseError(f"plan '{shrinking}': this model's pictures cannot be given with fewer visual tokens; leave it out of --plans")
    if not parts and (looking := next((p.name for p in plans if p.parts), None)):
        raise GlimpseError(f"plan '{looking}': this model sees a picture in one small square, of which it cannot see a part")
    if any(plan.matched for plan in plans) and "glimpse" not in names:
        raise GlimpseError(f"plan '{next(p.name for p in plans if p.matched)}' keeps as many as the plan 'glimpse' does: name that one too")
    return sorted(plans, key=lambda plan: plan.matched is not None)
