"""Annotation rows of the public formats, read into one `Row`. `checks.py` compares them with their pictures.

There are three formats; the format of each row is recognised by its content.

Visual-CoT training JSONL: `question, answer, image, width, height, bboxs, dataset, split`, boxes in pixels. It is a
special case of 'your own'.

Visual-CoT benchmark JSON: `image` is `[path, "path###[x1, y1, x2, y2]"]` with the box in pixels, `conversations` holds the question,
the same box as shares of the picture padded to a centred square (used only when the pixel box is absent), and the answer.

Your own: JSONL, or one JSON list, of objects with

    image or images    one path or a list of paths, inside the folder of images
    question, answer   text (an answer may be a number)
    boxes              one picture: a list of [x1, y1, x2, y2] (one bare box is fine too); several: such a list per picture, [] or
                       null for a picture without evidence. Also read: bboxes, bboxs, bbox
    mask or masks      instead of boxes: a mask picture (white = evidence), or a list with one per picture, null for none
    box_format         "pixel", "normalized" or "0-1000" (also box_type; "normalised", "per_mille", "qwen")
    width, height      optional, of the upright picture (lists for several); checked against the file
    id, dataset, split optional

Boxes are shares or pixels of the upright picture, as viewers show it. Without `box_format` (and `--boxes auto`) fractions that all lie
in 0..1 are normalised and everything else is pixels. The format 0-1000 must be declared: [100, 200, 300, 400] is a valid box in pixels
too, and nothing in a row can tell the two apart. A row whose format is unclear, such as [0, 0, 1, 1] in whole numbers, is a bad row.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gp_jax.errors import GlimpseError, printable, shown
from gp_jax.runtime.disk import parse_json

Frame = str  # what the numbers of boxes mean: "auto", one of FRAMES, or "square" (shares of the picture padded to a square)
FRAMES = ("pixel", "normalized", "0-1000")
ALIASES = {"pixels": "pixel", "normalised": "normalized", "per_mille": "0-1000", "qwen": "0-1000"}
FRAME_NAMES = {name: name for name in ("auto", *FRAMES)} | ALIASES
BOX_FIELDS = ("boxes", "bboxes", "bboxs", "bbox")
REQUEST = "Please provide the bounding box coordinate of the region that can help you answer the question better"
SPLIT_NAME = re.compile(r"(?!all$)[A-Za-z][A-Za-z0-9_]*", re.IGNORECASE)  # split names that TFDS accepts; it reserves "all"
LONGEST = 100_000  # characters of a text; a longer prompt would not fit into any model
LONGEST_NAME = 1000


class BadRow(Exception):
    """A row that cannot become a record. reason: short and always the same, for counting; detail: one line about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, printable(" ".join(detail[:1000].split()), 300)


@dataclass(frozen=True)
class Row:
    """One annotation as its file has it, before pictures are opened. Tuples have one element per picture."""

    id: str
    dataset: str
    split: str
    question: str
    answer: str
    images: tuple[str, ...]
    boxes: tuple[tuple[Any, ...], ...]  # not yet checked to be numbers
    masks: tuple[str | None, ...]
    frame: Frame
    sizes: tuple[tuple[int | None, int | None], ...]  # declared (width, height)


def parse_row(data: bytes, where: str, dataset: str, boxes: Frame = "auto", split: str | None = None) -> Row:
    """One row of any format.

    Args: where: such as "file.jsonl:17", which becomes the id of a row without one; dataset: for rows that name none; boxes: what box
    numbers of 'your own' rows mean, unless "auto" it overrides their `box_format`; split: overrides the row's own.
    Raises: BadRow.
    """
    try:
        fields = parse_json(data.decode("utf-8-sig"), "the row")
    except UnicodeDecodeError as error:
        raise BadRow("not JSON", "is not UTF-8 text") from error
    except GlimpseError as error:
        raise BadRow("not JSON", str(error)) from error
    if not isinstance(fields, dict):
        raise BadRow("not an object", f"is a JSON {type(fields).__name__}, rows are objects with fields")
    fields = {name: value for name, value in fields.items() if value is not None} | ({"split": split} if split else {})
    return _benchmark(fields, where, dataset) if "conversations" in fields else _own(fields, where, dataset, boxes)


