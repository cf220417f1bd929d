"""gp-jax train --config scenes_plus_glimpse

The second stage of GlimpsePrune+ on the bundled model: a glimpse for the model that configs/scenes_plus.py has tuned, merged into
runs/scenes_plus/merged. It starts from the base's glimpse, which saves most of the steps that a new one needs.
"""

from dataclasses import replace

from configs.scenes_glimpse import train as first

train = replace(
    first,
    model="runs/scenes_plus/merged",
    glimpse_from="scenes",
    out="runs/scenes_plus_glimpse",
    optim=replace(first.optim, learning_rate=5e-4),
)
