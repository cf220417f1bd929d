"""Finds the ratio with which a plan keeps as many visual tokens as another plan did."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from gp_jax.processing.views import shrunk_grid

Grids = Sequence[tuple[int, int]]  # (rows, columns) of the visual tokens of a sample's pictures


def sample_ratio(grids: Grids, kept: int, shrink: bool = False) -> float:
    """The ratio with which max(1, int(ratio * N)) of a sample's N visual tokens equals `kept` (1 if `kept` is 0).

    Args: grids: of the sample's pictures. shrink: find the ratio with which `shrunk_grid` of them comes nearest to `kept`.
    """
    total, kept = sum(rows * columns for rows, columns in grids), max(1, kept)
    if kept >= total:
        return 1.0
    if not shrink:
        ratio = kept / total
        return ratio if int(ratio * total) == kept else math.nextafter(ratio, 1)  # the product may be rounded down

    def misfit(ratio: float) -> float:
        return abs(sum(math.prod(shrunk_grid(grid, ratio)) for grid in grids) - kept)

    more = sum(map(max, grids))  # enough for one row or column more
    return min((count / total for count in range(kept, min(total, kept + more) + 1)), key=misfit)


def pooled_ratio(grids: Sequence[Grids], kept: int, shrink: bool = False) -> float:
    """The one ratio with which max(1, int(ratio * N)), over all samples with N visual tokens each, adds up as nearly as possible to `kept`.

    The mean share is not that ratio: rounding down loses half a token per sample. Of two ratios equally near the larger one is taken.
    Args: grids: per sample, those of its pictures. shrink: count the visual tokens of pictures that are scaled down instead.
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
