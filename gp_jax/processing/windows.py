"""Attention windows of pictures, packed into blocks of equal size, so that window attention is a reshape.

Full windows come first, then the partial ones of picture borders, several to a block if they fit (first-fit decreasing):

    block 0: [window 0                ]   block k: [window 7 | window 9 | - -]      '-' = padding

W windows, M vision slots.
"""

from collections.abc import Sequence

import numpy as np


def split_windows(grids: Sequence[tuple[int, int]], side: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Cuts grids into windows, row by row.

    Args: grids: (rows, columns) per view; side: of a window, in cells of the grid.
    Returns: per window the numbers of its cells, which are counted through all grids; places (W, 3) int: view, row and column of every
        window among those of its view.
    """
    windows, places, first = [], [], 0
    for view, (rows, columns) in enumerate(grids):
        cells = np.arange(first, first + rows * columns).reshape(rows, columns)
        first += rows * columns
        for top in range(0, rows, side):
            for left in range(0, columns, side):
                windows.append(cells[top : top + side, left : left + side].reshape(-1))
                places.append((view, top // side, left // side))
    return windows, np.array(places, np.int32).reshape(-1, 3)


def pack(windows: Sequence[np.ndarray], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Packs windows into blocks. windows: the numbers of every window's cells.

    Returns: cells (M,) int, the cell in every vision slot, and numbers (M,) int, the window that it belongs to; -1 is padding. M is a
    multiple of side^2.
    """
    capacity = side * side
    full = [number for number, window in enumerate(windows) if window.size == capacity]
    partial = [number for number, window in enumerate(windows) if window.size < capacity]
    blocks, free = [[number] for number in full], [0] * len(full)
    for number in sorted(partial, key=lambda number: -windows[number].size):
        size = windows[number].size
        home = next((block for block in range(len(full), len(blocks)) if free[block] >= size), len(blocks))
        if home == len(blocks):
            blocks.append([])
            free.append(capacity)
        blocks[home].append(number)
        free[home] -= size
    cells, numbers = np.full((2, len(blocks), capacity), -1, np.int32)
    for block, members in enumerate(blocks):
        joined = np.concatenate([windows[number] for number in members])
        cells[block, : joined.size] = joined
        numbers[block, : joined.size] = np.repeat(members, [windows[number].size for number in members])
    return cells.reshape(-1), numbers.reshape(-1)


def pack_windows(grids: Sequence[tuple[int, int]], side: int) -> tuple[np.ndarray, np.ndarray]:
    """All windows of these grids, packed. Returns: as `pack`."""
    return pack(split_windows(grids, side)[0], side)
