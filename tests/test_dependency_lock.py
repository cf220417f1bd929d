"""The lock file of the development environment against pyproject.toml: what `make lock` would be needed for."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
LINES = [line for line in (ROOT / "requirements-dev.lock").read_text().splitlines() if line and not line.startswith("#")]
LOCKED = {canonicalize_name(found.name): found for found in map(Requirement, LINES)}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def asked() -> Iterator[Requirement]:
    """What `make test` installs: to build the project, to run it, and the extra `dev` with the extras that it names."""
    yield from map(Requirement, PROJECT["build-system"]["requires"])
    yield from map(Requirement, PROJECT["project"]["dependencies"])
    extras = ["dev"]
    for extra in extras:
        for found in map(Requirement, PROJECT["project"]["optional-dependencies"][extra]):
            if found.name == "gp_jax":
                extras += sorted(found.extras)  # a set: every worker must collect the same order
            else:
                yield found


@pytest.mark.parametrize("wanted", list(asked()), ids=str)
def test_the_lock_holds_a_version_of_every_range(wanted):
    found = LOCKED[canonicalize_name(wanted.name)]
    (pinned,) = found.specifier
    assert pinned.operator == "==" and wanted.specifier.contains(pinned.version, prereleases=True)
    for system in ("linux", "darwin"):
        for python in ("3.11", "3.12", "3.13", "3.14"):
            machine = default_environment() | {"sys_platform": system, "platform_machine": "x86_64", "python_version": python}
            machine["python_full_version"] = f"{python}.0"
            needed = wanted.marker is None or wanted.marker.evaluate(machine)
            assert not needed or found.marker is None or found.marker.evaluate(machine), f"{system}, Python {python}"


def test_the_lock_is_for_every_machine():
    """Names and versions alone, each once: no index, no path, no build for one kind of processor (torch's `+cpu`)."""
    assert len(LOCKED) == len(LINES)
    for line in LINES:
        assert re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*( ; [^#@/]+)?", line), line
