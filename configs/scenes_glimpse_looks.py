"""gp-jax train --config scenes_glimpse_looks

The bundled glimpse goes on, with a third of the pictures at the size of a first look: one glimpse for both looks. Its location loss is
mostly cross-entropy: then an importance is a probability, and a place that may matter is not ruled out.
"""

from dataclasses import replace

from configs.scenes_glimpse import REST, SMALL
from configs.scenes_glimpse import train as first
from gp_jax.data.settings import DataSource
from gp_jax.training.settings import LossConfig

LARGE = "400-576"
KINDS = (REST, "relation,comparison")  # those that need two regions are learned last

train = replace(
    first,
    glimpse_from="scenes",
    out="runs/scenes_glimpse_looks",
    data=replace(
        first.data,
        sources=tuple(
            DataSource(f"scenes:{count}:{kind}{size}")
            for size, count in ((f":{SMALL}", 3000), ("", 4000), (f":{LARGE}", 1000))
            for kind in KINDS
        ),
        looks=0.35,
        look_shares=(0.25, 0.25, 0.125),
        look_least=16,
        shapes=8,
    ),
    loss=LossConfig(dice_weight=0.1, bce_weight=1.0),
    optim=replace(first.optim, learning_rate=1e-3),
    steps=1000,
    validate_every=1000,
)
