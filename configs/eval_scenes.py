"""gp-jax eval --config eval_scenes

The bundled model on the bundled benchmark: accuracy and cost of the glimpse, of its controls and of its upper bound.
"""

from gp_jax.evaluation.settings import EvalConfig

evaluation = EvalConfig(model="scenes", tasks=("scenes:test",), limit=600, out="runs/eval_scenes")
