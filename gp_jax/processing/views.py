"""Converts a processor's arrays to pictures, by the type of vision tower: the input of the tower, and which patches become visual tokens.

A picture has one or several views. Qwen2.5-VL and LLaVA-1.5 have one; LLaVA-NeXT (arXiv 2310.03744, anyres) has two, the whole picture in
one tile and the picture cut into several tiles, with a line break after each row of visual tokens:

    overview  24 x 24      detail  48 x 72 of 2 x 3 tiles, less the padding that made the picture fit them
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from gp_jax.config.vision import ClipConfig, QwenVision
from gp_jax.errors import GlimpseError, one_line, printable

Grid = tuple[int, int]  # rows, columns

LONGEST_SIDE = 2**24  # pixels of a picture; beyond it, rounding of a division may differ from the processor's
REPEATED = 64 << 20  # bytes by which an array may exceed the memory that it refers to, e.g. a broadcast one
BAND = 1 << 22  # values that are checked at a time


@dataclass(frozen=True)
class Plot:
    """Mapping of a picture's patch groups to visual tokens and to prompt rows.

    seen:  per view the (rows, columns) of patch groups at the tower's input.
    crops: per view (top, left, rows, columns) of those that become visual tokens.
    breaks: per view whether every row of tokens ends with a line break.
    """

    seen: tuple[Grid, ...]
    crops: tuple[tuple[int, int, int, int], ...]
    breaks: tuple[bool, ...]

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Per view (rows, columns) of visual tokens."""
        return tuple((rows, columns) for _, _, rows, columns in self.crops)

    @property
    def tokens(self) -> np.ndarray:
        """(groups,) int: number of the visual token that a patch group becomes, -1: none."""
        parts, first = [], 0
        for seen, (top, left, rows, columns) in zip(self.seen, self.crops, strict=True):
            numbers = np.full(seen, -1)
            numbers[top : top + rows, left : left + columns] = first + np.arange(rows * columns).reshape(rows, columns)
            parts.append(numbers.reshape(-1))
            first += rows * columns
        return np.concatenate(parts)

    @property
    def rows(self) -> np.ndarray:
        """(n,) int: for each of the picture's prompt rows the number of its visual token, -1 for a line break."""
        parts, first = [], 0
        for (rows, columns), breaks in zip(self.grids, self.breaks, strict=True):
            numbers = first + np.arange(rows * columns).reshape(rows, columns)
            parts.append((np.pad(numbers, ((0, 0), (0, 1)), constant_values=-1) if breaks else numbers).reshape(-1))
            first += rows * columns
        return np.concatenate(parts)


@dataclass(frozen=True)
class Picture:
    """A picture's pixels: patch groups of all views, row by row."""

    plot: Plot
    pixels: np.ndarray  # (groups * merge_unit, patch_dim) float


def whole(grid: Grid) -> Plot:
    """A picture with one view, all of whose patch groups become visual tokens."""
    return Plot((grid,), ((0, 0, *grid),), (False,))


