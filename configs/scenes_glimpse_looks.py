"""python train.py --config configs/scenes_glimpse_looks.py

The bundled glimpse goes on, with a third of the pictures at the size of a first look: one glimpse for both looks.
Its settings are chosen on validation scenes:

    python eval.py --tasks scenes:val --limit 600 --glimpse runs/scenes_glimpse_looks/export --out runs/looks_val \
        --plans dense glimpse look look-share12.5 look-above10 look-margin1 look-cap40 look-random-floor25 look-first look-oracle
"""

from dataclasses import replace

from configs.scenes_glimpse_long import train as long

train = replace(
    long,
    glimpse_from="scenes",
    out="runs/scenes_glimpse_looks",
    data=replace(long.data, looks=0.35, look_shares=(0.25, 0.25, 0.125), look_least=16, shapes=8),
    optim=replace(long.optim, learning_rate=1e-3),
    steps=1500,
)
