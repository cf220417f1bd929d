"""What a report shows, in three lines and a small table."""

from collections.abc import Sequence

from gp_jax.evaluation.reporting.chips import chip
from gp_jax.evaluation.reporting.gallery import safe
from gp_jax.evaluation.reporting.plan_rows import DENSE, GLIMPSE, PlanRow
from gp_jax.evaluation.reporting.tables import MISSING, label, percent


def headline(rows: Sequence[PlanRow], metric: str) -> list[str]:
    """What was compared, what came out, and how the page is read. Empty without plans."""
    if not rows:
        return []
    known = {row.plan: row for row in rows}
    most = max(row.samples for row in rows)
    plans = f"{len(rows)} plan{'s' * (len(rows) > 1)}"
    lines = [f"What: {plans} answered the same {most} questions; a plan decides which visual tokens the model may keep."]
    shown = known.get(GLIMPSE) or next((row for row in rows if row.plan != DENSE), rows[0])
    if shown.metrics.get(metric) is None:
        lines.append(f"Result: {shown.plan} keeps {percent(shown.retention)} % of the visual tokens; its answers have no {label(metric)}.")
    else:
        lines.append(f"Result: {_result(shown, known.get(DENSE), metric)}")
    lines.append("Reading: every number leads to the answers behind it; filters choose among the samples, which are at the end.")
    return lines


def small_table(rows: Sequence[PlanRow], metric: str) -> str:
    """HTML: the two numbers that matter, of every plan. Nothing in it is a link, so the tab key passes it."""
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("plan", f"{safe(label(metric))} (%)", "pruned (%)"))
    lines = []
    for number, row in enumerate(rows):
        found = row.metrics.get(metric)
        cells = f"<td>{percent(found.mean) if found else MISSING}</td><td>{percent(1 - row.retention)}</td>"
        lines.append(f'<tr><th scope="row">{chip(number)} {safe(row.plan)}</th>{cells}</tr>')
    return f'<table class="small"><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def _result(row: PlanRow, dense: PlanRow | None, metric: str) -> str:
    own, reference = row.metrics[metric], dense.metrics.get(metric) if dense is not None else None
    said = f"{row.plan} drops {percent(1 - row.retention)} % of the visual tokens and reaches {percent(own.mean)} % {label(metric)}"
    if dense is None or dense is row or reference is None:
        return f"{said}."
    said += f"; {dense.plan}, which keeps all, {percent(reference.mean)} %"
    if (ahead := row.differences.get(metric)) is not None:
        low, mean, high = (f"{round(100 * value, 1) + 0.0:+.1f}" for value in (ahead.low, ahead.mean, ahead.high))
        said += f" ({mean} points, 95 % interval {low} to {high})"
    return f"{said}."