def shrunk_grid(grid: Grid, ratio: float) -> Grid:
    """The (rows, columns) with at most `ratio` of a grid's visual tokens, at least one, that are nearest in number and shape."""
    rows, columns = grid
    target = max(1, int(ratio * rows * columns))

    def misfit(r: int) -> float:
        c = min(columns, target // r)
        return abs(math.log(c * rows / (r * columns))) + math.log(target / (r * c))

    best = min(range(1, min(rows, target) + 1), key=misfit)
    return best, min(columns, target // best)


def numeric(name: str, value: object) -> np.ndarray:
    """The value as a numeric array. Raises: GlimpseError that names the argument when it is ragged, masked or not numeric, or a view that
    repeats a few numbers to a huge array, since a copy would have its full size."""
    try:
        array, masked = np.asarray(value), np.ma.is_masked(value)
    except Exception as error:  # raised by an object that claims to be an array
        raise GlimpseError(f"{name} is not an array ({one_line(error)})") from error
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        raise GlimpseError(f"{name} must hold numbers, not {printable(array.dtype, 60)}")
    if masked:
        raise GlimpseError(f"{name} is masked in parts, whose values are not known")
    held = array.itemsize + sum(abs(stride) * (length - 1) for stride, length in zip(array.strides, array.shape, strict=True))
    if array.nbytes > held + REPEATED:
        raise GlimpseError(f"{name} repeats {held} bytes to an array of {array.nbytes}: give it as an array that holds them")
    return array


def check_finite(name: str, array: np.ndarray) -> None:
    """Raises: GlimpseError when a value is not a finite float32. Works in blocks of rows, to bound memory."""
    rows = max(1, BAND * len(array) // max(1, array.size))
    with np.errstate(over="ignore"):
        finite = (np.isfinite(array[top : top + rows].astype(np.float32)).all() for top in range(0, len(array), rows))
        if not all(finite):
            raise GlimpseError(f"{name} holds values that are not finite")


def check_count(images: int, tokens: int, by: str) -> None:
    """Raises: GlimpseError when there are more pictures than image tokens."""
    if images > tokens:
        raise GlimpseError(f"{by} holds {images} images, but input_ids has tokens for {tokens} only")


def read_grids(vision: QwenVision, tokens: int, pixel_values: object, image_grid_thw: object, image_sizes: object) -> list[Picture]:
    """Pictures of any size in patches, one after the other: pixel_values (patches, patch_dim), image_grid_thw (images, 3).

    Args: tokens: image tokens of the prompts, at least one per picture. Returns: the pictures, in order. Raises: GlimpseError that names
    the argument at fault.
    """
    if image_sizes is not None:
        raise GlimpseError("image_sizes is not an input of this model: its pictures are sized by image_grid_thw")
    if (pixel_values is None) != (image_grid_thw is None):
        raise GlimpseError("pixel_values and image_grid_thw must be given together")
    if image_grid_thw is None:
        return []
    grid, pixels, merge = numeric("image_grid_thw", image_grid_thw), numeric("pixel_values", pixel_values), vision.spatial_merge_size
    if grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype.kind not in "iu":
        raise GlimpseError(f"image_grid_thw must be (images, 3) integers, not {grid.dtype} {grid.shape}")
    check_count(len(grid), tokens, "image_grid_thw")
    ends = [0]
    for i, (time, rows, columns) in enumerate(grid.tolist()):  # integers of any length, whose products do not wrap
        if time != 1:
            raise GlimpseError(f"image_grid_thw[{i}] has {time} frames; only still images (1) are supported")
        if rows < merge or columns < merge or rows % merge or columns % merge:
            raise GlimpseError(f"image_grid_thw[{i}] = {rows} x {columns} patches is not a multiple of the {merge} x {merge} merge")
        ends.append(ends[-1] + rows * columns)
    if pixels.shape != (ends[-1], vision.patch_dim):
        raise GlimpseError(f"pixel_values must be {(ends[-1], vision.patch_dim)} for this image_grid_thw, not {pixels.shape}")
    check_finite("pixel_values", pixels)
    grids = [(rows // merge, columns // merge) for _, rows, columns in grid.tolist()]
    return [Picture(whole(own), pixels[start:end]) for own, start, end in zip(grids, ends[:-1], ends[1:], strict=True)]


def read_tiles(vision: ClipConfig, tokens: int, pixel_values: object, image_grid_thw: object, image_sizes: object) -> list[Picture]:
    """Pictures of one tile each: pixel_values (images, channels, side, side). With pinpoints of several tiles: pixel_values (images, tiles,
    channels, side, side), with padding after the last tile, and image_sizes (images, 2), the original heights and widths in pixels.

    Args, returns, raises: as of `read_grids`.
    """
    if image_grid_thw is not None:
        raise GlimpseError("image_grid_thw is not an input of this model: its pictures come in tiles of one size")
    if vision.pinpoints and (pixel_values is None) != (image_sizes is None):
        raise GlimpseError("pixel_values and image_sizes must be given together")
    if not vision.pinpoints and image_sizes is not None:
        raise GlimpseError("image_sizes is not an input of this model: a picture is one tile")
    if pixel_values is None:
        return []
    pixels, side = numeric("pixel_values", pixel_values), vision.image_size
    tile = (vision.in_channels, side, side)
    if not vision.pinpoints:
        if pixels.ndim != 4 or pixels.shape[1:] != tile:
            raise GlimpseError(f"pixel_values must be (images, {', '.join(map(str, tile))}), not {pixels.shape}")
        check_count(len(pixels), tokens, "pixel_values")
        check_finite("pixel_values", pixels)
        return [Picture(whole((vision.window_side,) * 2), patches(image[None, None], vision.patch_size)) for image in pixels]
    sizes = numeric("image_sizes", image_sizes)
    if sizes.ndim != 2 or sizes.shape[1] != 2 or sizes.dtype.kind not in "iu":
        raise GlimpseError(f"image_sizes must be (images, 2) integers, not {sizes.dtype} {sizes.shape}")
    if sizes.size and not 1 <= sizes.min() <= sizes.max() <= LONGEST_SIDE:
        raise GlimpseError(f"image_sizes must hold sides of 1 to {LONGEST_SIDE} pixels, not {sizes.min()} to {sizes.max()}")
    if pixels.ndim != 5 or pixels.shape[2:] != tile or len(pixels) != len(sizes):
        raise GlimpseError(f"pixel_values must be ({len(sizes)}, tiles, {', '.join(map(str, tile))}), not {pixels.shape}")
    check_count(len(pixels), tokens, "pixel_values")
    check_finite("pixel_values", pixels)
    pictures = []
    for i, (image, (height, width)) in enumerate(zip(pixels, sizes.tolist(), strict=True)):
        plot = tiled(vision, height, width)
        rows, columns = (n // vision.window_side for n in plot.seen[1])
        if len(image) < 1 + rows * columns:
            raise GlimpseError(f"pixel_values[{i}] holds {len(image)} tiles, a picture of {width} x {height} has {1 + rows * columns}")
        tiles = image[1 : 1 + rows * columns].reshape(rows, columns, *tile)
        views = (image[:1, None], tiles)
        pictures.append(Picture(plot, np.concatenate([patches(view, vision.patch_size) for view in views])))
    return pictures


def patches(tiles: np.ndarray, size: int) -> np.ndarray:
    """(rows, columns, channels, side, side) of a view's tiles -> (patches, channels * size^2), row by row over the whole view."""
    rows, columns, channels, side, _ = tiles.shape
    n = side // size
    cut = tiles[..., : n * size, : n * size].reshape(rows, columns, channels, n, size, n, size)
    return cut.transpose(0, 3, 1, 5, 2, 4, 6).reshape(rows * n * columns * n, -1)


def best_pinpoint(pinpoints: Iterable[tuple[int, ...]], height: int, width: int) -> Grid:
    """The resolution (height, width) that keeps the most pixels of a picture; of several the one with the least padding, then the first."""

    def fitness(point: tuple[int, ...]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - point[0] * point[1]

    high, wide = max(pinpoints, key=fitness)
    return high, wide


def tiled(vision: ClipConfig, height: int, width: int) -> Plot:
    """Views of a picture of this size in pixels: the overview and the detail, cropped to where the picture is."""
    side, (high, wide) = vision.window_side, best_pinpoint(vision.pinpoints, height, width)
    rows, columns = side * (high // vision.image_size), side * (wide // vision.image_size)
    top = left = 0
    if width / height > columns / rows:
        top = (rows - int(round(height * (columns / width), 7))) // 2
    else:
        left = (columns - int(round(width * (rows / height), 7))) // 2
    detail = (top, left, rows - 2 * top, columns - 2 * left)
    return Plot(((side, side), (rows, columns)), ((0, 0, side, side), detail), (False, True))
