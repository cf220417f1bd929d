"""The trained glimpse in the formats that others read."""

import shutil
import tempfile
from pathlib import Path

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from gp_jax.pretrained.params import export_glimpse
from gp_jax.pretrained.saving import save_glimpse
from gp_jax.training.build import Run
from gp_jax.training.step import TrainState

ORBAX = "orbax"


def export(run: Run, state: TrainState, folder: epath.Path) -> None:
    """Writes `folder`/export: config.json, glimpse.safetensors, new_modules_gp.pt, and orbax/ with the same tensors."""
    target = folder / "export"
    scratch = folder / ".export.partial"
    model = run.step.model(state.params)
    if jax.process_index() == 0:
        with tempfile.TemporaryDirectory() as local:  # the writers know local files only, `folder` may be gs://
            save_glimpse(model, run.vlm.hf_config, Path(local) / "export")
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
    ocp.save(scratch / ORBAX, export_glimpse(model))
    if jax.process_index() == 0:
        scratch.rename(target)
