"""Reads questions from annotation files without preparing them first: Visual-CoT's benchmark and your own.

Rows that cannot be read or have no picture are left out and reported. Rows with wrong boxes or masks are asked without them, because
accuracy does not need them. Pictures are decoded when they are asked about, so a damaged one is only found then.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from gp_jax.data.checks import Checker, upright_size
from gp_jax.data.formats import BadRow, Row, parse_row
from gp_jax.data.record import Entry, Record
from gp_jax.data.sources import Chunk, cut, find_files, scan
from gp_jax.errors import GlimpseError, printable, reason
from gp_jax.runtime.disk import kind_of, path_of
from gp_jax.runtime.progress import Progress

EVIDENCE = ("no evidence", "box ", "mask ", "size disagrees")  # first words of the reasons for which a question is still asked


class Annotations:
    """The first `limit` rows of annotation files, as a `record.Source`. left_out: the reason per row that is not asked."""

    def __init__(self, files: Sequence[str | Path], images: str | Path, limit: int, boxes: str = "auto", progress: bool = False) -> None:
        self.files, self.boxes, self._progress = list(map(path_of, files)), boxes, progress
        self.name = ", ".join(file.name for file in self.files)
        if kind_of(path_of(images)) != "folder":
            raise GlimpseError(f"--images {images}: no such folder")
        self.checker = Checker(path_of(images))
        self.left_out: dict[str, str] = {}
        self.answers: dict[str, tuple[str, ...]] = {}  # all references of rows with several
        self._facts: dict[str, str] = {}
        pieces, _ = scan(find_files(self.files))
        self._chunk = cut(pieces, limit)[0]

    @cached_property
    def _rows(self) -> list[tuple[Row, Entry]]:
        found: list[tuple[Row, Entry]] = []
        names: Counter[str] = Counter()
        rows = Progress(
            Chunk.read(self._chunk), desc=printable(self.name, 80), total=self._chunk.rows, unit="row", disable=not self._progress
        )
        for where, stem, data in rows:
            try:
                references, data = _references(data)
                row = parse_row(data, where, stem, self.boxes)
                pictures = [self.checker.find(path, row.dataset, "image") for path in row.images]
                sizes = tuple(map(upright_size, pictures))
                facts = row.images, [path.stat().st_size for path in pictures], row.boxes, row.masks, row.frame, row.sizes
            except Exception as error:  # whatever is wrong with this row, the others can be asked
                self.left_out[where] = _reason(error)
                continue
            names[row.id] += 1
            name = row.id if names[row.id] == 1 else f"{row.id}~{names[row.id]}"  # ids in files of your own may not be unique
            if len(references) > 1:
                self.answers[name] = references
            self._facts[name] = hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()[:16]
            found.append((row, Entry(name, row.dataset, row.question.strip(), row.answer.strip(), sizes)))
        return found

    @property
    def entries(self) -> list[Entry]:
        """One entry per row that can be asked."""
        return [entry for _, entry in self._rows]

    def references(self, name: str) -> tuple[str, ...]:
        """All right answers of a row with a list `answers`; empty for other rows."""
        return self.answers.get(name, ())

    def made_from(self, name: str) -> str:
        """A digest of the pictures' names and bytes and of the evidence in the row."""
        return self._facts[name]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Record number `index`. Raises: GlimpseError when its picture cannot be decoded."""
        row, entry = self._rows[index]
        try:
            try:
                record, _ = self.checker.check(row, evidence=False)
            except BadRow as error:
                if not error.reason.startswith(EVIDENCE):
                    raise
                count = len(row.images)
                plain = dataclasses.replace(row, boxes=((),) * count, masks=(None,) * count, sizes=((None, None),) * count)
                record, _ = self.checker.check(plain, evidence=False)
        except BadRow as error:
            raise GlimpseError(_reason(error)) from error
        return dataclasses.replace(record, id=entry.id)


def _reason(error: Exception) -> str:
    if not isinstance(error, BadRow):
        return reason(error)
    return f"{error.reason}: {error.detail}" if error.detail else error.reason


def _references(data: bytes) -> tuple[tuple[str, ...], bytes]:
    """The list `answers` of a row of your own, and the row; if it has no `answer`, the most frequent one of the list is added as such."""
    if b'"answers"' not in data:
        return (), data
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return (), data  # parse_row will report what is wrong
    answers = fields.get("answers") if isinstance(fields, dict) else None
    if answers is None:
        return (), data
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRow("field not text", "'answers' is not a list of texts")
    fields.setdefault("answer", Counter(answers).most_common(1)[0][0])
    return tuple(answers), json.dumps(fields).encode()
