"""The training loop: feed, step, log, validate, save. It saves and stops on signals and on numbers that are not finite."""

import contextlib
import json
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from gp_jax.data.feed import Placer
from gp_jax.errors import GlimpseError, printable
from gp_jax.runtime.clock import COMPILES
from gp_jax.runtime.compilation_cache import keep_compiled
from gp_jax.runtime.disk import write_text, writing
from gp_jax.runtime.exits import NOW, saving_as
from gp_jax.runtime.progress import Progress
from gp_jax.sharding import has_others, start_processes
from gp_jax.training.base_settings import BaseConfig
from gp_jax.training.build import plain
from gp_jax.training.checkpoint import Checkpoints, run_folder
from gp_jax.training.early import no_early_stops
from gp_jax.training.meter import Meter
from gp_jax.training.places import alone, find_places
from gp_jax.training.plus.settings import PlusConfig
from gp_jax.training.run_log import RunLog, environment, memory_gib
from gp_jax.training.settings import TrainConfig
from gp_jax.training.stages import Stage, build_stage

STEP_GRACE, SAVE_GRACE = 10.0, 120.0  # seconds that Ctrl-C leaves to a step, and to a checkpoint that is being written
LAG = 2  # newest steps whose metrics are not read yet, so that the host never waits for the device


def say(message: str) -> None:
    """Prints lines above the progress bar, in the first process."""
    if jax.process_index() == 0:
        tqdm.write("\n".join(map(printable, message.split("\n"))))


def bar(items: Iterable, what: str, total: int | None = None) -> Iterable:
    """A progress bar in the first process."""
    return Progress(items, desc=what, total=total, leave=False, disable=jax.process_index() != 0)


