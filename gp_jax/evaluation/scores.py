"""Completes the scores of answers for the table: the judge's verdicts and the main metric; lists the answers that are left out."""

import dataclasses
import json
import math
from collections.abc import Sequence

from gp_jax.errors import printable
from gp_jax.evaluation.judge import judge
from gp_jax.evaluation.results import Prediction
from gp_jax.evaluation.runner import Runner
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.evaluation.tasks import JUDGE
from gp_jax.evaluation.verdicts import Question, Verdicts
from gp_jax.runtime.disk import path_of, write_text

SCORE = "score"  # name of the main metric when tasks have different ones: each answer by that of its task
Found = list[tuple[Runner, list[Prediction]]]


def main_metric(runners: Sequence[Runner]) -> str:
    """The metric that tables and plots show."""
    mains = {runner.task.metrics[0] for runner in runners}
    return mains.pop() if len(mains) == 1 else SCORE


def add_verdicts(config: EvalConfig, found: Found) -> tuple[Found, list[str]]:
    """Asks the judge for tasks whose metrics name it, and writes left_out.jsonl, with a line and a reason for everything without a score.

    Answers without a verdict get NaN, which is left out of means. Returns: predictions with all metrics, and notes for the report.
    """
    out, main, notes, lines, verdicts = path_of(config.out), main_metric([runner for runner, _ in found]), [], [], Verdicts()
    judged = [p for runner, predictions in found for p in predictions if JUDGE in runner.task.metrics]
    if judged:
        verdicts = judge(config.judge, [_question(p) for p in judged], path_of(config.judge.cache or out / "verdicts.jsonl"))
        notes.append(f"judge: {config.judge.model} at {config.judge.shown}, temperature 0, seed {config.judge.seed}; {verdicts.text()}")
    result = []
    for runner, predictions in found:
        name, broken = runner.task.name, runner.left_out(predictions)
        lines += [{"task": name, "sample": sample, "reason": reason} for sample, reason in broken.items()]
        if broken:
            sample, reason = next(iter(broken.items()))
            rows = len(runner.task.entries) + len(runner.task.left_out)
            notes.append(f"left out of {name}: {len(broken)} of {rows} rows (left_out.jsonl), first {sample}: {reason}")
        result.append((runner, [_scored(runner, prediction, main, verdicts) for prediction in predictions]))
    for p in judged:
        if (failure := verdicts.failures.get(_question(p))) is not None:
            lines.append({"task": p.task, "sample": p.sample, "plan": p.plan, "reason": f"judge: {failure}"})
    print("".join(f"{printable(note)}\n" for note in notes), end="")
    write_text(out / "left_out.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return result, notes


def _question(prediction: Prediction) -> Question:
    return prediction.question, prediction.answer, prediction.prediction


def _scored(runner: Runner, prediction: Prediction, main: str, verdicts: Verdicts) -> Prediction:
    """The prediction with the judge's score added, and the main metric in first place."""
    metrics = dict(prediction.metrics)
    if JUDGE in runner.task.metrics:
        metrics[JUDGE] = verdicts.scores.get(_question(prediction), math.nan)
    if main == SCORE:
        metrics[SCORE] = metrics[runner.task.metrics[0]]
    order = dict.fromkeys([main, *runner.task.metrics, *metrics])
    return dataclasses.replace(prediction, metrics={name: metrics[name] for name in order})
