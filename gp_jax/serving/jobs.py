"""What passes between those who receive requests and the thread that answers them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gp_jax.inference.requests import Pruning
from gp_jax.processing.layout import Sample
from gp_jax.processing.views import Plot
from gp_jax.trees import Sampling

BEST = 20  # most alternatives of a token that OpenAI's interface has


@dataclass(frozen=True)
class PictureKey:
    """A picture of a request. digest: of its content; plot: its visual tokens; areas: per view the part of the picture that it covers,
    left, top, right and bottom as shares of the picture's sides."""

    digest: bytes
    plot: Plot
    areas: tuple[tuple[float, ...], ...] = ((0.0, 0.0, 1.0, 1.0),)


@dataclass(frozen=True)
class Started:
    """The prompt was read: its counts, and per visual token of the whole pictures, in prompt order, whether it stays, and its importance in
    0 .. 1."""

    keep: np.ndarray
    importance: np.ndarray
    seen_before: int  # pictures that were in the vision cache
    pictures: int
    seen: int | None = None  # visual tokens that the tower saw in a second look; None: all


@dataclass(frozen=True)
class Tokens:
    """New tokens, (n,) int, where they were asked for their log-probabilities (n,), and the best tokens (n, b) with theirs (n, b)."""

    ids: np.ndarray
    logprobs: np.ndarray | None
    best: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Ended:
    """The answer is whole. reason: "stop" or "length"."""

    reason: str


@dataclass(frozen=True)
class Failed:
    """There will be no (further) answer. status: of HTTP; message: for the one who asked."""

    status: int
    message: str


Event = Started | Tokens | Ended | Failed


class Gone(Exception):
    """Nobody waits for this answer any more."""


@dataclass(eq=False)
class Job:
    """One request. Only `gone` is written by others than the thread that answers it."""

    sample: Sample
    pictures: Sequence[PictureKey]
    pruning: Pruning
    settings: Sampling  # of one row
    max_new_tokens: int
    deadline: float  # of time.monotonic
    deliver: Callable[[Event], Any] = lambda event: None  # called in the receiver's thread
    gone: bool = False
    sent: int = 0  # tokens that were delivered
    times: dict[str, float] = field(default_factory=dict)  # arrived, begun, first, last: of time.monotonic

    @property
    def noted(self) -> int:
        """Whether log-probabilities are wanted (1), and those of the best tokens (2)."""
        return int(self.settings.noted[0])

    def check(self) -> None:
        """Raises: Gone when nobody waits any more, TimeoutError behind the deadline."""
        if self.gone:
            raise Gone
        if time.monotonic() > self.deadline:
            raise TimeoutError