class Stop:
    """Records SIGTERM (preemption) and SIGINT; a second signal ends the process at once. All processes stop at the same step."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.stepping = False  # before the first step there is nothing to save: Ctrl-C ends the process as it ends any other
        self.asked = 0  # number of calls of `now`, which is the same in all processes

    def __enter__(self) -> "Stop":
        # With several processes JAX's preemption notice handles SIGTERM: it makes them agree on a step. SIGINT may reach only one
        # of them, so it keeps its default effect there.
        self.together = jax.process_count() > 1
        if not self.together:
            no_early_stops()
        self.old = {} if self.together else {s: signal.signal(s, self._note) for s in self.SIGNALS}
        return self

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGINT and not self.stepping:
            raise KeyboardInterrupt
        self.signal = number
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def __exit__(self, *_: object) -> None:
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def now(self) -> bool:
        """Whether to stop here. All processes must call this equally often: they agree on the number of the call at which to stop."""
        self.asked += 1
        if self.together and self.signal is None and multihost_utils.reached_preemption_sync_point(self.asked):
            self.signal = signal.SIGTERM
        return self.signal is not None


class Loop:
    """Takes one run from its newest checkpoint to its end."""

    def __init__(self, stage: Stage):
        self.stage, self.run, self.config = stage, stage.run, stage.run.config
        run = stage.run
        self.folder = run_folder(run.config.out)
        self.checkpoints = Checkpoints(self.folder / "checkpoints", run.identity, run.config.keep, say)
        self.state, self.gathered = run.step.start()
        self.waiting: deque[tuple[int, dict[str, jax.Array]]] = deque()
        self.meter, self.owed = Meter(), False  # owed: whether a validation is due that was not finished

    def start(self) -> int:
        """Restores the newest checkpoint and writes configuration and environment of the run. Returns: the step to continue from."""
        found = self.checkpoints.restore(self.state)
        step = found.step if found else 0
        if found is not None:
            self.state = found.state
            say(f"going on from step {found.step} of {self.run.steps} in {self.folder}")
        if jax.process_index() == 0:
            with writing(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / "config.json", json.dumps(plain(self.config) | {"resolved": self.run.identity}, indent=2) + "\n")
            write_text(self.folder / "environment.json", json.dumps(environment() | {"from_step": step}, indent=2) + "\n")
        # A run that was stopped before the end of a validation that was due starts with this validation.
        self.owed = found is not None and self.due(step) and not (found.rated or found.facts.get("validated"))
        self.log = RunLog(self.folder, step, say, again="validation" if self.owed else None)
        if found is not None and "window" in found.facts:
            self.meter.go_on(found.facts["window"])
        else:
            self.meter.clear()
        return step

    def go(self, stop: Stop) -> int | None:
        """Trains. Returns: the signal that stopped it, None at the end."""
        step = self.start()
        stop.stepping = True
        try:
            with saving_as(self.saved, STEP_GRACE):
                step = self.train(step, stop)
        except Exception:
            for part in (self.checkpoints, self.log):  # pending writes are still finished; their own errors would hide the first one
                with contextlib.suppress(Exception):
                    part.close()
            raise
        self.checkpoints.close()
        self.log.close()
        return stop.signal if step < self.run.steps or self.owed else None

    def saved(self) -> str:
        """What an interrupted run leaves."""
        steps = self.checkpoints.steps()
        return (f"step {steps[0]} is saved in {self.folder}" if steps else "no step is saved yet") + "; the same command goes on"

    def train(self, step: int, stop: Stop) -> int:
        """Takes steps from `step` to the end or a signal. Returns: the number of steps that are done."""
        if self.owed and (loss := self.validate(step, stop)) is not None:
            self.checkpoints.rate(step, loss)
        feed, accumulation = self.run.feed, self.config.accumulation
        batches = feed.load(step * accumulation, self.run.steps * accumulation)
        place = Placer(self.run.mesh, self.config.batch_size)
        quiet = jax.process_index() != 0
        progress = Progress(total=self.run.steps, initial=step, desc="training", unit="step", disable=quiet)
        with progress:
            self.progress = progress
            while step < self.run.steps and stop.signal is None:
                if not self.advance(step, batches, place, stop):
                    break
                samples, tokens = feed.sizes(step)
                self.meter.samples, self.meter.tokens = self.meter.samples + samples, self.meter.tokens + tokens
                step += 1
                due = step % self.config.log_every == 0 or step == self.run.steps
                self.collect(0 if due else LAG)
                if due:
                    self.write(step)
                progress.update()
                stop.now()
                self.rest(step, stop)
        self.collect(0)
        self.save(step, wait=True)
        return step

    def advance(self, step: int, batches: Iterator, place: Placer, stop: Stop) -> bool:
        """One step. Returns: whether it was taken: a signal may end it early."""
        if self.stage.take is not None:
            taken = self.stage.take(
                self.state, self.gathered, step, batches, self.progress.set_description, lambda: stop.signal is not None
            )
            if taken is None:
                return False
            self.state, self.gathered, metrics = taken
            self.waiting.append((step, metrics))
            return True
        counts = self.run.feed.counts(step)
        for _ in range(self.config.accumulation):
            loaded = next(batches)
            self.gathered = self.run.step.accumulate(self.gathered, self.state, place(loaded.batch, loaded.rows), counts)
        self.state, self.gathered, metrics = self.run.step.update(self.state, self.gathered)
        self.waiting.append((step, metrics))
        return True

    def collect(self, leave: int) -> None:
        """Reads the metrics of all but the newest `leave` steps. Raises: GlimpseError on one that was not finite."""
        while len(self.waiting) > leave:
            step, metrics = self.waiting.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if values.pop("bad") >= 0:
                self.give_up(step, values)
            self.meter.add(values)

    def give_up(self, step: int, values: dict[str, float]) -> None:
        """Saves the state before a step that was not finite, and raises GlimpseError with the records of the step."""
        state = self.state.__class__(**(self.state.__dict__ | {"bad": jax.device_put(np.int32(-1), self.state.bad.sharding)}))
        self.checkpoints.save(step, state, wait=True)
        begin_with = self.stage.begin_with(state, self.folder)
        numbers = range(step * self.config.accumulation, (step + 1) * self.config.accumulation)
        kinds = ", ".join(f"{name}={values[name]}" for name in (*self.stage.losses, "grad_norm"))
        raise GlimpseError(
            f"step {step + 1}: loss or gradient is not finite ({kinds}); its records are {', '.join(self.run.feed.names(numbers))}; "
            f"the state before it is saved; another --out goes on from it with {begin_with}"
        )

    def write(self, step: int) -> None:
        """Writes a log line."""
        values = self.stage.summary(self.meter.read()) | {"epoch": self.run.feed.epoch(step), "memory_gib": memory_gib()}
        losses = "  ".join(f"{name} {values[name]:.3f}" for name in self.stage.shown)
        self.progress.set_postfix_str(f"{losses}  {values['samples_per_s']:.3g} samples/s  {values['tokens_per_s']:.3g} tokens/s")
        self.log.write(step, values, "train")
        self.meter.clear()

    def due(self, step: int) -> bool:
        """Whether a validation follows this step."""
        return self.stage.validate is not None and (step % self.config.validate_every == 0 or step == self.run.steps)

    def validate(self, step: int, stop: Stop) -> float | None:
        """Validates. Returns: the loss; None when a signal stopped the validation, which is then still due."""
        start, compiled = time.perf_counter(), COMPILES.seconds
        assert self.stage.validate is not None, "a validation is due"
        found = self.stage.validate(self.state, step, self.folder, self.log, bar, stop.now)
        self.owed = found is None
        if found is not None:
            say(f"step {step}: validation " + "  ".join(f"{name} {found[name]:.3f}" for name in self.stage.validation_shown))
        self.meter.paused += time.perf_counter() - start - (COMPILES.seconds - compiled)
        return None if found is None else found["loss"]

    def rest(self, step: int, stop: Stop) -> None:
        """Validates and saves, where that is due. A checkpoint is saved after every validation, so that the best state is kept."""
        loss, self.owed = None, self.due(step)
        if self.owed and stop.signal is None:
            self.collect(0)
            loss = self.validate(step, stop)
        stopping = stop.signal is not None
        if loss is not None or step % self.config.save_every == 0 or step == self.run.steps or stopping:
            self.collect(0)
            self.save(step, loss, wait=stopping)

    def save(self, step: int, loss: float | None = None, wait: bool = False) -> None:
        """Saves a checkpoint, with the state of the log, so that a resumed run writes the same log lines."""
        start = time.perf_counter()
        with saving_as(self.saved, SAVE_GRACE):
            self.checkpoints.save(step, self.state, loss, wait, {"validated": not self.owed, "window": self.meter.state()})
        self.meter.paused += time.perf_counter() - start


def train(config: TrainConfig | BaseConfig | PlusConfig) -> dict[str, Any]:
    """Runs a configuration to its end, or until a signal.

    Returns: {"step": ..., "signal": ...}. Raises: GlimpseError for errors in the configuration, the model or the data.
    """
    config = find_places(config.check())
    mesh = config.mesh
    if has_others(mesh.coordinator, mesh.processes, mesh.process):
        no_early_stops()  # JAX handles SIGTERM itself once processes are joined
    start_processes(mesh.coordinator, mesh.processes, mesh.process)
    keep_compiled(config.compilation_cache)
    kept = saving_as(f"what was saved in {config.out} stays; the same command goes on")
    with kept, Stop() as stop, alone(config.out):
        stage = build_stage(config, bar, say)
        say(stage.describe())
        loop = Loop(stage)
        stopped = loop.go(stop)
        step = int(loop.state.step)
        if stopped is not None:
            say(f"stopped by signal {stopped} after step {step}; saved, the same command goes on from here")
            NOW.told = True
            return {"step": step, "signal": stopped}
        say(f"done: {loop.folder / 'export'} holds {stage.export(loop.state, loop.folder)}")
    return {"step": step, "signal": None}
