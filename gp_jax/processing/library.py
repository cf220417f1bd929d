"""Calls of other people's packages: whatever they raise becomes one line that says whose fault it is."""

import importlib
import traceback
from collections.abc import Callable
from typing import Any

from gp_jax.errors import GlimpseError, one_line


def load_class(module: str, name: str) -> Any:
    """A class or function of a module, here of transformers: it is slow to import, and imports optional packages that are installed.

    Raises: GlimpseError that names the package at fault.
    """
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # a broken package raises whatever it comes to: RuntimeError from torchvision beside another torch
        raise broken(module, error) from error


def broken(module: str, error: BaseException) -> GlimpseError:
    """Which package fails: of those that transformers imports where they are installed, the one whose code the error passed."""
    while error.__cause__ is not None:
        error = error.__cause__
    passed = " ".join(frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__))
    optional = ("torchvision", "torch", "PIL")
    package = next((name for name in optional if f"/{name}/" in passed or name in str(error)), module.split(".")[0])
    return GlimpseError(f"the package {package} cannot be used: {type(error).__name__} while {module} was imported ({one_line(error)})")


def guarded(wrong: str, call: Callable[[], Any]) -> Any:
    """What a library's call gives. Raises: GlimpseError that begins with `wrong`, for whatever the library raises.

    The tokenizers library may panic. Python sees that as a PanicException, which is no subclass of Exception.
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
