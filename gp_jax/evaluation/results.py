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
    boxes:             evidence, (x0, y0, x1, y1) as shares of the picture.
    grid, keep:        (rows, columns) of the visual tokens, and the numbers of those kept, row by row.
    tokens:            generated ones.
    seconds:           per stage of `clock.STAGES`; of a batch, this sample's share.
    cuts:              (last layer in front of a cut, visual tokens behind it), in order.
    cached:            visual tokens in the decode cache, averaged over layers; None: `kept` in every layer.
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
    cuts: tuple[tuple[int, int], ...] = ()
    cached: float | None = None

    @property
    def held(self) -> float:
        """Visual tokens in the decode cache, averaged over layers."""
        return self.kept if self.cached is None else self.cached

    def mask(self) -> np.ndarray:
        """`keep` as (rows, columns) bool."""
        mask = np.zeros(self.grid[0] * self.grid[1], bool)
        mask[list(self.keep)] = True
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
    found: dict[tuple[str, str, str], Prediction] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            prediction = Prediction.from_json(line.decode("utf-8", "replace"))
        except GlimpseError as error:
            raise GlimpseError(f"{path}:{number}: {error}") from error
        found[prediction.task, prediction.sample, prediction.plan] = prediction
    return list(found.values())
