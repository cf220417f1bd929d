"""Where the rooms are that targets read with."""

from gp_jax.processing import images
from gp_jax.processing.layout import read_samples
from gp_jax.processing.table import load_processor
from gp_jax.training.run_log import RunLog

__all__ = ["RunLog", "images", "load_processor", "read_samples"]
