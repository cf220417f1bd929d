"""Rows of plans as text for people, who get percent: the columns of every table, a table for a terminal, and Markdown."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from gp_jax.errors import printable
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.plan_rows import DENSE, GLIMPSE, PHASES, PlanRow
from gp_jax.evaluation.reporting.statistics import ENOUGH, Interval, Spread, enough

MAIN = "exact_match"
MISSING = "-"
WORDS = {"vqa_accuracy": "VQA accuracy", "anls": "ANLS", "token_f1": "token F1", "iou": "IoU"}


def label(metric: str) -> str:
    """A metric's name in words."""
    return WORDS.get(metric, metric.replace("_", " "))


def percent(share: float | None, digits: int = 1) -> str:
    """0.0738 -> 7.4"""
    return MISSING if share is None or math.isnan(share) else f"{100 * share:.{digits}f}"


def counted(cell: str, count: int, samples: int) -> str:
    """A cell with the number of its samples, where that is not the row's."""
    return cell if count == samples or cell == MISSING else f"{cell}, n = {count}"


def accuracy(interval: Interval | None, samples: int) -> str:
    """71.2 (67.1 to 75.0), n = 90 where `samples` is another number"""
    if interval is None:
        return MISSING
    return counted(f"{percent(interval.mean)} ({percent(interval.low)} to {percent(interval.high)})", interval.n, samples)


def difference(interval: Interval | None, samples: int) -> str:
    """-3.2 (-5.1 to -1.4), in points; n as in `accuracy`"""
    if interval is None:
        return MISSING
    mean, low, high = (f"{round(100 * x, 1) + 0.0:+.1f}" for x in (interval.mean, interval.low, interval.high))
    return counted(f"{mean} ({low} to {high})", interval.n, samples)


