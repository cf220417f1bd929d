"""Which generated scenes a run of the stage `base` draws: the fields `scenes` of its configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Canvas:
    """A picture size and how often it is drawn, at the start and at the end of the run (linear between)."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    questions: int
    """At most so many turns per picture."""
    early: float
    """Weight at the first step."""
    late: float
    """Weight from the step `ScenesConfig.settled` on."""


@dataclass(frozen=True)
class ScenesConfig:
    """Which generated scenes, and what is hidden of them."""

    canvases: tuple[Canvas, ...] = ()
    """Sizes; one program is compiled for each."""
    settled: float = 0.4
    """Share of the steps after which sizes are drawn with their late weights."""
    turn_rows: int = 20
    """Text rows reserved per turn; turns that do not fit are left out."""
    pruned: float = 0.5
    """Share of pictures whose turns lose visual tokens behind a random layer, as pruning makes them."""
    first_cut: int = 1
    """First layer that such a cut may come before."""
    blackened: float = 0.08
    """Share of pictures of which only the evidence of two turns is left, all else is black."""
    relations: float = 0.0
    """Share of a picture's turns that ask for relations, where there are so many; 0: as many as of each other family."""
    anchored: float = 0.0
    """Share of pictures whose relation turns do not see what they ask for, only the shape that it stands beside: the answer must be read
    off that shape's visual tokens, which know it."""
    seed: int = 0
    """Of scenes, questions and hiding."""
    threads: int = 2
    """Drawing threads."""
    prefetch: int = 8
    """Micro-batches that are ready ahead."""
