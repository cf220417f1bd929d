"""Compares plans of several models on the same questions: python -m benchmarks.plus_table LABEL=FOLDER:PLAN ...

Every argument names a run folder of eval.py and one of its plans; the first one is the baseline of the paired differences. Folders with
other seeds of the same task may be pooled: LABEL=FOLDER,FOLDER:PLAN.

    python -m benchmarks.plus_table base-dense=runs/base:dense base-glimpse=runs/base:glimpse plus-glimpse=runs/plus:glimpse
"""

import sys
from pathlib import Path

import numpy as np

from gp_jax.errors import GlimpseError
from gp_jax.evaluation.reporting.statistics import bootstrap, paired_difference
from gp_jax.runtime.disk import parse_json

MAIN = "exact_match"


def read(folders: str, plan: str) -> dict[str, tuple[float, int, int]]:
    """Per question: score, visual tokens kept, and all of them. Raises: GlimpseError when a folder has no answers of the plan."""
    found = {}
    for folder in folders.split(","):
        path = Path(folder) / "predictions.jsonl"
        lines = [parse_json(line, path) for line in path.read_text().splitlines()]
        own = {line["sample"]: line for line in lines if line["plan"] == plan}
        if not own:
            raise GlimpseError(f"{path}: has no answers of the plan {plan}")
        found |= {name: (line["metrics"][MAIN], line["kept"], line["total"]) for name, line in own.items()}
    return found


def row(label: str, own: dict[str, tuple[float, int, int]], base: dict[str, tuple[float, int, int]]) -> str:
    """A line of the table."""
    names = sorted(own.keys() & base.keys())
    if not names:
        raise GlimpseError(f"{label}: answers none of the baseline's questions")
    score, baseline = (np.array([of[name][0] for name in names]) for of in (own, base))
    kept, total = (sum(own[name][part] for name in names) for part in (1, 2))
    mean, difference = bootstrap(100 * score), paired_difference(100 * score, 100 * baseline)
    ratio = 100 * score.mean() / baseline.mean()
    low, high = (100 + end / baseline.mean() for end in (difference.low, difference.high))
    return (
        f"| {label} | {len(names)} | {mean.mean:.1f} ({mean.low:.1f} to {mean.high:.1f}) | {difference.mean:+.1f} "
        f"({difference.low:+.1f} to {difference.high:+.1f}) | {ratio:.1f} ({low:.1f} to {high:.1f}) | {100 - 100 * kept / total:.1f} |"
    )


def main(arguments: list[str]) -> None:
    """Prints the table."""
    if not arguments:
        raise SystemExit(__doc__)
    print("| model and plan | questions | exact match (%) | difference to the first (points, paired) | of the first (%) | pruned (%) |")
    print("|---|---:|---:|---:|---:|---:|")
    base = None
    for argument in arguments:
        label, _, place = argument.partition("=")
        folders, _, plan = place.rpartition(":")
        own = read(folders, plan)
        base = base or own
        print(row(label, own, base))


if __name__ == "__main__":
    main(sys.argv[1:])
