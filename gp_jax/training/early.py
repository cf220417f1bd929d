"""SIGTERM before there is anything to save: while JAX is imported, and until the loop listens itself."""

import contextlib
import os
import signal
from collections.abc import Iterator


def stop_early(*_: object) -> None:
    """Ends the process well: a preempted run that has not begun has lost nothing."""
    os.write(2, b"train.py: stopped before the first step\n")
    os._exit(0)


@contextlib.contextmanager
def early_stops() -> Iterator[None]:
    """SIGTERM ends the process well inside, unless somebody else takes the signal over."""
    old = signal.signal(signal.SIGTERM, stop_early)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if old is None else old)


def no_early_stops() -> None:
    """From here on the signal is what it always is."""
    if signal.getsignal(signal.SIGTERM) is stop_early:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
