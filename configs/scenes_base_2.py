"""gp-jax train --config scenes_base_2

The rest of the bundled model's training, behind configs/scenes_base.py: mostly relations, which that leaves weak. Visual tokens know by
then what stands beside their shape, and the reading loss makes questions look there; three in ten pictures hide what a relation asks for.
"""

from gp_jax.scenes.settings import Canvas, ScenesConfig
from gp_jax.training.base_settings import BaseConfig, BaseLossConfig
from gp_jax.training.settings import OptimConfig

train = BaseConfig(
    model="runs/scenes_base/export",
    start="runs/scenes_base",
    out="runs/scenes_base_2",
    blend=0.75,
    scenes=ScenesConfig(
        canvases=(
            Canvas(192, 192, questions=12, early=0.50, late=0.50),
            Canvas(256, 256, questions=12, early=0.35, late=0.35),
            Canvas(320, 192, questions=12, early=0.06, late=0.06),
            Canvas(192, 320, questions=12, early=0.05, late=0.05),
            Canvas(320, 320, questions=12, early=0.04, late=0.04),
        ),
        pruned=0.35,
        relations=0.5,
        anchored=0.3,
        seed=1,
    ),
    loss=BaseLossConfig(neighbor_weight=1.5, reading_weight=0.5),
    optim=OptimConfig(name="muon", learning_rate=1.5e-3, schedule="cosine", warmup_ratio=0.02, end_ratio=0.02, b2=0.95, clip_norm=1.0),
    batch_size=8,
    accumulation=2,
    steps=600,
    attention="einsum",
    log_every=10,
    validate_every=120,
    save_every=60,
)
