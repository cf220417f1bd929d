"""gp-jax train --config scenes_plus_sft

The warm start of GlimpsePrune+ on the bundled model: its layers behind the cut learn to answer from what a glimpse keeps. Layers up to the
cut stay as they are: the glimpse stays exactly what it was.
"""

from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.plus.settings import MasksConfig, PlusConfig
from gp_jax.training.settings import OptimConfig

SMALL, USUAL = "64-121", "196-256"  # visual tokens: a small picture takes a third of the time of a usual one


def mixture(unit: int, *sizes: str) -> tuple[DataSource, ...]:
    """Scenes, `unit` for each part: mostly the kinds of question that leave something to learn."""
    parts = {"relation": 12, "chart": 8, "comparison": 7, "attribute,text,detail": 5}
    return tuple(DataSource(f"scenes:{count * unit}:{kind}:{size}") for kind, count in parts.items() for size in sizes)


train = PlusConfig(
    stage="sft",
    model="scenes",
    glimpse_from="scenes-looks",
    out="runs/scenes_plus_sft",
    adapter=AdapterConfig(r=32, lora_alpha=64, target_modules=r"model\.layers\.[567]\..*"),
    data=DataConfig(
        sources=(*mixture(180, SMALL), *mixture(60, USUAL)),
        validation=(DataSource(f"scenes:192:{USUAL}", split="val"),),
        shapes=2,
    ),
    masks=MasksConfig(kind="predicted"),
    optim=OptimConfig(learning_rate=3e-3, schedule="cosine", warmup_ratio=0.05, clip_norm=1.0),
    batch_size=64,
    accumulation=1,
    steps=120,
    remat=False,
    log_every=10,
    validate_every=120,
    save_every=40,
    keep=1,
)
