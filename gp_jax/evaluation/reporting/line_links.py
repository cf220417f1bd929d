"""From a number to the lines of predictions.jsonl that it was made of."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal
from urllib.parse import quote

from gp_jax.evaluation.results import Prediction


@dataclass(frozen=True)
class Lines:
    """The answers of a report and where they stand.

    numbers: of lines in `file`, from 1, by `Prediction.key`. by: what the parts of the report are, families or tasks.
    """

    predictions: Sequence[Prediction] = ()
    numbers: Mapping[tuple[str, str, str], int] = field(default_factory=dict)
    file: Path = Path("predictions.jsonl")
    by: Literal["family", "task"] = "family"

    def link(self, folder: Path) -> str:
        """The file as seen from a page in a folder: a relative URL."""
        return quote(os.fsencode(Path(os.path.relpath(self.file.absolute(), folder.absolute())).as_posix()))

    def source(self, plan: str, group: str | None = None) -> dict:
        """What is behind a row, for programs: the file, what the lines' fields are, and their numbers as runs [first, last].

        A file may hold more lines than were asked for now (another --limit, an answer given twice): the numbers are what counts.
        """
        own = self._numbers.get((plan, group), [])
        where = {"plan": plan} if group is None else {"plan": plan, self.by: group}
        tasks = list(dict.fromkeys(p.task for p in self.predictions))
        return {"file": self.file.name, "where": {"task": tasks} | where, "lines": runs(own)}

    @cached_property
    def _numbers(self) -> dict[tuple[str, str | None], list[int]]:
        found: dict[tuple[str, str | None], list[int]] = {}
        for p in self.predictions:
            if p.key in self.numbers:
                for group in (None, getattr(p, self.by)):
                    found.setdefault((p.plan, group), []).append(self.numbers[p.key])
        return found


def runs(numbers: Iterable[int]) -> list[list[int]]:
    """1, 2, 3, 7 -> [1, 3], [7, 7]"""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return found
