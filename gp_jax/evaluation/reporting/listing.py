"""All answers of a report for its script, which lists those behind a number when they are asked for."""

import json
import math
from collections.abc import Sequence

from gp_jax.evaluation.reporting.gallery import clean
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.tables import label

LONGEST, SHORTER, MANY = 400, 80, 20_000  # characters of a text, and of one where there are more than MANY; predictions.jsonl has all


def places(lines: Lines) -> dict[tuple[str, str], int]:
    """The number of every sample, by task and id."""
    return {key: i for i, key in enumerate(dict.fromkeys((p.task, p.sample) for p in lines.predictions))}


def metric_names(lines: Lines) -> list[str]:
    """In the order in which they first appear."""
    return list(dict.fromkeys(name for p in lines.predictions for name in p.metrics))


def listing(lines: Lines, plans: Sequence[str], metric: str) -> str:
    """JSON for a <script> of an HTML page, where it can end nothing.

    samples: [task, id, question, answer, family] each; answers: per sample, per number of a plan 0 or [text, line, value of each
    metric or null]; main: number of the metric by which an answer is right.
    """
    longest = LONGEST if len(lines.predictions) <= MANY else SHORTER

    def short(text: str) -> str:
        text = clean(text)
        return text if len(text) <= longest else text[:longest] + "…"

    numbers, names, known = {plan: i for i, plan in enumerate(plans)}, metric_names(lines), places(lines)
    samples: list[list[str]] = [[] for _ in known]
    answers: list[list] = [[0] * len(plans) for _ in known]
    for p in lines.predictions:
        place = known[p.task, p.sample]
        samples[place] = samples[place] or [clean(p.task), clean(p.sample), short(p.question), short(p.answer), clean(p.family)]
        values = [p.metrics.get(name, math.nan) for name in names]
        shown = [round(float(value), 4) if math.isfinite(value) else None for value in values]
        answers[place][numbers[p.plan]] = [short(p.prediction), lines.numbers.get(p.key, 0), *shown]
    main = names.index(metric) if metric in names else -1
    data = dict(plans=list(map(clean, plans)), metrics=[clean(label(name)) for name in names], main=main, samples=samples, answers=answers)
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
