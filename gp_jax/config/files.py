"""Configuration files in Python: finding them by name or path, and reading them."""

import ast
import dataclasses
import difflib
import importlib.util
import re
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gp_jax.errors import GlimpseError

PACKAGE = "configs"  # the name by which configurations import one another
USES = {"train": "gp-jax train", "evaluation": "gp-jax eval", "ask": "gp-jax ask"}  # variable of a configuration -> who reads it


def home() -> Path:
    """The folder of the configurations that come with gp_jax: inside an installed package, at the top of a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / PACKAGE
    return installed if installed.is_dir() else package.parent / PACKAGE


def shipped() -> list[Path]:
    """The configurations that come with gp_jax, by name."""
    return sorted(path for path in home().glob("*.py") if path.stem != "__init__")


def given_path(argv: Sequence[str]) -> Path | None:
    """The value of --config on a command line."""
    path = None
    for i, word in enumerate(argv):
        name, _, value = word.partition("=")
        if name == "--config":
            path = Path(value or (argv[i + 1] if i + 1 < len(argv) else ""))
    return path


def find_config(given: Path) -> Path:
    """The file of a path, or of the name of a configuration that comes with gp_jax: NAME, NAME.py or configs/NAME.py, from any folder.

    Raises: GlimpseError that names a similar one.
    """
    if given.is_file():
        return given
    own = home() / given.with_suffix(".py").name
    if str(given.parent) in (".", PACKAGE) and given.suffix in ("", ".py") and own.is_file():
        return own
    here = [p.name for p in given.parent.glob("*.py")] if given.parent.is_dir() else []
    if near := difflib.get_close_matches(given.name, here, n=1):
        raise GlimpseError(f"--config {given}: no such file, did you mean '{given.with_name(near[0])}'?")
    near = difflib.get_close_matches(given.stem, [path.stem for path in shipped()], n=1)
    meant = f"did you mean '{near[0]}'?" if near else "`gp-jax configs` lists the names that are known everywhere"
    raise GlimpseError(f"--config {given}: no such file, {meant}")


def read_config(given: Path, variable: str, kinds: tuple[type, ...]) -> Any:
    """What a file assigns to `variable`, one of these types. A file that does not assign it is not executed.

    Raises: GlimpseError with the file and its error.
    """
    path = find_config(given)
    try:
        bound = set(_bound(ast.parse(path.read_text(encoding="utf-8"), str(path))))
    except (OSError, ValueError, SyntaxError) as error:
        raise GlimpseError(f"--config {given}: {type(error).__name__}: {error}") from error
    others = [command for name, command in USES.items() if name in bound and name != variable]
    if not bound & {variable, "*"} and others:
        raise GlimpseError(f"--config {given}: is a configuration of {others[0]}, not of {USES[variable]}")
    if not bound & {variable, "*"}:
        raise GlimpseError(f"--config {given}: {_needs(variable, kinds)}")
    _import_as_package()
    try:
        found = runpy.run_path(str(path)).get(variable)
    except Exception as error:  # a configuration file may raise anything
        raise GlimpseError(f"--config {given}: {type(error).__name__}: {error}{_suggestion(error, kinds)}") from error
    if not isinstance(found, kinds):
        raise GlimpseError(f"--config {given}: {_needs(variable, kinds)}")
    return found


def _needs(variable: str, kinds: tuple[type, ...]) -> str:
    return f"needs {' or '.join(f'`{variable} = {kind.__name__}(...)`' for kind in kinds)}"


def _bound(node: ast.AST) -> Iterator[str]:
    """Names that a file's own statements bind, those inside its functions and classes left out; "*" for names that are not written down."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif isinstance(child, ast.alias):
            yield child.asname or child.name
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in ("globals", "vars", "locals", "exec"):
            yield "*"
        yield from _bound(child)


def _import_as_package() -> None:
    """Makes `from configs.NAME import ...` find the configurations that come with gp_jax, whatever folder this is."""
    known = sys.modules.get(PACKAGE)
    if known is not None and getattr(known, "__file__", None) == str(home() / "__init__.py"):
        return
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    spec = importlib.util.spec_from_file_location(PACKAGE, home() / "__init__.py", submodule_search_locations=[str(home())])
    assert spec is not None and spec.loader is not None, "a file"
    sys.modules[PACKAGE] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def _suggestion(error: Exception, kinds: tuple[type, ...]) -> str:
    """A similar field name for a misspelt one, among the fields of these dataclasses and of those that their modules import."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    known = [value for kind in kinds for value in vars(sys.modules[kind.__module__]).values() if isinstance(value, type)]
    kind = next((k for k in known if match and k.__name__ == match[1] and dataclasses.is_dataclass(k)), None)
    near = difflib.get_close_matches(match[2], [f.name for f in dataclasses.fields(kind)], n=1) if kind and match else []
    return f"; did you mean '{near[0]}'?" if near else ""
