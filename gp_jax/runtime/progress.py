"""What long work says: a bar on a terminal; elsewhere (a log file, nohup, CI) a plain line every so often."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, TypeVar

from tqdm import tqdm

from gp_jax.errors import printable

T = TypeVar("T")
BEATS = (2.0, 10.0, 30.0)  # seconds after the start of some work at which it says something; from the last one on, every EVERY
EVERY = 30.0
ANNOUNCING = threading.Event()  # set while first calls are named; commands set it, and `from_pretrained(progress=True)`


def announce(wanted: bool = True) -> None:
    """Has first calls named from now on, if it is wanted."""
    if wanted:
        ANNOUNCING.set()


def note(line: str) -> None:
    """Prints lines on standard error, above a bar if there is one."""
    tqdm.write("\n".join(map(printable, line.split("\n"))), file=sys.stderr)
    sys.stderr.flush()


class Work:
    """Work that says something from time to time. say: called with its seconds; beats: see BEATS; the last one repeats after EVERY."""

    def __init__(self, say: Callable[[float], None], beats: tuple[float, ...] | None = None):
        self.say, self.beats = say, BEATS if beats is None else beats
        self.start, self.said = time.monotonic(), 0

    def due(self) -> float:
        """When it says something next, on the monotonic clock."""
        over = self.said - len(self.beats) + 1
        return self.start + (self.beats[self.said] if over <= 0 else self.beats[-1] + over * EVERY)


class Heart:
    """The thread that lets work speak. It lives while there is any."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None

    def add(self, work: Work) -> None:
        """Lets work speak from now on."""
        with self.changed:
            self.work.append(work)
            if self.thread is None or not self.thread.is_alive():
                self.thread = threading.Thread(target=self._beat, daemon=True, name="gp_jax progress")
                self.thread.start()
            self.changed.notify()

    def remove(self, work: Work) -> None:
        """Ends it. What it is just saying is said to its end."""
        with self.changed, contextlib.suppress(ValueError):
            self.work.remove(work)

    def _beat(self) -> None:
        while True:
            with self.changed:
                now = time.monotonic()
                for work in self.work:
                    if work.due() <= now:
                        work.said += 1
                        with contextlib.suppress(OSError, ValueError):  # standard error was closed
                            work.say(now - work.start)
                self.changed.wait(min((work.due() for work in self.work), default=now + EVERY) - now)


HEART = Heart()


@contextlib.contextmanager
def speaking(say: Callable[[float], None], beats: tuple[float, ...] | None = None) -> Iterator[Work]:
    """Work that is announced while it lasts; see `Work`."""
    work = Work(say, beats)
    HEART.add(work)
    try:
        yield work
    finally:
        HEART.remove(work)


def waiting(what: str) -> contextlib.AbstractContextManager[Work]:
    """Work without steps, which is named when it takes long."""
    return speaking(lambda seconds: note(f"{what} ..." + (f" {seconds:.0f} s" if seconds > BEATS[1] / 2 else "")))


class Progress(tqdm):
    """A progress bar on a terminal. Elsewhere lines such as

        training: 120 of 500 steps (24%), 3.2 steps/s, 1:58 left, loss 0.41

    also while a single step lasts long, and one when it ends, if anything was said before and counted. While work inside it is shown too,
    that alone speaks. Arguments are those of tqdm.
    """

    work: Work | None = None
    speaking: ClassVar[list["Progress"]] = []  # those without a terminal, the innermost last

    def __init__(self, *args: Any, **options: Any):
        """disable: True shows nothing; None is False."""
        file, options["disable"] = options.get("file") or sys.stderr, bool(options.get("disable"))
        self.plain = not getattr(file, "isatty", lambda: False)()
        super().__init__(*args, **options)
        if self.plain and not self.disable:
            self.work = Work(lambda _: self.tell() if any(bar is self for bar in self.speaking[-1:]) else None)
            self.speaking.append(self)
            HEART.add(self.work)

    def display(self, *args: Any, **options: Any) -> Any:
        """Draws the bar; plain lines come in their own time."""
        return True if self.plain else super().display(*args, **options)

    def clear(self, *args: Any, **options: Any) -> None:
        """Clears the bar; there is nothing to clear where there is none."""
        if not self.plain:
            super().clear(*args, **options)

    def tell(self, ended: bool = False) -> None:
        """Prints the plain line."""
        self.fp.write(printable(self.sentence(ended)) + "\n")
        self.fp.flush()

    def sentence(self, ended: bool = False) -> str:
        """What the plain line says."""
        facts = self.format_dict
        n, total, elapsed, rate = facts["n"], facts["total"], facts["elapsed"], facts["rate"]
        new = n - facts["initial"]
        rate = rate or (new / elapsed if new and elapsed else None)
        unit = facts["unit"] if facts["unit"] != "it" else "step"
        said = [f"{n:,} of {total:,} {unit}s ({n / total:.0%})" if total else f"{n:,} {unit}s" if n else ""]
        if rate and not ended and n != total:
            said.append(f"{rate:.3g} {unit}s/s" if rate >= 1 else f"{1 / rate:.3g} s/{unit}")
            if total:
                said.append(f"{self.format_interval((total - n) / rate)} left")
        elif elapsed:
            said.append(f"{'took ' if ended else ''}{self.format_interval(elapsed)}")
        said.append((facts["postfix"] or "").strip())
        return f"{(self.desc or 'working').removesuffix(': ')}: {', '.join(filter(None, said))}"

    def __exit__(self, kind: Any, *error: Any) -> None:
        if kind is not None and self.work is not None:
            self.work.said = 0  # no last line: the error, or the interrupt, has its own
        super().__exit__(kind, *error)

    def close(self) -> None:
        """Ends it."""
        work, self.work = self.work, None
        if work is not None:
            HEART.remove(work)
            self.speaking[:] = [bar for bar in self.speaking if bar is not self]  # tqdm compares bars by their place
            if work.said and not self.disable and (self.total or self.n):  # what counts nothing names stages: the last is not all of it
                self.tell(ended=True)
        if not self.plain:
            super().close()
        elif not self.disable:
            self.disable = True
            self._decr_instances(self)  # type: ignore[attr-defined]


def bar(label: str, unit: str, progress: bool) -> Callable[[list[T]], Iterable[T]]:
    """What shows how far work on a list is."""
    return lambda items: Progress(items, desc=label, unit=unit, disable=not progress)
