"""Untrusted picture files: removes metadata that pixels do not need, and reads the orientation.

Pillow may fail on metadata although the pixels are fine: texts above its limits, tags of wrong types, damaged profiles. Metadata is
optional in every format, so it is removed before Pillow opens the file. The orientation is read once, before that, so that size and pixels
always agree about it. Truncated or damaged parts are left as they are, for Pillow to refuse.
"""

import functools
import io
import re
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from PIL import Image

from gp_jax.processing.tiff import Directory

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # none of them runs programs, or decodes when a file is opened
MAX_PARTS = 1 << 18  # chunks or segments of a file; no real picture has more, and they would take long to read
MAX_TEXT = 1 << 20  # bytes of a text, unpacked
SCAN, MARKER = 0xDA, re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # of JPEG; restart markers inside a scan do not begin segments
PER_BYTE = 1024  # the most pixels per byte of a JPEG or lossy WebP; pictures of one colour reach half of it
FEW_SCANS, MAX_SCANNED = 20, 1_000_000_000  # every scan of a progressive JPEG updates all pixels; encoders write about ten scans
ORIENTATION, XMP = 0x0112, 0x02BC  # TIFF tags
UPRIGHT = {  # the transform that makes a stored picture upright, by EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = (5, 6, 7, 8)

Spans = list[tuple[int, int]]  # (first byte, byte after the last) of the parts that are kept


class Stripped(NamedTuple):
    """A file without metadata, and the parts of the metadata that may hold the orientation."""

    data: bytes
    exif: bytes = b""
    xmp: bytes = b""


@functools.cache
def formats() -> tuple[str, ...]:
    """The entries of FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def open_encoded(data: bytes) -> tuple[Image.Image, int] | None:
    """A picture as stored, with its header read, and its orientation (1: upright); None for an unknown format.

    `Image.open` of Pillow checks a global limit on pixels that other threads share, so its plugins are called directly, in the same way.
    Raises: any error that Pillow's plugins raise for a damaged header.
    """
    accepted = (name for name in formats() if (accept := Image.OPEN[name][1]) and accept(data[:16]) is True)
    name = next(accepted, None)
    if name is None:
        return None
    stripped = STRIP.get(name, Stripped)(data)
    opened = Image.OPEN[name][0](io.BytesIO(stripped.data), "")
    exif, xmp = (opened.info.get("exif"), opened.info.get("xmp")) if name == "AVIF" else (stripped.exif, stripped.xmp)
    return opened, orientation(exif or b"", xmp or b"")


def orientation(exif: bytes, xmp: bytes) -> int:
    """1 to 8, from EXIF or else from XMP; 1 if neither has a valid one."""
    found = Directory(re.sub(b"^(Exif\0\0){1,2}", b"", exif)).number(ORIENTATION)
    if found is None and (said := re.search(rb'tiff:Orientation(?:="|>)([0-9])', xmp)):
        found = int(said[1])
    return int(found) if found in UPRIGHT else 1


def joined(data: bytes, spans: Spans) -> bytes:
    """The given parts of a file, concatenated; the file itself if they are all of it."""
    if sum(end - start for start, end in spans) == len(data):
        return data
    view = memoryview(data)
    return b"".join(view[start:end] for start, end in spans)


def strip_jpeg(data: bytes) -> Stripped:
    """The file without comments and application segments before the first scan. JFIF's and Adobe's stay: they define the colours.

    Raises: ValueError for more scans than a picture of this size has.
    """
    spans, exif, xmp, at, pixels, huffman = [(0, 2)], [], b"", 2, 0, False
    for marker, start, end in _segments(data, at):
        if marker == SCAN:
            at = start
            break
        content = data[start + 4 : end]
        if marker == 0xFE or (0xE1 <= marker <= 0xEF and marker != 0xEE):
            if marker == 0xE1 and content.startswith(b"Exif\0\0"):
                exif.append(content[6:])
            elif marker == 0xE1 and content.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                xmp = content
        else:
            spans.append((start, end))  # without bytes between segments, which every decoder skips
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            huffman, pixels = marker < 0xC8, int.from_bytes(content[1:3]) * int.from_bytes(content[3:5])
        at = end
    if huffman and pixels > PER_BYTE * len(data):  # a decoder would allocate all pixels before it finds them missing
        raise ValueError(f"{pixels} pixels in {len(data)} bytes")
    scans = sum(marker == SCAN for marker, _, _ in _segments(data, at))
    if scans > FEW_SCANS and scans * pixels > MAX_SCANNED:
        raise ValueError(f"{scans} scans of {pixels} pixels")
    return Stripped(joined(data, [*spans, (at, len(data))]), b"".join(exif), xmp)


def _segments(data: bytes, at: int) -> Iterator[tuple[int, int, int]]:
    """(marker, first byte, byte after the last) of a JPEG's segments up to its end, without the pixels of scans."""
    for _ in range(MAX_PARTS):
        found = MARKER.search(data, at)
        if not found or data[found.end() - 1] == 0xD9:
            return
        marker, at = data[found.end() - 1], found.end()
        if marker >= 0xC0 and marker not in (0xC8, 0xD8, *range(0xF0, 0xFE)):  # the others have no length
            at = min(at + max(2, int.from_bytes(data[at : at + 2])), len(data))
        yield marker, found.end() - 2, at
    raise ValueError(f"more than {MAX_PARTS} segments")


def strip_png(data: bytes) -> Stripped:
    """The file with only the chunks that the pixels of the first picture need. Text chunks may hold EXIF and XMP too."""
    spans, exif, texts, at, parts = [(0, 8)], b"", {}, 8, 0
    while at + 12 <= len(data):
        kind, end = data[at + 4 : at + 8], at + 12 + int.from_bytes(data[at : at + 4])
        if not kind.isalpha() or end > len(data):
            break
        if (parts := parts + 1) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} chunks")
        if kind == b"tRNS" or kind[:1].isupper():
            spans.append((at, end))
        elif kind == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif kind in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[at + 8 : min(end - 4, at + 88)].partition(b"\0")[0]
            texts[keyword] = kind, at + 9 + len(keyword), end - 4
        at = end
        if kind == b"IEND":
            at = len(data)
    spans.append((at, len(data)))
    said = {name: _png_text(*texts[name][:1], data[slice(*texts[name][1:])]) for name in texts if name in PNG_TEXTS}
    if not exif and (profile := said.get(b"Raw profile type exif")):
        try:
            exif = bytes.fromhex("".join(profile.decode("latin-1").split("\n")[3:]))
        except ValueError:
            exif = b""
    return Stripped(joined(data, spans), exif or said.get(b"exif", b""), said.get(b"XML:com.adobe.xmp", b""))


