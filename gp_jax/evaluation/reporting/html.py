"""The report of an evaluation: one HTML file that holds everything, numbers, plots and pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath

from gp_jax.evaluation.reporting.chips import chip
from gp_jax.evaluation.reporting.gallery import Example, cards, safe
from gp_jax.evaluation.reporting.headline import headline, small_table
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.listing import listing, metric_names, places
from gp_jax.evaluation.reporting.page import CSS, JS
from gp_jax.evaluation.reporting.plan_rows import PlanRow
from gp_jax.evaluation.reporting.tables import MAIN, MISSING, Column, cost_columns, label, main_columns, part_warning, percent, warnings
from gp_jax.runtime.disk import write_text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing from outside
MEMORY = (
    "Times: the median over answers, with the quartiles; of a batch, every answer has the same share. Plans answer each batch one "
    "after the other, another one first each time. What only a first call costs (tracing, compiling, reading and loading programs) is "
    "not in them: a batch in which it happened was asked again. Prefill time: stages glimpse and finish. Peak memory: of the whole "
    "process or its first device while it answered for the plan, with weights and compilation. n/a: hidden by the peak of another plan, "
    "or not measured; a plan in a run of its own has no other beside it."
)
RETENTION = (
    "Retention, decode cache: share of all visual tokens that the cache holds while the answer is written; mean of samples: the mean of "
    "every sample's own share. Retention, prefill: share that an average decoder layer sees while the question is read; layers before a "
    "cut see all of them. Plans without a percentage keep as many of every sample as the glimpse does; those called -pooled keep one "
    "share of all samples, with which the totals match."
)


def write_report(
    path: Path,
    title: str,
    rows: Sequence[PlanRow],
    breakdown: Mapping[str, Sequence[PlanRow]],
    samples: Sequence[Example],
    notes: Sequence[str],
    lines: Lines,
    metric: str = MAIN,
    cost: str = "",
) -> None:
    """Writes the HTML file whole or not at all; it opens without a network.

    Args:
        rows: of `rows.aggregate`. breakdown: of `rows.breakdown`. samples: for the gallery; 100 with 7 plans are 5 to 8 MB.
        notes: what was run, one line each; "model: x" shows the part before the colon in bold.
        lines: all answers, to which every number leads; 10,000 short ones add 2 MB.
        cost: HTML of `cost_panel.panel`.
        metric: the one in table, plots and breakdown; others get columns at the second table's end.
    """
    from gp_jax.evaluation.reporting.plots import flops_plot, retention_plot, time_plot, time_retention_plot  # slow to import

    number = {row.plan: i for i, row in enumerate(rows)}
    plans = list(dict.fromkeys([*number, *(p for s in samples for p in s.predictions), *(p.plan for p in lines.predictions)]))
    plots = [retention_plot(rows, metric)]
    if any(row.flops_ratio is not None for row in rows):
        plots.append(flops_plot(rows, metric))
    if any(row.seconds for row in rows):
        plots += [time_retention_plot(rows), time_plot(rows, metric)]
    legend = "".join(f"<span>{chip(i)} {safe(plan)}</span>" for plan, i in number.items())
    links = _Links(plans, metric_names(lines), lines.by)
    body = [
        '<a class="skip" href="#samples">Skip to the samples</a>' if samples or lines.predictions else "",
        f"<h1>{safe(title)}</h1>",
        *(f'<p class="lead">{_bold(line)}</p>' for line in headline(rows, metric)),
        small_table(rows, metric),
        f'<details><summary>What was run</summary><ul class="notes">{"".join(map(_note, notes))}</ul></details>' if notes else "",
        _filters(lines, plans) if samples or lines.predictions else "",
        "<h2>Plans</h2>",
        "".join(f'<p class="warning">{safe(said)}</p>' for said in warnings(rows, metric)) if rows else "",
        _table(rows, main_columns(rows, metric), links),
        f'<p class="caption">Intervals: 95 %, bootstrap over samples; differences pair every sample with itself and are bold where zero '
        f"lies outside; n: samples, where a number has fewer than its plan. {RETENTION} A number leads to the answers behind it.</p>",
        "<h2>Cost and other metrics</h2>",
        _table(rows, cost_columns(rows, metric), links),
        f'<p class="caption">{MEMORY}</p>',
        cost,
        "<h2>Accuracy against cost</h2>",
        f'<div class="plots">{"".join(f"<figure>{plot}</figure>" for plot in plots)}</div>',
        f'<div class="legend">{legend}</div>',
        '<p class="caption">Bars: 95 % intervals of accuracies, quartiles of times. Plans whose bars would cover each other stand '
        "side by side. The scale of retention is a square root.</p>",
        _breakdown(breakdown, plans, metric, links) if breakdown else "",
        *_samples(samples, plans, lines, metric, safe(lines.link(Path(path).parent))),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{safe(title)}</title><style>{CSS}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in body if part)}\n</body></html>\n"
    )
    write_text(epath.Path(path), page)


def _bold(line: str) -> str:
    """What stands before a colon, bold."""
    name, colon, rest = line.partition(": ")
    return f"<b>{safe(name)}:</b> {safe(rest)}" if colon else safe(line)


def _note(note: str) -> str:
    return f"<li>{_bold(note)}</li>"


class _Links:
    """From cells to the answers behind them; what they select is in their data, for the page's script."""

    def __init__(self, plans: Sequence[str], metrics: Sequence[str], by: str):
        self.by, self.plans, self.metrics = by, {p: i for i, p in enumerate(plans)}, {m: i for i, m in enumerate(metrics)}

    def __call__(self, cell: str, plan: str | None = None, metric: str | None = None, against: str | None = None, group: str = "") -> str:
        found = {"plan": self.plans.get(plan or ""), "metric": self.metrics.get(metric or ""), "against": self.plans.get(against or "")}
        data = "".join(f' data-{name}="{value}"' for name, value in found.items() if value is not None)
        data += f' data-{self.by}="{safe(group)}"' if group else ""
        return f'<a href="#samples"{data}>{cell}</a>' if self.metrics and cell != MISSING else cell


