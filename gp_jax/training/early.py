"""Handles SIGTERM before there is anything to save: while JAX is imported, until the loop handles the signal itself."""

import contextlib
import os
import signal
from collections.abc import Iterator


def stop_early(*_: object) -> None:
    """Ends the process with status 0: a preempted run that has not begun loses nothing."""
    os.write(2, b"train.py: stopped before the first step\n")
    os._exit(0)


@contextlib.contextmanager
def early_stops() -> Iterator[None]:
    """SIGTERM ends the process with status 0 in this context, unless another handler is installed."""
    old = signal.signal(signal.SIGTERM, stop_early)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def no_early_stops() -> None:
    """Restores the default handling of SIGTERM."""
    if signal.getsignal(signal.SIGTERM) is stop_early:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
