"""A training set-up small enough to be started, killed and started again many times."""

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

from xla_flags import flags

from gp_jax import tiny

ROOT = Path(__file__).resolve().parents[1]
SMALL = tiny.CONFIG | {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "hidden_size": 32,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "intermediate_size": 32,
    "selected_layers": [0],
    "reduce_layer": 0,
    "le_layers": [0, 1],
    "selected_visual_layers": [1],
    "vision_config": tiny.CONFIG["vision_config"]
    | {"depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32},
}
CONFIG = """
from gp_jax.training.settings import *
train = TrainConfig(
    model={folder!r} + "/model",
    data=DataConfig(sources=(DataSource({folder!r} + "/data"),), validation=(DataSource({folder!r} + "/data", split="val"),), shapes=1),
    glimpse=GlimpseSettings(attn_fuse_size=16, visual_cond_size=16),
    optim=OptimConfig(learning_rate=1e-3),
    batch_size=2, accumulation=2, steps=12, log_every=1, validate_every=1000, save_every=2, keep=5, validation_pictures=2,
)
"""


def prepare(folder: Path) -> Path:
    """A model, data and a configuration file. Returns: the file."""
    tiny.make_checkpoint(folder / "model", hf_config=SMALL)
    tiny.make_dataset(folder / "data", count=24)
    path = folder / "config.py"
    path.write_text(CONFIG.format(folder=str(folder)))
    return path


def command(config: Path, out: Path, *options: str) -> list[str]:
    """`python train.py` with this configuration."""
    return [sys.executable, str(ROOT / "train.py"), "--config", str(config), "--out", str(out), *options]


def environment(devices: int = 1) -> dict[str, str]:
    """Of a training process: so many fake devices, programs kept from process to process."""
    return os.environ | {"XLA_FLAGS": flags(devices), "JAX_PLATFORMS": "cpu", "GP_JAX_TRACEBACK": "1"}


def run(config: Path, out: Path, *options: str, devices: int = 1) -> subprocess.CompletedProcess:
    """Trains to the end. Returns: the finished process."""
    done = subprocess.run(command(config, out, *options), env=environment(devices), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(out: Path, group: str = "train", field: str = "loss") -> dict[int, float]:
    """A logged value by step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [line for line in lines if line["group"] == group]
    assert len({line["step"] for line in found}) == len(found), "no step stands there twice"
    return {line["step"]: line[field] for line in found}


@contextmanager
def full_disk(room: int):
    """No file of this process may grow beyond `room` bytes, which ends writes as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
