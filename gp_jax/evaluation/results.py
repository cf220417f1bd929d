"""What plans made of samples: one line of JSON per answer."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field

from gp_jax.config.schema import Share, Size, checked
from gp_jax.errors import GlimpseError, one_line, shown
from gp_jax.evaluation.jsonl import appending, mend, read_lines
from gp_jax.runtime.clock import COMPILE
from gp_jax.runtime.disk import kind_of, parse_json, set_aside, whole, writing

Natural = Annotated[int, Field(ge=0, lt=2**31)]
Amount = Annotated[float, Field(ge=0, le=1e15)]
Measured = Annotated[float, Field(allow_inf_nan=True)]  # NaN: does not apply
MOST_TOKENS = 1 << 22  # of a sample's pictures


@dataclass(frozen=True)
class Prediction:
    """What a plan made of a sample.

    answer:            the reference.
    kept, total:       visual tokens that the last layer sees after pruning, and before.
    prefill_retention: share of the visual tokens that a decoder layer saw in prefill, averaged over layers.
    metrics:           per sample, 0..1; NaN where a metric does not apply (null in JSON), left out of means.
    boxes:             evidence in the first picture, (x0, y0, x1, y1) as shares of it.
    grid, keep:        (rows, columns) of the visual tokens, and the numbers of those kept, row by row.
    more_grids:        of a question about several pictures, the grids of the others; `keep` counts on through them.
    tokens:            generated ones.
    seconds:           per stage of `clock.STAGES`, of a pass in which no program was made; of a batch, this sample's share. "compile":
                       what passes before it took more. Only "compile" if every pass made programs; empty: not measured.
    cuts:              (last layer in front of a cut, visual tokens behind it), in order.
    cached:            visual tokens in the decode cache, averaged over layers; None: `kept` in every layer.
    ratio:             the share of this sample's visual tokens that the plan was told to keep; None: it was told none.
    sizes:             (width, height) of the pictures.
    made_from:         digest of where pictures and evidence came from; empty: not known.
    windows:           per picture, the visual tokens of each vision window that was seen; empty: pictures were seen whole.
    looked:            per picture, the (rows, columns) of visual tokens of the first look; empty: there was none.
    peak:              bytes of memory at most, since its plan's turn began, `memory.Peak`; None: not known.
    """

    task: str
    sample: str
    plan: str
    question: str
    answer: str
    prediction: str
    family: str
    kept: Natural
    total: Natural
    prefill_retention: Annotated[float, Field(ge=0, le=10)]
    metrics: dict[str, Measured]
    boxes: tuple[tuple[Share, Share, Share, Share], ...] = ()
    grid: tuple[Natural, Natural] = (0, 0)
    keep: tuple[Natural, ...] = ()
    tokens: Natural = 0
    seconds: dict[str, Amount] = field(default_factory=dict)
    more_grids: tuple[tuple[Natural, Natural], ...] = ()
    cuts: tuple[tuple[int, Natural], ...] = ()
    cached: Amount | None = None
    ratio: Share | None = None
    sizes: tuple[tuple[Size, Size], ...] = ()
    peak: Annotated[int, Field(ge=0)] | None = None
    made_from: str = ""
    windows: tuple[tuple[Natural, ...], ...] = ()
    looked: tuple[tuple[Natural, Natural], ...] = ()

    @property
    def viewed(self) -> int:
        """Visual tokens that the vision tower saw, without those of a first look."""
        return sum(map(sum, self.windows or [[rows * columns] for rows, columns in self.grids]))

    @property
    def key(self) -> tuple[str, str, str]:
        """Of one answer: task, sample, plan."""
        return self.task, self.sample, self.plan

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """Of all pictures."""
        return () if self.grid == (0, 0) else (self.grid, *self.more_grids)

    @property
    def held(self) -> float:
        """Visual tokens in the decode cache, averaged over layers."""
        return self.kept if self.cached is None else self.cached

    def mask(self) -> np.ndarray:
        """`keep` of the first picture as (rows, columns) bool."""
        mask = np.zeros(self.grid[0] * self.grid[1], bool)
        mask[[number for number in self.keep if number < mask.size]] = True
        return mask.reshape(self.grid)

    @property
    def timed(self) -> bool:
        """Whether there are times that no first call is in."""
        return bool(self.seconds.keys() - {COMPILE})

    @property
    def time(self) -> float:
        """Seconds of all stages, without what first calls took more."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != COMPILE)

    @property
    def first_calls(self) -> float:
        """Seconds that first calls took more."""
        return self.seconds.get(COMPILE, 0.0)

    def to_json(self) -> str:
        """One line."""
        metrics = {name: float(value) if math.isfinite(value) else None for name, value in self.metrics.items()}
        return json.dumps(vars(self) | {"metrics": metrics}, ensure_ascii=False, allow_nan=False, default=lambda x: x.tolist())

    @classmethod
    def from_json(cls, line: str | bytes) -> "Prediction":
        """Reads `to_json`'s. Raises: GlimpseError that says what is wrong with the line."""
        try:
            values = parse_json(line if isinstance(line, str) else line.decode("utf-8"), "the line")
            values["metrics"] = {name: math.nan if value is None else value for name, value in values["metrics"].items()}
            for name in ("grid", "keep"):
                values[name] = tuple(values[name])
            for name in ("boxes", "cuts", "more_grids", "sizes", "windows", "looked"):
                values[name] = tuple(tuple(one) for one in values[name])
            made = checked(cls(**{f.name: values[f.name] for f in fields(cls)}), "the line")
            made.check()
            return made
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise GlimpseError(f"not a prediction ({type(error).__name__}: {one_line(error)}): {shown(line[:80])}") from error

    def check(self) -> None:
        """Raises: GlimpseError when fields contradict each other."""
        tokens = sum(rows * columns for rows, columns in self.grids)
        if tokens > MOST_TOKENS:
            raise GlimpseError(f"grids of {tokens} visual tokens")
        if sum(map(sum, self.windows)) > tokens:
            raise GlimpseError("windows: more visual tokens than the grids have")
        if list(self.keep) != sorted({*self.keep}):
            raise GlimpseError("keep: numbers are not ascending")
        layers = [after for after, _ in self.cuts]
        if layers != sorted({*layers}) or min(layers, default=-1) < -1:
            raise GlimpseError("cuts: layers are not ascending")
        if wrong := [name for name, value in self.metrics.items() if not (math.isnan(value) or 0 <= value <= 1)]:
            raise GlimpseError(f"metrics: {wrong[0]} is not in 0..1")


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Appends a line each, as soon as there is one. A last line that a killed run left half-written goes.

    Raises: GlimpseError that names the file when it cannot be written.
    """
    with appending(path) as append:
        for prediction in predictions:
            append(prediction.to_json())


def read_predictions(path: Path) -> list[Prediction]:
    """Reads them back, without a half-written last line; of a sample that a plan answered twice, the later answer counts.

    Raises: GlimpseError that names file and line.
    """
    return [prediction for _, prediction in _numbered(path)[0].values()]


def line_numbers(path: Path) -> dict[tuple[str, str, str], int]:
    """Where they stand, from 1, by `Prediction.key`. Raises: as `read_predictions`."""
    return {key: number for key, (number, _) in _numbered(path)[0].items()}


def _numbered(path: Path, start: int = 0) -> tuple[dict[tuple[str, str, str], tuple[int, Prediction]], int]:
    """Lines behind the first `start` bytes with their numbers, counted from there, and where the last of them ends."""
    found = {}
    for number, line in read_lines(path, start):
        try:
            prediction = Prediction.from_json(line)
        except GlimpseError as error:
            raise GlimpseError(f"{path}:{number}: {error}") from error
        found[prediction.key] = number, prediction
        start += len(line) + 1
    return found, start


def mend_predictions(path: Path) -> list[str]:
    """Sets damaged lines of all processes' files aside, before anybody answers. Returns: what was wrong, a line per file."""
    return [said for part in _parts(path) if (said := mend(part, Prediction.from_json))]


