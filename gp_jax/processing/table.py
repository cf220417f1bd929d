"""Which processor a model type has."""

from pathlib import Path

from gp_jax.config.model import ModelConfig
from gp_jax.processing.llava import LlavaProcessor, OriginalLlavaProcessor
from gp_jax.processing.qwen import Processor

PROCESSORS = {"qwen2_5_vl": Processor, "llava_llama": OriginalLlavaProcessor, "llava": LlavaProcessor, "llava_next": LlavaProcessor}


def load_processor(folder: Path, config: ModelConfig) -> Processor:
    """A model folder's tokenizer and image processor. Raises: GlimpseError, naming the file, when they do not fit the model."""
    return PROCESSORS[config.model_type].load(folder, config)
