"""`python -m gp_jax.scenes OUT --split test --count 1200` writes a split of the generated benchmark."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gp_jax.runtime.exits import exit_status
from gp_jax.scenes.write import Split, write


@dataclass(frozen=True)
class Scenes:
    """Draw generated scenes with questions, answers and evidence boxes, as a folder that training and evaluation read.

    Record number i of a split is the same on every machine.
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write; it must not exist yet."""
    split: Split = "test"
    """Split to draw from. test_ood: larger pictures, with pairs of color and shape that the other splits never show."""
    count: int = 1200
    """Number of records, with one picture and one question each."""
    start: int = 0
    """Number of the first record."""
    seed: int = 0
    """Seed of the benchmark; another seed gives other scenes of the same kind."""


def main() -> None:
    """Entry point."""
    args = tyro.cli(Scenes, prog="python -m gp_jax.scenes", config=(tyro.conf.HelptextFromCommentsOff,))

    def body() -> None:
        write(args.out, args.split, args.count, args.start, seed=args.seed)
        print(f"wrote {args.count} records ({args.split}) to {args.out}")

    if status := exit_status("gp_jax.scenes", body):
        sys.exit(status)


if __name__ == "__main__":
    main()
