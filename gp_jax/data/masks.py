"""Evidence as a mask over the visual tokens of a picture (method: arXiv 2508.01548, section 3.4)."""

from collections.abc import Sequence

import numpy as np

from gp_jax.data.record import Box, Record
from gp_jax.processing.images import decode
from gp_jax.processing.qwen import Area, Processor


def box_mask(boxes: Sequence[Box], grid: tuple[int, int]) -> np.ndarray:
    """The tokens that at least one box touches.

    Args: boxes: shares of width and height; grid: (rows, columns). Returns: (rows, columns) bool.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    for x1, y1, x2, y2 in boxes:
        right, bottom = min(int(x2 * columns), columns - 1), min(int(y2 * rows), rows - 1)
        mask[int(y1 * rows) : bottom + 1, int(x1 * columns) : right + 1] = True
    return mask


def picture_mask(encoded: bytes, grid: tuple[int, int], area: Box = (0, 0, 1, 1)) -> np.ndarray:
    """The tokens of a mask picture that contain a white pixel (128 or more). It is opened like a picture: upright, 16 bits scaled to 8.

    Args: area: the part of the picture that the grid covers, as shares of width and height. Returns: (rows, columns) bool.
    """
    picture = decode(encoded, "mask").convert("L")
    (width, height), (left, top, right, bottom) = picture.size, area
    covered = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    white = np.asarray(covered) >= 128
    upper, lower = _spans(grid[0], white.shape[0])
    first, last = _spans(grid[1], white.shape[1])
    summed = np.pad(white.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # white pixels above and left of every corner
    touched = summed[lower][:, last] - summed[upper][:, last] - summed[lower][:, first] + summed[upper][:, first]
    return touched > 0


def inside(box: Box, size: tuple[int, int], area: Area) -> Box | None:
    """A box as shares of an area of its picture, clipped to the area; None when they do not overlap. size: width and height in pixels."""
    if tuple(area) == (0, 0, *size):
        return box
    (width, height), (left, top, right, bottom) = size, area
    if right <= left or bottom <= top:  # the detail views of LLaVA-NeXT for pictures longer than 72:1
        return None
    x1, x2 = ((x * width - left) / (right - left) for x in box[::2])
    y1, y2 = ((y * height - top) / (bottom - top) for y in box[1::2])
    if x2 < 0 or y2 < 0 or x1 >= 1 or y1 >= 1:
        return None
    return max(x1, 0), max(y1, 0), min(x2, 1), min(y2, 1)


def evidence(record: Record, sizes: Sequence[tuple[int, int]], processor: Processor, released: bool = False) -> list[np.ndarray]:
    """The visual tokens that hold a record's evidence: one array (rows, columns) bool per view of every picture.

    Args: sizes: width and height of every picture in pixels; released: interpret boxes as shares of the padded square instead of the
        picture, as the released training does by mistake.
    """
    masks = []
    for boxes, mask, (width, height) in zip(record.boxes, record.masks, sizes, strict=True):
        for grid, area in zip(processor.plot(width, height).grids, processor.areas(width, height), strict=True):
            area = (0, 0, width, height) if released else area
            if mask is not None:
                masks.append(picture_mask(mask, grid, (area[0] / width, area[1] / height, area[2] / width, area[3] / height)))
                continue
            moved = [inside(box, (width, height), area) for box in boxes]
            masks.append(box_mask([box for box in moved if box], grid))
    return masks


def _spans(tokens: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of every token along one side, and the pixel after its last one."""
    token = np.arange(tokens)
    return token * pixels // tokens, -(-(token + 1) * pixels // tokens)
