"""One picture of what a plan kept: samples side by side, question and answer below each, and a legend."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from gp_jax.evaluation.reporting.gallery import Example, clean
from gp_jax.processing.images import overlay
from gp_jax.runtime.disk import whole

TILE, GAP, LINE = 288, 12, 18  # pixels
LONGEST = 400  # characters of a text, of which two lines are shown
INK, GROUND = "#1f2328", "#ffffff"
LEGEND = "left: the picture; right: bright parts were kept, dark ones dropped before the answer was written"
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
    right = sample.right.get(plan)
    pen.text((0, row), said, fill=VERDICT[right], font_size=15)
    expected = f"   right: {' '.join(clean(sample.answer[:LONGEST]).split())}" if right is False else ""
    told = f"{expected}   ({int(keep.sum())} of {keep.size} visual tokens kept)"
    pen.text((pen.textlength(said, font_size=15), row), told, fill=INK, font_size=15)
    return made


def chosen(samples: Sequence[Example], plan: str, count: int) -> list[Example]:
    """The first samples; if all of them are answered right, or wrong, the last makes room for the first other one."""
    own = [sample for sample in samples if plan in sample.keeps]
    first, right = own[:count], [sample.right.get(plan) for sample in own]
    other = next((sample for sample in own[count:] if sample.right.get(plan) == (not right[0])), None)
    return [*first[:-1], other] if other is not None and len(set(right[:count])) == 1 and right[0] is not None else first


def legend(pen: ImageDraw.ImageDraw, left: int, top: int, width: int) -> None:
    """What pictures and colors mean, in two lines at most."""
    for line in wrap(LEGEND, width, pen, 15):
        pen.text((left, top), line, fill=INK, font_size=15)
        top += LINE
    for text, color in (("right answer", VERDICT[True]), ("   wrong answer", VERDICT[False])):
        pen.text((left, top), text, fill=color, font_size=15)
        left += int(pen.textlength(text, font_size=15))


def write_sheet(path: Path, samples: Sequence[Example], plan: str, count: int, columns: int = 2) -> None:
    """Writes the picture of this many samples as PNG, whole or not at all. Raises: GlimpseError that names the file."""
    tiles = [tile(sample, plan) for sample in chosen(samples, plan, count)]
    if not tiles:
        return
    rows = -(-len(tiles) // columns)
    width, height = tiles[0].size
    bottom = rows * (height + 2 * GAP)
    sheet = Image.new("RGB", (columns * (width + 2 * GAP), bottom + 3 * LINE + GAP), GROUND)
    legend(ImageDraw.Draw(sheet), GAP, bottom, sheet.width - 2 * GAP)
    for i, made in enumerate(tiles):
        sheet.paste(made, (GAP + i % columns * (width + 2 * GAP), GAP + i // columns * (height + 2 * GAP)))
    with whole(path) as scratch:
        sheet.save(scratch, "PNG")
