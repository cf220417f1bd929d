"""Whole evaluations without a model's arithmetic: a small checkpoint whose answers are made up, so that nothing is compiled."""

import json
from pathlib import Path

import numpy as np
import run_tools
from PIL import Image

from gp_jax import GlimpseVLM, tiny
from gp_jax.evaluation.command import main
from gp_jax.evaluation.results import Prediction, read_predictions
from gp_jax.inference.requests import keep_rules, resolve
from gp_jax.inference.results import Answer
from gp_jax.processing.layout import ARRAYS, read_samples

SIZES = [(4, 3), (9, 7), (5, 8), (3, 3), (11, 6)]  # of the pictures, in visual tokens
PLANS = ("dense", "glimpse", "random", "random-pooled")


def make_home(home: Path) -> Path:
    """A model with a glimpse, and pictures 0.png to 4.png."""
    tiny.make_checkpoint(home / "model", hf_config=run_tools.SMALL | {"max_remain_ratio": 0.3})
    for number, (columns, rows) in enumerate(SIZES):
        Image.new("RGB", (28 * columns, 28 * rows), (40 * number, 90, 200)).save(home / f"{number}.png")
    return home


def row(number: int, **changes) -> dict:
    return {"image": f"{number}.png", "question": f"what is number {number}?", "answer": "red"} | changes


def made_up(vlm: GlimpseVLM, images, questions, *, prune=None, max_new_tokens=0) -> list[Answer]:
    """Instead of `GlimpseVLM.answer`: "red", and of every picture's visual tokens the first ones, as many as the rule says. What can be
    wrong with a request is wrong here too."""
    prepared = vlm.processor(images, questions)
    samples = read_samples(vlm.config, *(prepared.inputs.get(name) for name in ARRAYS))
    plan, rule = resolve(prune, vlm.glimpse_config, depth := vlm.config.text.num_hidden_layers)
    cuts = keep_rules(samples, plan, rule, len(samples), max(sample.groups.size for sample in samples))
    found = []
    for b, sample in enumerate(samples):
        total = sample.count
        fixed = int(cuts[-1].limits.fixed[b]) if cuts else total
        kept = fixed if fixed >= 0 else max(1, total // (3 + sample.grids[0][0]))
        keep = [part.reshape(grid) for part, grid in zip([np.arange(total) < kept], sample.grids, strict=True)]
        seen = (total, *(kept,) * (depth - 1))
        found.append(Answer("red", np.zeros(2, int), kept, total, keep, [], {"decode": 0.1}, seen, (kept,) * depth))
    return found


def write_rows(path: Path, rows: list) -> Path:
    (path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path / "own.jsonl"


def evaluate(home: Path, path: Path, rows: list, *more: str, plans: tuple[str, ...] = PLANS) -> int:
    """Runs eval.py over these rows, into `path`/out. Returns: the exit status."""
    words = {"model": home / "model", "tasks": write_rows(home, rows), "images": home, "out": path / "out"}
    words |= {"batch": 2, "max-new-tokens": 2, "pictures": 2}
    return main([word for name, value in words.items() for word in (f"--{name}", str(value))] + ["--plans", *plans, *more])


def answers(path: Path) -> dict[tuple[str, str], Prediction]:
    """By sample and plan."""
    return {(p.sample, p.plan): p for p in read_predictions(path / "out" / "predictions.jsonl")}


def left_out(path: Path) -> dict[str, str]:
    """Reasons by sample."""
    lines = map(json.loads, (path / "out" / "left_out.jsonl").read_text().splitlines())
    return {line["sample"]: line["reason"] for line in lines}
