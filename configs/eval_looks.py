"""gp-jax eval --config eval_looks

Two looks against one, with their controls, on usual and on large scenes. Settings were chosen on `scenes:val` and `scenes:val:400-576`, see
docs/looks.md. Large batches: records are sorted by size, so there are few shapes to compile programs for.
"""

from gp_jax.evaluation.settings import EvalConfig

evaluation = EvalConfig(
    model="scenes",
    glimpse="scenes-looks",
    tasks=("scenes:test", "scenes:test:400-576"),
    plans=(
        "dense",
        "glimpse",
        "look-tokens64-cap80-sure30",
        "look-first",
        "look-random-floor50",
        "look-oracle",
        "downsample-45",
        "downsample-60",
    ),
    limit=600,
    batch=120,
    out="runs/eval_looks",
    title="Two looks on generated scenes",
)
