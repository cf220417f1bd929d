"""Annotation files as a source of questions, without preparing them first: Visual-CoT's benchmark and your own.

Rows that cannot be read or have no picture are left out and named. Rows whose boxes or masks do not fit are asked without them:
accuracy needs none. Pictures are decoded when they are asked about, so one that breaks there is found then.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from gp_jax.data.checks import Checker, upright_size
from gp_jax.data.formats import BadRow, Row, parse_row
from gp_jax.data.record import Entry, Record
from gp_jax.data.sources import Chunk, cut, find_files, scan
from gp_jax.errors import GlimpseError, printable, reason
from gp_jax.runtime.disk import kind_of, path_of

EVIDENCE = ("no evidence", "box ", "mask ", "size disagrees")  # how reasons begin that do not keep a question from being asked


class Annotations:
    """The first `limit` rows of annotation files, a `record.Source`. left_out: why, per row that is not asked."""

    def __init__(self, files: Sequence[str | Path], images: str | Path, limit: int, boxes: str = "auto", progress: bool = False) -> None:
        self.files, self.boxes, self._progress = list(map(path_of, files)), boxes, progress
        self.name = ", ".join(file.name for file in self.files)
        if kind_of(path_of(images)) != "folder":
            raise GlimpseError(f"--images {images}: no such folder")
        self.checker, self.left_out = Checker(path_of(images)), {}
        self.answers: dict[str, tuple[str, ...]] = {}  # of rows with several references
        self._facts: dict[str, str] = {}
        pieces, _ = scan(find_files(self.files))
        self._chunk = cut(pieces, limit)[0]

    @cached_property
    def _rows(self) -> list[tuple[Row, Entry]]:
        found, names = [], Counter()
        rows = tqdm(Chunk.read(self._chunk), desc=printable(self.name, 80), total=self._chunk.rows, unit="row", disable=not self._progress)
        for where, stem, data in rows:
            try:
                references, data = _references(data)
                row = parse_row(data, where, stem, self.boxes)
                pictures = [self.checker.find(path, row.dataset, "image") for path in row.images]
                sizes = tuple(map(upright_size, pictures))
                facts = row.images, [path.stat().st_size for path in pictures], row.boxes, row.masks, row.frame, row.sizes
            except Exception as error:  # whatever is wrong with it, the others can be asked
                self.left_out[where] = _reason(error)
                continue
            names[row.id] += 1
            name = row.id if names[row.id] == 1 else f"{row.id}~{names[row.id]}"  # ids of your own may come twice
            if len(references) > 1:
                self.answers[name] = references
            self._facts[name] = hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()[:16]
            found.append((row, Entry(name, row.dataset, row.question.strip(), row.answer.strip(), sizes)))
        return found

    @property
    def entries(self) -> list[Entry]:
        """Of the rows that can be asked."""
        return [entry for _, entry in self._rows]

    def references(self, name: str) -> tuple[str, ...]:
        """All right answers of a row with several (`answers`); empty for others."""
        return self.answers.get(name, ())

    def made_from(self, name: str) -> str:
        """A digest of the pictures' names and bytes, and of the evidence as the row has it."""
        return self._facts[name]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        """Raises: GlimpseError when the picture does not decode."""
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
    """`answers` of a row of your own, and the row with an `answer`: the most frequent of them, where it has none."""
    if b'"answers"' not in data:
        return (), data
    try:
        fields = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return (), data  # parse_row says what is wrong
    answers = fields.get("answers") if isinstance(fields, dict) else None
    if answers is None:
        return (), data
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise BadRow("field not text", "'answers' is not a list of texts")
    fields.setdefault("answer", Counter(answers).most_common(1)[0][0])
    return tuple(answers), json.dumps(fields).encode()
