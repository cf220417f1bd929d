"""gp-jax train --config debug

A tiny random model learns to look at drawn shapes: the whole way through training in seconds on a CPU.
"""

from pathlib import Path

from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.tiny import ensure
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig

inputs = ensure(Path("runs/debug_inputs"))
train = TrainConfig(
    model=str(inputs / "model"),
    out="runs/debug",
    data=DataConfig(
        sources=(DataSource(str(inputs / "data"), suffix="Answer the question using a single word or phrase."),),
        validation=(DataSource(str(inputs / "data"), split="val"),),
        shapes=1,
    ),
    glimpse=GlimpseSettings(attn_fuse_size=32, visual_cond_size=32),
    optim=OptimConfig(learning_rate=2e-3),
    batch_size=4,
    accumulation=2,
    steps=20,
    log_every=5,
    validate_every=10,
    save_every=10,
)