def duration(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def typical(spread: Spread | None, samples: int) -> str:
    """Median and quartiles: 8.8 ms (8.1 to 9.9), n = 40 where `samples` is another number"""
    if spread is None:
        return MISSING
    ends = [duration(end) for end in (spread.low, spread.high)]
    unit = duration(spread.median).split()[1]
    low, high = ends if any(end.split()[1] != unit for end in ends) else (end.split()[0] for end in ends)
    return counted(f"{duration(spread.median)} ({low} to {high})", spread.n, samples)


def size(count: float | None) -> str:
    """Bytes."""
    if count is None:
        return MISSING
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


@dataclass(frozen=True)
class Column:
    """What a column is called, in which unit it is, and a row's cell.

    metric: the one that the samples behind a cell must have. against: the plan that must have answered them too.
    interval: of a difference, to see whether zero lies outside.
    """

    name: str
    unit: str
    cell: Callable[[PlanRow], str]
    metric: str | None = None
    against: str | None = None
    interval: Callable[[PlanRow], Interval | None] = lambda row: None


PLAN = Column("plan", "", lambda row: row.plan)


def lead_column(metric: str) -> Column:
    """The plan "glimpse" minus the row's."""
    own = lambda row: row.leads.get(metric)  # noqa: E731
    return Column("glimpse minus plan", "points, paired", lambda row: difference(own(row), row.samples), metric, GLIMPSE, own)


def looks(row: PlanRow) -> bool:
    """Whether a plan saw parts of pictures only."""
    return row.plan.startswith("look")


def main_columns(rows: Sequence[PlanRow], metric: str = MAIN, lead: bool = True) -> list[Column]:
    """Accuracy, what is kept, and time. lead: with `lead_column`, if there is anything in it, and means of retentions."""
    own = lambda row: row.differences.get(metric)  # noqa: E731
    each = Column("retention, mean of samples", "% of decode cache", lambda row: percent(row.sample_retention))
    means = Column("retention, mean of tasks", "% of decode cache, mean of samples in each", lambda row: percent(row.task_retention))
    return [
        PLAN,
        Column(label(metric), "%, 95 % interval", lambda row: accuracy(row.metrics.get(metric), row.samples), metric),
        Column("difference to dense", "points, paired", lambda row: difference(own(row), row.samples), metric, DENSE, own),
        *[lead_column(metric)] * (lead and any(row.leads for row in rows)),
        Column("pruned", "%", lambda row: percent(1 - row.retention)),
        Column("retention, decode cache", "%", lambda row: percent(row.retention)),
        *[each] * lead,
        Column("retention, prefill", "%", lambda row: percent(row.prefill_retention)),
        *[Column("picture seen", "% of the vision tower", lambda row: percent(row.vision_retention))] * any(looks(row) for row in rows),
        *[means] * (lead and any(row.task_retention is not None for row in rows)),
        Column("FLOPs", "% of dense", lambda row: percent(row.flops_ratio), against=DENSE),
        Column("time per answer", "median, quartiles", lambda row: typical(row.seconds, row.samples)),
    ]


def cost_columns(rows: Sequence[PlanRow], metric: str = MAIN) -> list[Column]:
    """Memory, tokens, time per stage, and metrics other than the main one."""

    def phase(name: str) -> Column:
        return Column(f"{name} time", "per answer, median, quartiles", lambda row: typical(row.phases.get(name), row.samples))

    def mean(name: str) -> Column:
        def cell(row: PlanRow) -> str:
            found = row.metrics.get(name)
            return counted(percent(found.mean), found.n, row.samples) if found else MISSING

        return Column(label(name), "%", cell, name)

    others = [name for name in dict.fromkeys(name for row in rows for name in row.metrics) if name != metric]
    same = lambda row: counted(percent(row.agreement), row.paired, row.samples)  # noqa: E731
    return [
        PLAN,
        Column("KV cache", "visual tokens, per answer", lambda row: size(row.kv_bytes)),
        Column("tokens generated", "per answer", lambda row: f"{row.tokens:.1f}"),
        Column("peak memory", "whole process", lambda row: size(row.peak) if row.peak is not None else "n/a"),
        *map(phase, PHASES),
        Column("same answer as dense", "%", same, against=DENSE),
        *map(mean, others),
    ]


# Few samples ----------------------------------------------------------------------------------------------------------------


def few(row: PlanRow, metric: str | None = None) -> dict[str, str]:
    """Warnings about metrics that fewer than 500 samples have; metric: the main one, which no sample may have."""
    counts = dict.fromkeys([metric] if metric else [], 0) | {name: found.n for name, found in row.metrics.items()}
    return {name: said for name, count in counts.items() if (said := enough(count))}


def warnings(rows: Sequence[PlanRow], metric: str = MAIN) -> list[str]:
    """The same of a table: one line for metrics and plans alike. Plans are named where not all have few."""
    counts: dict[str, dict[str, int]] = {metric: dict.fromkeys((row.plan for row in rows), 0)}
    for row in rows:
        for name, found in row.metrics.items():
            counts.setdefault(name, {})[row.plan] = found.n
    lines: dict[str, list[str]] = {}
    for name, own in counts.items():
        short = [plan for plan, count in own.items() if count < ENOUGH]
        if short:
            said = enough(min(own[plan] for plan in short)) or ""
            lines.setdefault(said, []).append(label(name) + (f" of {', '.join(short)}" if len(short) < len(own) else ""))
    return [f"{', '.join(names)}: {said}" for said, names in lines.items()]


def part_warning(groups: Mapping[str, Sequence[PlanRow]], metric: str = MAIN) -> str | None:
    """The same of a table by group: the groups and their numbers of samples."""
    least = {name: min((row.metrics[metric].n if metric in row.metrics else 0 for row in rows), default=0) for name, rows in groups.items()}
    short = {name: count for name, count in least.items() if count < ENOUGH}
    named = ", ".join(f"{_cell(name)} ({count})" for name, count in short.items())
    return f"{label(metric)}, fewer than {ENOUGH} samples: {named}. {enough(min(short.values()))}" if short else None


# Text -----------------------------------------------------------------------------------------------------------------------


def markdown(rows: Sequence[PlanRow], metric: str = MAIN, lines: Lines | None = None) -> str:
    """Two tables for README files: accuracy against retention, and costs; what to be careful with, and where the answers are."""
    parts = []
    for columns in (main_columns(rows, metric), cost_columns(rows, metric)):
        head = [f"{column.name} ({column.unit})" if column.unit else column.name for column in columns]
        parts.append(_ruled([head, ["---"] + ["---:"] * (len(head) - 1), *([column.cell(row) for column in columns] for row in rows)]))
    parts += [f"> Warning: {said}\n" for said in warnings(rows, metric)]
    return "\n".join([*parts, *_behind(lines, "The answers behind a row are the lines whose `plan` is its name", "table.json")])


def grouped_markdown(groups: Mapping[str, Sequence[PlanRow]], by: str, metric: str = MAIN, lines: Lines | None = None) -> str:
    """The metric of every plan by group: mean and interval."""
    plans = list(dict.fromkeys(row.plan for rows in groups.values() for row in rows))
    table = [[by, "samples", *plans], ["---"] + ["---:"] * (len(plans) + 1)]
    for name, rows in groups.items():
        known, count = {row.plan: row for row in rows}, max((row.samples for row in rows), default=0)
        found = [accuracy(known[plan].metrics.get(metric), count) if plan in known else MISSING for plan in plans]
        table.append([name, str(count), *found])
    said = part_warning(groups, metric)
    where = f"The answers behind a number are the lines whose `{by}` is the row's and whose `plan` is the column's name"
    return "\n".join([_ruled(table), *[f"> Warning: {said}\n"] * bool(said), *_behind(lines, where, f"by_{by}.json")])


def _ruled(table: Sequence[Sequence[str]]) -> str:
    return "".join("| " + " | ".join(map(_cell, line)) + " |\n" for line in table)


def _cell(text: str) -> str:
    """Names from data sets, on one line and as they are."""
    return printable(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")


def _behind(lines: Lines | None, where: str, numbers: str) -> list[str]:
    return [f"{where} in [{lines.file.name}]({lines.file.name}); [{numbers}]({numbers}) has their numbers.\n"] if lines else []


def text(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """Tables for a terminal: the main one, below it what the glimpse is ahead of each other plan, and warnings."""
    said = _aligned(rows, main_columns(rows, metric, lead=False))
    if any(row.leads for row in rows):
        said += "\n" + _aligned([row for row in rows if row.plan != GLIMPSE], [PLAN, lead_column(metric)])
    return said + "".join(f"warning: {printable(line)}\n" for line in warnings(rows, metric))


def _aligned(rows: Sequence[PlanRow], columns: Sequence[Column]) -> str:
    """The names of columns in three lines."""
    heads = []
    for column in columns:
        name, unit = column.name, column.unit
        first, _, second = name.partition(", ") if ", " in name else name.partition(" ") if unit else (name, "", "")
        heads.append((first, second, unit))
    lines = [*map(list, zip(*heads, strict=True)), *([printable(column.cell(row)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [*lines[:3], ["─" * width for width in widths], *lines[3:]]
    shown = ([cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))] for line in ruled)
    return "".join("  ".join(line).rstrip() + "\n" for line in shown)
