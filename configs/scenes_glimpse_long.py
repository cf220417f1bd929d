"""gp-jax train --config scenes_glimpse_long

The bundled glimpse: configs/scenes_glimpse.py on four times as many scenes, most of an hour on two CPU cores.
"""

from dataclasses import replace

from configs.scenes_glimpse import mixture
from configs.scenes_glimpse import train as short

train = replace(
    short,
    out="runs/scenes_glimpse_long",
    data=replace(short.data, sources=mixture(1000)),
    steps=3000,
    validate_every=600,
    save_every=200,
)
