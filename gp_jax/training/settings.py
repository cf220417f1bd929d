"""Settings of a training run as frozen dataclasses: the fields of `configs/*.py` and the options of `train.py`."""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from gp_jax.config.choices import ATTENTION, NORMS, OPTIMIZERS, PREDICTORS, SCHEDULES, check_choice
from gp_jax.data.settings import DataConfig, DataSource, parse_sampling
from gp_jax.errors import GlimpseError


@dataclass(frozen=True)
class GlimpseSettings:
    """Settings of a new glimpse. Names and defaults are those of the released training; layers are counted from 0."""

    reduce_layer: int | None = None
    """Last layer that sees every visual token. [default: two thirds of the depth]"""
    selected_layers: tuple[int, ...] = ()
    """Layers whose attention the predictor reads. [default: reduce_layer]"""
    le_layers: tuple[int, ...] | None = None
    """Layers before which a learned vector is added to the glimpse rows. [default: all]"""
    le_length: int = 1
    """Number of glimpse rows."""
    le_norm_type: str = "rmsnorm"
    """Normalisation of the glimpse vectors: rmsnorm or layernorm."""
    le_dropout_prob: float = 0.1
    """Dropout of the glimpse vectors."""
    use_attention_logits: bool | None = None
    """Whether the predictor reads raw attention logits; otherwise their log-softmax. [default: as released, true for Qwen, false for
    LLaVA]"""
    attn_fuse_type: str = "AttnFuserV1"
    """AttnFuserV1; AttnFuserV2: without visual conditions; mean: no predictor, importance is the mean of the glimpse's attention."""
    attn_fuse_size: int = 256
    """Width of the predictor."""
    attn_fuse_num_heads: int = 4
    """Attention heads of the predictor."""
    attn_fuse_global: bool = True
    """Whether the predictor attends within a whole image; otherwise within a vision window."""
    selected_visual_layers: tuple[int, ...] = ()
    """Vision blocks whose outputs condition the predictor, deepest first. [default: the full-attention blocks; Qwen3-VL: the last block and
    those of DeepStack]"""
    visual_cond_size: int = 512
    """Width of a visual condition."""
    deep_supervision: bool = False
    """Whether every predictor block has a supervised head; otherwise only the last one."""
    reduce_threshold: float = 0.5
    """Importance above which visual tokens are kept."""
    max_remain_ratio: float | None = None
    """Largest share of the visual tokens to keep."""
    min_remain_num: int | None = 1
    """Least number of visual tokens to keep."""
    start: Literal["random", "prompt"] = "random"
    """Initial glimpse rows. random: as in the released training; prompt: copies of the last tokens of a prompt, whose attention already
    finds the evidence, which small models that train for minutes need."""


