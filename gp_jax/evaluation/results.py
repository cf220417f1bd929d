"""What plans made of samples: one line of JSON per answer."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from gp_jax.errors import GlimpseError

COMPILE = "compile"  # of `clock.STAGES`, the one that no answer is charged for


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
    seconds:           per stage of `clock.STAGES`; of a batch, this sample's share.
    cuts:              (last layer in front of a cut, visual tokens behind it), in order.
    cached:            visual tokens in the decode cache, averaged over layers; None: `kept` in every layer.
    ratio:             the share that the plan was told to keep; None: it was told none, or (older files) it is not known.
    sizes:             (width, height) of the pictures; empty in older files.
    peak:              bytes of memory at most, from the plan's first answer in this process on, `memory.Peak`; None: not known.
    """

    task: str
    sample: str
    plan: str
    question: str
    answer: str
    prediction: str
    family: str
    kept: int
    total: int
    prefill_retention: float
    metrics: dict[str, float]
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    grid: tuple[int, int] = (0, 0)
    keep: tuple[int, ...] = ()
    tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    more_grids: tuple[tuple[int, int], ...] = ()
    cuts: tuple[tuple[int, int], ...] = ()
    cached: float | None = None
    ratio: float | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    peak: int | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """Of one answer: task, sample, plan."""
        return self.task, self.sample, self.plan

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
    def time(self) -> float:
        """Seconds of all stages but compilation."""
        return sum(seconds for stage, seconds in self.seconds.items() if stage != COMPILE)

    def to_json(self) -> str:
        """One line."""
        metrics = {name: float(value) if math.isfinite(value) else None for name, value in self.metrics.items()}
        return json.dumps(vars(self) | {"metrics": metrics}, ensure_ascii=False, allow_nan=False, default=lambda x: x.tolist())

    @classmethod
    def from_json(cls, line: str) -> "Prediction":
        """Reads `to_json`'s. Raises: GlimpseError that says what is wrong with the line."""
        try:
            values = json.loads(line)
            values["metrics"] = {name: math.nan if value is None else value for name, value in values["metrics"].items()}
            values["boxes"] = tuple(tuple(box) for box in values["boxes"])
            values["cuts"] = tuple(tuple(cut) for cut in values["cuts"])
            values["grid"], values["keep"] = tuple(values["grid"]), tuple(values["keep"])
            values["more_grids"] = tuple(tuple(grid) for grid in values.get("more_grids", ()))
            values["sizes"] = tuple(tuple(size) for size in values.get("sizes", ()))
            values.setdefault("ratio", None)
            values.setdefault("peak", None)
            return cls(**{name: values[name] for name in (f.name for f in fields(cls))})
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise GlimpseError(f"not a prediction ({type(error).__name__}: {error}): {line[:80]!r}") from error


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Appends a line each, as soon as there is one. A last line that a killed run left half-written goes."""
    with path.open("ab+") as file:
        if end := file.tell():
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
        for prediction in predictions:
            file.write(prediction.to_json().encode("utf-8", "backslashreplace") + b"\n")
            file.flush()


def read_predictions(path: Path) -> list[Prediction]:
    """Reads them back, without a half-written last line; of a sample that a plan answered twice, the later answer counts.

    Raises: GlimpseError that names file and line.
    """
    return [prediction for _, prediction in _numbered(path).values()]


def line_numbers(path: Path) -> dict[tuple[str, str, str], int]:
    """Where they stand, from 1, by `Prediction.key`. Raises: as `read_predictions`."""
    return {key: number for key, (number, _) in _numbered(path).items()}


def _numbered(path: Path) -> dict[tuple[str, str, str], tuple[int, Prediction]]:
    found = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            prediction = Prediction.from_json(line.decode("utf-8", "replace"))
        except GlimpseError as error:
            raise GlimpseError(f"{path}:{number}: {error}") from error
        found[prediction.key] = number, prediction
    return found


def part_path(path: Path, process: int) -> Path:
    """The file that a process appends to: `path` itself for the first."""
    return path.with_name(f"{path.stem}-{process}{path.suffix}") if process else path


def read_parts(path: Path) -> list[Prediction]:
    """Predictions of all processes' files, as `read_predictions`."""
    found = {p.key: p for part in _parts(path) for p in read_predictions(part)}
    return list(found.values())


def merge_predictions(path: Path) -> None:
    """Brings the files of several processes into one. May be interrupted and repeated."""
    parts = _parts(path)
    if any(part != path for part in parts):
        scratch = path.with_name(f".{path.name}.partial")
        scratch.unlink(missing_ok=True)
        write_predictions(scratch, read_parts(path))
        scratch.replace(path)
        for part in parts:
            if part != path:
                part.unlink()


def _parts(path: Path) -> list[Path]:
    others = [part for part in path.parent.glob(f"{path.stem}-*{path.suffix}") if part.stem.rpartition("-")[2].isdecimal()]
    return [part for part in (path, *sorted(others)) if part.exists()]
