"""How much a plan must be told to keep so that it keeps as many visual tokens as another one did."""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

Grids = Sequence[tuple[int, int]]  # (rows, columns) of the visual tokens of a sample's pictures


def shrunk_grid(grid: tuple[int, int], ratio: float) -> tuple[int, int]:
    """(rows, columns) of visual tokens, at most `ratio` of the grid's and at least one, near in number and in shape."""
    rows, columns = grid
    target = max(1, int(ratio * rows * columns))

    def misfit(r: int) -> float:
        c = min(columns, target // r)
        return abs(math.log(c * rows / (r * columns))) + math.log(target / (r * c))

    best = min(range(1, min(rows, target) + 1), key=misfit)
    return best, min(columns, target // best)


def sample_ratio(grids: Grids, kept: int, shrink: bool = False) -> float:
    """The ratio with which max(1, int(ratio * N)) of a sample's N visual tokens are `kept`, or 1 where it is 0.

    Args: grids: of its pictures. shrink: the ratio with which `shrunk_grid` of them comes nearest to `kept`.
    """
    total, kept = sum(rows * columns for rows, columns in grids), max(1, kept)
    if kept >= total:
        return 1.0
    if not shrink:
        ratio = kept / total
        return ratio if int(ratio * total) == kept else math.nextafter(ratio, 1)  # the product may be rounded down

    def misfit(ratio: float) -> float:
        return abs(sum(math.prod(shrunk_grid(grid, ratio)) for grid in grids) - kept)

    more = sum(map(max, grids))  # a grid with one row or column more is within this
    return min((count / total for count in range(kept, min(total, kept + more) + 1)), key=misfit)


def pooled_ratio(grids: Sequence[Grids], kept: int, shrink: bool = False) -> float:
    """The one ratio with which max(1, int(ratio * N)) of every sample's N visual tokens add up to `kept`, or as near as a ratio comes.

    The mean share will not do: rounding down loses half a token of every sample. Of two ratios as near the larger is taken.
    Args: grids: per sample those of its pictures. shrink: count what is left of the pictures scaled down instead.
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
