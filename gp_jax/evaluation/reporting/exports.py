"""Rows of plans for programs: CSV and JSON, shares as 0..1, nothing rounded."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from gp_jax.errors import printable
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.plan_rows import PHASES, PlanRow
from gp_jax.evaluation.reporting.tables import few

ENDS = ("mean", "low", "high", "n")
SPREAD = ("median", "low", "high", "n")  # low, high: quartiles
PLAIN = (
    "retention",
    "sample_retention",
    "prefill_retention",
    "task_retention",
    "vision_retention",
    "flops_ratio",
    "kv_bytes",
    "tokens",
    "peak",
)


def as_csv(rows: Sequence[PlanRow], lines: Lines | None = None, metric: str | None = None) -> str:
    """Every number of every metric. Columns `file`, `warning`: where the answers stand, which metrics have few samples. metric: the
    main one."""
    return grouped_csv({None: rows}, lines=lines, metric=metric)


def grouped_csv(
    groups: Mapping[str, Sequence[PlanRow]] | Mapping[None, Sequence[PlanRow]],
    by: str = "group",
    lines: Lines | None = None,
    metric: str | None = None,
) -> str:
    """The same of every group, whose names stand in a first column called `by`; a group None has no name."""
    named, everything, file_name = None not in groups, [row for rows in groups.values() for row in rows], (lines or Lines()).file.name
    metrics = list(dict.fromkeys(name for row in everything for name in row.metrics))
    parts = [f"{name}{kind}_{end}" for name in metrics for kind in ("", "_difference", "_glimpse_minus_plan") for end in ENDS]
    times = ["seconds", *(f"seconds_{name}" for name in PHASES)]
    times = [f"{name}_{end}" for name in times for end in SPREAD] + ["first_calls_seconds"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([by] * named + ["plan", "samples", "paired", *parts, "pruned", *PLAIN, *times, "agreement", "file", "warning"])
    for group, row in ((group, row) for group, rows in groups.items() for row in rows):
        found = [table.get(name) for name in metrics for table in (row.metrics, row.differences, row.leads)]
        numbers = [getattr(interval, end, None) for interval in found for end in ENDS]
        numbers += [1 - row.retention, *(getattr(row, name) for name in PLAIN)]
        numbers += [getattr(spread, end, None) for spread in (row.seconds, *map(row.phases.get, PHASES)) for end in SPREAD]
        numbers += [row.first_calls, row.agreement]
        blank = ["" if x is None or math.isnan(x) else x for x in numbers]
        warning = " ".join(f"{name}: {said}" for name, said in few(row, metric).items())
        writer.writerow([_word(group)] * named + [_word(row.plan), row.samples, row.paired, *blank, file_name, warning])
    return file.getvalue()


def _word(text: object) -> str:
    """A name of strangers that no spreadsheet takes for a formula."""
    text = printable(text)
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def as_json(rows: Sequence[PlanRow], lines: Lines | None = None, metric: str | None = None) -> str:
    """`PlanRow`s as a list of objects with the lines behind them; what was not measured is null."""
    return _dumps([_object(row, None, lines, metric) for row in rows])


def grouped_json(groups: Mapping[str, Sequence[PlanRow]], lines: Lines | None = None, metric: str | None = None) -> str:
    """The same by group."""
    return _dumps({name: [_object(row, name, lines, metric) for row in rows] for name, rows in groups.items()})


def _dumps(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _object(row: PlanRow, group: str | None, lines: Lines | None, metric: str | None) -> dict:
    made = asdict(row)
    made["glimpse_minus_plan"] = made.pop("leads")
    return made | {"pruned": 1 - row.retention, "warnings": few(row, metric)} | ({"source": lines.source(row.plan, group)} if lines else {})