PNG_TEXTS = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"exif")


def _png_text(kind: bytes, rest: bytes) -> bytes:
    """The text of a text chunk, decompressed; empty if it cannot be decompressed."""
    packed = kind == b"zTXt"
    if packed:
        rest = rest[1:]  # the compression method, of which there is one
    elif kind == b"iTXt":
        packed = rest[:1] == b"\1"
        rest = rest[2:].partition(b"\0")[2].partition(b"\0")[2]  # after the language and the translated keyword
    try:
        return zlib.decompressobj().decompress(rest, MAX_TEXT) if packed else rest[:MAX_TEXT]
    except zlib.error:
        return b""


def strip_webp(data: bytes) -> Stripped:
    """The file without colour profile, EXIF, XMP and unknown chunks."""
    end, spans, at, parts = min(len(data), 8 + int.from_bytes(data[4:8], "little")), [], 12, 0
    found: dict[bytes, bytes] = {}
    dropped = 0
    while at + 8 <= end:
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        following = at + 8 + length + length % 2
        if (parts := parts + 1) > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} chunks")
        if kind == b"VP8 ":
            width, height = (int.from_bytes(data[at + place : at + place + 2], "little") & 0x3FFF for place in (14, 16))
            if width * height > PER_BYTE * len(data):
                raise ValueError(f"{width} x {height} pixels in {len(data)} bytes")
        if kind in (b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF"):
            spans.append((at, min(following, end)))
        else:
            found.setdefault(kind, data[at + 8 : at + 8 + length])
            dropped += following - at
        at = following
    if not dropped:
        return Stripped(data)
    size = max(0, int.from_bytes(data[4:8], "little") - dropped).to_bytes(4, "little")
    kept = bytearray(b"".join([data[:4], size, data[8:12], joined(data, spans)]))
    if kept[12:16] == b"VP8X" and len(kept) > 20:
        kept[20] &= 0b00010010  # keeps the flags of transparency and animation only
    return Stripped(bytes(kept), found.get(b"EXIF", b""), found.get(b"XMP ", b""))


def strip_tiff(data: bytes) -> Stripped:
    """The file with one directory, which has only the entries that the pixels need."""
    first = Directory(data)
    return Stripped(first.with_pixels_only(), data if ORIENTATION in first.entries else b"", first.content(XMP, MAX_TEXT))


def strip_avif(data: bytes) -> Stripped:
    """The file with its metadata, which libavif reads. EXIF that Pillow cannot parse is hidden. Rotation is no part of EXIF in AVIF."""
    try:
        Image.OPEN["AVIF"][0](io.BytesIO(data), "")
        return Stripped(data)
    except Exception:  # Pillow's plugins raise any type of error for a damaged file
        return Stripped(re.sub(rb"(infe\x02.{7}|infe\x03.{9})Exif", rb"\1exif", data, flags=re.DOTALL))


STRIP: dict[str, Callable[[bytes], Stripped]] = {
    "JPEG": strip_jpeg,
    "PNG": strip_png,
    "WEBP": strip_webp,
    "TIFF": strip_tiff,
    "AVIF": strip_avif,
}
