"""Cuts annotation files into chunks of rows, by byte positions, so that worker processes read only their own rows."""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gp_jax.errors import GlimpseError, printable
from gp_jax.runtime.disk import kind_of, path_of, reading

SUFFIXES = (".jsonl", ".json")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")

Span = tuple[int, int, int]  # first byte, number of bytes, number of the row counted from 1 (in JSONL: its line)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file."""

    path: str
    label: str  # "file.jsonl:" or, for elements of a JSON list, "file.json#"; the row's number follows
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Chunk:
    """The rows of one shard."""

    index: int
    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return sum(len(piece.spans) for piece in self.pieces)

    def read(self) -> Iterator[tuple[str, str, bytes]]:
        """(where, name of the file without suffix, JSON text) of each row."""
        for piece in self.pieces:
            stem = printable(Path(piece.path).stem)  # becomes a data set's name, and a file name need not be valid text
            with open(piece.path, "rb") as file:
                for start, length, number in piece.spans:
                    file.seek(start)
                    yield f"{piece.label}{number}", stem, file.read(length)


def find_files(sources: Sequence[str | Path]) -> list[Path]:
    """The annotation files among files and in folders, in order. Raises: GlimpseError for a missing path or a folder without any."""
    files = []
    for source in map(path_of, sources):
        kind = kind_of(source)
        if kind == "folder":
            with reading(source):
                listed = sorted(path for path in source.iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
            found = [path for path in listed if kind_of(path) == "file"]
            if not found:
                raise GlimpseError(f"{source}: the folder has no {' or '.join(SUFFIXES)} files")
            files += found
        elif kind == "file":
            files.append(source)
        else:
            raise GlimpseError(f"{source}: {'is not a regular file' if kind else 'no such file or folder'}")
    if not files:
        raise GlimpseError("no annotation file is given")
    doubled = next((path for i, path in enumerate(files) if path.resolve() in {other.resolve() for other in files[:i]}), None)
    if doubled:
        raise GlimpseError(f"{doubled}: is given twice")
    return files


def scan(files: Sequence[Path]) -> tuple[list[Piece], str]:
    """Finds the rows of every file. Returns: pieces, one per file, and a digest of all names and contents. Raises: GlimpseError for a file
    without a readable row."""
    names = [printable(path.name) for path in files]
    digest = hashlib.sha256()
    pieces = []
    for path in files:
        with reading(path):
            data = path.read_bytes()
        name = printable(path.name if names.count(printable(path.name)) == 1 else path)
        digest.update(f"{name}\0{len(data)}\0".encode() + hashlib.sha256(data).digest())
        spans, is_list = _spans(data, path)
        if not any(_is_object(data[start : start + length]) for start, length, _ in spans):
            raise GlimpseError(f"{path}: has no readable row, expected one JSON object per line, or one JSON list of objects, in UTF-8")
        pieces.append(Piece(str(path), f"{name}{'#' if is_list else ':'}", tuple(spans)))
    return pieces, digest.hexdigest()


def cut(pieces: Sequence[Piece], rows: int) -> list[Chunk]:
    """Cuts pieces into chunks of this number of rows; a chunk may span files."""
    chunks: list[Chunk] = []
    current: list[Piece] = []
    space = rows
    for piece in pieces:
        start = 0
        while start < len(piece.spans):
            taken = piece.spans[start : start + space]
            current.append(Piece(piece.path, piece.label, taken))
            start, space = start + len(taken), space - len(taken)
            if not space:
                chunks.append(Chunk(len(chunks), tuple(current)))
                current, space = [], rows
    return [*chunks, Chunk(len(chunks), tuple(current))] if current else chunks


def _spans(data: bytes, path: Path) -> tuple[list[Span], bool]:
    """The rows of a file, and whether they are elements of a JSON list."""
    if data[:4096].removeprefix(BYTE_ORDER_MARK).lstrip()[:1] != b"[":
        return _line_spans(data), False
    try:
        return _list_spans(data, path), True
    except GlimpseError:
        lines = _line_spans(data)
        # JSONL whose first line is a list, hence a bad row: its second line is a whole object. In a JSON list a comma would follow it.
        if len(lines) > 1 and _is_object(data[lines[1][0] : lines[1][0] + lines[1][1]]):
            return lines, False
        raise


def _line_spans(data: bytes) -> list[Span]:
    spans, start = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.removeprefix(BYTE_ORDER_MARK).strip():
            spans.append((start, len(line), number))
        start += len(line) + 1
    return spans


def _list_spans(data: bytes, path: Path) -> list[Span]:
    """Positions of the elements of a JSON list. Raises: GlimpseError when it is damaged: elements after the damage cannot be trusted."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise GlimpseError(f"{path}: is not UTF-8 text (byte {error.start})") from error
    decoder = json.JSONDecoder()
    spans: list[Span] = []
    at = _skip(text, text.index("[") + 1)
    counted, bytes_before = 0, 0  # bytes of the first `counted` characters
    try:
        while text[at : at + 1] != "]":
            _, end = decoder.raw_decode(text, at)
            bytes_before += len(text[counted:at].encode())
            length = len(text[at:end].encode())
            spans.append((bytes_before, length, len(spans) + 1))
            counted, bytes_before = end, bytes_before + length
            at = _skip(text, end)
            if text[at : at + 1] == ",":
                at = _skip(text, at + 1)
            elif text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
        if _skip(text, at + 1) != len(text):
            raise json.JSONDecodeError("Expecting nothing after the list", text, at + 1)
    except (ValueError, RecursionError) as error:
        raise GlimpseError(f"{path}: is a damaged or cut off JSON list, after element {len(spans)} ({error})") from error
    return spans


def _skip(text: str, at: int) -> int:
    """The first position from `at` on that is not white space."""
    blank = BLANK.match(text, at)
    return blank.end() if blank else at


def _is_object(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        return False
