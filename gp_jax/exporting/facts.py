"""`export.json`: what an exported program is, written and read in one place."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gp_jax.buckets import Ladder, Ladders
from gp_jax.disk import read_json
from gp_jax.errors import GlimpseError, one_line, some
from gp_jax.exporting.layout import FACTS
from gp_jax.glimpse.select import Prune
from gp_jax.schema import checked

BUCKETS = ("batch", "patches", "prompt", "kept")
LARGEST = 1 << 21  # rows of a whole batch: inputs are made at the size of the last buckets, whatever a file says that is
Rung = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class Facts:
    """The file's fields. prune: the keep rule's, None for a dense program; buckets: rungs of its ladders; others are as in `Program`."""

    gp_jax: str
    jax: str
    model: str
    glimpse: bool
    dtype: str
    plan: str
    prune: dict[str, Any] | None
    buckets: dict[str, Annotated[list[Rung], Field(min_length=1, max_length=256)]]
    max_new_tokens: Rung
    platforms: list[str]
    attention: str


def described(rule: Prune | None, buckets: Ladders, **facts: Any) -> dict[str, Any]:
    """The file's content."""
    rungs = {name: list(getattr(buckets, name).rungs) for name in BUCKETS}
    return dataclasses.asdict(Facts(prune=rule and dataclasses.asdict(rule), buckets=rungs, **facts))


def read_facts(folder: Path) -> tuple[Facts, Prune | None, Ladders]:
    """The file of a folder, and what its fields `prune` and `buckets` stand for. Raises: GlimpseError that names file and field."""
    path = folder / FACTS
    found, names = read_json(path), [field.name for field in dataclasses.fields(Facts)]
    _same_names(str(path), found, names)
    facts = checked(Facts(**found), str(path))
    _same_names(f"{path}: buckets", facts.buckets, BUCKETS)
    _same_names(f"{path}: prune", facts.prune or {}, [field.name for field in dataclasses.fields(Prune)] if facts.prune else ())
    try:
        ladders = Ladders(**{name: Ladder(name, tuple(rungs)) for name, rungs in facts.buckets.items()})
        for name in ("patches", "prompt"):
            if ladders.batch.rungs[-1] * getattr(ladders, name).rungs[-1] > LARGEST:
                raise GlimpseError(f"buckets: a batch of {ladders.batch.rungs[-1]} with so many {name} is more than {LARGEST}")
        return facts, Prune(**facts.prune) if facts.prune else None, ladders
    except (GlimpseError, TypeError, ValueError) as error:
        raise GlimpseError(f"{path}: {one_line(error)}") from error


def _same_names(where: str, found: dict[str, Any], names: Any) -> None:
    if missing := [name for name in names if name not in found]:
        raise GlimpseError(f"{where}: {some(missing)} is missing")
    if unknown := [name for name in found if name not in names]:
        raise GlimpseError(f"{where}: {some(unknown)} is not known")
