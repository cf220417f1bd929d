"""Means of metrics and speeds between two log lines."""

import time
from typing import Any

from gp_jax.runtime.clock import COMPILES


class Meter:
    """Means of metrics and speeds between two log lines. Time spent on compiling, validation and saving does not count."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Starts anew."""
        self.steps, self.samples, self.tokens, self.rate, self.paused = 0, 0, 0, 0.0, 0.0
        self.sums: dict[str, float] = {}
        self.start, self.compiled = time.perf_counter(), COMPILES.seconds

    def add(self, metrics: dict[str, float]) -> None:
        """One step."""
        self.steps, self.rate = self.steps + 1, metrics["learning_rate"]
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()}

    def seconds(self) -> float:
        """Training time so far."""
        compiling = COMPILES.seconds - self.compiled
        return max(time.perf_counter() - self.start - self.paused - compiling, 1e-9)

    def read(self) -> dict[str, float]:
        """Means and speeds."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        means["learning_rate"] = self.rate
        return means | {"samples_per_s": self.samples / self.seconds(), "tokens_per_s": self.tokens / self.seconds()}

    def state(self) -> dict[str, Any]:
        """The steps since the last log line, as JSON values: a resumed run's next line is that of one that was never stopped."""
        return {"steps": self.steps, "samples": self.samples, "tokens": self.tokens, "sums": self.sums, "seconds": self.seconds()}

    def go_on(self, state: dict[str, Any]) -> None:
        """From what `state` returned."""
        self.clear()
        self.steps, self.samples, self.tokens, self.sums = state["steps"], state["samples"], state["tokens"], dict(state["sums"])
        self.paused = -state["seconds"]
