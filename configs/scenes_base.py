"""gp-jax train --config scenes_base

A whole small vision-language model of the Qwen2.5-VL kind from nothing, on generated scenes: the model that `--model scenes` names.
"""

from pathlib import Path

from gp_jax.scenes.architecture import ensure_architecture
from gp_jax.scenes.settings import Canvas, ScenesConfig
from gp_jax.training.base_settings import BaseConfig, BaseLossConfig
from gp_jax.training.settings import OptimConfig

train = BaseConfig(
    model=str(ensure_architecture(Path("runs/scenes_architecture"))),
    out="runs/scenes_base",
    scenes=ScenesConfig(
        canvases=(
            Canvas(128, 128, questions=8, early=0.70, late=0.06),
            Canvas(192, 192, questions=10, early=0.20, late=0.14),
            Canvas(256, 256, questions=12, early=0.10, late=0.56),
            Canvas(320, 192, questions=12, early=0.0, late=0.10),
            Canvas(192, 320, questions=12, early=0.0, late=0.08),
            Canvas(320, 320, questions=12, early=0.0, late=0.06),
        ),
        settled=0.3,
        pruned=0.35,
    ),
    loss=BaseLossConfig(neighbor_weight=1.5),
    optim=OptimConfig(name="muon", learning_rate=3e-3, schedule="cosine", warmup_ratio=0.02, end_ratio=0.02, b2=0.95, clip_norm=1.0),
    batch_size=8,
    accumulation=2,
    steps=2700,
    attention="einsum",
    log_every=10,
    validate_every=300,
    save_every=100,
)
