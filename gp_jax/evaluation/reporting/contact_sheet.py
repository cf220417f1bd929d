"""One picture of what a plan kept: samples side by side, question and answer below each."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from gp_jax.evaluation.reporting.gallery import Example, clean
from gp_jax.processing.images import overlay
from gp_jax.runtime.disk import whole

TILE, GAP, LINE = 288, 12, 18  # pixels
LONGEST = 400  # characters of a text, of which two lines are shown
INK, GROUND = "#1f2328", "#ffffff"
VERDICT = {True: "#1a7f37", False: "#b42318", None: INK}  # right, wrong, not scored


def wrap(text: str, width: int, pen: ImageDraw.ImageDraw, size: int) -> list[str]:
    """Lines of at most `width` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font_size=size) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def tile(sample: Example, plan: str) -> Image.Image:
    """Picture and overlay beside each other, scaled to one height, over question and answer."""
    keep, scale = sample.keeps[plan], TILE / max(sample.picture.size)
    width, height = (max(1, round(side * scale)) for side in sample.picture.size)
    picture = sample.picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    made = Image.new("RGB", (2 * TILE + GAP, TILE + 4 * LINE), GROUND)
    made.paste(picture, (0, 0))
    made.paste(overlay(picture, keep), (TILE + GAP, 0))
    pen = ImageDraw.Draw(made)
    row = TILE + 6
    for line in wrap(clean(sample.question[:LONGEST]), made.width, pen, 15)[:2]:
        pen.text((0, row), line, fill=INK, font_size=15)
        row += LINE
    said = " ".join(clean(sample.predictions[plan][:LONGEST]).split())
    told = f"{said}   ({int(keep.sum())} of {keep.size} visual tokens kept)"
    pen.text((0, row), told, fill=VERDICT[sample.right.get(plan)], font_size=15)
    return made


def write_sheet(path: Path, samples: Sequence[Example], plan: str, columns: int = 2) -> None:
    """Writes the picture as PNG, whole or not at all. Raises: GlimpseError that names the file."""
    tiles = [tile(sample, plan) for sample in samples if plan in sample.keeps]
    if not tiles:
        return
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    sheet = Image.new("RGB", (columns * (width + 2 * GAP), rows * (height + 2 * GAP)), GROUND)
    for i, made in enumerate(tiles):
        sheet.paste(made, (GAP + i % columns * (width + 2 * GAP), GAP + i // columns * (height + 2 * GAP)))
    with whole(path) as scratch:
        sheet.save(scratch, "PNG")
