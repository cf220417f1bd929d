"""Cards of samples: what every plan kept of the picture, and what it answered."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image, ImageDraw

from gp_jax.evaluation.reporting.chips import chip
from gp_jax.processing.images import overlay

SMALL, LARGE = 200, 400  # pixels of the longer side: below SMALL pictures are doubled, above LARGE shrunk
QUALITY = 80
NOT_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True)
class Example:
    """A question and what plans made of it.

    picture: upright RGB; keeps: per plan (rows, columns) bool over its visual tokens; predictions, right: per plan; a plan that is not
    in `right` has not been scored.
    boxes: evidence, (x0, y0, x1, y1) as shares of the picture, outlined in the first plan's picture.
    task, id: its name; lines: per plan, where its answer stands in predictions.jsonl.
    """

    question: str
    answer: str
    family: str
    picture: Image.Image
    keeps: Mapping[str, np.ndarray]
    predictions: Mapping[str, str]
    right: Mapping[str, bool]
    boxes: Sequence[tuple[float, float, float, float]] = ()
    task: str = ""
    id: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)


def clean(text: object) -> str:
    """What UTF-8 or HTML cannot hold becomes a replacement character."""
    return NOT_TEXT.sub("\ufffd", str(text))


def safe(text: object) -> str:
    """The same for HTML, attributes included."""
    return escape(clean(text), quote=True)


def shown_size(size: tuple[int, int]) -> tuple[int, int]:
    """In which a picture is stored. (width, height) in pixels."""
    longest = max(size)
    scale = 2 if longest < SMALL else min(1.0, LARGE / longest)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def outlined(picture: Image.Image, boxes: Sequence[tuple[float, float, float, float]]) -> Image.Image:
    """With boxes around evidence, a light line beside a dark one: seen on any ground."""
    picture, (width, height) = picture.copy(), picture.size
    draw = ImageDraw.Draw(picture)
    for x0, y0, x1, y1 in boxes:
        left, top = round(x0 * (width - 1)), round(y0 * (height - 1))
        right, bottom = max(left, round(x1 * (width - 1))), max(top, round(y1 * (height - 1)))
        draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="#101418")
        draw.rectangle((left, top, right, bottom), outline="#ffe14d")
    return picture


def picture_uri(picture: Image.Image, keep: np.ndarray | None, boxes: Sequence[tuple[float, float, float, float]] = ()) -> str:
    """A JPEG as a data URI, what was dropped dimmed, boxes outlined; scaled first, so that tokens and lines keep sharp edges."""
    picture = picture.convert("RGB").resize(shown_size(picture.size), Image.Resampling.BICUBIC)
    picture = picture if keep is None or keep.all() else overlay(picture, keep)
    file = io.BytesIO()
    outlined(picture, boxes).save(file, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def cards(samples: Sequence[Example], plans: Sequence[str], places: Mapping[tuple[str, str], int]) -> str:
    """HTML. plans: in the order of the table, by which they are numbered. places: the numbers of samples in the list, by task and id."""
    return "".join(_card(sample, plans, places.get((sample.task, sample.id))) for sample in samples)


def _card(sample: Example, plans: Sequence[str], place: int | None) -> str:
    known = {number: plan for number, plan in enumerate(plans) if plan in sample.predictions}
    width, height = shown_size(sample.picture.size)
    figures: list[str] = []
    for number, plan in known.items():
        boxes = sample.boxes if not figures else ()
        keep, right = sample.keeps.get(plan), sample.right.get(plan)
        code, mark, meaning = ("", "?", "not scored") if right is None else ("1", "✓", "right") if right else ("0", "✗", "wrong")
        kept = "" if keep is None else f"{int(keep.sum())} of {keep.size} tokens ({keep.mean():.0%})"
        line = f"line {sample.lines[plan]}" if plan in sample.lines else ""
        said = f"<q>{safe(sample.predictions[plan])}</q>" if sample.predictions[plan].strip() else "<i>nothing</i>"
        figures.append(
            f'<figure data-plan="{number}" data-right="{code}">'
            f'<img role="button" tabindex="0" loading="lazy" decoding="async" width="{width}" height="{height}" '
            f'alt="kept by {safe(plan)}, opens large" '
            f'src="{picture_uri(sample.picture, keep, boxes)}">'
            f"<figcaption><span>{chip(number)} <b>{safe(plan)}</b></span> <small>{kept}</small>"
            f'<small class="line">{line}</small>'
            f'<span class="said"><span class="mark" title="{meaning}">{mark}</span> {said}</span>'
            f"</figcaption></figure>"
        )
    named = "" if place is None else f' id="card-{place}" data-number="{place}"'
    return (
        f'<article class="card"{named} data-family="{safe(sample.family)}">'
        f'<header><h3>{safe(sample.question)}</h3><p><span class="family">{safe(sample.family)}</span> '
        f'answer: <b>{safe(sample.answer)}</b> <small class="id">{safe(f"{sample.task}:{sample.id}")}</small></p></header>'
        f'<div class="plans">{"".join(figures)}</div></article>\n'
    )
