"""Logs of a run: `metrics.jsonl`, TensorBoard events, and the environment that it ran in."""

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from gp_jax import __version__
from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import kind_of, parse_json, read_bytes, set_aside, write_text, writing

MAX_METRICS = 1 << 30  # bytes of metrics.jsonl
FLUSH_SECONDS = 120.0
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tensorflow-datasets", "numpy")


def environment() -> dict[str, Any]:
    """Git revision, package versions and devices."""
    root = Path(__file__).resolve().parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "gp_jax": __version__,
        "git_revision": git("rev-parse", "HEAD"),
        "git_changed_files": (git("status", "--porcelain") or "").splitlines(),
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": versions,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
    }


def memory_gib() -> float:
    """Peak memory in GiB: of the first device if it reports it, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Events:
    """Writes TensorBoard events without a background thread: tensorboardX's own writer thread dies when the disk is full, and its queue
    then blocks for ever."""

    def __init__(self, folder: str, purge: int | None):
        """Args: purge: TensorBoard ignores events of earlier files from this step on."""
        from tensorboardX.event_file_writer import EventsWriter  # slow to import
        from tensorboardX.proto.event_pb2 import SessionLog
        from tensorboardX.record_writer import directory_check

        self._folder, self._flushed = folder, time.monotonic()
        try:
            with writing(folder):
                directory_check(folder)
                self._writer = EventsWriter(f"{folder}/events")
        except ImportError as error:  # the package for an object store is not installed
            raise GlimpseError(f"{folder}: cannot be written ({one_line(error)})") from error
        if purge is not None:
            self._add(step=purge, session_log=SessionLog(status=SessionLog.START))

    def _add(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        with writing(self._folder):
            self._writer.write_event(Event(wall_time=time.time(), **fields))
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                self._writer.flush()
                self._flushed = time.monotonic()

    def scalar(self, name: str, value: float, step: int) -> None:
        """Adds a number."""
        from tensorboardX.summary import scalar

        self._add(step=step, summary=scalar(name, value))

    def picture(self, name: str, image: Image.Image, step: int) -> None:
        """Adds a picture."""
        from tensorboardX.summary import image as encoded

        self._add(step=step, summary=encoded(name, np.asarray(image), dataformats="HWC"))

    def close(self) -> None:
        """Flushes."""
        with writing(self._folder):
            self._writer.close()


class RunLog:
    """metrics.jsonl and TensorBoard events of a run folder, written by the first process only.

    A resumed run deletes lines of steps after the one that it continues from, so that no step is logged twice.
    """

    def __init__(self, folder: epath.Path, step: int, tell: Callable[[str], None] = print, again: str | None = None):
        """Args: again: a group of lines that this run will log again at this step; tell: called with a message about a damaged file, which
        is renamed."""
        self._events, self._file = None, folder / "metrics.jsonl"
        self._lines: list[str] = []
        if jax.process_index():
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        if kind_of(self._file) is not None:
            lines, reason = _read_lines(self._file)
            if reason is not None:
                tell(f"{self._file}: is damaged ({reason}); it is now {set_aside(self._file).name}, its readable lines are kept")
            kept = [line for line, at, group in lines if at < step or (at == step and group != again)]
            write_text(self._file, "".join(line + "\n" for line in kept))
            self._lines = kept if "://" in str(self._file) else []
        self._events = Events(str(folder / "tensorboard"), step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float], group: str) -> None:
        """Writes one line, and one TensorBoard scalar per value. group: train or validation. Raises: GlimpseError when the disk is full."""
        if self._events is None:
            return
        line = json.dumps({"step": step, "group": group} | {k: _plain(v) for k, v in values.items()})
        if "://" not in str(self._file):
            with writing(self._file), self._file.open("a") as file:
                file.write(line + "\n")
        else:  # object stores cannot append
            self._lines.append(line)
            write_text(self._file, "".join(line + "\n" for line in self._lines))
        for name, value in values.items():
            self._events.scalar(f"{group}/{name}", float(value), step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """Writes a picture to TensorBoard."""
        if self._events is not None:
            self._events.picture(name, image, step)

    def close(self) -> None:
        """Flushes."""
        if self._events is not None:
            self._events.close()


def _read_lines(path: epath.Path) -> tuple[list[tuple[str, int, str]], str | None]:
    """The readable lines (text, step, group), and what is wrong with the file; None when nothing is."""
    try:
        *whole, _ = read_bytes(path, MAX_METRICS).split(b"\n")  # the last line is incomplete if the run was killed
    except GlimpseError as error:
        return [], str(error).removeprefix(f"{path}: ")
    found, bad = [], []
    for number, line in enumerate(whole, 1):
        try:
            text = line.decode()
            fields = parse_json(text, "line")
            if not (isinstance(fields, dict) and type(fields.get("step")) is int and isinstance(fields.get("group"), str)):
                raise ValueError("neither step nor group")
            found.append((text, fields["step"], fields["group"]))
        except ValueError:
            bad.append(number)
    return found, f"{len(bad)} of its lines cannot be read, the first is {bad[0]}" if bad else None


def _plain(value: float) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if isinstance(value, int) else float(f"{value:.6g}") if np.isfinite(value) else None
