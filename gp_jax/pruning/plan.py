"""Pruning plans: an ordered list of cuts. No pruning is the empty plan, GlimpsePrune is one cut.

A cut is a layer after which tokens are dropped, the scorer that ranks them, and whether the caches of earlier layers are cut too.
How many tokens stay is given by `trees.KeepLimits`, numbers that change without recompiling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from gp_jax.config.model import GlimpseConfig
from gp_jax.config.vision import Vision
from gp_jax.errors import GlimpseError
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.rule import Prune
from gp_jax.pruning.scorers import attention, cdpruner, divprune, fastv, given, glimpse, pyramiddrop, visionzip, vscan
from gp_jax.pruning.scorers.scorer import Cut, Scorer
from gp_jax.trees import Stream

Plan = tuple[Cut, ...]

SCORERS = {
    "glimpse": Scorer(glimpse.score, glimpse=True, in_parts=True),
    "attention": Scorer(attention.score, attention=True),
    "given": Scorer(given.score, given=True),
    "fastv": Scorer(fastv.score, attention=True),
    "pyramiddrop": Scorer(pyramiddrop.score),
    "visionzip": Scorer(visionzip.score, blocks=visionzip.blocks, merge=visionzip.merge),
    "divprune": Scorer(divprune.score),
    "cdpruner": Scorer(cdpruner.score),
    "vscan_tower": Scorer(vscan.tower_score, blocks=vscan.blocks, merge=vscan.merge),
    "vscan": Scorer(vscan.score),
}


@dataclass(frozen=True)
class Published:
    """A published method that defines where it cuts.

    layers: number of decoder layers -> per cut the last layer before it. shares: the requested ratio -> per cut the share of all visual
    tokens that is left after it; None: that ratio. past: as of `Cut`.
    """

    scorers: tuple[str, ...]
    layers: Callable[[int], tuple[int, ...]]
    shares: Callable[[float], tuple[float, ...]] | None = None
    past: bool = True


PUBLISHED = {
    "fastv": Published(("fastv",), lambda depth: (1,), past=False),
    "pyramiddrop": Published(("pyramiddrop",) * 3, pyramiddrop.layers, pyramiddrop.shares, past=False),
    "visionzip": Published(("visionzip",), lambda depth: (-1,)),
    "divprune": Published(("divprune",), lambda depth: (-1,)),
    "cdpruner": Published(("cdpruner",), lambda depth: (-1,)),
    "vscan": Published(("vscan_tower", "vscan"), vscan.layers, vscan.shares),
}
SCORER_OF = {"glimpse": "glimpse", "attention": "attention", "random": "given", "nothing": "given"}  # the other methods of `Prune`


def look_plan(glimpse: GlimpseConfig | None) -> Plan:
    """The plan of a first look (see `pruning.look`), which is taken up to its scores. Raises: GlimpseError without a glimpse."""
    if glimpse is None:
        raise GlimpseError("look: a first look needs a glimpse, unless Look(windows=...) says what to see")
    return (Cut(glimpse.reduce_layer, "glimpse"),)


def needs_glimpse(plan: Plan) -> bool:
    """Whether the prompt needs glimpse rows."""
    return any(SCORERS[cut.scorer].glimpse for cut in plan)


def merges(cut: Cut) -> bool:
    """Whether dropped tokens are merged into kept ones."""
    return SCORERS[cut.scorer].merge is not None


def tapped_layers(plan: Plan, config: GlimpseConfig | None) -> tuple[int, ...]:
    """Layers whose attention a plan's scorers read."""
    layers = {cut.after for cut in plan if SCORERS[cut.scorer].attention}
    return tuple(sorted(layers | (set(config.selected_layers) if config and needs_glimpse(plan) else set())))


def watched_blocks(plan: Plan, config: Vision) -> tuple[int, ...]:
    """Vision blocks whose attention a plan's scorers read."""
    return tuple(sorted({block for cut in plan for block in SCORERS[cut.scorer].blocks(config)}))


def make_plan(prune: Prune, config: GlimpseConfig | None, depth: int) -> Plan:
    """The plan that `Prune` stands for. depth: decoder layers.

    Raises: GlimpseError when the glimpse is needed and there is none, or the cut is not one of the layers.
    """
    if prune.reference_masks is None and prune.method in PUBLISHED:
        return _published(prune, depth)
    name = "given" if prune.reference_masks is not None else SCORER_OF[prune.method]
    scorer = SCORERS[name]
    if scorer.glimpse and config is None:
        raise GlimpseError("prune is set, but no glimpse is loaded: pass glimpse=... to from_pretrained, or prune=None")
    after = config.reduce_layer if config else middle_layer(depth)
    if prune.after is not None:
        after = prune.after
    first = -1 if scorer.given else 0
    if not first <= after < depth:
        raise GlimpseError(f"after={after} is not one of the model's {depth} layers ({first}..{depth - 1})")
    if scorer.glimpse and config:
        if config.use_ref_masks:
            raise GlimpseError("this glimpse config has use_ref_masks=true: pass Prune(reference_masks=...)")
        if prune.after not in (None, config.reduce_layer):
            raise GlimpseError(f"after={after}: this glimpse was trained for layer {config.reduce_layer}")
        name = "given" if config.use_zero_masks else name
    return (Cut(after, name),)


def _published(prune: Prune, depth: int) -> Plan:
    """A published method's cuts."""
    method = PUBLISHED[prune.method]
    layers, last = method.layers(depth), depth - 2  # at least one layer must follow a cut
    if prune.after is not None:
        if prune.method != "fastv":
            raise GlimpseError(f"after={prune.after}: the method '{prune.method}' says itself where it cuts")
        layers = (prune.after,)
        if not 0 <= prune.after <= last:
            raise GlimpseError(f"after={prune.after} is not one of the model's {depth} layers with a layer behind it (0..{last})")
    if list(layers) != sorted(set(layers)) or layers[-1] > last:
        raise GlimpseError(f"the method '{prune.method}' needs a deeper model than {depth} layers")
    return tuple(Cut(after, scorer, method.past) for after, scorer in zip(layers, method.scorers, strict=True))


def shares(prune: Prune, plan: Plan) -> tuple[float | tuple[float, ...] | None, ...]:
    """The `fixed_remain_ratio` of every cut."""
    method = PUBLISHED.get(prune.method)
    split = method.shares if method and prune.reference_masks is None and prune.ratios else None
    return tuple(zip(*map(split, prune.ratios), strict=True)) if split else (prune.fixed_remain_ratio,) * len(plan)


def middle_layer(depth: int) -> int:
    """The layer after which the released models cut: at two thirds of the depth."""
    return -(-depth * 2 // 3) - 1


def survivors_mask(stream: Stream, keep: Array, drop_glimpse: bool) -> Array:
    """Which stream rows stay. Text rows always do. keep: (B, M) over vision slots. Returns: (B, T) bool."""
    kept = take_rows(keep, jnp.maximum(stream.image_slot, 0))
    stays = jnp.where(stream.image_slot >= 0, kept, True) & stream.valid
    return stays & (stream.glimpse_row < 0) if drop_glimpse else stays