def _own(fields: dict, where: str, dataset: str, boxes: Frame) -> Row:
    for name in ("question", "answer"):
        if name not in fields:
            raise BadRow("field missing", f"has no '{name}'")
    images = tuple(path for path in _paths(fields, "image", "images") if path is not None)
    if not images:
        raise BadRow("field missing", "has no 'image'")
    given = next((fields[name] for name in BOX_FIELDS if name in fields), None)
    masks = _paths(fields, "mask", "masks")
    if masks and len(masks) != len(images):
        raise BadRow("counts disagree", f"{len(masks)} masks for {len(images)} images")
    said = fields.get("box_format", fields.get("box_type", "auto"))
    if not isinstance(said, str) or said.lower() not in FRAME_NAMES:
        raise BadRow("unknown box format", f"box_format {shown(said)} is not one of {', '.join(FRAME_NAMES)}")
    return Row(
        **_common(fields, where, dataset),
        question=_text(fields, "question"),
        answer=_text(fields, "answer"),
        images=images,
        boxes=_per_image(given, len(images)),
        masks=masks or (None,) * len(images),
        frame=boxes if boxes != "auto" else FRAME_NAMES[said.lower()],
        sizes=tuple(zip(_lengths(fields, "width", len(images)), _lengths(fields, "height", len(images)), strict=True)),
    )


def _benchmark(fields: dict, where: str, dataset: str) -> Row:
    """A row of the benchmark. Each distinct path of `image` is a picture; the numbers after ### are its boxes, in pixels."""
    boxes: dict[str, tuple] = {}
    for path in _paths(fields, "image", "images"):
        name, _, text = (path or "").partition("###")
        if not name.strip():
            raise BadRow("field missing", "'image' has an empty path")
        boxes[name] = boxes.get(name, ()) + (_one_image(_numbers(text)) if text else ())
    if not boxes:
        raise BadRow("field missing", "has no 'image'")
    humans, replies = _turns(fields["conversations"])
    if not humans or not replies:
        raise BadRow("field missing", "conversations have no question (human) or no answer (gpt)")
    spoken = _spoken_box(replies[0])
    if spoken and len(replies) == 1:
        raise BadRow("field missing", "conversations end with the box, without an answer")
    frame = "pixel"
    asked = humans[0].replace("<image>", "").strip()
    if spoken and len(boxes) == 1 and not any(boxes.values()):
        frame, boxes = "square", dict.fromkeys(boxes, (spoken,))
    return Row(
        **_common(fields, where, dataset),
        question=asked.removesuffix(".").removesuffix(REQUEST).rstrip() if asked.removesuffix(".").endswith(REQUEST) else asked,
        answer=replies[-1],
        images=tuple(boxes),
        boxes=tuple(boxes.values()),
        masks=(None,) * len(boxes),
        frame=frame,
        sizes=((None, None),) * len(boxes),
    )


def _turns(conversations: object) -> tuple[list[str], list[str]]:
    """The texts of the human and of the model, each in order."""
    turns: list[Any] = conversations if isinstance(conversations, list) else [None]
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise BadRow("field not text", "conversations are not a list of objects with 'from' and a text 'value'")
    said: dict[str, list[str]] = {"human": [], "gpt": []}
    for turn in turns:
        speaker = {"user": "human", "assistant": "gpt"}.get(str(turn.get("from")), turn.get("from"))
        if speaker in ("human", "gpt"):
            said[speaker].append(_text(turn, "value"))
    return said["human"], said["gpt"]


def _spoken_box(text: str) -> list | None:
    """The box when a turn consists of [x1, y1, x2, y2] alone, else None."""
    try:
        box = parse_json(text, "box")
    except GlimpseError:
        return None
    return box if isinstance(box, list) and len(box) == 4 and not any(isinstance(value, list | dict | str) for value in box) else None