@dataclass(frozen=True)
class LossConfig:
    """language_weight * L_lang + location_weight * (dice_weight * Dice + bce_weight * BCE)."""

    language_weight: float = 1.0
    """Weight of the language loss; `le_weight` in the released training."""
    location_weight: float = 1.0
    """Weight of the location loss; `loc_weight` in the released training."""
    dice_weight: float = 1.0
    """Weight of Dice in the location loss; `loc_dice_weight` in the released training."""
    bce_weight: float = 0.1
    """Weight of binary cross-entropy in the location loss; `loc_bce_weight` in the released training."""
    answer_in_denominator: bool = False
    """If the predictor reads a log-softmax: normalise over the answer's keys too, as the released training does."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser: AdamW, or Muon for the matrices of a whole model."""

    name: str = "adamw"
    """adamw; or muon (arXiv 2502.16982): matrices by Muon with the step sizes of AdamW, all else by AdamW."""
    learning_rate: float = 1e-4
    """Learning rate at its peak."""
    schedule: str = "cosine"
    """Course of the learning rate after the warm-up: cosine, linear or constant."""
    warmup_ratio: float = 0.1
    """Share of the steps in which the learning rate rises linearly from 0."""
    end_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    b1: float = 0.9
    """Decay rate of the first moment."""
    b2: float = 0.999
    """Decay rate of the second moment."""
    eps: float = 1e-8
    """Constant added to the square root of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    clip_norm: float = 1.0
    """Global gradient norm above which gradients are scaled down; 0: never."""


@dataclass(frozen=True)
class MeshConfig:
    """Distribution over devices: data x fsdp x tensor must be their number; -1: whatever number remains."""

    data: int = 1
    """Number of copies of the model; samples are split over them."""
    fsdp: int = -1
    """Devices over which stored parameters, and samples, are split."""
    tensor: int = 1
    """Devices over which heads, MLPs and the vocabulary are split."""
    coordinator: str | None = None
    """host:port of process 0; not needed where a TPU pod or a cluster manager provides it."""
    processes: int | None = None
    """Number of processes, with `coordinator`."""
    process: int | None = None
    """Number of this process, with `coordinator`."""


@dataclass(frozen=True)
class TrainConfig:
    """Train the glimpse of a frozen vision-language model."""

    model: str = ""
    """Folder or Hugging Face Hub id of the base model."""
    glimpse_from: str | None = None
    """Folder or Hub id of a trained glimpse to start from; its settings replace `glimpse`."""
    glimpse: GlimpseSettings = field(default_factory=GlimpseSettings)
    """Settings of the new glimpse."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records and batches to train on."""
    loss: LossConfig = field(default_factory=LossConfig)
    """Weights of the losses."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimiser and learning rate."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Distribution over devices."""
    out: str = "runs/glimpse"
    """Run folder: logs, checkpoints, pictures, the exported glimpse; may be gs://. If it holds a run already, that run is continued."""
    dtype: str | None = None
    """Type of the frozen base model's weights: float32, bfloat16 or float16. [default: as stored]"""
    batch_size: int = 1
    """Samples of a micro-batch, over all devices together."""
    accumulation: int = 8
    """Micro-batches per optimiser step."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Number of optimiser steps, instead of `epochs`."""
    seed: int = 0
    """Seed of the new parameters and of dropout."""
    remat: bool = True
    """Store only matrix products for the backward pass and recompute the rest, attention included; --no-remat stores everything."""
    attention: str = "auto"
    """Implementation of attention over long sequences."""
    log_every: int = 10
    """Steps between two log lines."""
    validate_every: int = 500
    """Steps between two validations."""
    validation_pictures: int = 8
    """Number of pictures with predicted and reference masks that a validation writes."""
    save_every: int = 500
    """Steps between two checkpoints."""
    keep: int = 3
    """Number of newest checkpoints that are kept, besides the best one."""
    compilation_cache: str | None = None
    """Folder of the cache of compiled programs. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""

    def check(self) -> "TrainConfig":
        """Checks everything that can be checked before anything is loaded. Returns: self. Raises: GlimpseError that names the field."""
        self._check_types()

        def positive(owner: Any, prefix: str, *names: str) -> None:
            for name in names:
                value = getattr(owner, name)
                if value is not None and not value > 0:
                    raise GlimpseError(f"{prefix}{name}={value!r} must be positive")

        def in_range(owner: Any, prefix: str, *names: str) -> None:
            for name in names:
                if not 0 <= getattr(owner, name) <= 1:
                    raise GlimpseError(f"{prefix}{name}={getattr(owner, name)!r} is not in 0..1")

        if not self.model:
            raise GlimpseError("model is missing: a folder or a Hugging Face Hub id (--model)")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise GlimpseError(f"dtype='{self.dtype}' is not float32, bfloat16 or float16")
        check_words(self)
        check_choice("glimpse.le_norm_type", self.glimpse.le_norm_type, NORMS)
        check_choice("glimpse.attn_fuse_type", self.glimpse.attn_fuse_type, PREDICTORS)
        names = ("batch_size", "accumulation", "epochs", "steps", "log_every", "validate_every", "save_every", "keep")
        positive(self, "", *names)
        positive(self.data, "data.", "look_least", "max_visual_tokens", "max_prompt", "max_answer", "shapes", "threads", "prefetch")
        positive(self.optim, "optim.", "learning_rate", "eps")
        in_range(self.optim, "optim.", "warmup_ratio", "end_ratio", "b1", "b2")
        in_range(self.data, "data.", "looks")
        if not self.data.look_shares or not all(isinstance(s, int | float) and 0 < s <= 1 for s in self.data.look_shares):
            raise GlimpseError(f"data.look_shares={self.data.look_shares!r} must be shares in 0..1")
        if self.seed < 0 or self.data.seed < 0 or any(s.seed < 0 for s in (*self.data.sources, *self.data.validation)):
            raise GlimpseError("seeds must not be negative")
        if self.data.workers < 0 or self.optim.clip_norm < 0 or self.optim.weight_decay < 0 or self.validation_pictures < 0:
            raise GlimpseError("data.workers, optim.clip_norm, optim.weight_decay and validation_pictures must not be negative")
        own = DataSource(self.data.own or "", suffix=self.data.sources[0].suffix if self.data.sources else "")
        if self.data.own and self.data.sources != (own,):
            return dataclasses.replace(self, data=dataclasses.replace(self.data, sources=(own,))).check()
        if not self.data.sources:
            raise GlimpseError("data.sources is empty: name the data to train on, e.g. --data.own FOLDER")
        for source in (*self.data.sources, *self.data.validation):
            parse_sampling(source.sampling)
            if source.weight is not None and not source.weight > 0:
                raise GlimpseError(f"data source {source.path}: weight={source.weight} must be positive")
        for name in ("sources", "validation"):
            if len({s.weight is None for s in getattr(self.data, name)}) > 1:
                raise GlimpseError(f"data.{name}: give every source a weight, or none")
        return self

    def _check_types(self) -> None:
        """Checks that numeric fields hold numbers: a configuration file is plain Python and may hold anything."""
        for owner, prefix in ((self, ""), (self.data, "data."), (self.optim, "optim."), (self.loss, "loss."), (self.mesh, "mesh.")):
            for item in dataclasses.fields(owner):
                value, kind = getattr(owner, item.name), str(item.type)
                number = isinstance(value, int | float) and not isinstance(value, bool)
                numeric = any(word in kind for word in ("int", "float")) and "tuple" not in kind and "str" not in kind
                if numeric and not ((number and math.isfinite(value)) or (value is None and "None" in kind)):
                    raise GlimpseError(f"{prefix}{item.name}={value!r} is not a number")


def check_words(config: Any) -> None:
    """Checks the fields of both stages that accept only certain words. Raises: GlimpseError that names the field."""
    check_choice("optim.name", config.optim.name, OPTIMIZERS)
    check_choice("optim.schedule", config.optim.schedule, SCHEDULES)
    check_choice("attention", config.attention, ATTENTION)
