"""How a command ends: one line for an error and one for Ctrl-C, and always within seconds.

Ctrl-C raises KeyboardInterrupt in the main thread, but Python can only do so between two of its own instructions: not while XLA compiles or
runs, and where it lands inside a callback of a library it is swallowed. A thread of its own therefore hears the signal too, and ends the
process when it is still there after a while. That is safe: whatever is written is renamed when it is whole, or appended line by line.
"""

import contextlib
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.progress import ANNOUNCING, note

GRACE = 4.0  # seconds that a command may take to end by itself
INTERRUPTED = 130  # exit status
NOTHING = "nothing was written"


class Interrupts:
    """What Ctrl-C finds: the command that runs, what is saved of its work, and how long it may take to end by itself."""

    def __init__(self) -> None:
        self.command, self.grace, self.told = "gp-jax", GRACE, False
        self.saved: str | Callable[[], str] = NOTHING

    def line(self) -> str:
        """What an interrupted command prints last."""
        try:
            saved = self.saved if isinstance(self.saved, str) else self.saved()
        except Exception:  # e.g. the disk, or a store, cannot be read now
            saved = "what was saved before stays"
        return f"{self.command}: interrupted; {saved}"

    def tell(self) -> None:
        """Prints it, once."""
        if not self.told:
            self.told = True
            note(self.line())

    def listen(self, fd: int) -> None:
        """Reads the numbers of signals as they arrive; a byte 0 ends it."""
        asked = 0
        while True:
            for number in os.read(fd, 16):
                if number == 0:
                    return
                if number == signal.SIGINT:
                    asked += 1
                    if asked > 1:
                        self.end()
                    threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        start = time.monotonic()
        while time.monotonic() - start < self.grace:
            time.sleep(0.05)
        self.end()

    def end(self) -> None:
        """Ends the process without asking it."""

        def speak() -> None:
            with contextlib.suppress(Exception):
                self.tell()
                sys.stdout.flush()

        speaker = threading.Thread(target=speak, daemon=True)
        speaker.start()
        speaker.join(1.0)  # whoever does not end may hold the lock of what is printed
        os._exit(INTERRUPTED)


NOW = Interrupts()  # of this process


@contextlib.contextmanager
def saving_as(saved: str | Callable[[], str], grace: float = GRACE) -> Iterator[None]:
    """Around work that can be interrupted. saved: what is saved of it and how it goes on, for the last line; grace: seconds that it may
    take to end by itself."""
    before = NOW.saved, NOW.grace
    NOW.saved, NOW.grace = saved, grace
    try:
        yield
    except KeyboardInterrupt:
        raise  # both stay as they are, for the last line
    except BaseException:
        NOW.saved, NOW.grace = before
        raise
    NOW.saved, NOW.grace = before


@contextlib.contextmanager
def listening(command: str) -> Iterator[None]:
    """Ctrl-C ends the process within seconds in this context; see above."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) in (signal.SIG_IGN, None):
        yield
        return
    NOW.command, NOW.saved, NOW.grace, NOW.told = command, NOTHING, GRACE, False
    heard, told = os.pipe()
    os.set_blocking(told, False)
    old_fd, old_hook = signal.set_wakeup_fd(told, warn_on_full_buffer=False), sys.unraisablehook
    sys.unraisablehook = lambda found: None if found.exc_type is KeyboardInterrupt else old_hook(found)
    listener = threading.Thread(target=NOW.listen, args=(heard,), daemon=True, name="gp_jax Ctrl-C")
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd)
        sys.unraisablehook = old_hook
        os.write(told, b"\0")
        listener.join()
        os.close(heard)
        os.close(told)


def exit_status(command: str, body: Callable[[], int | None]) -> int:
    """Runs a command. Returns: its exit status; 130 after Ctrl-C.

    An error is printed as one line; GP_JAX_TRACEBACK=1 shows the traceback of an unexpected one.
    """
    with contextlib.suppress(AttributeError, ValueError):  # a log file shows every line when it is printed
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    ANNOUNCING.set()
    shown, warnings.showwarning = warnings.showwarning, lambda message, *_, **__: note(f"warning: {one_line(message, 300)}")
    with listening(command):
        try:
            return body() or 0
        except GlimpseError as error:
            print(f"{command}: {' '.join(str(error).split())}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            NOW.tell()
            return INTERRUPTED
        except BrokenPipeError:  # e.g. `gp-jax configs | head`
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (Python flushes it at the end)
            return 1
        except Exception as error:
            if os.environ.get("GP_JAX_TRACEBACK"):
                raise
            print(f"{command}: unexpected {type(error).__name__}: {one_line(error, 300)} (GP_JAX_TRACEBACK=1 shows where)", file=sys.stderr)
            return 1
        finally:
            ANNOUNCING.clear()
            warnings.showwarning = shown
