"""Draws a random scene: which things there are, where they are and how they look."""

from typing import Any

import numpy as np

from gp_jax.errors import GlimpseError
from gp_jax.scenes.palette import HELD_OUT, HELD_OUT_TINY, JITTER, RGB, TINY_SHAPES, Rgb, held_out
from gp_jax.scenes.things import CHART_MARGIN, CHART_SIDE, TAG_SIZE, Bar, Box, Scene, Thing

TOKEN = 16  # side of a visual token in pixels
BACKGROUNDS = ("noise", "gradient", "stripes", "checker", "blobs")
MOST = 12  # things in a scene, at most
BAR_STEP = 6  # least difference between the heights of two bars, in pixels
UNSEEN_SHARE = 0.5  # share of shapes with a held-out pair, where such pairs are allowed


def cells(canvas: tuple[int, int]) -> tuple[int, int]:
    """Numbers of columns and rows of cells; a cell is at least 42 x 42 px."""
    return canvas[0] * 3 // 128, canvas[1] * 3 // 128


def make_scene(rng: np.random.Generator, canvas: tuple[int, int] = (256, 256), unseen: bool = False) -> Scene:
    """A random scene.

    Args: canvas: (width, height) in pixels, multiples of 16, from 64; unseen: whether held-out pairs of color and shape may occur.
    Raises: GlimpseError for other canvases.
    """
    if any(side % TOKEN or side < 64 for side in canvas):
        raise GlimpseError(f"canvas {canvas[0]}x{canvas[1]}: sides must be multiples of {TOKEN} px, at least 64")
    columns, rows = cells(canvas)
    most = max(1, min(MOST, columns * rows - 1))
    groups = _groups(rng, int(rng.integers(min(4, most), most + 1)), columns * rows)
    places = rng.permutation(columns * rows)[: len(groups)].tolist()
    shifts = rng.integers(-3, 4, (len(groups), 2)).tolist()
    jitter = rng.integers(-JITTER, JITTER + 1, (len(groups), 3)).tolist()
    tag_colors, numbers = rng.permutation(8).tolist(), _numbers(rng)
    # With few colors two things often have the same one, which some questions need.
    colors = rng.permutation(8)[: (2, 3, 8, 8)[int(rng.integers(4))]].tolist()
    things = []
    for i, group in enumerate(groups):
        cell = (places[i] % columns, places[i] // columns)
        values: dict[str, Any] = {}
        if group == "tag":
            size, color, values["number"] = TAG_SIZE, tag_colors.pop(), numbers.pop()
        elif group == "chart":
            size, color = (CHART_SIDE, CHART_SIDE), -1
        else:
            color, values["kind"] = _pair(rng, colors, group == "tiny", unseen)
            side = _side(rng, group, values)
            size = (side, side)
        box = _place(canvas, (columns, rows), cell, size, shifts[i])
        if group == "chart":
            values["bars"] = _bars(rng, box)
        things.append(Thing(group, box, cell, color, _shade(color, jitter[i]), **values))
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    return Scene(canvas, tuple(things), background, int(rng.integers(2**32)), (3, 7, 15)[int(rng.integers(3))])


def _groups(rng: np.random.Generator, count: int, room: int) -> list[str]:
    """The group (shape, tag, chart, tiny) of every thing."""
    tags, charts, tiny = int(rng.integers(1, 4)), int(rng.random() < 0.7), int(rng.integers(0, 3))
    if room < 6:  # too small for all groups
        drawn = ["tag"] * tags + ["chart"] * charts + ["tiny"] * tiny + ["shape"] * 3
        return [drawn[i] for i in rng.permutation(len(drawn))[:count].tolist()]
    tags = min(tags, count - 2)
    charts = min(charts, count - 2 - tags)
    tiny = min(tiny, count - 2 - tags - charts)
    return ["tag"] * tags + ["chart"] * charts + ["tiny"] * tiny + ["shape"] * (count - tags - charts - tiny)


def _numbers(rng: np.random.Generator) -> list[str]:
    """Three different numbers, mostly of 3 digits, sometimes of 2."""
    return [
        str(value)
        for value in dict.fromkeys(int(rng.integers(10, 100) if rng.random() < 0.15 else rng.integers(100, 1000)) for _ in range(9))
    ][:3]


def _pair(rng: np.random.Generator, colors: list[int], tiny: bool, unseen: bool) -> tuple[int, int]:
    """Draws the color and the shape of a thing."""
    if unseen and rng.random() < UNSEEN_SHARE:
        pairs = HELD_OUT_TINY if tiny else HELD_OUT
        return pairs[int(rng.integers(len(pairs)))]
    color = colors[int(rng.integers(len(colors)))]
    kinds = [kind for kind in (TINY_SHAPES if tiny else range(8)) if not held_out(color, kind)]
    return color, kinds[int(rng.integers(len(kinds)))]


def _side(rng: np.random.Generator, group: str, values: dict) -> int:
    """Draws the side of a shape in pixels; adds fill and size class to `values`."""
    if group == "tiny":
        return int(rng.integers(14, 17))
    values["fill"], values["large"] = int(rng.integers(3)), bool(rng.integers(2))
    return int(rng.integers(30, 37) if values["large"] else rng.integers(20, 24))


def _place(canvas: tuple[int, int], grid: tuple[int, int], cell: tuple[int, int], size: tuple[int, int], shift: list[int]) -> Box:
    """A box inside its cell, near the middle."""
    corner = []
    for total, parts, at, side, wanted in zip(canvas, grid, cell, size, shift, strict=True):
        first, end = -(-at * total // parts), (at + 1) * total // parts
        half = (end - first - side) // 2
        corner.append(first + half + max(-half, min(half, wanted)))
    return corner[0], corner[1], corner[0] + size[0], corner[1] + size[1]


def _shade(color: int, jitter: list[int]) -> Rgb:
    if color < 0:
        return (0, 0, 0)
    red, green, blue = (max(0, min(240, value + change)) for value, change in zip(RGB[color], jitter, strict=True))
    return red, green, blue


def _bars(rng: np.random.Generator, panel: Box) -> tuple[Bar, ...]:
    """3 or 4 bars of different colors (not white: the panel is light) and heights."""
    count = int(rng.integers(3, 5))
    spare = CHART_SIDE - 2 * CHART_MARGIN - BAR_STEP * count
    extra = np.sort(rng.integers(0, spare + 1, count)).tolist()
    heights = [BAR_STEP * (i + 1) + extra[i] for i in range(count)]
    order, colors = rng.permutation(count).tolist(), [color for color in rng.permutation(8).tolist() if color != 6]
    jitter = rng.integers(-JITTER, JITTER + 1, (count, 3)).tolist()
    step, bottom = (CHART_SIDE - 4) // count, panel[3] - CHART_MARGIN
    bars = []
    for i in range(count):
        x = panel[0] + 3 + i * step
        bars.append(Bar(colors[i], _shade(colors[i], jitter[i]), (x, bottom - heights[order[i]], x + step - 2, bottom)))
    return tuple(bars)
