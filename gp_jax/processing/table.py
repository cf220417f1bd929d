"""The processor of a model's family."""

from pathlib import Path

from gp_jax.config.model import ModelConfig
from gp_jax.processing.qwen import Processor


def load_processor(folder: Path, config: ModelConfig) -> Processor:
    """A model folder's tokenizer and image processor. Raises: GlimpseError, naming the file, when they do not fit the model."""
    return config.family.processor.load()(folder, config)
