"""Two looks: a first look at fewer visual tokens chooses the vision windows that a second look sees at full resolution.

`Look` holds the settings. What depends on a sample's windows is computed here on the host; `choose` is the rule itself, in operations that
NumPy and JAX arrays share, so that the engine (on the host) and the traced function (on the device) choose by the same lines.

B samples, W vision windows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from pydantic import Field, SkipValidation

from gp_jax.config.schema import AtLeastOne, FromNumpy, Seed, Share, values
from gp_jax.errors import GlimpseError
from gp_jax.trees import Array, LookLimits

Margin = Annotated[int, Field(ge=0, le=1 << 12), FromNumpy]
Part = Annotated[float, Field(gt=0, le=1), FromNumpy]


@dataclass(frozen=True)
class Look:
    """How a first look chooses the windows of the second. Shares of windows are of all windows of a sample's pictures together.

    share:     visual tokens of the first look, as a share of each picture's.
    tokens:    visual tokens of the first look at each picture, in place of the share.
    least:     never fewer than this, as far as a picture has as many. Samples of which a first look would see more than half of the visual
               tokens are seen whole at once, the ordinary way: small pictures, and text.
    threshold: choose windows in which an importance of the first look is above it.
    margin:    choose their neighbours too, up to this number of windows away.
    floor:     choose at least this share of the windows, the best ones.
    cap:       a map that chooses a larger share is unsure.
    sure:      a map without an importance of at least this is unsure, too. If a map is unsure the pictures are seen whole. None: they are
               not: the best windows up to the cap are seen.
    windows:   one mask per sample, as `Prune.reference_masks`: what it touches is seen, instead of what a first look would choose. None
               for a sample that is seen whole.
    random:    a seed: random windows are seen instead, as many as `floor` says; a control.

    LLaVA-NeXT's windows are the tiles of the detail; its first look is the overview, which the second sees too, so share, tokens and least
    do not matter.
    """

    share: Part = 0.25
    tokens: AtLeastOne | None = None
    least: AtLeastOne = 16
    threshold: Share = 0.05
    margin: Margin = 0
    floor: Share = 0.1
    cap: Share = 0.6
    sure: Share | None = 0.5
    windows: SkipValidation[Sequence | None] = None
    random: Seed | None = None

    def __post_init__(self) -> None:
        for name, value in values(self).items():
            object.__setattr__(self, name, value)
        if self.windows is not None:
            if not isinstance(self.windows, list | tuple | np.ndarray) or getattr(self.windows, "ndim", 1) == 0:
                raise GlimpseError("windows must be a list with one mask per sample")
            object.__setattr__(self, "windows", tuple(self.windows))
        if self.floor > self.cap:
            raise GlimpseError(f"floor={self.floor} is more than cap={self.cap}")
        if self.windows is not None and self.random is not None:
            raise GlimpseError("windows and random exclude each other")

    @property
    def told(self) -> bool:
        """Whether the windows are known without a first look."""
        return self.windows is not None or self.random is not None


def as_logit(probability: float) -> np.float32:
    """The logit of a probability; 0 and 1 give infinities."""
    if probability in (0, 1):
        return np.float32(math.inf if probability else -math.inf)
    return np.float32(math.log(probability / (1 - probability)))


def look_limits(look: Look, counts: np.ndarray) -> LookLimits:
    """The rule as numbers. counts: (B,) int, the windows that a sample's look chooses from."""
    cap = [max(1, int(look.cap * n)) for n in counts.tolist()]
    floor = [max(1, min(most, math.ceil(look.floor * n))) for n, most in zip(counts.tolist(), cap, strict=True)]
    return LookLimits(
        threshold=np.full(counts.size, as_logit(look.threshold)),
        sure=np.full(counts.size, np.float32(np.nan) if look.sure is None else as_logit(look.sure)),
        margin=np.full(counts.size, look.margin, np.int32),
        floor=np.array(floor, np.int32),
        cap=np.array(cap, np.int32),
    )


def choose(score: Array, places: Array, present: Array, rule: LookLimits) -> Array:
    """The windows of the second look.

    Args: score: (B, W) float32, the largest importance logit of the first look in a window; places: (B, W, 3) int: view, row and column
        of every window; present: (B, W) bool: the windows to choose from.
    Returns: (B, W) bool, some of `present`.
    """
    order = np.arange(score.shape[1])
    ours, others = score[:, :, None], score[:, None]
    better = (others > ours) | ((others == ours) & (order[None] < order[:, None]))  # (B, W, W): whether another one is better
    rank = (better & present[:, None]).sum(-1)
    seeds = present & ((score > rule.threshold[:, None]) | (rank < rule.floor[:, None]))
    away, margin = abs(places[:, :, None] - places[:, None]), rule.margin[:, None, None]
    near = (away[..., 0] == 0) & (away[..., 1] <= margin) & (away[..., 2] <= margin)
    seen = present & (near & seeds[:, None]).any(-1)
    many = seen.sum(-1) > rule.cap
    peak = (present & (score >= rule.sure[:, None])).any(-1)
    whole = (rule.sure == rule.sure) & (many | ~peak)  # NaN: no map is unsure
    best = (better & seen[:, None]).sum(-1) < rule.cap[:, None]
    return (present & whole[:, None]) | (seen & best)
