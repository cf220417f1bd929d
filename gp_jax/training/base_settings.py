"""What training a whole small model from nothing is, as frozen dataclasses: the stage `base` of `train.py`."""

from dataclasses import dataclass, field

from gp_jax.errors import GlimpseError
from gp_jax.scenes.settings import ScenesConfig
from gp_jax.training.settings import MeshConfig, OptimConfig, check_words


@dataclass(frozen=True)
class BaseLossConfig:
    """L_lang + dense_weight * (cross-entropy of what is drawn on a visual token and beside it) + reading_weight * (cross-entropy of what
    stands beside the shape that a relation names, told by its question's last row)."""

    dense_weight: float = 0.5
    """Of the dense loss."""
    background_weight: float = 0.15
    """Of patches without anything on them."""
    neighbor_weight: float = 0.5
    """Of the neighbours of a shape, within the dense loss."""
    reading_weight: float = 0.0
    """Of the loss that teaches to read neighbours off a shape's visual tokens."""
    reading_layer: int = -3
    """Decoder layer behind which they must have been read."""


@dataclass(frozen=True)
class BaseConfig:
    """Train a whole small vision-language model on generated scenes, from nothing."""

    model: str = ""
    """Folder with config.json, tokenizer and processor files; weights that lie there are not read."""
    start: str = ""
    """Run folder of this stage to begin from: the parameters of its newest checkpoint, the training head's included. [default: random]"""
    blend: float = 1.0
    """Where the exported weights lie on the way from those that it began with to those that it came to: short of 1 they keep more of what
    `start` knew, and often generalise better (arXiv 2109.01903)."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """Pictures and questions."""
    loss: BaseLossConfig = field(default_factory=BaseLossConfig)
    """Weights of the losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Devices."""
    out: str = "runs/base"
    """Run folder: logs, checkpoints, the exported model. A run that is there already goes on."""
    batch_size: int = 4
    """Pictures of a micro-batch, over all devices."""
    accumulation: int = 4
    """Micro-batches of a step."""
    steps: int = 1000
    """Optimiser steps."""
    seed: int = 0
    """Of the parameters."""
    remat: bool = False
    """Compute activations again in the backward pass instead of keeping them."""
    attention: str = "auto"
    """Attention implementation of long sequences."""
    log_every: int = 10
    """Steps between two log lines."""
    validate_every: int = 250
    """Steps between two validations."""
    validation_scenes: int = 96
    """Pictures of a validation, with several questions each."""
    save_every: int = 250
    """Steps between two checkpoints."""
    keep: int = 2
    """Newest checkpoints kept, besides the best one."""
    compilation_cache: str | None = None
    """Folder that keeps compiled programs from run to run. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""

    def check(self) -> "BaseConfig":
        """What can be wrong before anything is loaded. Returns: itself. Raises: GlimpseError that names the field."""
        if not self.model:
            raise GlimpseError("model is missing: a folder with config.json, tokenizer and processor files (--model)")
        check_words(self)
        for name in ("batch_size", "accumulation", "steps", "log_every", "validate_every", "validation_scenes", "save_every", "keep"):
            if not getattr(self, name) > 0:
                raise GlimpseError(f"{name}={getattr(self, name)!r} must be positive")
        if not 0 < self.blend <= 1:
            raise GlimpseError(f"blend={self.blend!r} is not in 0..1")
        if self.blend < 1 and not self.start:
            raise GlimpseError(f"blend={self.blend!r}: between what? It needs `start`")
        if not self.scenes.canvases:
            raise GlimpseError("scenes.canvases is empty: say which picture sizes to draw")
        for canvas in self.scenes.canvases:
            if canvas.width % 16 or canvas.height % 16 or min(canvas.width, canvas.height) < 64:
                raise GlimpseError(f"scenes.canvases: {canvas.width}x{canvas.height} pixels: sides must be multiples of 16, at least 64")
            if canvas.questions < 1 or min(canvas.early, canvas.late) < 0:
                raise GlimpseError(f"scenes.canvases: {canvas.width}x{canvas.height}: questions must be positive, weights not negative")
        for when in ("early", "late"):
            if not sum(getattr(canvas, when) for canvas in self.scenes.canvases) > 0:
                raise GlimpseError(f"scenes.canvases: no canvas has a positive {when} weight")
        for name in ("settled", "pruned", "blackened", "relations", "anchored"):
            if not 0 <= getattr(self.scenes, name) <= 1:
                raise GlimpseError(f"scenes.{name}={getattr(self.scenes, name)!r} is not in 0..1")
        return self
