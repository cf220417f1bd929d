"""Checkpoints of a run, with orbax: asynchronous and atomic; the newest few and the best are kept.

A checkpoint holds the training state (trainable parameters, optimiser, step, random key; the data position is the step) and the
configuration that made it. A checksum of the values detects damaged files.
"""

import contextlib
import dataclasses
import gc
import json
import logging
import math
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from gp_jax.errors import GlimpseError, one_line
from gp_jax.runtime.disk import folder_of, kind_of, writing
from gp_jax.sharding import fetch

policies = ocp.training.preservation_policies


def run_folder(out: str) -> epath.Path:
    """The run folder: an absolute path, or a URI such as gs://bucket/run unchanged. Raises: GlimpseError for a file."""
    folder = folder_of(out)
    if "://" in out:
        return folder
    if not out or kind_of(folder) not in (None, "folder"):
        raise GlimpseError(f"--out {out}: is not a folder")
    return epath.Path(folder.resolve())


def checksum(tree: Any) -> int:
    """Checksum of all values of a tree, in order. Every process must call it."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        whole = fetch(leaf, getattr(getattr(leaf, "sharding", None), "mesh", None))
        total = zlib.crc32(np.ascontiguousarray(whole).tobytes(), total)
    return total


def text_checksum(value: Any) -> int:
    """Checksum of a JSON value."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the long messages that libraries print about a damaged file; the caller reports it in one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):  # raised in tensorstore's threads after a failed write
            hook(kind, error, trace)

    try:
        sys.excepthook = show
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
        gc.collect()  # abandoned tasks print their errors when they are collected
    finally:
        sys.excepthook = hook
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def saving(what: object) -> Iterator[None]:
    """For blocks in which orbax writes: any failure, also one of an earlier asynchronous save, becomes a GlimpseError of one line."""
    try:
        yield
    except GlimpseError:
        raise
    except Exception as error:  # from the system, tensorstore or orbax's threads
        raise GlimpseError(f"{what}: cannot be written ({one_line(error, 600)})") from error


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Messages about the fields in which two configurations (nested dicts) differ. A field that only one of them has and that is off there
    (False, 0, empty) is no difference: runs that do not use a setting continue after the program has got it."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in old | new if (key in old and key in new) or old.get(key) or new.get(key)]
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{name}.{key}" if name else key)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in differences(*pair, f"{name}[{i}]")]
    return [] if old == new else [f"{name}: {old!r} in the checkpoint, {new!r} now"]


@dataclasses.dataclass(frozen=True)
class Restored:
    """A checkpoint that has been read."""

    state: Any
    step: int
    facts: dict[str, Any]  # JSON values that were saved with it
    rated: bool  # whether it has the loss of a validation


