"""Ladders of static sizes. XLA compiles a program per shape, so every length is rounded up to a rung.

A length beyond the largest rung is an error, and nothing is cut off to fit: the choice of a bucket never changes a result.
"""

import bisect
import itertools
import operator
from dataclasses import dataclass, fields

from gp_jax.config.schema import LARGEST
from gp_jax.errors import GlimpseError, TooLong, one_line, some


@dataclass(frozen=True)
class Ladder:
    """Ascending rungs of one length. `name` is the setting that the error names when a length exceeds the last rung."""

    name: str
    rungs: tuple[int, ...]

    def __post_init__(self) -> None:
        try:
            rungs = tuple(operator.index(rung) for rung in self.rungs)
        except TypeError as error:
            raise GlimpseError(f"ladder '{self.name}' must be whole numbers ({one_line(error)})") from error
        if not rungs or any(a >= b for a, b in itertools.pairwise(rungs)) or not 1 <= rungs[0] <= rungs[-1] <= LARGEST:
            raise GlimpseError(f"ladder '{self.name}' must be positive and ascending up to at most {LARGEST}, not {some(rungs, 20)}")
        object.__setattr__(self, "rungs", rungs)

    def fit(self, length: int) -> int:
        """The smallest rung >= `length`. Raises: TooLong, a GlimpseError, beyond the last rung."""
        index = bisect.bisect_left(self.rungs, length)
        if index == len(self.rungs):
            raise TooLong(f"{length} is longer than the '{self.name}' ladder, which ends at {self.rungs[-1]}; raise Ladders.{self.name}")
        return self.rungs[index]

    def upto(self, length: int) -> tuple[int, ...]:
        """All rungs that `fit` can return for lengths up to `length`."""
        return self.rungs[: bisect.bisect_left(self.rungs, self.fit(length)) + 1]


def octaves(name: str, first: int, last: int, parts: int = 8, multiple: int = 1) -> Ladder:
    """Rungs from `first` to `last` that divide every doubling into equal `parts`, rounded up to `multiple`.

    Padding is 1 / (3 parts) of the rung on average, for lengths spread evenly over an octave, and at most 1 / parts of the length.
    """
    if not (1 <= first <= last <= LARGEST and 1 <= parts <= 1024 and multiple >= 1):
        raise GlimpseError(f"ladder '{name}': first={first}, last={last}, parts={parts}, multiple={multiple} make no rungs")
    rungs, octave = {first, last}, first
    while octave < last:
        rungs |= {min(last, -(-(octave * (parts + part) // parts) // multiple) * multiple) for part in range(1, parts + 1)}
        octave *= 2
    return Ladder(name, tuple(sorted(rungs)))


def finer_from(first: int, ladder: Ladder, parts: int, multiple: int) -> Ladder:
    """A ladder with more rungs from `first` on, for lengths where padding costs more than a further compilation. (Below 2,048 some rungs
    are not multiples of 128; attention on TPU pads them to that.)"""
    above = octaves(ladder.name, first, ladder.rungs[-1], parts, multiple).rungs
    return Ladder(ladder.name, tuple(sorted({*ladder.rungs, *above})))


@dataclass(frozen=True)
class Ladders:
    """The lengths that shape a request. Defaults hold one 16,384-token photograph or several smaller ones.

    Fine ladders pad little, but more programs are compiled. A server that compiles everything in advance uses coarser ones:
    `Ladders(prompt=octaves("prompt", 128, 8192, parts=2))`.

    patches: vision patches of a sample, window padding included (4 per visual token).
    prompt:  prompt tokens of a sample with its visual tokens and glimpse rows.
    kept:    rows left after a cut; a prompt rung not on it is added, so that "keep everything" always fits.
    decode:  new tokens.
    batch:   samples.
    """

    patches: Ladder = octaves("patches", 256, 196608, multiple=64)
    prompt: Ladder = finer_from(1024, octaves("prompt", 128, 65536, multiple=16), parts=16, multiple=16)
    kept: Ladder = octaves("kept", 32, 65536, multiple=16)
    decode: Ladder = octaves("decode", 16, 8192, parts=1)
    batch: Ladder = Ladder("batch", (1, 2, 4, 8, 16, 32, 64, 128, 256))

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), Ladder):
                raise GlimpseError(f"Ladders.{field.name} must be a Ladder, not a {type(getattr(self, field.name)).__name__}")

    def kept_for(self, need: int, prompt: int) -> int:
        """Rung for `need` surviving rows of a stream that is `prompt` long: never longer than the stream itself."""
        return min(self.kept.fit(need), prompt) if need <= self.kept.rungs[-1] else prompt

    def kept_rungs(self, prompt: int) -> tuple[int, ...]:
        """All rungs that `kept_for` can return for a stream that is `prompt` long."""
        return (*(rung for rung in self.kept.rungs if rung < prompt), prompt)
