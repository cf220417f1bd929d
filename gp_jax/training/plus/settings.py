"""Settings of the stages `plus` (reinforcement fine-tuning under pruning) and `sft` (supervised, on the same parts)."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from gp_jax.config.choices import check_choice
from gp_jax.data.settings import DataConfig, DataSource, parse_sampling
from gp_jax.errors import GlimpseError
from gp_jax.inference.logprobs import EXACT, MODES
from gp_jax.models.adapter import AdapterConfig
from gp_jax.training.rewards.settings import RewardConfig, RewardTerm, check_terms
from gp_jax.training.settings import MeshConfig, OptimConfig, check_words

LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")
MASKS = ("reference", "predicted", "none")


@dataclass(frozen=True)
class MasksConfig:
    """Which visual tokens completions see. A mask is drawn once per question and step, for all completions and both models."""

    kind: str = "reference"
    """reference: those of the evidence's boxes or masks; predicted: those that the frozen base's glimpse keeps; none: all of them, to
    compare with. Records without evidence get a predicted mask, or without a glimpse all of the picture."""
    predicted_share: float = 0.0
    """Share of the questions that get a predicted mask instead of their reference; `gen_mask_usage_ratio` in the released code."""
    after: int | None = None
    """Last layer that sees every visual token. [default: the glimpse's, else two thirds of the depth]"""


@dataclass(frozen=True)
class PolicyConfig:
    """Group-relative policy gradients. The defaults are the preset `modern`; docs/plus.md gives reasons and measurements."""

    loss: str = "dapo"
    """grpo: mean over each completion's tokens, then over completions; dapo: mean over all tokens of a step (arXiv 2503.14476); dr_grpo:
    sum over tokens divided by the token limit, advantages not divided by the spread (arXiv 2503.20783); gspo: one ratio per completion
    (arXiv 2507.18071)."""
    mode: str = EXACT
    """exact: log-probabilities of the distribution that is sampled from; released: as the released trainer computes them."""
    group_size: int = 8
    """Completions of a question."""
    epsilon: float = 0.2
    """Ratios below 1 - epsilon are clipped."""
    epsilon_high: float = 0.28
    """Ratios above 1 + epsilon_high are clipped."""
    num_iterations: int = 1
    """Updates with the completions of a step."""
    beta: float = 0.0
    """Weight of the KL term to the model without adapter; 0 saves its pass."""
    std_epsilon: float = 1e-4
    """Added to the standard deviation of a group's rewards."""
    flat_groups: Literal["keep", "drop"] = "drop"
    """Whether groups whose rewards are all equal count in the loss. They are counted in the log either way."""
    cut_completions: Literal["keep", "drop"] = "drop"
    """Whether completions that were cut at max_new_tokens count in the loss. They are counted in the log either way."""
    importance_cap: float = 2.0
    """Each token's loss is weighted by the ratio of the training pass's probability to the sampler's, at most this; 0: not weighted."""
    temperature: float = 1.0
    """Temperature of sampling and of the log-probabilities."""
    top_k: int = 0
    """Most likely tokens to sample from; 0: all. Log-probabilities are those of the whole vocabulary, so other values bias the gradient."""
    top_p: float = 1.0
    """Probability mass to sample from; 1: all. Biases the gradient too."""
    max_new_tokens: int = 128
    """Longest completion."""

    def check(self) -> None:
        """Raises: GlimpseError that names the field."""
        check_choice("policy.loss", self.loss, LOSSES)
        check_choice("policy.mode", self.mode, MODES)
        for name in ("flat_groups", "cut_completions"):
            check_choice(f"policy.{name}", getattr(self, name), ("keep", "drop"))
        numbers = ("epsilon", "epsilon_high", "beta", "std_epsilon", "importance_cap", "temperature", "top_p")
        for name in (*numbers, "group_size", "num_iterations", "top_k", "max_new_tokens"):
            value = getattr(self, name)
            whole = name not in numbers
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not math.isfinite(value) or value < 0:
                raise GlimpseError(f"policy.{name}={value!r} must be a {'whole ' if whole else ''}number, 0 or more")
        if self.group_size < 2:
            raise GlimpseError(f"policy.group_size={self.group_size}: a group needs at least 2 completions to compare")
        for name in ("num_iterations", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise GlimpseError(f"policy.{name}={getattr(self, name)} must be positive")
        if not self.temperature > 0:
            raise GlimpseError(f"policy.temperature={self.temperature}: completions of a group must differ, so it must be above 0")
        if not 0 < self.top_p <= 1:
            raise GlimpseError(f"policy.top_p={self.top_p} is not in 0..1 (0 excluded)")


RELEASED_POLICY = PolicyConfig(
    loss="grpo",
    mode="released",
    group_size=4,
    beta=0.04,
    flat_groups="keep",
    cut_completions="keep",
    importance_cap=0.0,
    epsilon_high=0.2,
)
RELEASED_ADAPTER = AdapterConfig(r=32, lora_alpha=64, lora_dropout=0.05)
RELEASED_OPTIM = OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_ratio=0.1, clip_norm=1.0)


@dataclass(frozen=True)
class PlusConfig:
    """Fine-tune a vision-language model on pruned sequences, by reinforcement (stage plus) or on reference answers (stage sft)."""

    stage: str = "plus"
    """plus: completions are sampled and rewarded; sft: cross-entropy of the records' answers."""
    model: str = ""
    """Folder or Hugging Face Hub id of the base model."""
    glimpse_from: str | None = None
    """Folder or Hub id of a glimpse, for predicted masks. [default: the model folder's own, if it has one]"""
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    """LoRA adapter that is trained; None: `parameters` are."""
    adapter_from: str | None = None
    """Folder or Hub id of an adapter (PEFT) to go on training; its settings replace `adapter`."""
    parameters: tuple[str, ...] = ()
    """Parameters of the decoder that are trained in full, in float32, by names or patterns, e.g. "decoder.layers.*.mlp.*"; needs
    adapter=None."""
    data: DataConfig = field(default_factory=DataConfig)
    """Records to train on."""
    masks: MasksConfig = field(default_factory=MasksConfig)
    """Which visual tokens completions see."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """Sampling and loss of the stage plus."""
    rewards: RewardConfig = field(default_factory=RewardConfig)
    """Rewards of completions, for data sources that name none of their own."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5, schedule="constant", warmup_ratio=0.05))
    """Optimiser and learning rate."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Distribution over devices."""
    out: str = "runs/plus"
    """Run folder: logs, checkpoints, samples, the exported adapter; may be gs://. If it holds a run already, that run is continued."""
    dtype: str | None = None
    """Type of the frozen base model's weights: float32, bfloat16 or float16. [default: as stored]"""
    batch_size: int = 1
    """Questions of a micro-batch, over all devices together, with all their completions."""
    accumulation: int = 8
    """Micro-batches per step."""
    epochs: float = 1.0
    """Passes over the data."""
    steps: int | None = None
    """Number of steps, instead of `epochs`."""
    seed: int = 0
    """Seed of the adapter, of sampling, of the choice of masks and of dropout."""
    remat: bool = True
    """Store only the inputs of layers for the backward pass and compute the layers again; --no-remat stores everything."""
    attention: str = "auto"
    """Implementation of attention over long sequences."""
    log_every: int = 1
    """Steps between two log lines."""
    samples_every: int = 10
    """Steps between two entries in samples.jsonl and samples.html; 0: none."""
    validate_every: int = 100
    """Steps between two validations: greedy answers to the validation records, scored by their rewards."""
    save_every: int = 50
    """Steps between two checkpoints."""
    keep: int = 3
    """Number of newest checkpoints that are kept, besides the best one."""
    compilation_cache: str | None = None
    """Folder of the cache of compiled programs. [default: JAX_COMPILATION_CACHE_DIR, else ~/.cache/gp_jax/compiled]"""

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained, and not the model's own parameters."""
        return self.adapter is not None or self.adapter_from is not None

    def check(self) -> "PlusConfig":
        """Checks everything that can be checked before anything is loaded. Returns: self. Raises: GlimpseError that names the field."""
        check_choice("stage", self.stage, ("plus", "sft"))
        if not self.model:
            raise GlimpseError("model is missing: a folder or a Hugging Face Hub id (--model)")
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise GlimpseError(f"dtype='{self.dtype}' is not float32, bfloat16 or float16")
        check_words(self)
        check_choice("masks.kind", self.masks.kind, MASKS)
        if self.data.looks:
            raise GlimpseError("data.looks: only the stage that trains the glimpse sees pictures at the size of a first look")
        if not 0 <= self.masks.predicted_share <= 1:
            raise GlimpseError(f"masks.predicted_share={self.masks.predicted_share!r} is not in 0..1")
        if self.adapter is not None:
            self.adapter.check()
            if self.parameters:
                raise GlimpseError("parameters: are trained instead of an adapter, so adapter must be None")
        elif not self.parameters and self.adapter_from is None:
            raise GlimpseError("adapter is None and parameters is empty: there is nothing to train")
        if self.stage == "plus":
            self.policy.check()
            self.rewards.check()
            for kind in ("sources", "validation"):
                for number, source in enumerate(getattr(self.data, kind)):
                    check_terms(terms_of(source.rewards), self.rewards.judge, f"data.{kind}[{number}].rewards")
            if self.policy.beta and not self.adapts:
                raise GlimpseError(f"policy.beta={self.policy.beta}: the KL term compares with the model without adapter; set it to 0")
        for name in ("batch_size", "accumulation", "epochs", "steps", "log_every", "validate_every", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value > 0):
                raise GlimpseError(f"{name}={value!r} must be positive")
        if self.seed < 0 or self.samples_every < 0 or self.data.seed < 0:
            raise GlimpseError("seed, data.seed and samples_every must not be negative")
        return self._with_own_data()

    def _with_own_data(self) -> "PlusConfig":
        first = self.data.sources[0] if self.data.sources else DataSource("")
        own = DataSource(self.data.own or "", suffix=first.suffix, rewards=first.rewards)
        if self.data.own and self.data.sources != (own,):
            return dataclasses.replace(self, data=dataclasses.replace(self.data, sources=(own,))).check()
        if not self.data.sources:
            raise GlimpseError("data.sources is empty: name the data to train on, e.g. --data.own FOLDER")
        for source in (*self.data.sources, *self.data.validation):
            parse_sampling(source.sampling)
        return self


def terms_of(names: Sequence[str]) -> tuple[RewardTerm, ...]:
    """The terms of a data source. names: "name" or "name=weight". Raises: GlimpseError."""
    terms = []
    for text in names:
        name, _, weight = text.partition("=")
        try:
            terms.append(RewardTerm(name, float(weight) if weight else 1.0))
        except ValueError as error:
            raise GlimpseError(f"rewards: '{text}' is not name or name=weight") from error
    return tuple(terms)


def released(config: PlusConfig) -> PlusConfig:
    """A configuration with the released values and mathematics."""
    changed: dict[str, Any] = {"policy": RELEASED_POLICY, "adapter": RELEASED_ADAPTER, "optim": RELEASED_OPTIM, "accumulation": 8}
    return dataclasses.replace(config, **changed)
