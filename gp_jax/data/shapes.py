"""Bucket shapes that fit a set of records: a given number of them, chosen so that padding is least.

Records are sorted by prompt length and cut into groups; a group's shape is as long as its longest member. The best cuts are found by
dynamic programming over rounded lengths, which takes far less time than reading the records.
"""

from collections.abc import Sequence

import numpy as np

from gp_jax.data.collate import Shape

STEPS = ((192, 16), (768, 32), (3072, 64))  # (limit, multiple): lengths up to the limit are rounded up to the multiple
LONG_STEP = 128
TAIL_STEP = 16


def round_up(length: int, window: int = 1) -> int:
    """A length rounded up to a multiple from STEPS that is also a multiple of `window`."""
    step = next((step for limit, step in STEPS if length <= limit), LONG_STEP)
    step = int(np.lcm(step, window))
    return max(step, -(-length // step) * step)


def fit_shapes(shapes: Sequence[Shape], count: int, window: int) -> list[Shape]:
    """Chooses buckets.

    Args: shapes: one per record; count: the most buckets to choose; window: vision slots of an attention window.
    Returns: buckets in order of prompt length.
    """
    needs = np.array([(round_up(s.prompt), round_up(s.slots, window), -(-s.tail // TAIL_STEP) * TAIL_STEP) for s in shapes], np.int64)
    rungs, group = np.unique(needs[:, 0], return_inverse=True)
    size = np.bincount(group)
    slots, tail = (np.array([needs[group == g, column].max() for g in range(rungs.size)]) for column in (1, 2))
    n, count = rungs.size, min(count, rungs.size)
    cost = np.full((n + 1, n + 1), np.inf)  # cost of one bucket for the rungs low .. high - 1
    for low in range(n):
        most_slots, most_tail = np.maximum.accumulate(slots[low:]), np.maximum.accumulate(tail[low:])
        cost[low, low + 1 :] = np.cumsum(size[low:]) * (rungs[low:] + most_slots + most_tail)
    best, cut = cost[0], []
    for _ in range(count - 1):
        through = best[:, None] + cost
        cut.append(through.argmin(axis=0))
        best, cut[-1] = np.minimum(best, through.min(axis=0)), np.where(through.min(axis=0) < best, cut[-1], -1)
    high, buckets = n, []
    for back in [*reversed(cut), None]:
        low = 0 if back is None else int(back[high])
        if low < 0:  # one bucket fewer costs the same
            continue
        buckets.append(Shape(int(slots[low:high].max()), int(rungs[high - 1]), int(tail[low:high].max())))
        high = low
        if high == 0:
            break
    return buckets[::-1]


def padding(shapes: Sequence[Shape], buckets: Sequence[Shape]) -> float:
    """Share of rows (vision slots, prompt and tail) that are padding when every record is padded to its bucket."""
    used = sum(s.slots + s.prompt + s.tail for s in shapes)
    held = sum((lambda b: b.slots + b.prompt + b.tail)(bucket_of(s, buckets)) for s in shapes)
    return 1 - used / held


def bucket_of(shape: Shape, buckets: Sequence[Shape]) -> Shape:
    """The first bucket that is large enough for a record."""
    return next(b for b in buckets if b.prompt >= shape.prompt and b.slots >= shape.slots and b.tail >= shape.tail)
