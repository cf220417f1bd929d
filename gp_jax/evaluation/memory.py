"""Peak memory of a plan's answers, where the platform can measure it per plan."""

import ctypes
import resource
import sys
from pathlib import Path

import jax


class Peak:
    """Measures the peak memory from its creation on.

    This is device memory if the device reports it, else the resident set of this process, which includes weights, compiled programs and
    everything allocated before. Linux can reset a process's peak. Where a peak cannot be reset, it is only known if the plan raises it.
    """

    def __init__(self) -> None:
        self._device = "peak_bytes_in_use" in _device()
        self._fresh = not self._device and _forget()
        self._before = 0 if self._fresh else self._now()

    def bytes(self) -> int | None:
        """The peak since the start in bytes; None if an earlier peak was higher."""
        now = self._now()
        return now if now > self._before else None

    def _now(self) -> int:
        return int(_device()["peak_bytes_in_use"]) if self._device else _resident()


def _device() -> dict:
    return jax.local_devices()[0].memory_stats() or {}


def _forget() -> bool:
    """Returns free memory to the system and resets the peak to the resident memory. Returns: whether the system supports it."""
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
