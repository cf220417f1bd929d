"""What a run leaves to read: `metrics.jsonl`, TensorBoard events, and facts about where it ran."""

import importlib.metadata
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from PIL import Image

from gp_jax.disk import write_text
from gp_jax.version import __version__

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

    versions = {}
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
    """Peak memory: of the first device where it says so, else of this process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class RunLog:
    """metrics.jsonl and TensorBoard events of a run folder, written by the first process only.

    A resumed run forgets what was logged behind the step it goes on from, so that no step stands there twice.
    """

    def __init__(self, folder: epath.Path, step: int):
        self._events, self._file = None, folder / "metrics.jsonl"
        self._lines: list[str] = []
        if jax.process_index():
            return
        folder.mkdir(parents=True, exist_ok=True)
        if self._file.exists():
            self._lines = [line for line in self._file.read_text().splitlines() if _step_of(line) <= step]
            write_text(self._file, "".join(line + "\n" for line in self._lines))
        from tensorboardX import SummaryWriter  # slow to import

        self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, values: Mapping[str, float], group: str) -> None:
        """One line, and one TensorBoard scalar per value. group: train or validation."""
        if self._events is None:
            return
        line = json.dumps({"step": step, "group": group} | {k: _plain(v) for k, v in values.items()})
        self._lines.append(line)
        if "://" not in str(self._file):
            with self._file.open("a") as file:
                file.write(line + "\n")
        else:  # object stores cannot append
            write_text(self._file, "".join(line + "\n" for line in self._lines))
        for name, value in values.items():
            self._events.add_scalar(f"{group}/{name}", float(value), step)

    def picture(self, step: int, name: str, image: Image.Image) -> None:
        """A picture for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Flushes."""
        if self._events is not None:
            self._events.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):  # a line that a killed run left half-written
        return float("inf")


def _plain(value: float) -> float | int | None:
    value = value if isinstance(value, int) else float(value)
    return value if isinstance(value, int) else float(f"{value:.6g}") if np.isfinite(value) else None
