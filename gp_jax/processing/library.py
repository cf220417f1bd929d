"""Calls of other packages: any error becomes a GlimpseError of one line that names the package or file at fault."""

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from gp_jax.errors import GlimpseError, one_line


def load_class(module: str, name: str) -> Any:
    """A class or function of a module (of transformers: slow to import, and it imports optional packages if they are installed).

    Raises: GlimpseError that names the package at fault.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken package may raise anything, e.g. RuntimeError from torchvision with another version of torch
        raise broken(module, error) from error


def broken(module: str, error: BaseException) -> GlimpseError:
    """An error that names the package that fails: of those that transformers may import, the one in the traceback."""
    while error.__cause__ is not None:
        error = error.__cause__
    passed = " ".join(frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__))
    optional = ("torchvision", "torch", "PIL")
    package = next((name for name in optional if f"/{name}/" in passed or name in str(error)), module.split(".")[0])
    return GlimpseError(f"the package {package} cannot be used: {type(error).__name__} while {module} was imported ({one_line(error)})")


def guarded(wrong: str, call: Callable[[], Any]) -> Any:
    """The result of a library's call. Raises: GlimpseError that begins with `wrong`, for any error of the library.

    The tokenizers library may panic. In Python that is a PanicException, which is not a subclass of Exception.
    """
    try:
        return call()
    except GlimpseError:
        raise
    except Exception as error:
        raise GlimpseError(f"{wrong} ({one_line(error)})") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GlimpseError(f"{wrong} (the tokenizers library fails: {one_line(error)})") from None
