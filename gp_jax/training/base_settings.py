"""Settings of the stage `base` of `train.py`, which trains a whole small model from random weights, as frozen dataclasses."""

from dataclasses import dataclass, field

from gp_jax.errors import GlimpseError
from gp_jax.scenes.settings import ScenesConfig
from gp_jax.training.settings import MeshConfig, OptimConfig, check_words


@dataclass(frozen=True)
class BaseLossConfig:
    """L_lang + dense_weight * (cross-entropy of what a visual token and its neighbours show) + reading_weight * (cross-entropy of the
    neighbours of the shape that a relation names, predicted from its question's last row)."""

    dense_weight: float = 0.5
    """Weight of the dense loss."""
    background_weight: float = 0.15
    """Weight of empty patches in the dense loss."""
    neighbor_weight: float = 0.5
    """Weight of the neighbours of a shape in the dense loss."""
    reading_weight: float = 0.0
    """Weight of the reading loss, with which questions learn to read the neighbours of a shape from its visual tokens."""
    reading_layer: int = -3
    """Decoder layer after which the reading loss is computed; -1: the last one."""


@dataclass(frozen=True)
class BaseConfig:
    """Train a whole small vision-language model on generated scenes, from random weights."""

    model: str = ""
    """Folder with config.json, tokenizer and processor files; weights in it are not read."""
    start: str = ""
    """Run folder of this stage whose newest checkpoint gives the initial parameters, training heads included. [default: random weights]"""
    blend: float = 1.0
    """Interpolation between the initial (0) and the trained (1) weights for the export: below 1 more of the model `start` is kept, which
    often generalises better (arXiv 2109.01903)."""
    scenes: ScenesConfig = field(default_factory=ScenesConfig)
    """Pictures and questions."""
    loss: BaseLossConfig = field(default_factory=BaseLossConfig)
    """Weights of the losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Distribution over devices."""
    out: str = "runs/base"
    """Run folder: logs, checkpoints, the exported model. If it holds a run already, that run is continued."""
    batch_size: int = 4
    """Pictures of a micro-batch, over all devices together."""
    accumulation: int = 4
    """Micro-batches per optimiser step."""
    steps: int = 1000
    """Number of optimiser steps."""
    seed: int = 0
    """Seed of the initial parameters."""
    remat: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    attention: str = "auto"
    """Implementation of attention over long sequences."""
    log_every: int = 10
    """Steps between two log lines."""
    validate_every: int = 250
    """Steps between two validations."""
    validation_scenes: int = 96
    """Pictures in a validation, with several questions each."""
    save_every: int = 250
    """Steps between two checkpoints."""
    keep: int = 2
    """Number of newest checkpoints that are kept, besides the best one."""
    compilation_cache: str | None = None
    """Folder of the cache of compiled programs. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""

    def check(self) -> "BaseConfig":
        """Checks everything that can be checked before anything is loaded. Returns: self. Raises: GlimpseError that names the field."""
        if not self.model:
            raise GlimpseError("model is missing: a folder with config.json, tokenizer and processor files (--model)")
        check_words(self)
        for name in ("batch_size", "accumulation", "steps", "log_every", "validate_every", "validation_scenes", "save_every", "keep"):
            if not getattr(self, name) > 0:
                raise GlimpseError(f"{name}={getattr(self, name)!r} must be positive")
        if not 0 < self.blend <= 1:
            raise GlimpseError(f"blend={self.blend!r} is not in 0..1")
        if self.blend < 1 and not self.start:
            raise GlimpseError(f"blend={self.blend!r}: needs `start`, the run whose weights it interpolates with")
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
