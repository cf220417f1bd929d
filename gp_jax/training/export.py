"""Writes the trained glimpse in the formats that other programs read."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from gp_jax.pretrained.params import export_glimpse
from gp_jax.pretrained.saving import save_glimpse
from gp_jax.training.build import Run
from gp_jax.training.checkpoint import quiet, saving
from gp_jax.training.step import TrainState

ORBAX = "orbax"


def export_run(run: Run, state: TrainState, folder: epath.Path) -> str:
    """Writes `folder`/export: config.json, glimpse.safetensors, new_modules_gp.pt, and orbax/ with the same tensors.

    Returns: a text that names what it holds.
    """
    model = run.step.model(state.params)
    export(folder, lambda local: save_glimpse(model, run.vlm.hf_config, local), export_glimpse(model))
    return "the glimpse (glimpse.safetensors, new_modules_gp.pt, orbax)"


def export(folder: epath.Path, write: Callable[[Path], None], tensors: Any) -> None:
    """Writes `folder`/export, completely or not at all. Args: write: writes files into a local folder; tensors: what orbax/ holds.

    Raises: GlimpseError when the disk is full.
    """
    target = folder / "export"
    scratch = folder / ".export.partial"
    with quiet(), saving(target):
        if jax.process_index() == 0:
            with tempfile.TemporaryDirectory() as local:  # `write` supports local files only; `folder` may be gs://
                write(Path(local) / "export")
                for old in (scratch, target):
                    if old.exists():
                        old.rmtree()
                scratch.mkdir(parents=True)
                for path in sorted((Path(local) / "export").iterdir()):
                    with path.open("rb") as source, (scratch / path.name).open("wb") as sink:
                        shutil.copyfileobj(source, sink)
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("export")
        ocp.save(scratch / ORBAX, tensors)
        if jax.process_index() == 0:
            scratch.rename(target)
