"""One question about one or several pictures, with the regions that hold the evidence: the one format inside."""

from dataclasses import dataclass
from typing import Annotated, Protocol

from pydantic import Field

from gp_jax.errors import GlimpseError

Side = Annotated[int, Field(ge=1, lt=2**31)]  # pixels
Box = tuple[float, float, float, float]  # x1, y1, x2, y2 as shares (0..1) of the upright picture's width and height


@dataclass(frozen=True)
class Record:
    """Everything a training sample is made of. Evidence is, per picture, boxes or a mask; a picture may have none of its own."""

    id: str
    dataset: str
    question: str
    answer: str
    images: tuple[bytes, ...]  # encoded files, as they were
    boxes: tuple[tuple[Box, ...], ...]  # per picture
    masks: tuple[bytes | None, ...]  # per picture: an encoded mask picture (white = evidence) that stands instead of boxes


@dataclass(frozen=True)
class Entry:
    """What planning batches needs to know of a record without reading its pictures."""

    id: str
    dataset: str
    question: str
    answer: str
    sizes: tuple[tuple[Side, Side], ...]  # (width, height) of every upright picture, in pixels


class BadRecord(GlimpseError):
    """One record cannot be used; its neighbours can."""


class Source(Protocol):
    """Records by number."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def entries(self) -> list[Entry]:
        """One per record, in order."""

    def __getitem__(self, index: int) -> Record: ...
