"""Where the rooms are that targets read with."""

from gp_jax import images
from gp_jax.layout import read_samples
from gp_jax.processors import load_processor
from gp_jax.report import RunLog

__all__ = ["RunLog", "images", "load_processor", "read_samples"]
