"""`export.json`, the file that describes an exported program: how it is written and read."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from gp_jax.ahead.artifact.names import FACTS
from gp_jax.buckets import Ladder, Ladders
from gp_jax.config.schema import Several
from gp_jax.errors import GlimpseError, some
from gp_jax.pretrained.fields import read
from gp_jax.pruning.look import Look
from gp_jax.pruning.rule import Prune
from gp_jax.runtime.disk import read_json

BUCKETS = ("batch", "patches", "prompt", "kept")
LARGEST = 1 << 21  # most rows of a whole batch: inputs have the size of the largest buckets, and a file may give any size
Rung = Annotated[int, Field(ge=1, le=LARGEST)]


@dataclass(frozen=True)
class ExportFacts:
    """The file's fields. prune: fields of the keep rule, None for a dense program; buckets: rungs of its ladders; others: see
    `ExportSettings`."""

    glimpse: bool
    plan: str
    prune: dict[str, Any] | None
    buckets: dict[str, Annotated[list[Rung], Field(min_length=1, max_length=256)]]
    max_new_tokens: Rung = 1
    model: str = ""
    dtype: str = ""
    attention: str = ""
    platforms: Several[str] = ()
    gp_jax: str = ""
    jax: str = ""


def described(rule: Prune | None, buckets: Ladders, **facts: Any) -> dict[str, Any]:
    """The content of the file."""
    rungs = {name: list(getattr(buckets, name).rungs) for name in BUCKETS}
    return dataclasses.asdict(ExportFacts(prune=dataclasses.asdict(rule) if rule else None, buckets=rungs, **facts))


def read_facts(folder: Path) -> tuple[ExportFacts, Prune | None, Ladders]:
    """Reads the file of a folder. Returns: its fields, its keep rule and its ladders. Raises: GlimpseError that names file and field."""
    path = folder / FACTS
    found = read_json(path)
    facts = read(ExportFacts, found, str(path))
    unknown = [
        *(found.keys() - _names(ExportFacts)),
        *(facts.buckets.keys() - _names(Ladders)),
        *((facts.prune or {}).keys() - _names(Prune)),
    ]
    if unknown:
        raise GlimpseError(f"{path}: {some(unknown)} is not known")
    if missing := [name for name in BUCKETS if name not in facts.buckets]:
        raise GlimpseError(f"{path}: buckets: {some(missing)} is missing")
    try:
        ladders = Ladders(**{name: Ladder(name, tuple(rungs)) for name, rungs in facts.buckets.items()})
        for name in ("patches", "prompt"):
            if ladders.batch.rungs[-1] * getattr(ladders, name).rungs[-1] > LARGEST:
                raise GlimpseError(f"buckets: {name} of the whole batch of {ladders.batch.rungs[-1]} are more than {LARGEST}")
        return facts, None if facts.prune is None else _rule(facts.prune), ladders
    except GlimpseError as error:
        raise GlimpseError(f"{path}: {error}") from error


def _rule(fields: dict[str, Any]) -> Prune:
    """A keep rule from its fields. Raises: GlimpseError that names one."""
    look = fields.get("look")
    if look is None:
        return Prune(**fields)
    if not isinstance(look, dict) or (unknown := look.keys() - _names(Look)):
        raise GlimpseError(f"prune.look: {some(unknown) if isinstance(look, dict) else 'a look'} is not known")
    return Prune(**fields | {"look": Look(**look)})


def _names(kind: type) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
