"""The command `gp-jax prepare`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from gp_jax.errors import GlimpseError


@dataclass(frozen=True)
class Prepare:
    """Check annotations and pictures and write them as a TFDS folder of ArrayRecord shards, for training and evaluation.

    gp-jax prepare SOURCE [SOURCE ...] --images DIR --out DIR

    Reads Visual-CoT's training JSONL and benchmark JSON as released, and 'your own': JSONL or a JSON list of objects with image
    (or images), question, answer, and boxes [[x1, y1, x2, y2], ...] or a mask picture (white = evidence). Pictures are searched
    at the path in the row, and in cot/DATASET and DATASET. Bad rows are not used; they are counted and reported (report.txt in the output
    folder). Interrupted work is continued when the same command is run again.
    """

    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE [SOURCE ...]")]
    """Annotation files, or folders with .jsonl and .json files."""
    images: Path | None = None
    """Folder of the pictures. No files outside it are read."""
    out: Path | None = None
    """Folder to write: a new one, or that of the same command when it was interrupted."""
    split: str | None = None
    """Put all rows into this split. [default: each row's own `split`, else train]"""
    boxes: Literal["auto", "pixel", "normalized", "0-1000"] = "auto"
    """Meaning of box numbers in 'your own' rows. auto: the row's box_format; without one, fractions that are all in 0..1 are normalized,
    everything else is pixels. 0-1000 must be declared, here or in the rows, because it looks like pixels."""
    workers: int | None = None
    """Number of processes. [default: one per core, fewer for small sets]"""
    max_bad_share: float = 0.1
    """Stop when more than this share of all rows is bad."""
    rows_per_shard: int | None = None
    """Source rows per shard. [default: 512, fewer for small sets]"""
    offenders: int = 5
    """Bad rows to show per reason, at most 20."""
    overwrite: bool = False
    """Delete another preparation that is in the output folder and start again."""

    def check(self) -> None:
        """Checks everything that can be checked before anything is read. Raises: GlimpseError."""
        if not self.sources:
            raise GlimpseError("give at least one annotation file or folder: gp-jax prepare SOURCE --images DIR --out DIR")
        if self.images is None:
            raise GlimpseError("--images is missing: the folder of the pictures")
        if self.out is None:
            raise GlimpseError("--out is missing: the folder to write")


def run(args: Prepare) -> None:
    """Runs `gp-jax prepare`."""
    args.check()
    assert args.images is not None and args.out is not None, "checked"
    from gp_jax.data.prepare import TooManyBad
    from gp_jax.data.prepare import prepare as run
    from gp_jax.runtime.exits import saving_as

    try:
        with saving_as(f"the parts that are checked are kept in {args.out}; the same command goes on", grace=10.0):
            report = run(
                args.sources,
                args.images,
                args.out,
                split=args.split,
                boxes=args.boxes,
                workers=args.workers,
                max_bad_share=args.max_bad_share,
                rows_per_shard=args.rows_per_shard,
                offenders=args.offenders,
                overwrite=args.overwrite,
                progress=True,
            )
    except TooManyBad as error:
        print(error.report.text(args.offenders), flush=True)
        raise
    print(report.text(args.offenders))
    print(f"out       {args.out}")


def parse(argv: list[str]) -> Prepare:
    """Reads the command line."""
    return tyro.cli(Prepare, args=argv, prog="gp-jax prepare", config=(tyro.conf.HelptextFromCommentsOff,))
