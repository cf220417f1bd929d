"""Seconds per stage. What only a first call costs is counted apart, and named while it is waited for: making programs, and starting what
stays."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import jax

from gp_jax.runtime.progress import ANNOUNCING, HEART, Work, note

COMPILE = "compile"  # the stage of what only a first call costs: tracing, lowering, compiling, reading programs from the cache on disk
STAGES = ("processing", COMPILE, "look", "vision", "glimpse", "finish", "decode")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"  # with the time to read a program from the persistent cache, if it is there
MAKING = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration", COMPILE_EVENT)
READ_EVENT = "/jax/compilation_cache/cache_hits"
READING_EVENT = "/jax/compilation_cache/cache_retrieval_time_sec"
BEATS = (1.0, 30.0)  # seconds after which a first call is named
REMEMBERED = 4096  # spans of time, among which those inside a longer one are looked for


class Name:
    """What programs are made for, e.g. "vision for 1,024 patches", and the announcement of the first that takes long."""

    def __init__(self, what: str | Callable[[], str]):
        self.what = what
        self.work: Work | None = None

    def text(self) -> str:
        """The name."""
        return self.what if isinstance(self.what, str) else self.what()


class CompileWatch:
    """Counts the programs that JAX makes in this process, and the seconds that only first calls take.

    count:   programs compiled by XLA or read from the persistent cache.
    read:    those read from the persistent cache; reading: the seconds that this took.
    seconds: of tracing, lowering, compiling and reading, of the whole `call` in which they happened, and of what is done `once`.
        Work inside other work (a function traced while another one is) and work of several threads at once counts once.
    """

    def __init__(self) -> None:
        self.count, self.read, self.seconds, self.reading = 0, 0, 0.0, 0.0
        self._names = threading.local()
        self._spans: deque[tuple[float, float]] = deque(maxlen=REMEMBERED)  # (start, end), apart from each other, in order
        self._lock = threading.Lock()
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._note_read)
        jax.monitoring.register_scalar_listener(self._note_begin)

    @contextlib.contextmanager
    def naming(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Around calls of programs: while ANNOUNCING, what they are made for is printed when making them takes more than a second. A name
        inside another one is not used."""
        if not ANNOUNCING.is_set() or getattr(self._names, "name", None) is not None:
            yield
            return
        name = self._names.name = Name(what)
        try:
            yield
        finally:
            self._names.name = None
            if name.work is not None:
                HEART.remove(name.work)

    def _note_begin(self, event: str, value: float, **_: str | int) -> None:
        """JAX reports with this event that it begins to trace, to lower or to compile."""
        name = getattr(self._names, "name", None)
        if event not in MAKING or name is None or name.work is not None:
            return
        count, read = self.count, self.read

        def say(seconds: float) -> None:
            made, found = self.count - count, self.read - read
            verb = "reading kept programs of" if found and found == made else "compiling"
            note(f"{verb} {name.text()} ..." + (f" {seconds:.0f} s" if seconds > BEATS[-1] / 2 else ""))

        name.work = Work(say, BEATS)
        HEART.add(name.work)

    def _note(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.count += event == COMPILE_EVENT
        self.reading += duration_secs if event == READING_EVENT else 0.0
        if event in MAKING:
            self._add(time.perf_counter() - duration_secs)  # JAX reports a span when it ends

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around the call of a program. If the call makes anything, all of it is a first call's cost: JAX does not report what it does
        between tracing, lowering and compiling."""
        start, before = time.perf_counter(), self.seconds
        yield
        if self.seconds != before:
            self._add(start)

    @contextlib.contextmanager
    def once(self) -> Iterator[None]:
        """Around other work that later calls do not repeat."""
        start = time.perf_counter()
        yield
        self._add(start)

    def _add(self, start: float) -> None:
        """Adds the span from `start` until now. Spans that it overlaps become one with it."""
        with self._lock:
            end = time.perf_counter()
            while self._spans and self._spans[-1][1] > start:
                first, last = self._spans.pop()
                self.seconds -= last - first
                start = min(start, first)
            self._spans.append((start, end))
            self.seconds += end - start

    def _note_read(self, event: str, **_: str | int) -> None:
        self.read += event == READ_EVENT


COMPILES = CompileWatch()


@dataclass
class Clock:
    """Stage timings. When enabled it waits for the device at every lap; otherwise it does nothing."""

    enabled: bool = False
    seconds: dict[str, float] = field(default_factory=dict)
    on_lap: Callable[[str], None] | None = None  # told the name of every stage that ends

    def __post_init__(self) -> None:
        if self.enabled:
            self.seconds |= dict.fromkeys(STAGES, 0.0)
        self._last, self._compiled = time.perf_counter(), COMPILES.seconds

    def lap(self, stage: str, result: object = None) -> None:
        """Adds the time since the last lap to `stage`, and what of it only a first call costs to "compile".

        A program's first run is slower than later ones even so: where "compile" is above 0, the other stages are upper bounds.
        Args: result: arrays to wait for.
        """
        if not self.enabled:
            return
        jax.block_until_ready(result)
        now, compiled = time.perf_counter(), COMPILES.seconds
        compiling = compiled - self._compiled
        self.seconds[stage] = self.seconds.get(stage, 0.0) + max(0.0, now - self._last - compiling)
        self.seconds[COMPILE] = self.seconds.get(COMPILE, 0.0) + compiling
        self._last, self._compiled = now, compiled
        if self.on_lap:
            self.on_lap(stage)
