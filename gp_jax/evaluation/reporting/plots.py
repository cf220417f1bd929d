"""Accuracy and time against retention, accuracy against time, as SVG that takes the page's colors."""

import io
import math
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from matplotlib.transforms import ScaledTranslation

from gp_jax.evaluation.reporting.chips import COLORS, MARKERS
from gp_jax.evaluation.reporting.plan_rows import PlanRow
from gp_jax.evaluation.reporting.statistics import Interval
from gp_jax.evaluation.reporting.tables import MAIN, label

INK = "#010203"  # stands for the text color of the page, whichever that is
APART = 7.0  # points between plans that would lie on top of each other
NEAR = 0.02  # of the axis: closer than this they would
STYLE: dict[Any, Any] = {  # matplotlib's types list every name
    "svg.fonttype": "none",
    "svg.hashsalt": "gp_jax",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
}


Scale = Callable[[Axes], None]


def retention_plot(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """Accuracy with its interval over the share of visual tokens in the decode cache, on a square-root scale."""
    title, places = "visual tokens kept in the decode cache, %", [row.retention for row in rows]
    return _plot("retention", title, f"{label(metric)}, %", places, [_percents(row, metric) for row in rows], _retention_scale)


def flops_plot(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """Accuracy with its interval over the FLOPs of an answer, as a share of dense's."""
    places = [math.nan if row.flops_ratio is None else 100 * row.flops_ratio for row in rows]

    def scale(axes: Axes) -> None:
        axes.set_xlim(0, 1.08 * max((place for place in places if math.isfinite(place)), default=100.0))

    return _plot("flops", "FLOPs of an answer, % of dense", f"{label(metric)}, %", places, [_percents(row, metric) for row in rows], scale)


def time_plot(rows: Sequence[PlanRow], metric: str = MAIN) -> str:
    """Accuracy with its interval over the median time of an answer."""
    unit, factor, slowest = _time_unit(rows)

    def scale(axes: Axes) -> None:
        axes.set_xlim(0, slowest * 1.08)

    places = [row.seconds.median * factor if row.seconds else math.nan for row in rows]
    return _plot("time", f"median time per answer, {unit}", f"{label(metric)}, %", places, [_percents(row, metric) for row in rows], scale)


def time_retention_plot(rows: Sequence[PlanRow]) -> str:
    """The median time of an answer, with quartiles, over the share of visual tokens in the decode cache, on a square-root scale."""
    unit, factor, slowest = _time_unit(rows)

    def scale(axes: Axes) -> None:
        _retention_scale(axes)
        axes.set_ylim(0, slowest * 1.08)

    title, places = "visual tokens kept in the decode cache, %", [row.retention for row in rows]
    spreads = [row.seconds for row in rows]
    times = [Interval(s.median * factor, s.low * factor, s.high * factor, s.n) if s else None for s in spreads]
    return _plot("time-retention", title, f"median time per answer, {unit}", places, times, scale, limits=False)


def _retention_scale(axes: Axes) -> None:
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set_xlim(0, 1.08)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.0f}"))


def _time_unit(rows: Sequence[PlanRow]) -> tuple[str, float, float]:
    """Unit, units per second, the longest time in it."""
    slowest = max((row.seconds.high for row in rows if row.seconds), default=1.0)
    unit, factor = ("s", 1.0) if slowest >= 1 else ("ms", 1000.0)
    return unit, factor, slowest * factor


def _percents(row: PlanRow, metric: str) -> Interval | None:
    found = row.metrics.get(metric)
    return found and Interval(100 * found.mean, 100 * found.low, 100 * found.high, found.n)


def _plot(
    name: str, title: str, height: str, places: Sequence[float], heights: Sequence[Interval | None], scale: Scale, limits: bool = True
) -> str:
    """title, height: of the axes. heights: with their bars; None is not drawn. limits: set around them, else by `scale`."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        scale(axes)
        axes.set_xlabel(title)
        axes.set_ylabel(height)
        shown = [(i, x, found) for i, (x, found) in enumerate(zip(places, heights, strict=True)) if found and math.isfinite(x)]
        shifts = _shifts(axes, [x for _, x, _ in shown], [found for *_, found in shown])
        for (i, x, found), shift in zip(shown, shifts, strict=True):
            ends = [[found.mean - found.low], [found.high - found.mean]]
            mark, color = MARKERS[i % len(MARKERS)], COLORS[i % len(COLORS)]
            move = ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)
            look: dict[str, Any] = {"markersize": 7, "clip_on": False, "transform": axes.transData + move, "zorder": 3}  # of the mark
            axes.errorbar([x], [found.mean], np.maximum(ends, 0), fmt=mark, color=color, capsize=3, **look)
        if limits:
            lows, highs = [found.low for *_, found in shown] or [0.0], [found.high for *_, found in shown] or [100.0]
            room = max(1.0, 0.08 * (max(highs) - min(lows)))
            axes.set_ylim(min(lows) - room, max(highs) + room)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return _inline(file.getvalue(), name, f"{height} against {title}")


def _shifts(axes: Axes, places: Sequence[float], intervals: Sequence[Interval]) -> list[float]:
    """Points to the right per place, so that plans whose bars would cover each other stand side by side."""
    across = axes.transAxes.inverted().transform(axes.transData.transform([(x, 0) for x in places] or [(0, 0)]))[:, 0]
    shifts = [0.0] * len(places)
    groups: list[list[int]] = []
    for i in sorted(range(len(places)), key=lambda i: across[i]):
        for group in groups:
            if any(across[i] - across[k] < NEAR and _overlap(intervals[i], intervals[k]) for k in group):
                group.append(i)
                break
        else:
            groups.append([i])
    for group in groups:
        for rank, i in enumerate(group):
            shifts[i] = APART * (rank - (len(group) - 1) / 2)
    return shifts


def _overlap(one: Interval, other: Interval) -> bool:
    return one.low <= other.high and other.low <= one.high


def _inline(svg: str, name: str, title: str) -> str:
    """A part of an HTML page: without XML head, with names of its own, text in the page's color."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href").replace(INK, "currentColor")
    svg = re.sub(r'\bid="', f'id="{name}-', svg).replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)
