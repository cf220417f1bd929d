"""Settings of the generated scenes of a run of the stage `base`: the fields `scenes` of its configurations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Canvas:
    """A picture size and how often it is drawn. Its weight changes linearly from `early` to `late`."""

    width: int
    """Width of the picture in pixels."""
    height: int
    """Height of the picture in pixels."""
    questions: int
    """Most turns (question and answer) per picture."""
    early: float
    """Weight of this size at the first step."""
    late: float
    """Weight of this size after the share `ScenesConfig.settled` of the steps."""


@dataclass(frozen=True)
class ScenesConfig:
    """Which generated scenes are drawn, and which visual tokens are hidden."""

    canvases: tuple[Canvas, ...] = ()
    """Picture sizes; a program is compiled for each."""
    settled: float = 0.4
    """Share of the steps after which picture sizes are drawn with their late weights."""
    turn_rows: int = 20
    """Text tokens reserved per turn; turns that do not fit are left out."""
    pruned: float = 0.5
    """Share of pictures whose turns lose visual tokens after a random layer, as they would by pruning."""
    first_cut: int = 1
    """First layer that may lack these visual tokens; layers are counted from 0."""
    blackened: float = 0.08
    """Share of pictures that are black except for the evidence of two turns."""
    relations: float = 0.0
    """Share of a picture's turns that ask for relations, if the scene has enough of them; 0: as many as of each other family."""
    anchored: float = 0.0
    """Share of pictures whose relation turns do not see the shape that they ask for, only its neighbour that the question names: the answer
    must be read from the visual tokens of that neighbour."""
    seed: int = 0
    """Seed of scenes, questions and hidden visual tokens."""
    threads: int = 2
    """Threads that draw pictures."""
    prefetch: int = 8
    """Micro-batches that are drawn ahead."""
