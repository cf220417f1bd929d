"""Rows of plans as text: for a terminal, Markdown, CSV and JSON. Shares are in percent for people and 0..1 for programs."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict

from gp_jax.evaluation.rows import PlanRow
from gp_jax.evaluation.statistics import Interval

MAIN = "exact_match"
MISSING = "-"
WORDS = {"vqa_accuracy": "VQA accuracy", "anls": "ANLS", "token_f1": "token F1", "iou": "IoU"}


def label(metric: str) -> str:
    """A metric's name in words."""
    return WORDS.get(metric, metric.replace("_", " "))


def percent(share: float | None, digits: int = 1) -> str:
    """0.0738 -> 7.4"""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.{digits}f}"


def accuracy(interval: Interval | None) -> str:
    """71.2 (67.1 to 75.0)"""
    return MISSING if interval is None else f"{percent(interval.mean)} ({percent(interval.low)} to {percent(interval.high)})"


def difference(interval: Interval | None) -> str:
    """-3.2 (-5.1 to -1.4), in points"""
    if interval is None:
        return MISSING
    mean, low, high = (f"{round(100 * x, 1) + 0.0:+.1f}" for x in (interval.mean, interval.low, interval.high))
    return f"{mean} ({low} to {high})"


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    if math.isnan(seconds):
        return MISSING
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return MISSING
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


def headers(metric: str = MAIN) -> list[tuple[str, str]]:
    """Of the columns: what, and its unit."""
    return [
        ("plan", ""),
        (label(metric), "%, 95 % interval"),
        ("difference to dense", "points, paired"),
        ("pruned", "%"),
        ("retention, decode cache", "%"),
        ("retention, prefill", "%"),
        ("FLOPs", "% of dense"),
        ("time per answer", ""),
    ]


def cells(row: PlanRow, metric: str = MAIN) -> list[str]:
    """A row under `headers`."""
    return [
        row.plan,
        accuracy(row.metrics.get(metric)),
        difference(row.differences.get(metric)),
        percent(1 - row.retention),
        percent(row.retention),
        percent(row.prefill_retention),
        percent(row.flops_ratio),
        duration(row.seconds),
    ]


def markdown(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """A table for README files."""
    head = [f"{name} ({unit})" if unit else name for name, unit in headers(metric)]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *(cells(row, metric) for row in rows)]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def grouped_markdown(groups: Mapping[str, Sequence[PlanRow]], by: str, metric: str = MAIN) -> str:
    """The metric of every plan by group: mean and interval."""
    plans = list(dict.fromkeys(row.plan for rows in groups.values() for row in rows))
    lines = [[by, "samples", *plans], ["---"] + ["---:"] * (len(plans) + 1)]
    for name, rows in groups.items():
        known = {row.plan: row for row in rows}
        found = [accuracy(known[plan].metrics.get(metric)) if plan in known else MISSING for plan in plans]
        lines.append([name, str(max((row.samples for row in rows), default=0)), *found])
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def text(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """A table for a terminal: aligned, the names of columns in three lines."""
    heads = []
    for name, unit in headers(metric):
        first, _, second = name.partition(", ") if ", " in name else name.partition(" ") if unit else (name, "", "")
        heads.append((first, second, unit))
    lines = [*map(list, zip(*heads, strict=True)), *(cells(row, metric) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [*lines[:3], ["─" * width for width in widths], *lines[3:]]
    shown = ([cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in ruled)
    return "".join("  ".join(line).rstrip() + "\n" for line in shown)


def as_csv(rows: Sequence[PlanRow]) -> str:
    """Every number of every metric, unrounded."""
    return grouped_csv({None: rows})


def grouped_csv(groups: Mapping[str | None, Sequence[PlanRow]], by: str = "group") -> str:
    """The same of every group, whose names stand in a first column called `by`; a group None has no name."""
    named, everything = None not in groups, [row for rows in groups.values() for row in rows]
    metrics = list(dict.fromkeys(name for row in everything for name in row.metrics))
    ends = ("mean", "low", "high")
    plain = ("retention", "prefill_retention", "flops_ratio", "kv_bytes", "seconds", "agreement")
    parts = [f"{name}{kind}_{end}" for name in metrics for kind in ("", "_difference") for end in ends]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([by] * named + ["plan", "samples", "paired", *parts, "pruned", *plain])
    for group, row in ((group, row) for group, rows in groups.items() for row in rows):
        found = [table.get(name) for name in metrics for table in (row.metrics, row.differences)]
        numbers = [getattr(interval, end, None) for interval in found for end in ends]
        numbers += [1 - row.retention, *(getattr(row, name) for name in plain)]
        blank = ["" if x is None or math.isnan(x) else x for x in numbers]
        writer.writerow([group] * named + [row.plan, row.samples, row.paired, *blank])
    return file.getvalue()


def as_json(rows: Sequence[PlanRow]) -> str:
    """`PlanRow`s as a list of objects; what was not measured is null."""
    return json.dumps(_objects(rows), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def grouped_json(groups: Mapping[str, Sequence[PlanRow]]) -> str:
    """The same by group."""
    return json.dumps({name: _objects(rows) for name, rows in groups.items()}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _objects(rows: Sequence[PlanRow]) -> list[dict]:
    lines = [asdict(row) | {"pruned": 1 - row.retention} for row in rows]
    return [line | {"seconds": None if math.isnan(line["seconds"]) else line["seconds"]} for line in lines]
