"""The directory of a TIFF file, or of an EXIF block, which has the same format.

Entries have 12 bytes: tag, type, number of values, and the values or their offset; in a BigTIFF, with longer counts and offsets, 20 bytes.
"""

import struct
from typing import Any, ClassVar

MAX_COUNT = 1 << 18  # entries, or values of one entry; pictures have fewer strips
SMALL_TILE = 1 << 22  # pixels
WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT = 256, 257, 322, 323
# Tags that are needed to decode pixels: all of the specification except names, dates, resolutions, orientation and offsets of other
# directories; older tags for depth and type of samples; one tag of a compression.
PIXELS = {*range(254, 533)} - {269, 270, 271, 272, 274, 282, 283, 285, 286, 287, 296, 297, 305, 306, 315, 316, 330, 337}
PIXELS |= {32995, 32996, 32997, 32998, 50674}


class Directory:
    """The first directory of a file. entries: the complete ones, by tag.

    Reading never raises: what cannot be read is left out.
    """

    NUMBERS: ClassVar = {3: "H", 4: "L", 5: "LL", 6: "b", 8: "h", 9: "l", 10: "ll", 11: "f", 12: "d", 13: "L", 16: "Q"}  # by type
    TEXTS = (1, 2, 7)  # types with one byte per value

    def __init__(self, data: bytes) -> None:
        self.data, self.order = data, {b"II": "<", b"MM": ">"}.get(data[:2], "<")
        self.entries: dict[int, bytes] = {}
        self.big = data[2:3] == b"\x2b"
        self.size, self.head = (20, 16) if self.big else (12, 8)  # of an entry, and of the file's header
        self.long, self.short = ("Q", "Q") if self.big else ("L", "H")  # of a place, and of the number of entries
        if data[:2] not in (b"II", b"MM"):
            return
        at = self._unpack(self.long, data[self.head // 2 : self.head])
        if at is None or (number := self._unpack(self.short, data[at : at + struct.calcsize("<" + self.short)])) is None:
            return
        at += struct.calcsize("<" + self.short)
        for place in range(at, min(at + self.size * min(number, MAX_COUNT), len(data) - self.size + 1), self.size):
            entry = data[place : place + self.size]
            self.entries.setdefault(self._unpack("H", entry[:2]), entry)

    def _unpack(self, letter: str, data: bytes) -> Any:
        return struct.unpack(self.order + letter, data)[0] if len(data) == struct.calcsize(self.order + letter) else None

    def count(self, tag: int) -> int:
        """The number of values in the header of an entry."""
        return self._unpack(self.long, self.entries[tag][4 : 12 if self.big else 8])

    def content(self, tag: int, most: int) -> bytes:
        """The bytes of an entry's values, at most `most` of them; none when there is no entry."""
        kind = self._unpack("H", self.entries[tag][2:4]) if tag in self.entries else None
        if kind not in self.NUMBERS and kind not in self.TEXTS:
            return b""
        length = self.count(tag) * struct.calcsize("<" + self.NUMBERS.get(kind, "B"))
        place = self.entries[tag][12 if self.big else 8 :]
        at, data = (0, place) if length <= len(place) else (self._unpack(self.long, place), self.data)
        return data[at : at + min(length, most)]

    def number(self, tag: int) -> float | None:
        """An entry's first value; None if there is none, -1 if it is not a number."""
        first = self.content(tag, 8)
        letters = self.NUMBERS.get(self._unpack("H", self.entries[tag][2:4])) if first else None
        if letters is None:
            return -1 if first else None
        size = struct.calcsize("<" + letters)
        if len(first) < size:
            return None
        above, below = (*struct.unpack(self.order + letters, first[:size]), 1)[:2]
        return above / below if below else -1

    def with_pixels_only(self) -> bytes:
        """The file with one directory that has only the entries that pixels need. Raises: ValueError for invalid counts or tile sizes."""
        kept = [tag for tag in self.entries if tag in PIXELS]
        counts = [self.count(tag) for tag in kept]
        if max(counts, default=0) > MAX_COUNT or sum(counts) > len(self.data):
            raise ValueError("a directory that is larger than its file")
        width, height, across, down = (self.number(tag) or 0 for tag in (WIDTH, HEIGHT, TILE_WIDTH, TILE_HEIGHT))
        if across * down > max(4 * width * height, SMALL_TILE):  # a decoder allocates whole tiles
            raise ValueError(f"tiles of {across:.0f} x {down:.0f} pixels")
        padding = bytes(len(self.data) % 2)
        place = struct.pack(self.order + self.long, len(self.data) + len(padding))
        number, last = struct.pack(self.order + self.short, len(kept)), struct.pack(self.order + self.long, 0)
        entries = [self.entries[tag] for tag in kept]
        return b"".join([self.data[: self.head // 2], place, memoryview(self.data)[self.head :], padding, number, *entries, last])
