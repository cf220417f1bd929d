"""From answers to the numbers in the table: the judge's verdicts, the main metric, and what is left out of them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from gp_jax.evaluation.judge import judge
from gp_jax.evaluation.results import Prediction
from gp_jax.evaluation.runner import Runner
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.evaluation.tasks import JUDGE

SCORE = "score"  # every answer by the main metric of its task, where tasks have different ones
Found = list[tuple[Runner, list[Prediction]]]


def main_metric(runners: Sequence[Runner]) -> str:
    """The one in tables and plots."""
    mains = {runner.task.metrics[0] for runner in runners}
    return mains.pop() if len(mains) == 1 else SCORE


def add_verdicts(config: EvalConfig, found: Found) -> tuple[Found, list[str]]:
    """Asks the judge where a task's metrics name it, and writes left_out.jsonl: a line for everything that has no number, and why.

    Answers without a verdict get NaN, which means leave out. Returns: predictions with all metrics, and notes for the report.
    """
    out, notes = Path(config.out), []
    wanted = [runner.task.name for runner, _ in found if JUDGE in runner.task.metrics]
    failures: dict = {}
    scores: dict = {}
    if wanted:
        asked = [_question(p) for _, predictions in found for p in predictions if p.task in wanted]
        verdicts = judge(config.judge, asked, Path(config.judge.cache or out / "verdicts.jsonl"))
        scores, failures = verdicts.scores, verdicts.failures
        notes.append(f"judge: {config.judge.model} at {config.judge.url}, temperature 0, seed {config.judge.seed}; {verdicts.text()}")
    main, lines, result = main_metric([runner for runner, _ in found]), [], []
    for runner, predictions in found:
        broken = runner.left_out(predictions)
        lines += [{"task": runner.task.name, "sample": name, "reason": reason} for name, reason in broken.items()]
        if broken:
            count, first = len(broken), next(iter(broken.items()))
            notes.append(
                f"left out of {runner.task.name}: {count} of {count + len(runner.number)} rows (left_out.jsonl), {first[0]}: {first[1]}"
            )
        scored = []
        for prediction in predictions:
            metrics = dict(prediction.metrics)
            if runner.task.name in wanted:
                metrics[JUDGE] = scores.get(_question(prediction), math.nan)
                if (reason := failures.get(_question(prediction))) is not None:
                    lines.append(
                        {"task": prediction.task, "sample": prediction.sample, "plan": prediction.plan, "reason": f"judge: {reason}"}
                    )
            if main == SCORE:
                metrics[SCORE] = metrics[runner.task.metrics[0]]
            order = dict.fromkeys([*([SCORE] if main == SCORE else []), *runner.task.metrics, *metrics])
            scored.append(dataclasses.replace(prediction, metrics={name: metrics[name] for name in order}))
        result.append((runner, scored))
    for note in notes:
        print(note)
    scratch = out / ".left_out.partial"
    scratch.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8", errors="backslashreplace")
    scratch.replace(out / "left_out.jsonl")
    return result, notes


def _question(prediction: Prediction) -> tuple[str, str, str]:
    return prediction.question, prediction.answer, prediction.prediction
