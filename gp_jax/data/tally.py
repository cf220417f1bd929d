"""The report of a preparation: counts of good and bad rows, and the first bad rows per reason."""

import functools
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from gp_jax.errors import printable

KEPT = 20  # bad rows per reason that every shard remembers, hence the most that a report can show
Natural = Annotated[int, Field(ge=0, le=2**62)]


@dataclass
class Tally:
    """The bad rows of one reason."""

    count: Natural = 0
    first: list[tuple[str, str]] = field(default_factory=list)  # where ("file.jsonl:17"), detail


@dataclass
class Report:
    """The counts of a whole preparation or of one shard. rows: in the sources; total: read so far."""

    rows: Natural = 0
    total: Natural = 0
    splits: dict[str, Natural] = field(default_factory=dict)  # good rows
    datasets: dict[str, Natural] = field(default_factory=dict)  # good rows
    reasons: dict[str, Tally] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """Number of rows that became records."""
        return sum(self.splits.values())

    @property
    def bad(self) -> int:
        """Number of rows that did not."""
        return self.total - self.good

    def add_good(self, split: str, dataset: str) -> None:
        """Counts a record."""
        self.total += 1
        self.splits[split] = self.splits.get(split, 0) + 1
        self.datasets[dataset] = self.datasets.get(dataset, 0) + 1

    def add_bad(self, reason: str, where: str, detail: str) -> None:
        """Counts a bad row."""
        self.total += 1
        tally = self.reasons.setdefault(reason, Tally())
        tally.count += 1
        if len(tally.first) < KEPT:
            tally.first.append((where, detail))

    def as_dict(self, offenders: int = KEPT) -> dict:
        """The report as JSON values."""
        reasons = sorted(self.reasons.items(), key=lambda item: (-item[1].count, item[0]))
        return {
            "rows": self.rows,
            "total": self.total,
            "good": self.good,
            "bad": self.bad,
            "splits": dict(sorted(self.splits.items())),
            "datasets": dict(sorted(self.datasets.items())),
            "reasons": {name: {"count": tally.count, "first": tally.first[:offenders]} for name, tally in reasons},
        }

    @classmethod
    def merged(cls, reports: Iterable["Report"], rows: int) -> "Report":
        """The sum of the reports of all shards, in the order of the shards."""
        whole = cls(rows=rows)
        for report in reports:
            whole.total += report.total
            for mine, theirs in ((whole.splits, report.splits), (whole.datasets, report.datasets)):
                for name, count in theirs.items():
                    mine[name] = mine.get(name, 0) + count
            for reason, tally in report.reasons.items():
                known = whole.reasons.setdefault(reason, Tally())
                known.count += tally.count
                known.first = (known.first + tally.first)[:KEPT]
        return whole

    def text(self, offenders: int = 5) -> str:
        """The report as text."""
        read = f"rows      {self.total}" if self.total == self.rows else f"rows      {self.total} read of {self.rows}"
        share = f" ({self.bad / self.total:.1%})" if self.total else ""
        lines = [f"{read}: {self.good} good, {self.bad} bad{share}"]
        for title, counts in (("splits", self.splits), ("datasets", self.datasets)):
            if counts:
                lines.append(f"{title:<10}" + ", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
        for name, tally in self.as_dict(offenders)["reasons"].items():
            lines.append(f"{tally['count']:>7}  {name}")
            lines += [f"           {where}{'  ' + detail if detail else ''}" for where, detail in tally["first"]]
            more = tally["count"] - len(tally["first"])
            lines += [f"           ... and {more} more"] if more and tally["first"] else []
        return "\n".join(lines)


def read_as(kind: type, text: bytes) -> Any:
    """Reads the JSON of a dataclass `kind`. Raises: ValueError for anything else."""
    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        raise ValueError(".".join(map(str, first["loc"])) + ": " * bool(first["loc"]) + first["msg"]) from error


@functools.cache
def _adapter(kind: type) -> TypeAdapter:
    return TypeAdapter(kind)


def say(line: str) -> None:
    """Prints one line without disturbing a progress bar."""
    from tqdm import tqdm

    tqdm.write(printable(line), file=sys.stderr)
