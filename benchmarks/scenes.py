"""How fast are scenes made on one core? python -m benchmarks.scenes [--scenes 300]

Scenes per second with everything that base training needs (scene, picture, questions, labels), and milliseconds of each part.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class Args:
    """Making scenes."""

    canvas: tuple[int, int] = (256, 256)
    """Width and height in pixels."""
    scenes: int = 300
    """Scenes of each measurement."""
    rounds: int = 7
    """Measurements of each; the median is shown."""
    questions: int = 8
    """Of each scene, at most."""


def main(args: Args) -> None:
    """Measures and prints."""
    import numpy as np

    from gp_jax.scenes.draw import draw
    from gp_jax.scenes.labels import labels
    from gp_jax.scenes.questions import pick
    from gp_jax.scenes.scene import make_scene
    from gp_jax.scenes.source import packed_scene, scene_record

    scenes = [make_scene(np.random.default_rng(i), args.canvas) for i in range(args.scenes)]
    rng = np.random.default_rng(0)

    def rates(work: Callable[[int], object]) -> list[float]:
        for i in range(min(100, args.scenes)):  # shapes and digits are drawn once
            work(i)
        found = []
        for _ in range(args.rounds):
            start = time.perf_counter()
            for i in range(args.scenes):
                work(i)
            found.append(args.scenes / (time.perf_counter() - start))
        return found

    whole = rates(lambda i: packed_scene(0, i, args.canvas, args.questions))
    parts = {
        "scene": lambda i: make_scene(np.random.default_rng(i), args.canvas),
        "picture": lambda i: draw(scenes[i]),
        "questions": lambda i: pick(scenes[i], rng, args.questions),
        "labels": lambda i: labels(scenes[i]),
        "record, as a file": lambda i: scene_record("train", i),
    }
    size = f"{args.canvas[0]} x {args.canvas[1]} px"
    print(f"scenes of {size}  {statistics.median(whole):7.1f} a second (from {min(whole):.1f} to {max(whole):.1f})")
    for name, work in parts.items():
        print(f"{name:<18} {1000 / statistics.median(rates(work)):7.2f} ms")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
