"""Pruning plans: an ordered list of cuts. No pruning is the empty plan, GlimpsePrune is one cut.

A cut says after which layer, which scorer ranks the visual tokens, and whether the cache of the layers already run is cut too.
How many tokens stay is `trees.KeepLimits`, numbers that change without recompiling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from gp_jax.config import GlimpseConfig
from gp_jax.errors import GlimpseError
from gp_jax.glimpse.compact import take_rows
from gp_jax.glimpse.select import Prune
from gp_jax.lvlm import LVLM
from gp_jax.trees import Stream, VisionFeatures, VisionInput


@dataclass(frozen=True)
class Cut:
    """after: last layer that sees everything (-1: cut before layer 0). past: also cut the cache of layers 0 .. after."""

    after: int
    scorer: str
    past: bool = True


Plan = tuple[Cut, ...]


@dataclass(frozen=True)
class Scorer:
    """Ranks visual tokens.

    score(model, stream, vision, features, given) -> (B, M) float32 logits; `given` is the request's own array for this cut.
    taps: it reads the glimpse's attention, so the prompt needs glimpse rows; the cut drops them.
    """

    score: Callable[[LVLM, Stream, VisionInput, VisionFeatures, Array | None], Array]
    taps: bool = False


def to_slots(rows: Array, image_slot: Array, slots: int) -> Array:
    """Moves a value per stream row to its vision slot. (B, T, ...) -> (B, M, ...), zeros where nothing stands."""
    batch = jnp.arange(rows.shape[0])[:, None]
    target = jnp.where(image_slot >= 0, image_slot, slots)
    return jnp.zeros((rows.shape[0], slots, *rows.shape[2:]), rows.dtype).at[batch, target].set(rows, mode="drop")


def present_slots(stream: Stream, slots: int) -> Array:
    """Vision slots whose token is still in the stream. Returns: (B, M) bool."""
    return to_slots(stream.valid, stream.image_slot, slots)


def importance(model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, remat: bool = False) -> Array:
    """What the predictor makes of a stream's taps. Returns: (heads, B, M) float32 logits, of which the last head decides."""
    slots = vision.token_image.shape[1]
    maps = jnp.concatenate([stream.taps[layer] for layer in model.glimpse_config.selected_layers], axis=-1)
    maps = to_slots(maps, stream.image_slot, slots)
    return model.predictor(maps, features.conditions, vision, present_slots(stream, slots), remat)


def _glimpse(model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, given: Array | None) -> Array:
    return importance(model, stream, vision, features)[-1]


def _given(model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, given: Array | None) -> Array:
    """Logits that came with the request: +inf and -inf for a reference mask."""
    return given


SCORERS = {"glimpse": Scorer(_glimpse, taps=True), "given": Scorer(_given)}


def uses_taps(plan: Plan) -> bool:
    """Whether the prompt needs glimpse rows."""
    return any(SCORERS[cut.scorer].taps for cut in plan)


def glimpse_plan(prune: Prune, config: GlimpseConfig | None) -> Plan:
    """The plan that `Prune` stands for.

    Raises: GlimpseError when there is no glimpse, whose config says where to cut.
    """
    if config is None:
        raise GlimpseError("prune is set, but no glimpse is loaded: pass glimpse=... to from_pretrained, or prune=None")
    if prune.reference_masks is not None:
        return (Cut(config.reduce_layer, "given"),)
    if config.use_ref_masks:
        raise GlimpseError("this glimpse config has use_ref_masks=true: pass Prune(reference_masks=...)")
    return (Cut(config.reduce_layer, "given" if config.use_zero_masks else "glimpse"),)


def survivors_mask(stream: Stream, keep: Array, drop_glimpse: bool) -> Array:
    """Which stream rows stay. Text always does. keep: (B, M) over vision slots. Returns: (B, T) bool."""
    kept = take_rows(keep, jnp.maximum(stream.image_slot, 0))
    stays = jnp.where(stream.image_slot >= 0, kept, True) & stream.valid
    return stays & (stream.glimpse_row < 0) if drop_glimpse else stays
