"""Draws a run's learning curve. python -m benchmarks.curve runs/scenes_base docs/pictures/scenes_base.png

Reads metrics.jsonl and config.json of a run folder of `train.py`: exact match of every family (stage base) or losses against hours of
training, which leave out compilation, validation and saving.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

NOT_CURVES = ("step", "group", "epoch", "grad_norm", "update_norm", "learning_rate", "memory_gib", "samples_per_s", "tokens_per_s")


@dataclass(frozen=True)
class Args:
    """Learning curve."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder."""
    picture: Annotated[Path, tyro.conf.Positional]
    """Where the picture goes (.png or .svg)."""
    group: str = "train"
    """train or validation."""
    smooth: int = 5
    """Log lines that a point is the mean of."""


def main(args: Args) -> None:
    """Draws."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    config = json.loads((args.run / "config.json").read_text())
    samples = config["batch_size"] * config["accumulation"]
    hours, step, when = 0.0, 0, {}
    for line in (line for line in lines if line["group"] == "train"):
        hours += (line["step"] - step) * samples / line["samples_per_s"] / 3600
        step = line["step"]
        when[step] = hours
    own = [line for line in lines if line["group"] == args.group and line["step"] in when]
    names = [name for name in own[-1] if name not in NOT_CURVES]
    shares = [name for name in names if name not in ("loss", "language", "dense", "reading", "dice", "bce")]
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name in shares:
        values = [line[name] for line in own]
        smooth = [sum(part) / len(part) for part in (values[max(0, i - args.smooth + 1) : i + 1] for i in range(len(values)))]
        axis.plot([when[line["step"]] for line in own], smooth, label=name, linewidth=2.5 if name == "exact" else 1.2)
    axis.set(xlabel="hours of training", ylabel=f"share ({args.group})", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(loc="best", fontsize=8)
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=120)
    print(f"{own[-1]['step']} steps, {hours:.2f} h: " + "  ".join(f"{name} {own[-1][name]:.3f}" for name in names))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
