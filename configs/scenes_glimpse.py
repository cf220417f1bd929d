"""gp-jax train --config scenes_glimpse

The glimpse of the bundled model, from its frozen base, with the released losses: minutes on two CPU cores.
"""

from gp_jax.data.settings import DataConfig, DataSource
from gp_jax.training.settings import GlimpseSettings, OptimConfig, TrainConfig

REST = "attribute,relation,text,chart,detail"
SMALL = "64-121"  # visual tokens: a third of the time of a usual picture


def mixture(unit: int) -> tuple[DataSource, ...]:
    """48 units of scenes: more than half small pictures; a third comparisons, which need two regions and are learned last."""
    units = {f"{REST}:{SMALL}": 18, f"comparison:{SMALL}": 10, REST: 13, "comparison": 7}
    return tuple(DataSource(f"scenes:{count * unit}:{kind}") for kind, count in units.items())


train = TrainConfig(
    model="scenes",
    out="runs/scenes_glimpse",
    data=DataConfig(
        sources=mixture(250),
        validation=(DataSource("scenes:192", split="val"),),
        shapes=5,
    ),
    glimpse=GlimpseSettings(
        reduce_layer=4,
        selected_layers=(4, 3, 2, 1),
        selected_visual_layers=(5, 4, 2),
        le_dropout_prob=0.0,
        attn_fuse_size=96,
        attn_fuse_num_heads=4,
        visual_cond_size=96,
        reduce_threshold=0.05,  # by eval.py --model scenes --tasks scenes:val --limit 300 --plans dense glimpse-above-{5,10,20,30,50}
        start="prompt",
    ),
    optim=OptimConfig(learning_rate=2e-3, schedule="cosine", warmup_ratio=0.05, clip_norm=1.0),
    batch_size=8,
    accumulation=2,
    steps=640,
    remat=False,
    log_every=10,
    validate_every=640,
    save_every=100,
    keep=1,
)
