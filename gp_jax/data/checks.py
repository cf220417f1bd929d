"""All checks of an annotation row before it becomes a record. A check that fails raises `BadRow` with one of these reasons:

    not JSON, not an object, field missing, field not text, field too long, fields clash, split name, unknown box format, counts disagree,
    size not numbers (formats.py); empty question, empty answer, image outside the folder, image missing, image broken,
    size disagrees, no evidence, box not numbers, box format unclear, box empty, box outside the picture,
    mask outside the folder, mask missing, mask broken, mask transparent, mask size disagrees, mask empty

Axes: boxes are (x1, y1, x2, y2), sizes (width, height).
"""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from gp_jax.data.formats import BadRow, Row
from gp_jax.data.record import Box, Record
from gp_jax.errors import GlimpseError, printable, shown
from gp_jax.processing.images import MAX_BYTES, read_picture
from gp_jax.runtime.disk import kind_of, read_bytes, spelled

SLACK_PIXELS = 1.0  # a box may leave the picture by this, or by SLACK_SHARE of the side, and is clipped: tools round
SLACK_SHARE = 0.005
UNCLEAR_BELOW = 2.0  # a box in pixels has a coordinate of at least this; a share of the picture is smaller
CACHED = 8  # pictures that are remembered: rows about one picture follow each other
WHITE = 128  # mask pixels of this value or more are evidence
SIBLINGS = {"textcap": "textvqa", "visual7w": "v7w", "v7w": "visual7w"}  # released data sets that share or rename a folder of pictures

# EXIF orientation -> function from (x, y) in the stored picture to (x, y) in the upright one, as shares of width and height.
TO_UPRIGHT = {
    2: lambda x, y: (1 - x, y),
    3: lambda x, y: (1 - x, 1 - y),
    4: lambda x, y: (x, 1 - y),
    5: lambda x, y: (y, x),
    6: lambda x, y: (1 - y, x),
    7: lambda x, y: (1 - y, 1 - x),
    8: lambda x, y: (y, 1 - x),
}


@dataclass(frozen=True)
class PictureFile:
    """A picture file that can be decoded. size: (width, height) of the upright picture; orientation: the EXIF tag, 1..8."""

    data: bytes
    size: tuple[int, int]
    orientation: int

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) as stored, which is what programs that ignore EXIF report."""
        return self.size[::-1] if self.orientation >= 5 else self.size


class Checker:
    """Checks rows against the pictures in a folder; remembers the last few pictures."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open = functools.lru_cache(CACHED)(_read_picture)
        self.open_mask = functools.lru_cache(CACHED)(_read_mask)

    def check(self, row: Row, evidence: bool = True) -> tuple[Record, tuple[tuple[int, int], ...]]:
        """Returns the record and the sizes of its upright pictures. evidence: whether the row must have some. Raises: BadRow."""
        for name, text in (("question", row.question), ("answer", row.answer)):
            if not text.strip():
                raise BadRow(f"empty {name}")
        if evidence and not any(row.boxes) and not any(row.masks):
            raise BadRow("no evidence", "has neither boxes nor a mask")
        pictures = [self._picture(path, row.dataset) for path in row.images]
        numbers = [_four_numbers(values) for values in row.boxes]
        frame = _clear_frame([box for boxes in numbers for box in boxes]) if row.frame == "auto" and any(numbers) else row.frame
        regions = []
        for path, picture, values, declared in zip(row.images, pictures, numbers, row.sizes, strict=True):
            turned = _is_turned(declared, picture, path)
            regions.append(tuple(_box(box, frame, picture, turned) for box in values))
        masks = [self._mask(path, row.dataset, picture) if path else None for path, picture in zip(row.masks, pictures, strict=True)]
        record = Record(
            id=row.id,
            dataset=row.dataset,
            question=row.question.strip(),
            answer=row.answer.strip(),
            images=tuple(picture.data for picture in pictures),
            boxes=tuple(regions),
            masks=tuple(masks),
        )
        return record, tuple(picture.size for picture in pictures)

    def _picture(self, path: str, dataset: str) -> PictureFile:
        found = self.open(self.find(path, dataset, "image"))
        if isinstance(found, str):
            raise BadRow("image broken", f"{path}: {found}")
        return found

    def _mask(self, path: str, dataset: str, picture: PictureFile) -> bytes:
        found = self.open_mask(self.find(path, dataset, "mask"))
        if isinstance(found, BadRow):
            raise BadRow(found.reason, f"{path}: {found.detail}")
        (wide, high), (width, height) = found.size, picture.size
        if abs(wide * height / width - high) > 1 and abs(high * width / height - wide) > 1:
            raise BadRow("mask size disagrees", f"{path}: {wide} x {high} pixels for a picture of {width} x {height}")
        return found.data

    def find(self, path: str, dataset: str, kind: str) -> Path:
        """The first of the `candidates` that exists. Only the folder is searched; symbolic links in it are followed. Raises: BadRow."""
        for place in candidates(path, dataset, self.folder, kind):
            try:
                place = spelled(place)
                if kind_of(place) in ("file", "other"):  # opening anything but a regular file reports what it is
                    return place
            except GlimpseError:  # not a possible file name
                break
        raise BadRow(f"{kind} missing", f"{path}: no such file")


