"""gp-jax eval --config demo

What `make demo` shows: the bundled model on scenes that no training has seen, one small batch after the other.
"""

from gp_jax.evaluation.settings import EvalConfig

evaluation = EvalConfig(
    model="scenes",
    tasks=("scenes:test",),
    start=100_000,
    limit=240,
    pictures=60,
    out="demo/answers",
    report="demo/report.html",
    title="GlimpsePrune on generated scenes",
)
