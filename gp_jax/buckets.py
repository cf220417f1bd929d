"""Ladders of static sizes. XLA compiles a program per shape, so every length is rounded up to a rung.

Largest rung = everything fits or an error: a bucket never changes a result.
"""

import bisect
from dataclasses import dataclass

from gp_jax.errors import GlimpseError


@dataclass(frozen=True)
class Ladder:
    """Ascending rungs of one length; `name` is the setting that an overflow names."""

    name: str
    rungs: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.rungs or any(a >= b for a, b in zip(self.rungs, self.rungs[1:], strict=False)) or self.rungs[0] < 1:
            raise GlimpseError(f"ladder '{self.name}' must be positive and ascending, not {list(self.rungs)}")

    def fit(self, length: int) -> int:
        """The smallest rung >= `length`. Raises: GlimpseError past the last rung."""
        index = bisect.bisect_left(self.rungs, length)
        if index == len(self.rungs):
            raise GlimpseError(
                f"{length} is longer than the '{self.name}' ladder, which ends at {self.rungs[-1]}; raise Ladders.{self.name}"
            )
        return self.rungs[index]

    def upto(self, length: int) -> tuple[int, ...]:
        """All rungs that `fit` can return for lengths up to `length`."""
        return self.rungs[: bisect.bisect_left(self.rungs, self.fit(length)) + 1]


def geometric(name: str, first: int, last: int, ratio: float = 1.5, multiple: int = 128) -> Ladder:
    """Rungs from `first` to `last`, each about `ratio` times the one before, rounded up to `multiple`."""
    rungs, value = [], float(first)
    while not rungs or rungs[-1] < last:
        rungs.append(min(last, -(-int(value) // multiple) * multiple))
        value = max(value * ratio, rungs[-1] + multiple)
    return Ladder(name, tuple(rungs))


@dataclass(frozen=True)
class Ladders:
    """The lengths that shape a request. Defaults hold one 16,384-token photograph or several smaller ones.

    patches: vision patches of a sample, window padding included (4 per visual token).
    prompt:  prompt tokens of a sample with its visual tokens and glimpse rows.
    kept:    rows left after a cut; a prompt rung not on it is added, so that "keep everything" always fits.
    decode:  new tokens.
    batch:   samples.
    """

    patches: Ladder = geometric("patches", 256, 196608, multiple=256)
    prompt: Ladder = geometric("prompt", 128, 65536)
    kept: Ladder = geometric("kept", 64, 65536, multiple=64)
    decode: Ladder = geometric("decode", 32, 8192, ratio=2.0, multiple=32)
    batch: Ladder = Ladder("batch", (1, 2, 4, 8, 16, 32, 64, 128, 256))

    def kept_for(self, need: int, prompt: int) -> int:
        """Rung for `need` surviving rows of a stream that is `prompt` long: never longer than the stream itself."""
        return min(self.kept.fit(need), prompt) if need <= self.kept.rungs[-1] else prompt
