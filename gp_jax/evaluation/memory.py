"""The most memory that a plan's answers took, where the platform can tell one plan from the others."""

import ctypes
import resource
import sys
from pathlib import Path

import jax


class Peak:
    """Starts counting when it is made.

    Device memory where the device reports it, else the resident set of this process: weights, compiled programs and what was there
    before included. Linux can forget a process's peak. A peak that cannot be forgotten is a plan's own only when the plan has raised it.
    """

    def __init__(self) -> None:
        self._device = "peak_bytes_in_use" in _device()
        self._fresh = not self._device and _forget()
        self._before = 0 if self._fresh else self._now()

    def bytes(self) -> int | None:
        """At most since the start; None where an earlier peak hides it."""
        now = self._now()
        return now if now > self._before else None

    def _now(self) -> int:
        return int(_device()["peak_bytes_in_use"]) if self._device else _resident()


def _device() -> dict:
    return jax.local_devices()[0].memory_stats() or {}


def _forget() -> bool:
    """Makes the peak what is resident now, with free memory given back first. Returns: whether the system does that."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):
        return False
    return True


def _resident() -> int:
    """Peak resident set of this process in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