def candidates(path: str, dataset: str, folder: Path, kind: str = "image") -> Iterator[Path]:
    """Paths at which a row's picture may be: as written, or in the released layout with its folders cot/DATASET. Raises: BadRow.

    A path that begins with cot/DATASET is also tried without these folders, for a folder of images that is `cot` or `cot/DATASET` itself.
    """
    if os.path.isabs(path):
        inside = [os.path.relpath(path, base) for base in (os.path.abspath(folder), os.path.realpath(folder))]
        path = next((other for other in inside if not other.startswith("..")), path)
    parts = PurePosixPath(path).parts
    if os.path.isabs(path) or ".." in parts:
        raise BadRow(f"{kind} outside the folder", f"{path}: only files inside the folder of images are read")
    yield folder / path
    for name in (dataset, SIBLINGS.get(dataset)):
        if name and "/" not in name and name not in (".", ".."):
            yield folder / "cot" / name / path
            yield folder / name / path
    if parts[:1] == ("cot",):
        yield folder.joinpath(*parts[1:])
        yield folder.joinpath(*parts[2:])
        yield folder.joinpath(*parts[:2], "val", *parts[2:])  # the released evaluation also looks there


def _four_numbers(boxes: Sequence[object]) -> list[tuple[float, float, float, float]]:
    """Boxes as tuples of four finite numbers. Raises: BadRow."""
    checked = []
    for box in boxes:
        values = list(box) if isinstance(box, list | tuple) else []
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        if len(values) != 4 or not numeric or not all(abs(value) < 1e9 for value in values):
            raise BadRow("box not numbers", f"{shown(box)} is not [x1, y1, x2, y2]")
        checked.append(tuple(values))
    return checked


def _is_turned(declared: tuple[int | None, int | None], picture: PictureFile, path: str) -> bool:
    """Whether the row describes the picture as stored, before EXIF turns it upright: its declared size decides. Raises: BadRow."""

    def agrees(size: tuple[int, int]) -> bool:
        return all(said in (None, real) for said, real in zip(declared, size, strict=True))

    if agrees(picture.size):
        return False
    if agrees(picture.stored_size):
        return True
    said = " x ".join("?" if value is None else str(value) for value in declared)
    raise BadRow("size disagrees", f"{path}: the row says {said}, the file is {picture.size[0]} x {picture.size[1]}")


