"""The keep rule: which visual tokens stay (method: arXiv 2508.01548, section 3.3).

`Prune` holds the settings. Everything that depends on a sample's token count is computed here on the host, in exact integers; the
device only ranks once and compares.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array
from pydantic import SkipValidation

from gp_jax.config.choices import check_choice
from gp_jax.config.model import Anchors, GlimpseConfig
from gp_jax.config.schema import Count, Flag, Number, Seed, Several, Share, Whole, values
from gp_jax.errors import GlimpseError, shown
from gp_jax.ops.ranking import best
from gp_jax.processing.views import numeric
from gp_jax.pruning.look import Look
from gp_jax.trees import KeepLimits

METHODS = ("glimpse", "attention", "random", "nothing", "fastv", "pyramiddrop", "visionzip", "divprune", "cdpruner", "vscan")
BY_RULE = ("glimpse", "nothing")  # methods that determine how much to keep; the others need a ratio


@dataclass(frozen=True)
class Prune:
    """How much to keep. Names and order of application are the released ones.

    reduce_threshold:   keep tokens whose importance (a probability) is above it.
    max_remain_ratio:   if that keeps a larger share of a sample's tokens, keep the best int(ratio * N) instead.
    min_remain_num:     if fewer are kept, keep this number of tokens, the best ones (None or 0: a sample may lose all).
    fixed_remain_ratio: instead of all this, always keep the best int(ratio * N), at least one. A number, or a list with one per
                        sample. With 1 pruning is skipped: `generate` runs as with prune=None.
    anchor_positions:   corners that always stay, of "tl", "tr", "bl", "br" (samples with one image only).
    reference_masks:    one mask per sample that is used instead of the glimpse, exactly as given: a (rows, columns) or flat bool array
                        over its visual tokens, or a list of such arrays, one per image; None for a sample without images.
    method:             how visual tokens are ranked: "glimpse"; or, for comparison: "attention" (of the last prompt token in layer
                        `after`, without training), "random", "nothing" (none is kept), and the published "fastv", "pyramiddrop",
                        "visionzip", "divprune", "cdpruner" and "vscan" (see gp_jax/pruning/scorers). All but "nothing" need
                        fixed_remain_ratio: the share that is left after their last cut.
    after:              last layer that sees every visual token (-1: cut before layer 0, only if no attention is read); None: as in
                        the glimpse's config, else at two thirds of the depth. Fixed for the published methods except "fastv".
    seed:               of the method "random".
    look:               two looks: a first one at few visual tokens chooses the parts of the pictures that are seen at all. Shares to keep
                        are still of all their visual tokens. Anchors are always seen.
    released_batch_positions: decode every sample of a batch at the last sample's positions. The released code does (transformers
                        4.51 slices the position ids of a pruned batch along the wrong axis), so its batched tokens depend on
                        the other samples. Only to reproduce them.
    """

    reduce_threshold: Number = 0.5
    max_remain_ratio: Share | None = None
    fixed_remain_ratio: Share | Several[Share] | None = None
    min_remain_num: Count | None = 1
    anchor_positions: Anchors = ()
    reference_masks: SkipValidation[Sequence | None] = None
    released_batch_positions: Flag = False
    method: str = "glimpse"
    after: Whole | None = None
    seed: Seed = 0
    look: Look | None = None

    def __post_init__(self) -> None:
        if self.anchor_positions is None:
            object.__setattr__(self, "anchor_positions", ())
        for name, value in values(self).items():
            object.__setattr__(self, name, value)
        if self.reference_masks is not None:
            if not isinstance(self.reference_masks, list | tuple | np.ndarray) or getattr(self.reference_masks, "ndim", 1) == 0:
                raise GlimpseError("reference_masks must be a list with one entry per sample")
            object.__setattr__(self, "reference_masks", tuple(self.reference_masks))
        if not (self.look is None or isinstance(self.look, Look)):
            raise GlimpseError(f"look must be a Look or None, not {shown(self.look)}")
        check_choice("method", self.method, METHODS)
        if self.method not in BY_RULE and self.fixed_remain_ratio is None:
            raise GlimpseError(f"method='{self.method}' ranks only: say how much to keep with fixed_remain_ratio")
        if self.fixed_remain_ratio == ():
            raise GlimpseError("fixed_remain_ratio=[] needs a number for every sample")

    @property
    def ratios(self) -> tuple[float, ...]:
        """`fixed_remain_ratio` per sample, or the one for all; none where it is off."""
        fixed = self.fixed_remain_ratio
        return fixed if isinstance(fixed, tuple) else () if fixed is None else (fixed,)

    @property
    def keeps_everything(self) -> bool:
        """Whether no token can be dropped, for any scores."""
        return set(self.ratios) == {1} and self.reference_masks is None and self.method != "nothing"

    @classmethod
    def from_config(cls, config: GlimpseConfig) -> "Prune":
        """The settings that are part of a checkpoint's config."""
        shared = {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(config)}
        return cls(**{name: getattr(config, name) for name in shared})