def part_path(path: Path, process: int) -> Path:
    """The file that a process appends to: `path` itself for the first."""
    return path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path


class Saved:
    """Predictions in the files of all processes, as these grow: what was read is not read again."""

    def __init__(self, path: Path):
        self.path = path
        self._ends: dict[Path, int] = {}
        self._found: dict[tuple[str, str, str], Prediction] = {}

    def read(self) -> list[Prediction]:
        """As `read_predictions`."""
        for part in _parts(self.path):
            start = self._ends.get(part, 0)
            found, self._ends[part] = _numbered(part, start)
            self._found |= {key: prediction for key, (_, prediction) in found.items()}
        return list(self._found.values())


def merge_predictions(path: Path) -> None:
    """Brings the files of several processes into one. May be interrupted and repeated."""
    parts = _parts(path)
    if any(part != path for part in parts):
        with whole(path) as scratch:
            scratch.unlink(missing_ok=True)  # of a process that was killed: predictions are appended
            write_predictions(scratch, Saved(path).read())
        with writing(path):
            for part in parts:
                if part != path:
                    part.unlink()


def set_predictions_aside(path: Path) -> list[str]:
    """Takes all processes' files out of the way. Returns: their names now."""
    return [set_aside(part).name for part in _parts(path)]


def _parts(path: Path) -> list[Path]:
    others = [part for part in path.parent.glob(f"{path.stem}-*{path.suffix}") if part.stem.rpartition("-")[2].isdecimal()]
    return [part for part in (path, *sorted(others)) if kind_of(part)]
