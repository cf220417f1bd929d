"""Draws the picture of a scene."""

import dataclasses

import numpy as np
from PIL import Image

from gp_jax.scenes.palette import luminance, tone
from gp_jax.scenes.stencils import digit_stencil, fill_pattern, shape_stencil
from gp_jax.scenes.things import Box, Scene, Thing

PANEL = (224, 224, 218)
BASELINE = (60, 60, 60)


def draw(scene: Scene) -> np.ndarray:
    """Draws a scene. Returns: (height, width, 3) uint8."""
    rng = np.random.default_rng(scene.seed)
    picture = _background(scene, rng)
    for thing in scene.things:
        _paint(picture, thing)
    # No pixel is brighter than 240 so far, so adding noise cannot overflow. Noise covers the things too.
    return picture + (np.frombuffer(rng.bytes(picture.size), np.uint8) & scene.noise).reshape(picture.shape)


def without(scene: Scene, thing: Thing) -> Scene:
    """The scene without one of its things."""
    return dataclasses.replace(scene, things=tuple(other for other in scene.things if other is not thing))


def _background(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A background of medium brightness and low contrast, so that every color stands out. Returns: (height, width, 3) uint8."""
    width, height = scene.canvas
    grey = int(rng.integers(100, 146))
    first = grey + rng.integers(-18, 19, 3)
    second = first + int(rng.integers(14, 34)) * (1 if grey < 122 else -1) + rng.integers(-10, 11, 3)
    if scene.background in ("stripes", "checker"):
        x, y = np.arange(width, dtype=np.int32)[None], np.arange(height, dtype=np.int32)[:, None]
        period = int(rng.integers(10, 29))
        if scene.background == "stripes":
            a, b = rng.integers(-3, 4, 2).tolist()
            which = (a * x + (b or 1) * y) // (period * max(1, abs(a), abs(b))) & 1
        else:
            which = (x // period + y // period) & 1
        indexed = Image.fromarray(which.astype(np.uint8))  # Pillow looks up colors faster than numpy
        indexed.putpalette([*first.tolist(), *second.tolist()])
        return np.array(indexed.convert("RGB"))
    cell = {"noise": 12, "blobs": 48, "gradient": 512}[scene.background]
    share = rng.random((height // cell + 2, width // cell + 2, 1))
    small = (first + share * (second - first) + rng.integers(-8, 9, (*share.shape[:2], 3))).astype(np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR))


def _paint(picture: np.ndarray, thing: Thing) -> None:
    """Draws one thing on the picture, in place."""
    if thing.group == "tag":
        _fill(picture, thing.box, thing.rgb)
        ink = (10, 10, 10) if luminance(thing.rgb) > 110 else (240, 240, 240)
        for digit, box in thing.digits:
            _blend(picture, box, np.array(ink, np.int32), digit_stencil(digit))
    elif thing.group == "chart":
        x0, _, x1, y1 = thing.box
        _fill(picture, thing.box, PANEL)
        for bar in thing.bars:
            _fill(picture, bar.box, bar.rgb)
        _fill(picture, (x0 + 1, y1 - 3, x1 - 1, y1 - 2), BASELINE)
    else:
        side = thing.box[2] - thing.box[0]
        color = np.array(thing.rgb, np.int32)
        if thing.fill:
            color = np.where(fill_pattern(thing.kind, thing.fill, side), np.array(tone(thing.rgb), np.int32), color)
        _blend(picture, thing.box, color, shape_stencil(thing.kind, side))


def _fill(picture: np.ndarray, box: Box, rgb: tuple[int, int, int]) -> None:
    picture[box[1] : box[3], box[0] : box[2]] = rgb


def _blend(picture: np.ndarray, box: Box, color: np.ndarray, share: np.ndarray) -> None:
    """Blends a color into a box of the picture, in place. Args: color: (3,) or (h, w, 3); share: its opacity, (h, w, 1), 0..256."""
    region = picture[box[1] : box[3], box[0] : box[2]]
    region[...] = (region * (256 - share) + color * share + 128) >> 8
