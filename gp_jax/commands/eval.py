"""The command `gp-jax eval`, which `eval.py` is too."""

from gp_jax.evaluation.command import parse, run

__all__ = ["parse", "run"]
