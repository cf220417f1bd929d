"""Does the input starve the step? python -m benchmarks.data [--config configs/debug.py] [--seconds 10]

Samples per second of the data alone (reading, decoding, padding, in order) and of the training step alone (batches already on the
device), of the same configuration. Figures of one run: the ratio is what counts.
"""

import itertools
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from gp_jax.runtime.allocator import keep_memory


@dataclass(frozen=True)
class Args:
    """Data against step."""

    config: Path = Path("configs/debug.py")
    """A training configuration."""
    seconds: float = 10.0
    """To measure each of the two for."""
    rounds: int = 5
    """Measurements of each; the median is shown."""
    workers: int = 0
    """Loading processes."""


def main(args: Args) -> None:
    """Measures and prints."""
    import jax
    import numpy as np

    from gp_jax.data.feed import Placer, load
    from gp_jax.training.build import build
    from gp_jax.training.command import parse
    from gp_jax.training.step import Counts

    run = build(parse(["--config", str(args.config)]).train().check(), lambda items, *_: items)
    schedule, options = run.feed.schedule, run.config.data
    stream = load(run.feed.loader, 0, 10**9, threads=options.threads, prefetch=options.prefetch, workers=args.workers)
    for _ in range(2 * options.prefetch):  # start-up, and what was loaded ahead
        next(stream)

    def feed() -> float:
        start, samples = time.perf_counter(), 0
        while (seconds := time.perf_counter() - start) < args.seconds / args.rounds:
            samples += len(schedule[next(stream).number].members)
        return samples / seconds

    fed = [feed() for _ in range(args.rounds)]
    place, batches = Placer(run.mesh, run.config.batch_size), {}
    for number in range(schedule.epoch_end(1)):
        if schedule[number].shape not in batches:
            loaded = run.feed.loader.map(number)
            batches[loaded.shape] = (place(loaded.batch, loaded.rows), len(schedule[number].members))
    state, gathered = run.step.start()
    counts = Counts(np.float32(100), np.float32(run.config.batch_size))

    def step(batch) -> None:
        nonlocal state, gathered
        gathered = run.step.accumulate(gathered, state, batch, counts)
        state, gathered, metrics = run.step.update(state, gathered)
        jax.block_until_ready(metrics)

    for batch, _ in batches.values():
        step(batch)

    def train() -> float:
        start, samples, turn = time.perf_counter(), 0, itertools.cycle(batches.values())
        while (seconds := time.perf_counter() - start) < args.seconds / args.rounds:
            batch, count = next(turn)
            step(batch)
            samples += count
        return samples / seconds

    trained = [train() for _ in range(args.rounds)]
    data, alone = statistics.median(fed), statistics.median(trained)
    print(f"data alone  {data:8.1f} samples/s (from {min(fed):.1f} to {max(fed):.1f})")
    print(f"step alone  {alone:8.1f} samples/s (from {min(trained):.1f} to {max(trained):.1f})")
    print(f"data / step {data / alone:8.1f}   padding {schedule.padding:.1%}")
    sys.exit(0 if data >= 3 * alone else 1)


if __name__ == "__main__":
    keep_memory()
    main(tyro.cli(Args, description=__doc__))
