"""LoRA adapters (arXiv 2106.09685) of the decoder's linear layers: which layers have one, on and off, and merged into the weights.

Settings and names are those of PEFT. The layer itself is `ops.layers.LowRank`.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from gp_jax.errors import GlimpseError, some
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import Linear, LowRank

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # of every decoder layer
ALL_LINEAR = "all-linear"  # PEFT's word for all of them


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter. Names and meanings are those of PEFT's LoraConfig."""

    r: int = 32
    """Rank."""
    lora_alpha: float = 64.0
    """The adapter's output is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout of the adapter's inputs in training."""
    target_modules: tuple[str, ...] | str = ALL_LINEAR
    """Linear layers of the decoder that get an adapter: a list of names or ends of names, e.g. q_proj v_proj; or one regular expression
    that whole names must match; all-linear: all seven of every layer."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""

    def check(self, where: str = "adapter") -> "AdapterConfig":
        """Returns: self. Raises: GlimpseError that names the field."""
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise GlimpseError(f"{where}.r={self.r!r} must be a positive whole number")
        if not isinstance(self.lora_alpha, int | float) or not math.isfinite(self.lora_alpha) or self.lora_alpha <= 0:
            raise GlimpseError(f"{where}.lora_alpha={self.lora_alpha!r} must be a positive number")
        if not isinstance(self.lora_dropout, int | float) or not 0 <= self.lora_dropout < 1:
            raise GlimpseError(f"{where}.lora_dropout={self.lora_dropout!r} is not in 0..1 (1 excluded)")
        if not self.target_modules:
            raise GlimpseError(f"{where}.target_modules is empty")
        return self

    @property
    def scale(self) -> float:
        """The factor of B A x."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


def module_names(layers: int) -> Iterator[tuple[str, str]]:
    """PEFT's name and the dotted path here of every linear layer of the decoder."""
    for index in range(layers):
        for name in LINEAR:
            part = "self_attn" if name[0] in "qkvo" else "mlp"
            yield f"model.layers.{index}.{part}.{name}", f"decoder.layers.{index}.{part}.{name}"


def chosen(targets: Sequence[str] | str, layers: int) -> list[str]:
    """Dotted paths of the layers that `target_modules` names, by PEFT's rules. Raises: GlimpseError when one of them names none."""
    known = dict(module_names(layers))
    if targets == ALL_LINEAR:
        return list(known.values())
    if isinstance(targets, str):
        try:
            found = [path for name, path in known.items() if any(re.fullmatch(targets, form) for form in forms(name))]
        except re.error as error:
            raise GlimpseError(f"target_modules='{targets}' is not a regular expression ({error})") from error
        if not found:
            raise GlimpseError(f"target_modules='{targets}' matches no linear layer of the decoder, such as {next(iter(known))}")
        return found

    def hits(target: str) -> set[str]:
        return {name for name in known if any(form == target or form.endswith(f".{target}") for form in forms(name))}

    missed = [target for target in targets if not hits(target)]
    if missed:
        raise GlimpseError(f"target_modules: {some(missed)} is no linear layer of the decoder (those are {', '.join(LINEAR)})")
    wanted = set().union(*map(hits, targets))
    return [path for name, path in known.items() if name in wanted]


def forms(name: str) -> tuple[str, ...]:
    """The names that transformers' versions have given a module of the decoder."""
    rest = name.removeprefix("model.")
    return name, f"model.language_model.{rest}", f"language_model.model.{rest}"


def attach(model: LVLM, config: AdapterConfig, paths: Sequence[str] | None = None, seed: int = 0, abstract: bool = False) -> LVLM:
    """Gives a model an adapter, which changes nothing until it is trained: B is 0. paths: of its layers; None: those of the config;
    abstract: shapes instead of arrays, as `pretrained.params.abstract_model` has them.

    Returns: the model itself. Raises: GlimpseError.
    """
    config.check()
    rngs = nnx.Rngs(seed)
    for path in chosen(config.target_modules, model.config.text.num_hidden_layers) if paths is None else paths:
        linear = module_at(model, path)
        size_out, size_in = linear.weight.shape
        make = partial(LowRank, size_in, size_out, config.r, config.scale, config.lora_dropout)
        linear.adapter = nnx.data(nnx.eval_shape(lambda make=make: make(rngs=nnx.Rngs(0))) if abstract else make(rngs=rngs))
    return model


def module_at(model: LVLM, path: str) -> Linear:
    """A linear layer by its dotted path."""
    node: Any = model
    for name in path.split("."):
        node = node[int(name)] if name.isdigit() else getattr(node, name)
    return node


def adapted(model: nnx.Module) -> Iterator[tuple[str, Linear]]:
    """The linear layers with an adapter, by dotted path."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Linear) and node.adapter is not None:
            yield ".".join(map(str, path)), node


def without_adapter(model: LVLM) -> LVLM:
    """The base model: the same parameters, no adapter. Nothing is copied."""
    base = nnx.clone(model, variables=False)
    for _, linear in list(adapted(base)):
        linear.adapter = None
    return base


def with_dropout(model: nnx.Module, key: jax.Array | None) -> None:
    """Switches the adapters' dropout on, with masks of this key, or off (None)."""
    for index, (_, linear) in enumerate(sorted(adapted(model), key=lambda item: item[0])):
        assert linear.adapter is not None, "it has an adapter"
        linear.adapter.noise = nnx.data(None if key is None else jax.random.fold_in(key, index))


def merge(model: LVLM) -> LVLM:
    """The model with its adapter added to the weights, in float32 and rounded once. The given model stays as it is."""
    merged = nnx.clone(model, variables=False)
    for _, linear in list(adapted(merged)):
        add(linear)
    return merged


def add(linear: Linear) -> None:
    """Adds a layer's adapter to its weight, in float32 and rounded once, and takes it away."""
    adapter, weight = linear.adapter, linear.weight[...]
    assert adapter is not None, "it has an adapter"
    added = adapter.scale * jnp.matmul(adapter.lora_B[...], adapter.lora_A[...], precision="highest")
    linear.weight = nnx.Param((weight.astype(jnp.float32) + added).astype(weight.dtype))
    linear.adapter = None
