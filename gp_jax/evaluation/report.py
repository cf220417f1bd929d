"""The report of an evaluation: one HTML file that holds everything, numbers, plots and pictures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from etils import epath

from gp_jax.evaluation.gallery import Sample, cards, safe
from gp_jax.evaluation.marks import chip
from gp_jax.evaluation.page import CSS, JS
from gp_jax.evaluation.rows import PlanRow
from gp_jax.evaluation.statistics import enough
from gp_jax.evaluation.tables import MAIN, cells, headers, label, percent, size
from gp_jax.report import write_text

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"  # nothing from outside
RETENTION = (
    "Retention, decode cache: share of the visual tokens that the cache holds while the answer is written. Retention, prefill: share "
    "that an average decoder layer sees while the question is read; layers before a cut see all of them."
)


def write_report(
    path: Path,
    title: str,
    rows: Sequence[PlanRow],
    breakdown: Mapping[str, Sequence[PlanRow]],
    samples: Sequence[Sample],
    notes: Sequence[str],
    metric: str = MAIN,
) -> None:
    """Writes the HTML file whole or not at all; it opens without a network.

    Args:
        rows: of `rows.aggregate`. breakdown: of `rows.breakdown`. samples: for the gallery; 100 with 7 plans are 5 to 8 MB.
        notes: what was run, one line each; "model: x" shows the part before the colon in bold.
        metric: the one in table, plots and breakdown; others get columns at the table's end.
    """
    from gp_jax.evaluation.plots import retention_plot, time_plot  # slow to import

    number = {row.plan: i for i, row in enumerate(rows)}
    plans = list(number) + [p for p in dict.fromkeys(p for s in samples for p in s.predictions) if p not in number]
    warning = enough(min((row.samples for row in rows), default=0))
    plots = [retention_plot] + [time_plot] * any(math.isfinite(row.seconds) for row in rows)
    legend = "".join(f"<span>{chip(i)} {safe(plan)}</span>" for plan, i in number.items())
    body = [
        f"<h1>{safe(title)}</h1>",
        f'<ul class="notes">{"".join(map(_note, notes))}</ul>' if notes else "",
        "<h2>Plans</h2>",
        f'<p class="warning">{safe(warning)}</p>' if warning else "",
        _table(rows, metric),
        f'<p class="caption">Intervals: 95 %, bootstrap over samples; differences pair every sample with itself and are bold where zero '
        f"lies outside. {RETENTION}</p>",
        "<h2>Accuracy against cost</h2>",
        f'<div class="plots">{"".join(f"<figure>{plot(rows, metric)}</figure>" for plot in plots)}</div>',
        f'<div class="legend">{legend}</div>',
        '<p class="caption">Bars: 95 % intervals. Plans whose bars would cover each other stand side by side. The scale of retention is a '
        "square root.</p>",
        _breakdown(breakdown, plans, metric) if breakdown else "",
        "<h2>Samples</h2>" if samples else "",
        _filters(samples, plans) if samples else "",
        f'<div id="gallery">{cards(samples, plans)}</div>' if samples else "",
        f"<script>{JS}</script>" if samples else "",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{safe(title)}</title><style>{CSS}</style></head>\n'
        f"<body>\n{chr(10).join(part for part in body if part)}\n</body></html>\n"
    )
    write_text(epath.Path(path), page)


def _note(note: str) -> str:
    name, colon, rest = note.partition(": ")
    return f"<li><b>{safe(name)}:</b> {safe(rest)}</li>" if colon else f"<li>{safe(note)}</li>"


def _split(cell: str) -> str:
    """The interval of a cell goes below its mean."""
    mean, bracket, rest = cell.partition(" (")
    return f"{safe(mean)}<small>{safe(rest.rstrip(')'))}</small>" if bracket else safe(cell)


def _table(rows: Sequence[PlanRow], metric: str) -> str:
    others = [name for name in dict.fromkeys(name for row in rows for name in row.metrics) if name != metric]
    heads = headers(metric) + [("KV cache", "per answer"), ("same answer as dense", "%")] + [(label(name), "%") for name in others]
    head = "".join(f'<th scope="col">{safe(name)}<small>{safe(unit)}</small></th>' for name, unit in heads)
    lines = []
    for i, row in enumerate(rows):
        first, main, change, *rest = cells(row, metric)
        rest += [size(row.kv_bytes), percent(row.agreement)]
        rest += [percent(row.metrics[name].mean if name in row.metrics else None) for name in others]
        bold = ' class="clear"' if metric in row.differences and row.differences[metric].clear else ""
        lines.append(
            f'<tr><th scope="row">{chip(i)} {safe(first)}</th><td>{_split(main)}</td><td{bold}>{_split(change)}</td>'
            + "".join(f"<td>{safe(cell)}</td>" for cell in rest)
            + "</tr>"
        )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _breakdown(groups: Mapping[str, Sequence[PlanRow]], plans: Sequence[str], metric: str) -> str:
    known = {name: {row.plan: row for row in rows} for name, rows in groups.items()}
    used = [(i, plan) for i, plan in enumerate(plans) if any(plan in rows for rows in known.values())]
    head = '<th scope="col">family</th><th scope="col">samples</th>'
    head += "".join(f'<th scope="col">{chip(i)} {safe(plan)}</th>' for i, plan in used)
    lines = []
    for name, rows in known.items():
        found = [rows[plan].metrics.get(metric) if plan in rows else None for _, plan in used]
        shown = (
            percent(None) if x is None else f"{percent(x.mean)}<small>{percent(x.low, 0)} to {percent(x.high, 0)}</small>" for x in found
        )
        count = max((row.samples for row in rows.values()), default=0)
        lines.append(f'<tr><th scope="row">{safe(name)}</th><td>{count}</td>{"".join(f"<td>{cell}</td>" for cell in shown)}</tr>')
    return (
        f'<h2>By family: {safe(label(metric))}, %</h2><div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _filters(samples: Sequence[Sample], plans: Sequence[str]) -> str:
    def options(pairs: Sequence[tuple[object, str]]) -> str:
        return "".join(f'<option value="{safe(value)}">{safe(name)}</option>' for value, name in pairs)

    families = [(name, name) for name in dict.fromkeys(sample.family for sample in samples)]
    outcomes = [("", "all"), ("right", "right"), ("wrong", "wrong"), ("mixed", "plans differ")]
    return (
        '<form class="filters" id="filters" hidden>'
        f'<label>family<select name="family"><option value="">all</option>{options(families)}</select></label>'
        f'<label>plan<select name="plan"><option value="">all</option>{options(list(enumerate(plans)))}</select></label>'
        f'<label>answers<select name="outcome">{options(outcomes)}</select></label>'
        '<label>text<input name="words" type="search" size="24" placeholder="in questions and answers"></label>'
        '<output id="shown"></output></form>'
    )
