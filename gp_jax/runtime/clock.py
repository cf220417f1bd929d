"""Seconds per stage, compilation booked apart."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import jax

STAGES = ("processing", "compile", "vision", "glimpse", "finish", "decode")
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
READ_EVENT = "/jax/compilation_cache/cache_hits"


class CompileWatch:
    """Counts programs that XLA compiles and the seconds it takes, in this process, from the first use on; `read`: those of them that were
    found compiled in the persistent cache."""

    def __init__(self) -> None:
        self.count, self.read, self.seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._note)
        jax.monitoring.register_event_listener(self._note_read)

    def _note(self, event: str, duration: float, **_: object) -> None:
        if event == COMPILE_EVENT:
            self.count += 1
            self.seconds += duration

    def _note_read(self, event: str, **_: object) -> None:
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
        """Books the time since the last lap on `stage`, and what of it was compilation on "compile"."""
        if not self.enabled:
            return
        jax.block_until_ready(result)
        now, compiled = time.perf_counter(), COMPILES.seconds
        compiling = compiled - self._compiled
        self.seconds[stage] = self.seconds.get(stage, 0.0) + max(0.0, now - self._last - compiling)
        self.seconds["compile"] = self.seconds.get("compile", 0.0) + compiling
        self._last, self._compiled = now, compiled
        if self.on_lap:
            self.on_lap(stage)
