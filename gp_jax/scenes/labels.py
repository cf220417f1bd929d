"""Labels of what every patch and token of a picture shows: the targets of the dense auxiliary loss of the stage `base`.

A patch is 8 x 8 px, a token 16 x 16 px. The areas of shapes, digits and bars are their boxes.
"""

from dataclasses import dataclass

import numpy as np

from gp_jax.scenes.palette import TINY_SHAPES
from gp_jax.scenes.things import Box, Scene, Thing, neighbors

PATCH, TOKEN = 8, 16
KINDS = 28  # 0 background, 1..8 shapes, 9 ground of a tag, 10..19 digits, 20..23 bars (20: the tallest), 24..27 tiny shapes
COLORS = 9  # 0 none, 1..8
FILLS = 4  # 0 none, 1..3
NEIGHBORS = 9  # kinds in `neighbor`: 0 none, 1..8 shapes
TAG_GROUND, DIGITS, BARS, TINY = 9, 10, 20, 24
IGNORED = -1
PATCH_SHARE, TOKEN_SHARE = 0.3, 0.4  # share of a patch or token that a thing must cover to be its label


@dataclass(frozen=True)
class Labels:
    """The labels of one picture."""

    kind: np.ndarray  # (height / 8, width / 8) int8
    color: np.ndarray  # same shape; a tag's digits have the color of the tag
    fill: np.ndarray  # same shape
    neighbor: np.ndarray  # (4, 2, height / 16, width / 16) int8: (left, right, above, below), (shape, color); -1: no named thing here


def labels(scene: Scene) -> Labels:
    """The labels of a scene, computed from the scene alone, not from pixels."""
    width, height = scene.canvas
    maps = np.zeros((3, height // PATCH, width // PATCH), np.int8)
    best = np.full(maps.shape[1:], PATCH_SHARE)
    for thing in scene.things:
        if thing.is_named:
            kind = TINY + TINY_SHAPES.index(thing.kind) if thing.group == "tiny" else 1 + thing.kind
            _claim(best, maps, thing.box, (kind, 1 + thing.color, 1 + thing.fill))
        elif thing.group == "tag":
            digits = thing.digits
            _claim(best, maps, thing.box, (TAG_GROUND, 1 + thing.color, 0), [box for _, box in digits])
            for digit, box in digits:
                _claim(best, maps, box, (DIGITS + digit, 1 + thing.color, 0))
        else:
            ranked = sorted(thing.bars, key=lambda bar: -bar.height)
            for rank, bar in enumerate(ranked):
                _claim(best, maps, bar.box, (BARS + rank, 1 + bar.color, 0))
    kinds, colors, fills = maps
    return Labels(kinds, colors, fills, _neighbor(scene))


def _neighbor(scene: Scene) -> np.ndarray:
    width, height = scene.canvas
    found = np.full((4, 2, height // TOKEN, width // TOKEN), IGNORED, np.int8)
    best = np.full(found.shape[2:], TOKEN_SHARE - 1e-6)
    for thing in scene.things:
        if thing.is_named:
            values = np.array([_pair(scene, j) for j in neighbors(scene.things, thing)], np.int8)
            _claim(best, found.reshape(8, *best.shape), thing.box, values.ravel().tolist())
            x, y = (int(value) // TOKEN for value in thing.centre)
            found[:, :, y, x] = values
            best[y, x] = 2  # at its centre, above any share: nothing else can claim it
    return found


def _pair(scene: Scene, number: int | None) -> tuple[int, int]:
    if number is None:
        return 0, 0
    thing: Thing = scene.things[number]
    return 1 + thing.kind, 1 + thing.color


def _claim(best: np.ndarray, maps: np.ndarray, box: Box, values: tuple[int, ...] | list[int], holes: list[Box] | None = None) -> None:
    """Writes `values` where the box covers a larger share of a tile than any earlier box.

    Args: best: the largest share so far, (rows, columns); maps: where to write, (len(values), rows, columns).
    """
    side = PATCH if len(values) == 3 else TOKEN
    rows, columns = slice(box[1] // side, -(-box[3] // side)), slice(box[0] // side, -(-box[2] // side))
    share = np.multiply.outer(_covered(box[1], box[3], rows, side), _covered(box[0], box[2], columns, side))
    for hole in holes or ():
        share -= np.multiply.outer(_covered(hole[1], hole[3], rows, side), _covered(hole[0], hole[2], columns, side))
    region = best[rows, columns]
    wins = share > region
    region[wins] = share[wins]
    for plane, value in zip(maps, values, strict=True):
        plane[rows, columns][wins] = value


def _covered(first: int, end: int, tiles: slice, side: int) -> list[float]:
    """The share of each tile that lies in [first, end)."""
    return [max(0, min(end, (i + 1) * side) - max(first, i * side)) / side for i in range(tiles.start, tiles.stop)]