def _split(cell: str) -> str:
    """The interval of a cell and its number of samples go below its mean."""
    mean, bracket, rest = cell.partition(" (") if " (" in cell else cell.partition(", n")
    below = rest.replace(")", "") if bracket == " (" else f"n{rest}"
    return f"{safe(mean)}<small>{safe(below)}</small>" if bracket else safe(cell)


def _table(rows: Sequence[PlanRow], columns: Sequence[Column], links: _Links) -> str:
    head = "".join(f'<th scope="col">{safe(column.name)}<small>{safe(column.unit)}</small></th>' for column in columns)
    lines = []
    for i, row in enumerate(rows):
        cells = []
        for column in columns[1:]:
            interval = column.interval(row)
            shown = links(_split(column.cell(row)), row.plan, column.metric, column.against)
            bold = ' class="clear"' if interval and interval.clear else ""
            cells.append(f"<td{bold}>{shown}</td>")
        lines.append(f'<tr><th scope="row">{chip(i)} {safe(columns[0].cell(row))}</th>{"".join(cells)}</tr>')
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _breakdown(groups: Mapping[str, Sequence[PlanRow]], plans: Sequence[str], metric: str, links: _Links) -> str:
    known = {name: {row.plan: row for row in rows} for name, rows in groups.items()}
    used = [(i, plan) for i, plan in enumerate(plans) if any(plan in rows for rows in known.values())]
    head = f'<th scope="col">{links.by}</th><th scope="col">samples</th>'
    head += "".join(f'<th scope="col">{chip(i)} {safe(plan)}</th>' for i, plan in used)
    lines = []
    for name, rows in known.items():
        count, cells = max((row.samples for row in rows.values()), default=0), []
        for _, plan in used:
            found = rows[plan].metrics.get(metric) if plan in rows else None
            if found is None:
                cells.append(MISSING)
                continue
            n = "" if found.n == count else f", n = {found.n}"
            below = f"<small>{percent(found.low, 0)} to {percent(found.high, 0)}{n}</small>"
            cells.append(links(percent(found.mean) + below, plan, metric, group=name))
        lines.append(
            f'<tr><th scope="row">{safe(name)}</th><td>{links(str(count), group=name)}</td>'
            f"{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        )
    said = part_warning(groups, metric)
    return (
        f"<h2>By {links.by}: {safe(label(metric))}, %</h2>"
        + (f'<p class="warning">{safe(said)}</p>' if said else "")
        + f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _samples(samples: Sequence[Example], plans: Sequence[str], lines: Lines, metric: str, link: str) -> list[str]:
    """The list of answers, the cards, and what filters both."""
    if not samples and not lines.predictions:
        return []
    head = "".join(f'<th scope="col">{name}</th>' for name in ("sample", "plan", "line", "right", "question", "reference", "answer"))
    return [
        '<h2 id="samples" tabindex="-1">Samples</h2>',
        f'<p class="caption">All answers are lines of <a href="{link}">{safe(lines.file.name)}</a>; "line" counts them from 1. '
        f"Right: {safe(label(metric))} of a half or more.</p>",
        f'<div class="list" id="list" tabindex="0" hidden><table><thead><tr>{head}</tr></thead><tbody></tbody></table>'
        '<button type="button">more</button></div>',
        f'<div id="gallery">{cards(samples, plans, places(lines))}</div>',
        '<dialog id="large" aria-label="a picture, large"><button type="button">close</button><p></p></dialog>',
        f'<script type="application/json" id="data">{listing(lines, plans, metric)}</script>',
        f"<script>{JS}</script>",
    ]


def _filters(lines: Lines, plans: Sequence[str]) -> str:
    def select(name: str, title: str, pairs: Sequence[tuple[object, str]], nothing: str = "all") -> str:
        options = "".join(f'<option value="{safe(value)}">{safe(shown)}</option>' for value, shown in [("", nothing), *pairs])
        return f'<label>{title}<select name="{name}">{options}</select></label>'

    numbered = list(enumerate(plans))
    fields = [
        select("task", "task", [(name, name) for name in dict.fromkeys(p.task for p in lines.predictions)]),
        select("family", "family", [(name, name) for name in dict.fromkeys(p.family for p in lines.predictions)]),
        select("plan", "plan", numbered),
        select("outcome", "answers", [("right", "right"), ("wrong", "wrong"), ("mixed", "plans differ")]),
        select("metric", "that have", [(i, label(name)) for i, name in enumerate(metric_names(lines))], "any metric"),
        select("against", "paired with", numbered, "none"),
        '<label>text<input name="words" type="search" size="20" placeholder="in samples and answers"></label>',
    ]
    fields.append('<button type="reset">all</button><output id="shown"></output> <a href="#samples">to the samples</a>')
    return f'<form class="filters" id="filters" hidden>{"".join(fields)}</form>'
