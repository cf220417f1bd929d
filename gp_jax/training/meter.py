"""Means of metrics and speeds between two log lines."""

import time
from typing import Any

from gp_jax.runtime.clock import COMPILES


class Meter:
    """Means of metrics and speeds between two log lines. Time spent on compiling, validation and saving does not count."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all steps."""
        self.steps, self.samples, self.tokens, self.rate, self.paused = 0, 0, 0, 0.0, 0.0
        self.sums: dict[str, float] = {}
        self.start, self.compiled = time.perf_counter(), COMPILES.seconds

    def add(self, metrics: dict[str, float]) -> None:
        """Adds the metrics of a step."""
        self.steps, self.rate = self.steps + 1, metrics["learning_rate"]
        self.sums = {name: self.sums.get(name, 0.0) + value for name, value in metrics.items()}

    def seconds(self) -> float:
        """Training time since the last log line, in seconds."""
        compiling = COMPILES.seconds - self.compiled
        return max(time.perf_counter() - self.start - self.paused - compiling, 1e-9)

    def read(self) -> dict[str, float]:
        """Means of the metrics, and samples and tokens per second."""
        means = {name: value / self.steps for name, value in self.sums.items()}
        means["learning_rate"] = self.rate
        return means | {"samples_per_s": self.samples / self.seconds(), "tokens_per_s": self.tokens / self.seconds()}

    def state(self) -> dict[str, Any]:
        """The metrics since the last log line as JSON values, so that a resumed run writes the same next line."""
        return {"steps": self.steps, "samples": self.samples, "tokens": self.tokens, "sums": self.sums, "seconds": self.seconds()}

    def go_on(self, state: dict[str, Any]) -> None:
        """Continues from the value of `state`."""
        self.clear()
        self.steps, self.samples, self.tokens, self.sums = state["steps"], state["samples"], state["tokens"], dict(state["sums"])
        self.paused = -state["seconds"]