def cap_trigger(ratio: float | None, count: int) -> int:
    """The largest number of kept tokens for which the cap does not apply: max c with c / count <= ratio, in Python floats as released."""
    if ratio is None or count == 0:
        return count
    trigger = int(ratio * count)
    while trigger < count and (trigger + 1) / count <= ratio:
        trigger += 1
    while trigger > 0 and trigger / count > ratio:
        trigger -= 1
    return trigger


def anchor_indices(names: Sequence[str], grids: Sequence[tuple[int, int]]) -> list[int]:
    """Token indices of the named corners. Raises: GlimpseError when the sample has several images."""
    if not names or not grids:
        return []
    if len(grids) > 1:
        raise GlimpseError(
            f"anchor_positions={tuple(names)} needs samples with one image, this one has {len(grids)} (images, or views of one)"
        )
    rows, columns = grids[0]
    corner = {"tl": 0, "tr": columns - 1, "bl": (rows - 1) * columns, "br": rows * columns - 1}
    return [corner[name] for name in names]


def reference_mask(mask: object, grids: Sequence[tuple[int, int]], where: str) -> np.ndarray:
    """One sample's reference mask, flattened. Returns: (visual tokens,) bool. Raises: GlimpseError on a wrong size or kind."""
    shapes = [tuple(grid) for grid in grids]
    if mask is None:
        mask = []
    parts: Sequence[object] = [mask]
    if isinstance(mask, list | tuple) and len(mask) == len(shapes) and (not mask or numeric(where, mask[0]).ndim > 0):
        parts = mask
    flat = [numeric(where, part) for part in parts]
    if any(a.dtype.kind not in "bui" or ((a != 0) & (a != 1)).any() for a in flat if a.size):
        raise GlimpseError(f"{where}: masks must hold true and false (or 1 and 0) only")
    flat = [a.astype(bool) for a in flat]
    shaped = [a.shape for a in flat if a.ndim == 2]
    joined = np.concatenate([a.reshape(-1) for a in flat]) if flat else np.zeros(0, bool)
    if joined.size != sum(r * c for r, c in shapes) or (shaped and shaped != shapes[: len(shaped)]):
        raise GlimpseError(f"{where}: mask shapes {[a.shape for a in flat]} do not match the token grids {shapes} (rows, columns)")
    return joined


def limits(prune: Prune, totals: np.ndarray, always: np.ndarray, counts: np.ndarray | None = None) -> KeepLimits:
    """The keep rule as numbers per sample.

    Args: totals: (B,) int visual tokens per sample, of which shares are; always: (B, M) bool; counts: (B,) int, those that are seen; None:
        all.
    """
    counts = totals if counts is None else counts
    last = prune.ratios[-1] if prune.ratios else None
    ratios = [*prune.ratios, *[last] * (len(totals) - len(prune.ratios))]  # padding samples have no tokens, so any ratio will do

    def per_sample(f, *more) -> np.ndarray:
        return np.array([min(f(int(total), *own), n) for total, n, *own in zip(totals, counts.tolist(), *more, strict=True)], np.int32)

    return KeepLimits(
        threshold=np.float32(prune.reduce_threshold),
        cap_trigger=per_sample(lambda n: cap_trigger(prune.max_remain_ratio, n)),
        cap=per_sample(lambda n: n if prune.max_remain_ratio is None else int(prune.max_remain_ratio * n)),
        floor=per_sample(lambda n: min(prune.min_remain_num or 0, n)),
        fixed=per_sample(lambda n, ratio: -1 if ratio is None else max(min(1, n), min(n, int(ratio * n))), ratios),
        always=always,
    )


def keep_mask(logits: Array, present: Array, rule: KeepLimits) -> Array:
    """Applies the rule.

    Args: logits: (B, M) float32 importance; present: (B, M) bool, slots that hold a token.
    Returns: (B, M) bool.
    """

    def fewer(mask: Array, count: Array) -> Array:
        return jnp.sum(mask & present, axis=-1) < count

    keep = (1 / (1 + jnp.exp(-logits)) > rule.threshold) & present
    fixed, capped = rule.fixed >= 0, ~fewer(keep, rule.cap_trigger + 1)
    by_rank, filled = fixed | capped, fewer(keep, rule.floor)
    # One ranking is enough, because the best k tokens are among the best k + 1. Logits are ranked instead of probabilities, because a
    # saturated sigmoid makes different logits equal.
    count = jnp.where(fixed, rule.fixed, jnp.where(capped, jnp.maximum(rule.cap, rule.floor), rule.floor))
    ranked = best(logits, present, count)
    keep = jnp.where(by_rank[:, None], ranked, keep | (filled[:, None] & ranked))
    return (keep | rule.always) & present
