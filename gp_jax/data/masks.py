"""Evidence as a mask over the visual tokens of a picture (method: arXiv 2508.01548, section 3.4)."""

from collections.abc import Iterator, Sequence

import numpy as np

from gp_jax.data.record import Box, Record
from gp_jax.processing.images import decode
from gp_jax.processing.qwen import Area, Processor
from gp_jax.processing.views import Grid

UNKNOWN = 64  # the grey of mask pictures where nobody knows


def box_mask(boxes: Sequence[Box], grid: Grid) -> np.ndarray:
    """The tokens that at least one box touches.

    Args: boxes: shares of width and height; grid: (rows, columns). Returns: (rows, columns) bool.
    """
    rows, columns = grid
    mask = np.zeros(grid, bool)
    for x1, y1, x2, y2 in boxes:
        right, bottom = min(int(x2 * columns), columns - 1), min(int(y2 * rows), rows - 1)
        mask[int(y1 * rows) : bottom + 1, int(x1 * columns) : right + 1] = True
    return mask


def picture_mask(encoded: bytes, grid: Grid, area: Box = (0, 0, 1, 1), unknown: bool = False) -> np.ndarray:
    """The tokens of a mask picture that contain a white pixel (128 or more). It is opened like a picture: upright, 16 bits scaled to 8.

    Args: area: the part of the picture that the grid covers, as shares of width and height; unknown: the tokens that contain a pixel of
        exactly UNKNOWN and no white one instead, of which nobody knows whether they are evidence.
    Returns: (rows, columns) bool.
    """
    picture = decode(encoded, "mask").convert("L")
    (width, height), (left, top, right, bottom) = picture.size, area
    covered = picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))
    pixels = np.asarray(covered)
    white = touched(pixels >= 128, grid)
    return touched(pixels == UNKNOWN, grid) & ~white if unknown else white


def touched(pixels: np.ndarray, grid: Grid) -> np.ndarray:
    """The tokens that contain a pixel which is true. pixels: (height, width) bool. Returns: (rows, columns) bool."""
    upper, lower = _spans(grid[0], pixels.shape[0])
    first, last = _spans(grid[1], pixels.shape[1])
    summed = np.pad(pixels.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # true pixels above and left of every corner
    return summed[lower][:, last] - summed[upper][:, last] - summed[lower][:, first] + summed[upper][:, first] > 0


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


def evidence(
    record: Record, sizes: Sequence[tuple[int, int]], processor: Processor, released: bool = False, grids: Sequence[Grid] | None = None
) -> list[np.ndarray]:
    """The visual tokens that hold a record's evidence: one array (rows, columns) bool per view of every picture.

    Args: sizes: width and height of every picture in pixels; released: interpret boxes as shares of the padded square instead of the
        picture, as the released training does by mistake; grids: (rows, columns) per view, if they are not those of pictures as they are.
    """
    masks = []
    for boxes, mask, size, grid, area in _views(record, sizes, processor, grids):
        area = (0, 0, *size) if released else area
        if mask is not None:
            masks.append(picture_mask(mask, grid, _shares(area, size)))
            continue
        moved = [inside(box, size, area) for box in boxes]
        masks.append(box_mask([box for box in moved if box], grid))
    return masks


def known(record: Record, sizes: Sequence[tuple[int, int]], processor: Processor, grids: Sequence[Grid] | None = None) -> list[np.ndarray]:
    """The visual tokens of which is known whether they hold evidence: all but the unknown ones of mask pictures. As `evidence`."""
    return [
        np.ones(grid, bool) if mask is None else ~picture_mask(mask, grid, _shares(area, size), unknown=True)
        for _, mask, size, grid, area in _views(record, sizes, processor, grids)
    ]


def _views(
    record: Record, sizes: Sequence[tuple[int, int]], processor: Processor, grids: Sequence[Grid] | None
) -> Iterator[tuple[tuple[Box, ...], bytes | None, tuple[int, int], Grid, Area]]:
    """Boxes, mask, size of the picture, grid and area of every view."""
    own = iter(grids or ())
    for boxes, mask, size in zip(record.boxes, record.masks, sizes, strict=True):
        for grid, area in zip(processor.plot(*size).grids, processor.areas(*size), strict=True):
            yield boxes, mask, size, grid if grids is None else next(own), area


def _shares(area: Area, size: tuple[int, int]) -> Box:
    return area[0] / size[0], area[1] / size[1], area[2] / size[0], area[3] / size[1]


def _spans(tokens: int, pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of every token along one side, and the pixel after its last one."""
    token = np.arange(tokens)
    return token * pixels // tokens, -(-(token + 1) * pixels // tokens)
