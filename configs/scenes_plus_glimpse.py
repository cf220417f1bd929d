"""gp-jax train --config scenes_plus_glimpse

The second stage of GlimpsePrune+ on the bundled model: the glimpse goes on for the model that configs/scenes_plus.py has tuned, merged into
runs/scenes_plus/merged. Relations and comparisons, which need two regions, are most of its questions.
"""

from dataclasses import replace

from configs.scenes_glimpse_looks import train as first
from configs.scenes_plus_sft import SMALL
from gp_jax.data.settings import DataConfig, DataSource

KINDS = {"relation": (10, 5), "comparison": (7, 4), "attribute,text,chart,detail": (6, 3)}

train = replace(
    first,
    model="runs/scenes_plus/merged",
    glimpse_from="scenes-looks",
    out="runs/scenes_plus_glimpse",
    data=DataConfig(
        sources=tuple(
            DataSource(f"scenes:{count * 420}:{kind}:{size}")
            for kind, both in KINDS.items()
            for count, size in zip(both, (SMALL, "196-272"), strict=True)
        ),
        validation=(DataSource("scenes:192", split="val"),),
        shapes=2,
    ),
    optim=replace(first.optim, learning_rate=2e-3),
    batch_size=16,
    accumulation=1,
    steps=900,
    validate_every=900,
)
