"""Two looks at a sample's pictures, as samples themselves: a first one at fewer visual tokens, a second one at some of their windows.

    first look   the prompt with each picture scaled down (Qwen2.5-VL), or with its overview alone (LLaVA-NeXT)
    second look  the prompt and patches of chosen windows, at the positions that they have in the whole pictures

N visual tokens of the whole pictures, W attention windows.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gp_jax.config.model import ModelConfig
from gp_jax.config.vision import Vision
from gp_jax.errors import GlimpseError
from gp_jax.processing.layout import Sample, rope_positions
from gp_jax.processing.views import Grid, Plot, shrunk_grid, whole
from gp_jax.processing.windows import pack, split_windows

FEWER = 2  # a first look has at most one part in FEWER of the visual tokens; otherwise it would save too little to be taken


@dataclasses.dataclass(frozen=True)
class FirstSize:
    """Visual tokens of a first look. share: of each picture's; tokens: of each picture, in place of the share; least: of each picture,
    as far as it has as many."""

    share: float
    tokens: int | None
    least: int

    def of(self, grid: Grid) -> Grid:
        """The (rows, columns) at which a picture of this grid is looked at."""
        count = math.prod(grid)
        wanted = max(self.least, int(self.share * count) if self.tokens is None else self.tokens)
        return grid if wanted >= count else shrunk_grid(grid, min(1.0, math.nextafter(wanted / count, 1)))


def check_parts(config: ModelConfig) -> None:
    """Raises: GlimpseError when the model's pictures have no parts that can be seen alone."""
    if not config.vision.parts:
        raise GlimpseError("look: this model sees a picture in one small square, of which it cannot see a part")


def first_look(config: ModelConfig, sample: Sample, size: FirstSize) -> Sample | None:
    """A sample's first look. None: it would see more than half of the visual tokens. Raises: GlimpseError when pictures have no parts."""
    check_parts(config)
    return overview(config, sample) if config.vision.overviews else scaled(config, sample, size)


def present_windows(sample: Sample) -> np.ndarray:
    """(W,) bool: the windows that hold visual tokens. LLaVA-NeXT's tiles may be padding alone."""
    return np.bincount(windows_of_tokens(sample), minlength=len(sample.places)) > 0


def always_windows(config: ModelConfig, sample: Sample, anchors: Sequence[int]) -> np.ndarray:
    """(W,) bool: the windows that every second look sees: overviews, and those of anchors. anchors: visual tokens."""
    always = ~to_choose(config, sample)
    always[windows_of_tokens(sample)[np.array(anchors, int)]] = True
    return always


def first_plots(config: ModelConfig, plots: Sequence[Plot], size: FirstSize) -> list[Plot] | None:
    """The plots of the pictures of a sample's first look, as `first_look` makes it; None: there is none."""
    total = sum(math.prod(grid) for plot in plots for grid in plot.grids)
    grids = [plot.grids[0] if config.vision.overviews else size.of(plot.grids[0]) for plot in plots]
    return None if not total or FEWER * sum(map(math.prod, grids)) > total else [whole(grid) for grid in grids]


def scaled(config: ModelConfig, sample: Sample, size: FirstSize) -> Sample | None:
    """A first look for models whose pictures have any size: each is scaled down. None: that would leave too many visual tokens."""
    grids = tuple(size.of(grid) for grid in sample.grids)
    count = sum(map(math.prod, grids))
    if not sample.total or FEWER * count > sample.total:
        return None
    unit, before = config.vision.merge_unit, np.cumsum([0, *map(math.prod, sample.grids)])
    parts = zip(before[:-1] * unit, before[1:] * unit, sample.grids, grids, strict=True)
    pixels = [resized(config.vision, sample.pixels[start:end], old, new) for start, end, old, new in parts]
    view = np.append(np.repeat(np.arange(len(grids)), np.diff(before)), -1)[sample.image_token]  # of every prompt row, -1: text
    rows = _runs(view, [math.prod(grid) for grid in grids])
    image_token = np.where(view[rows] >= 0, np.cumsum(view[rows] >= 0) - 1, -1).astype(np.int32)
    windows, places = split_windows(grids, config.vision.window_side)
    groups, numbers = pack(windows, config.vision.window_side)
    return Sample(
        ids=sample.ids[rows],
        positions=rope_positions(image_token, grids, config.position_axes),
        image_token=image_token,
        grids=grids,
        tokens=np.arange(count),
        pixels=np.concatenate(pixels),
        groups=groups,
        slots=groups,
        windows=numbers,
        places=places,
    )