def _box(values: tuple[float, ...], frame: str, picture: PictureFile, turned: bool) -> Box:
    """A box as shares of the upright picture, clipped to the picture. Raises: BadRow."""
    width, height = picture.stored_size if turned else picture.size
    scale, left, top = {  # shares = (values - offset) / scale, for x and y
        "pixel": ((width, height), 0.0, 0.0),
        "normalized": ((1, 1), 0.0, 0.0),
        "0-1000": ((1000, 1000), 0.0, 0.0),
        "square": ((width / max(width, height), height / max(width, height)), *_padding(width, height)),
    }[frame]
    x1, x2 = ((values[i] - left) / scale[0] for i in (0, 2))
    y1, y2 = ((values[i] - top) / scale[1] for i in (1, 3))
    if x1 >= x2 or y1 >= y2:
        raise BadRow("box empty", f"{list(values)}: needs x1 < x2 and y1 < y2")
    slack = [max(SLACK_SHARE, SLACK_PIXELS / side) + 1e-9 for side in (width, height)]
    if min(x1 + slack[0], y1 + slack[1]) < 0 or max(x2 - slack[0], y2 - slack[1]) > 1:
        raise BadRow("box outside the picture", f"{list(values)} ({frame}) in a picture of {width} x {height}")
    if turned:
        (x1, y1), (x2, y2) = (TO_UPRIGHT[picture.orientation](x, y) for x, y in ((x1, y1), (x2, y2)))
        x1, y1, x2, y2 = min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)
    left, top, right, bottom = (float(np.float32(min(max(value, 0.0), 1.0))) for value in (x1, y1, x2, y2))
    if left >= right or top >= bottom:
        raise BadRow("box empty", f"{list(values)}: nothing of it is inside the picture")
    return left, top, right, bottom


def _padding(width: int, height: int) -> tuple[float, float]:
    """Left and top margin of the picture when it is padded to a centred square, as shares of the square."""
    return (1 - width / max(width, height)) / 2, (1 - height / max(width, height)) / 2


def _clear_frame(boxes: Sequence[tuple[float, ...]]) -> str:
    """Decides between "pixel" and "normalized" for a row without `box_format`. Raises: BadRow when both are possible."""
    frames = set()
    for box in boxes:
        largest = max(abs(value) for value in box)
        if largest <= 1 + SLACK_SHARE and any(isinstance(value, float) for value in box):
            frames.add("normalized")
        elif largest >= UNCLEAR_BELOW:
            frames.add("pixel")
    if len(frames) != 1:
        raise BadRow("box format unclear", f"{[list(box) for box in boxes]}: pixels or shares? Say box_format in the row, or --boxes")
    return frames.pop()


def _read_picture(path: Path) -> PictureFile | str:
    """The picture, or a text that says why it cannot be used."""
    try:
        data = read_bytes(path, MAX_BYTES)
        found = read_picture(data, str(path))
        found.rgb()
        return PictureFile(data, found.size, found.orientation)
    except GlimpseError as error:
        return _less(path, error)


def _less(path: Path, error: GlimpseError) -> str:
    """The message of an error without the file's full path: the caller names the file as the row does."""
    return str(error).removeprefix(f"{printable(path)}: ")


def upright_size(path: Path) -> tuple[int, int]:
    """Width and height of an upright picture, from its header alone: decoding may still fail. Raises: BadRow."""
    try:
        return read_picture(read_bytes(path, MAX_BYTES), str(path)).size
    except GlimpseError as error:
        raise BadRow("image broken", f"{path.name}: {_less(path, error)}") from error


def _read_mask(path: Path) -> PictureFile | BadRow:
    found = _read_picture(path)
    if isinstance(found, str):
        return BadRow("mask broken", found)
    mask = read_picture(found.data, str(path))
    brightest = int(np.asarray(mask.rgb().convert("L")).max())
    see_through = "A" in mask.stored.getbands() or "transparency" in mask.stored.info
    if see_through and np.asarray(mask.stored.convert("RGBA"))[..., 3].min() < 255:
        return BadRow("mask transparent", "opening pictures makes transparent parts white, which is evidence: save it without alpha")
    if brightest < WHITE:
        return BadRow("mask empty", f"no white pixel, the brightest is {brightest} of 255")
    return found
