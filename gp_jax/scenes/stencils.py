"""Shapes, fill patterns and digits as small arrays of opacities, made once per size."""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from gp_jax.scenes.palette import SHAPES
from gp_jax.scenes.things import DIGIT_SIZE

FINE = 8  # factor by which shapes are drawn larger and then scaled down, for smooth edges


def _star() -> list[tuple[float, float]]:
    return [((r := 1.0 if i % 2 == 0 else 0.52) * math.sin(math.pi * i / 5), -r * math.cos(math.pi * i / 5)) for i in range(10)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 72 for i in range(72)]
    return [(16 * math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))) for t in turns]


def _cross() -> list[tuple[float, float]]:
    a, b = 0.29, 0.71
    return [(a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b), (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a)]


POLYGONS = {
    "triangle": [(0.5, 0), (1, 1), (0, 1)],
    "diamond": [(0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5)],
    "star": _star(),
    "cross": _cross(),
    "heart": _heart(),
}


def _shares(picture: Image.Image) -> np.ndarray:
    """Grey values as opacities 0..256, so that blending divides by a power of two."""
    values = np.asarray(picture).astype(np.int32)[:, :, None]
    return values + (values >> 7)


@functools.cache
def shape_stencil(kind: int, side: int) -> np.ndarray:
    """The part of each pixel that a shape covers. Returns: (side, side, 1) int32, 0..256."""
    name, fine = SHAPES[kind], side * FINE
    picture = Image.new("L", (fine, fine), 255 if name == "square" else 0)
    pen = ImageDraw.Draw(picture)
    if name in ("circle", "ring"):
        pen.ellipse((0, 0, fine - 1, fine - 1), fill=255)
        if name == "ring":
            hole = fine * 0.3
            pen.ellipse((hole, hole, fine - 1 - hole, fine - 1 - hole), fill=0)
    elif name != "square":
        points = np.array(POLYGONS[name], float)
        points = (points - points.min(0)) / (points.max(0) - points.min(0)) * (fine - 1)  # scaled to fill the box
        pen.polygon([tuple(point) for point in points.tolist()], fill=255)
    return _shares(picture.reduce(FINE))


@functools.cache
def shape_area(kind: int, side: int) -> float:
    """Area of a shape in pixels, a ring's hole included."""
    filled = SHAPES.index("circle") if SHAPES[kind] == "ring" else kind
    return float(shape_stencil(filled, side).sum()) / 256


@functools.cache
def fill_pattern(kind: int, fill: int, side: int) -> np.ndarray:
    """The pixels of the second tone. Returns: (side, side, 1) bool."""
    y, x = np.mgrid[:side, :side] - side // 2
    if fill == 1:  # diagonal, 4 px wide across
        pattern = (x + y) % 10 < 5
    else:  # dots of 4 px in staggered rows, one in the middle
        row = (y + 2) // 6
        u, v = (x + 2 + row % 2 * 4) % 8 - 1.5, (y + 2) % 6 - 1.5
        pattern = u * u + v * v < 4.6
    # The edge keeps the first tone: the second may be close to the background, and the outline must stay visible.
    inside = shape_stencil(kind, side)[:, :, 0] > 128
    for _ in range(1 if side < 30 else 2):
        ringed = np.pad(inside, 1)
        inside = inside & ringed[:-2, 1:-1] & ringed[2:, 1:-1] & ringed[1:-1, :-2] & ringed[1:-1, 2:]
    return (pattern & inside)[:, :, None]


@functools.cache
def digit_stencil(digit: int) -> np.ndarray:
    """The opacities of a digit. Returns: (20, 11, 1) int32, 0..256."""
    width, height = DIGIT_SIZE
    font = ImageFont.load_default(4 * height)
    large = Image.new("L", (6 * height, 6 * height))
    ImageDraw.Draw(large).text((height, height // 2), str(digit), fill=255, font=font, stroke_width=1, stroke_fill=255)
    large = large.crop(large.getbbox())
    wide = min(width, max(6, round(large.width * height / large.height)))
    picture = Image.new("L", (width, height))
    picture.paste(large.resize((wide, height), Image.Resampling.BOX), ((width - wide) // 2, 0))
    return _shares(picture)