def _runs(view: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Numbers of prompt rows: text rows, and of every picture's rows the first ones. view: (n,) int; sizes: how many of each picture."""
    place = np.zeros(view.size, int)  # of a row among those of its picture
    for number in range(len(sizes)):
        own = view == number
        place[own] = np.arange(own.sum())
    return np.flatnonzero(place < np.append(sizes, 1)[view])


def resized(vision: Vision, pixels: np.ndarray, grid: Grid, smaller: Grid) -> np.ndarray:
    """A picture in fewer patches, bicubic and antialiased.

    Args: pixels: (patches, patch_dim) in merge groups row by row, grid: their (rows, columns). Returns: those of `smaller`, alike.
    """
    if grid == smaller:
        return pixels
    side, (channels, frames, size, _) = vision.spatial_merge_size, vision.patch_shape
    shape = (*grid, side, side, channels, frames, size, size)
    split = pixels.astype(np.float32).reshape(shape).transpose(4, 5, 0, 2, 6, 1, 3, 7)  # C T (row side size) (column side size)
    planes = split.reshape(channels, frames, grid[0] * side * size, grid[1] * side * size)
    still = all(np.array_equal(planes[:, 0], planes[:, frame]) for frame in range(1, frames))
    wide, high = smaller[1] * side * size, smaller[0] * side * size
    small = np.stack(
        [
            np.stack([np.asarray(Image.fromarray(plane).resize((wide, high), Image.Resampling.BICUBIC)) for plane in own])
            for own in (planes[:, :1] if still else planes)
        ]
    )
    small = np.repeat(small, frames, axis=1) if still else small
    small = small.reshape(channels, frames, smaller[0], side, size, smaller[1], side, size).transpose(2, 5, 3, 6, 0, 1, 4, 7)
    return np.ascontiguousarray(small).reshape(-1, vision.patch_dim)


def overview(config: ModelConfig, sample: Sample) -> Sample | None:
    """A first look for models whose pictures have an overview in one tile beside the detail in several: the overviews. None: that would
    leave too many visual tokens."""
    grids = sample.grids[::2]
    if not sample.total or FEWER * sum(map(math.prod, grids)) > sample.total:
        return None
    short = second_look(config, sample, ~to_choose(config, sample))
    positions = rope_positions(short.image_token, grids, config.position_axes)
    return dataclasses.replace(short, grids=grids, tokens=np.arange(short.count), positions=positions)


def to_choose(config: ModelConfig, sample: Sample) -> np.ndarray:
    """(W,) bool: the windows that a first look chooses from. Overviews are not: both looks see them."""
    return sample.places[:, 0] % 2 == 1 if config.vision.overviews else np.ones(len(sample.places), bool)


def second_look(config: ModelConfig, sample: Sample, seen: np.ndarray) -> Sample:
    """The prompt and patches of some windows, at their old places. Line breaks stay behind rows of which something is seen.

    Args: seen: (W,) bool.
    """
    keep = np.append(seen, False)[sample.windows]  # vision slots
    tokens = np.sort(sample.slots[keep & (sample.slots >= 0)])  # numbers among the sample's own
    stays = np.isin(np.arange(sample.count), tokens)
    rows = np.flatnonzero(_rows_that_stay(config, sample, stays))
    renumbered = np.append(np.where(stays, np.cumsum(stays) - 1, -1), -1)
    cells, owner = sample.groups[keep], sample.windows[keep]
    windows = [cells[owner == number] for number in np.flatnonzero(seen)]
    groups, numbers = pack(windows, config.vision.window_side)
    token_of_group = np.full(sample.groups.max(initial=-1) + 2, -1)
    token_of_group[sample.groups[sample.groups >= 0]] = sample.slots[sample.groups >= 0]
    return dataclasses.replace(
        sample,
        ids=sample.ids[rows],
        positions=sample.positions[:, rows],
        image_token=renumbered[sample.image_token[rows]].astype(np.int32),
        tokens=sample.tokens[tokens],
        groups=groups,
        slots=renumbered[token_of_group[groups]].astype(np.int32),
        windows=numbers,
        places=sample.places[seen],
    )


def _rows_that_stay(config: ModelConfig, sample: Sample, stays: np.ndarray) -> np.ndarray:
    """(n,) bool: prompt rows of a second look. stays: (N,) bool over the sample's visual tokens."""
    kept, line = np.append(stays, True)[sample.image_token], line_of_rows(config, sample)
    breaks = (line >= 0) & (sample.image_token < 0)
    kept[breaks] = np.isin(line[breaks], line[(sample.image_token >= 0) & kept])
    return kept


def line_of_rows(config: ModelConfig, sample: Sample) -> np.ndarray:
    """(n,) int: the line of a picture that a prompt row belongs to, a visual token or the break behind its line; -1: none, and everywhere
    where lines have no breaks."""
    line, token = np.full(sample.ids.size, -1, np.int32), sample.image_token
    breaks = np.flatnonzero((sample.ids == config.image_token_id) & (token < 0))
    if breaks.size:
        lines = sample.cells[:, 0] * (sample.cells[:, 1].max() + 1) + sample.cells[:, 1]
        lines = np.unique(lines, return_inverse=True)[1]
        line[token >= 0] = lines[token[token >= 0]]
        line[breaks] = lines[np.maximum.accumulate(token)[breaks]]  # the last visual token in front of a break is of its line
    return line


def windows_of_tokens(sample: Sample) -> np.ndarray:
    """(N,) int: the window of every visual token."""
    return sample.windows[sample.slot_of_token]


def source_tokens(sample: Sample, first: Sample) -> np.ndarray:
    """(N,) int: for every visual token of the whole pictures the one of the first look that shows its middle."""
    views, grids = len(sample.grids), first.grids
    before, found = np.cumsum([0, *map(math.prod, grids)]), []
    for view, (rows, columns) in enumerate(sample.grids):
        own = view * len(grids) // views  # LLaVA-NeXT: overview and detail have one first look
        across = [((2 * np.arange(old) + 1) * new // (2 * old)) for old, new in zip((rows, columns), grids[own], strict=True)]
        found.append((before[own] + across[0][:, None] * grids[own][1] + across[1]).reshape(-1))
    return np.concatenate(found) if found else np.zeros(0, int)


def window_sizes(sample: Sample) -> tuple[tuple[int, ...], ...]:
    """Visual tokens of every window that is seen, per view; windows that hold none are left out."""
    count = np.bincount(windows_of_tokens(sample), minlength=len(sample.places))
    views = sample.places[:, 0]
    return tuple(tuple(count[(views == view) & (count > 0)].tolist()) for view in range(len(sample.grids)))
