"""Mutated inputs end in a good result or one GlimpseError; see `tests.fuzz`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_mutated_inputs_end_well(monkeypatch):
    """About half a minute; the same inputs every time."""
    monkeypatch.syspath_prepend(str(ROOT))
    from tests.fuzz.registry import TARGETS
    from tests.fuzz.targets import prepare  # noqa: F401 - fills the table
    from tests.fuzz.watch import Case, failures

    cases = [Case(name, 16, number) for name, target in TARGETS.items() for number in range(10 * target.share)]
    wrong = [f"{case} {found}" for case, found in failures(cases) if found]
    assert not wrong, f"try one again: {sys.executable} -m tests.fuzz --only TARGET:SEED:NUMBER\n" + "\n".join(wrong)
