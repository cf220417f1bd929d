"""How much of its tolerance every float comparison uses: `python -m pytest tests/test_goldens.py --margins`.

Compiled as users compile, not as tests do: `GP_JAX_TEST_XLA= python -m pytest ... --margins`. One process, so without `-n`.
"""

import ast
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

import numpy as np
import pytest


def first_argument(line: str) -> str:
    """Of the call that the line is; nothing for a call of several lines."""
    try:
        return ast.unparse(ast.parse(line.strip()).body[0].value.args[0])
    except SyntaxError:
        return ""


@dataclass
class Margins:
    """A pytest plugin: watches `np.testing.assert_allclose` and prints the worst use of each call by a test, over its cases."""

    worst: dict[tuple[str, int, str], tuple[float, float, str]] = field(default_factory=dict)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        name, _, case = item.name.partition("[")
        check = np.testing.assert_allclose

        def watched(found, wanted, rtol=1e-7, atol=0, **options):
            caller = sys._getframe(1)
            what = first_argument(linecache.getline(caller.f_code.co_filename, caller.f_lineno))
            difference, allowed = np.abs(np.float64(found) - np.float64(wanted)), atol + rtol * np.abs(np.float64(wanted))
            share = np.max(difference / np.maximum(allowed, np.finfo(float).tiny), initial=0.0)
            key = (f"{item.path.name}::{name}", caller.f_lineno, what)
            where = " ".join(filter(None, (case[:-1], options.get("err_msg"))))
            self.worst[key] = max(self.worst.get(key, (-1.0, 0.0, "")), (share, difference.max(initial=0.0), where))
            check(found, wanted, rtol=rtol, atol=atol, **options)

        with mock.patch.object(np.testing, "assert_allclose", watched):
            return (yield)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        for (test, _, what), (share, difference, case) in sorted(self.worst.items()):
            terminalreporter.write_line(f"{share:7.1%} of the tolerance, {difference:.1e}: {test} {what} ({case})")
