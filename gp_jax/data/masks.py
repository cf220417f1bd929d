"""Evidence as a mask over the visual tokens of a picture (method: arXiv 2508.01548, section 3.4)."""

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gp_jax.data.record import Box


def box_mask(boxes: Sequence[Box], grid: tuple[int, int]) -> np.ndarray:
    """The union of boxes, every token that one touches.

    Args: boxes: shares of width and height; grid: (rows, columns). Returns: (rows, columns) bool.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    for x1, y1, x2, y2 in boxes:
        right, bottom = min(int(x2 * columns), columns - 1), min(int(y2 * rows), rows - 1)
        mask[int(y1 * rows) : bottom + 1, int(x1 * columns) : right + 1] = True
    return mask


def picture_mask(encoded: bytes, grid: tuple[int, int]) -> np.ndarray:
    """A mask picture, every token that a white pixel (128 or brighter) touches. Returns: (rows, columns) bool."""
    with Image.open(io.BytesIO(encoded)) as picture:
        white = np.asarray(picture.convert("L")) >= 128
    top, bottom = _spans(grid[0], white.shape[0])
    left, right = _spans(grid[1], white.shape[1])
    summed = np.pad(white.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # white pixels above and left of a corner
    inside = summed[bottom][:, right] - summed[top][:, right] - summed[bottom][:, left] + summed[top][:, left]
    return inside > 0


def _spans(tokens: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First and behind-last pixel that every token touches along one side."""
    token = np.arange(tokens)
    return token * pixels // tokens, -(-(token + 1) * pixels // tokens)