class Checkpoints:
    """The checkpoints of one run folder. `identity`: nested dicts of JSON values that must be equal for a run to be continued."""

    def __init__(self, folder: epath.Path, identity: dict, keep: int, tell: Callable[[str], None] = print):
        self.folder, self.identity, self.tell, self._keep = folder, identity, tell, keep
        self._manager: ocp.training.Checkpointer | None = None
        self._started: int | None = None  # step of the newest save, which may not have finished
        self._silence = contextlib.ExitStack()  # active as long as the manager: its threads print pages when the disk is full

    def _open(self) -> ocp.training.Checkpointer:
        if self._manager is None:
            self._silence.enter_context(quiet())
            best = policies.BestN(get_metric_fn=lambda m: m["loss"], reverse=True, n=1, keep_checkpoints_without_metrics=False)
            self._manager = ocp.training.Checkpointer(
                self.folder,
                preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(self._keep), best]),
                cleanup_tmp_directories=True,
            )
        return self._manager

    def steps(self) -> list[int]:
        """Steps that have a finished checkpoint, newest first."""
        if kind_of(self.folder) is None:
            return []
        if kind_of(self.folder) != "folder":
            raise GlimpseError(f"{self.folder}: is not a folder")
        found = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        if "://" in str(self.folder):  # object stores cannot rename: there a file that is written last marks a finished checkpoint
            found = [path for path in found if (path / "commit_success.txt").exists()]
        return sorted((int(path.name) for path in found), reverse=True)

    def save(self, step: int, state: Any, loss: float | None = None, wait: bool = False, facts: dict[str, Any] | None = None) -> None:
        """Writes a checkpoint in the background.

        Args: loss: of a validation, which decides the best checkpoint; wait: until it is on disk; facts: JSON values to save with it.
        Raises: GlimpseError when this checkpoint or the previous one cannot be written.
        """
        if loss is not None and not math.isfinite(loss):
            loss = None  # no number compares as smaller than NaN: this checkpoint would stay the best for ever
        with saving(self.folder):
            if step != self._started and step not in self.steps():
                # The state is donated to the next step, and on CPU orbax would write from the memory that this step overwrites.
                state, facts = jax.tree.map(jnp.copy, state), facts or {}
                metadata = {"identity": self.identity, "identity_checksum": text_checksum(self.identity), "checksum": checksum(state)}
                metadata |= {"facts": facts, "facts_checksum": text_checksum(facts)}
                self._open().save_async(
                    step, as_dict(state), force=True, metrics=None if loss is None else {"loss": loss}, custom_metadata=metadata
                )
                self._started = step
            if wait and self._manager is not None:
                self._manager.wait()

    def rate(self, step: int, loss: float) -> None:
        """Adds the loss of a validation to a checkpoint that is on disk already, before a later one is saved."""
        scratch = self.folder / str(step) / ".metrics.partial"
        if jax.process_index() == 0 and math.isfinite(loss):
            with writing(scratch):
                scratch.mkdir(exist_ok=True)
                (scratch / "metrics").write_text(json.dumps({"loss": loss}))
                scratch.rename(self.folder / str(step) / "metrics")

    def restore(self, like: Any) -> Restored | None:
        """Reads the newest undamaged checkpoint, onto the devices of `like`; None when there is no checkpoint.

        Damaged ones are reported and renamed. Raises: GlimpseError when the run had another configuration, or when every
        checkpoint is damaged (a run must not start again without a warning).
        """
        steps = self.steps()
        for step in steps:
            try:
                with quiet():
                    metadata = ocp.metadata(self.folder / str(step)).custom_metadata
                    identity, expected, facts = metadata["identity"], metadata["checksum"], metadata["facts"]
                if text_checksum(identity) != metadata["identity_checksum"]:
                    raise ValueError("its configuration does not match its checksum")
                if text_checksum(facts) != metadata["facts_checksum"]:
                    raise ValueError("its facts do not match their checksum")
                rated = self._check_metrics(step)
            except Exception as error:  # whatever a damaged file makes the libraries raise
                self._set_aside(step, error)
                continue
            changed = differences(identity, self.identity)
            if changed:
                raise GlimpseError(f"{self.folder}: is a run with another configuration ({'; '.join(changed)}); choose another --out")
            try:
                with quiet():
                    found = self._load(step, like)
                if checksum(found) != expected:
                    raise ValueError("its values do not match their checksum")
            except Exception as error:
                self._set_aside(step, error)
                continue
            for older in steps[steps.index(step) + 1 :]:
                try:
                    self._check_metrics(older)
                except Exception as error:
                    self._set_aside(older, error)
            return Restored(found, step, facts, rated)
        if steps:
            raise GlimpseError(f"{self.folder}: no checkpoint can be read; choose another --out to start over")
        return None

    def _check_metrics(self, step: int) -> bool:
        """Whether a checkpoint has metrics. Raises: when they are damaged, for orbax reads those of all checkpoints before every save."""
        path = self.folder / str(step) / "metrics" / "metrics"
        if path.exists():
            float(json.loads(path.read_text())["loss"])
            return True
        if not path.parent.parent.exists():
            raise FileNotFoundError("another process has set it aside")
        return False

    def _load(self, step: int, like: Any) -> Any:
        wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in as_dict(like).items()}
        loaded = ocp.load(self.folder / str(step), wanted)
        return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in wanted])  # dicts sort their leaves

    def _set_aside(self, step: int, error: Exception) -> None:
        """Renames a damaged checkpoint, so that the run can write another one at its step."""
        reason = one_line(error)
        self.close()  # the manager may remember the step
        aside = self.folder / f"damaged-{step}"
        self.tell(f"checkpoint {self.folder / str(step)} is damaged ({reason}); it is now {aside.name}, another one is used")
        if jax.process_index() == 0:
            with writing(self.folder):
                if aside.exists():
                    aside.rmtree()
                (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(f"set aside {step}")

    def close(self) -> None:
        """Waits until everything is written. Raises: GlimpseError when that fails."""
        manager, self._manager, self._started = self._manager, None, None
        with self._silence, saving(self.folder):
            if manager is not None:
                manager.close()


def read_params(folder: epath.Path, like: Any) -> Any:
    """The trainable parameters of the newest checkpoint of another run, in the structure of `like`. Raises: GlimpseError that names the
    folder."""
    steps = Checkpoints(folder, {}, 1).steps()
    if not steps:
        raise GlimpseError(f"{folder}: has no checkpoint to start from")
    path, names = folder / str(steps[0]), [f"params/{name}" for name in as_dict(like)]
    leaves = jax.tree.leaves(like)
    try:
        with quiet():
            shapes = {name: tuple(found.shape) for name, found in ocp.metadata(path).metadata.items() if name.startswith("params/")}
            wrong = sorted(shapes.items() ^ {name: leaf.shape for name, leaf in zip(names, leaves, strict=True)}.items())
            if not wrong:
                wanted = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in zip(names, leaves, strict=True)}
                context = ocp.Context()
                context.pytree.loading.partial_load = True  # without the optimiser's state
                with context:
                    loaded = ocp.load(path, wanted)
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise GlimpseError(f"{path}: cannot be read ({one_line(error)})") from error
    if wrong:
        raise GlimpseError(f"{path}: holds another model: {wrong[0][0]} {wrong[0][1]}")
    return jax.tree.unflatten(jax.tree.structure(like), [loaded[name] for name in names])


def as_dict(tree: Any) -> dict[str, jax.Array]:
    """The leaves of a tree by their paths, so that checkpoints do not depend on the classes of its nodes."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
