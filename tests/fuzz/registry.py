"""The table of targets, and what several of them need."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.fuzz.good import bundled

Made = tuple[Callable[[], object], int]  # what to call, and how many bytes it reads


@dataclass(frozen=True)
class Target:
    """make: (random numbers, scratch folder) -> what to try. share: how many of a hundred inputs are its."""

    make: Callable[[random.Random, Path], Made]
    share: int = 10


TARGETS: dict[str, Target] = {}


def target(share: int) -> Callable:
    def add(make: Callable[[random.Random, Path], Made]) -> Callable:
        TARGETS[make.__name__] = Target(make, share)
        return make

    return add


def generator(name: str, seed: int, number: int) -> random.Random:
    """The random numbers of one input."""
    return random.Random(f"{name}:{seed}:{number}")


@cache
def model() -> object:
    """The configuration and processor of the bundled model."""
    from gp_jax.pretrained.hf_config import model_config, read_config

    return model_config(read_config(bundled()))


@cache
def processor() -> object:
    from tests.fuzz.rooms import load_processor

    return load_processor(bundled(), model())
