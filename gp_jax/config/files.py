"""Configuration files in Python, and what their commands share: finding and reading the file, and one line per error."""

import dataclasses
import difflib
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gp_jax.errors import GlimpseError


def given_path(argv: Sequence[str]) -> Path | None:
    """The value of --config on a command line."""
    path = None
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--config":
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
    return path


def read_config(path: Path, variable: str, kinds: tuple[type, ...]) -> Any:
    """What a file assigns to `variable`, one of these dataclasses. Raises: GlimpseError with the file and its error."""
    if not path.is_file():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else [], n=1)
        raise GlimpseError(f"--config {path}: no such file" + (f", did you mean '{path.with_name(near[0])}'?" if near else ""))
    try:
        found = runpy.run_path(str(path)).get(variable)
    except Exception as error:  # a configuration file may raise anything
        raise GlimpseError(f"--config {path}: {type(error).__name__}: {error}{_suggestion(error, kinds)}") from error
    if not isinstance(found, kinds):
        raise GlimpseError(f"--config {path}: needs {' or '.join(f'`{variable} = {kind.__name__}(...)`' for kind in kinds)}")
    return found


def _suggestion(error: Exception, kinds: tuple[type, ...]) -> str:
    """A similar field name for a misspelt one, among the fields of these dataclasses and of those that their modules import."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    known = [value for kind in kinds for value in vars(sys.modules[kind.__module__]).values() if isinstance(value, type)]
    kind = next((k for k in known if match and k.__name__ == match[1] and dataclasses.is_dataclass(k)), None)
    near = difflib.get_close_matches(match[2], [f.name for f in dataclasses.fields(kind)], n=1) if kind and match else []
    return f"; did you mean '{near[0]}'?" if near else ""


def exit_status(command: str, body: Callable[[], int]) -> int:
    """Runs a command. An error is printed as one line; GP_JAX_TRACEBACK=1 shows the traceback of an unexpected one."""
    try:
        return body()
    except GlimpseError as error:
        print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if os.environ.get("GP_JAX_TRACEBACK"):
            raise
        reason = " ".join(str(error).split())[:300]
        print(f"{command}: unexpected {type(error).__name__}: {reason} (GP_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1