def _numbers(text: str) -> object:
    try:
        return parse_json(text, "box")
    except GlimpseError as error:
        raise BadRow("box not numbers", f"'###{text}' is not ###[x1, y1, x2, y2]") from error


def _common(fields: dict, where: str, dataset: str) -> dict[str, str]:
    """Id, dataset and split. A benchmark's question ids are unique only within its data set, so the data set becomes part of the id."""
    dataset = _text(fields, "dataset") if "dataset" in fields else dataset
    split = _text(fields, "split").strip() if "split" in fields else "train"
    if not SPLIT_NAME.fullmatch(split):
        raise BadRow("split name", f"split {split!r} must be a word of letters, digits and _, and not 'all'")
    name = where
    if "id" in fields:
        name = _text(fields, "id")
    elif "question_id" in fields:
        name = f"{dataset}/{_text(fields, 'question_id')}"
    return {"id": name, "dataset": dataset, "split": split}


def _text(fields: dict, name: str) -> str:
    """A text field. Raises: BadRow for a text that cannot be stored, printed or tokenized."""
    value = fields[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float) or (isinstance(value, float) and not math.isfinite(value)):
        raise BadRow("field not text", f"'{name}' is {value if isinstance(value, float) else f'a {type(value).__name__}'}")
    text = str(value)
    longest = LONGEST if name in ("question", "answer", "value") else LONGEST_NAME
    if len(text) > longest:
        raise BadRow("field too long", f"'{name}' has {len(text)} characters, at most {longest} are read")
    if "\0" in text:
        raise BadRow("field not text", f"'{name}' has a null character")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRow("field not text", f"'{name}' has half a surrogate pair, which is no character") from error
    return text


def _paths(fields: dict, one: str, several: str) -> tuple[str | None, ...]:
    """Paths in the field `one` or `several`, whichever the row has: one path, or a list of paths and nulls."""
    if one in fields and several in fields:
        raise BadRow("fields clash", f"has both '{one}' and '{several}'")
    name = one if one in fields else several
    value = fields.get(name, [])
    paths = value if isinstance(value, list) else [value]
    for path in paths:
        if not (isinstance(path, str) and path.strip()) and not (path is None and one == "mask"):
            raise BadRow("field not text", f"'{name}' holds {shown(path, 60)}, not a path")
    return tuple(paths)


def _lengths(fields: dict, name: str, count: int) -> list[int | None]:
    value = fields.get(name)
    values = value if isinstance(value, list) else [value] if count == 1 or value is not None else [None] * count
    if len(values) != count:
        raise BadRow("counts disagree", f"'{name}' has {len(values)} values for {count} images")
    for number in values:
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | float) or number != number // 1):
            raise BadRow("size not numbers", f"'{name}' is {shown(number, 60)}")
    return [None if number is None else int(number) for number in values]


def _is_box(value: object) -> bool:
    """Whether a value may be one box: a list without lists in it. Its values are checked later."""
    return isinstance(value, list) and bool(value) and not any(isinstance(item, list) or item is None for item in value)


def _one_image(value: object) -> tuple[Any, ...]:
    """The boxes of a single picture: one box, or a list of boxes."""
    if value is None or value == []:
        return ()
    if _is_box(value):
        return (value,)
    if isinstance(value, list) and all(_is_box(box) for box in value):
        return tuple(value)
    raise BadRow("box not numbers", f"{json.dumps(value)[:80]} is not a list of [x1, y1, x2, y2]")


def _per_image(value: object, count: int) -> tuple[tuple[Any, ...], ...]:
    if value is None:
        return ((),) * count
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("box not numbers", f"{json.dumps(value)[:80]} is not a list of [x1, y1, x2, y2]")
    if count > 1:
        if len(value) != count:
            raise BadRow("counts disagree", f"boxes for {len(value)} images, there are {count}: one list of boxes per image")
        return tuple(_one_image(boxes) for boxes in value)
    if len(value) == 1 and isinstance(value[0], list) and (not value[0] or isinstance(value[0][0], list)):
        value = value[0]  # one list per image, for one image
    return (_one_image(value),)
