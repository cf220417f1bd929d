"""gp-jax eval --config eval_published

The bundled glimpse against every published method and control, all with as many visual tokens of every sample as it keeps.
"""

from dataclasses import replace

from configs.eval_scenes import evaluation as scenes

evaluation = replace(
    scenes,
    plans=(
        *("dense", "glimpse", "oracle", "nothing", "random", "random-1", "random-2", "downsample"),
        *("attention", "fastv", "pyramiddrop", "visionzip", "divprune", "cdpruner", "vscan"),
    ),
    out="runs/eval_published",
)
