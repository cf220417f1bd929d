"""python eval.py --config configs/eval_published.py

The bundled glimpse against every published method and control, all with as many visual tokens of every sample as it keeps.
"""

from gp_jax.evaluation.settings import EvalConfig

evaluation = EvalConfig(
    model="scenes",
    tasks=("scenes:test",),
    limit=600,
    plans=(
        *("dense", "glimpse", "oracle", "nothing", "random", "random-1", "random-2", "downsample"),
        *("attention", "fastv", "pyramiddrop", "visionzip", "divprune", "cdpruner", "vscan"),
    ),
    out="runs/eval_published",
)
