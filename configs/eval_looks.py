"""gp-jax eval --config eval_looks

Two looks against one, with their controls, on usual and on large scenes. Settings are chosen with
`--tasks scenes:val scenes:val:400-576` first; `--glimpse runs/scenes_glimpse_looks/export` takes the glimpse that has learned both looks.
"""

from gp_jax.evaluation.settings import EvalConfig

evaluation = EvalConfig(
    model="scenes",
    tasks=("scenes:test", "scenes:test:400-576"),
    plans=("dense", "glimpse", "look", "look-first", "look-random-floor25", "look-oracle", "downsample-25", "downsample-50"),
    limit=1200,
    out="runs/eval_looks",
    title="Two looks on generated scenes",
)
