"""The record: one question about one or several pictures, with the regions that hold the evidence. All formats are read into it."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from gp_jax.errors import GlimpseError

Side = Annotated[int, Field(ge=1, lt=2**31)]  # pixels
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares (0..1) of the upright picture's width and height


@dataclass(frozen=True)
class Record:
    """Everything that a training sample is made of. Evidence is given per picture as boxes or a mask; a picture may have none."""

    id: str
    dataset: str
    question: str
    answer: str
    images: tuple[bytes, ...]  # encoded files, byte for byte
    boxes: tuple[tuple[Box, ...], ...]  # per picture
    masks: tuple[bytes | None, ...]  # per picture: an encoded mask picture (white = evidence) instead of boxes


@dataclass(frozen=True)
class Entry:
    """The part of a record that planning batches needs; it can be read without the pictures."""

    id: str
    dataset: str
    question: str
    answer: str
    sizes: tuple[tuple[Side, Side], ...]  # (width, height) of every upright picture, in pixels


class BadRecord(GlimpseError):
    """One record that cannot be used. It does not affect other records."""


class Source(Protocol):
    """Records by number."""

    @property
    def name(self) -> str:
        """How messages call this source."""

    @property
    def entries(self) -> list[Entry]:
        """One entry per record, in order."""

    def __getitem__(self, index: int) -> Record: ...
