"""GlimpsePrune (arXiv 2508.01548): the trained predictor on the attention of the glimpse rows."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import at_once
from gp_jax.pruning.scorers.scorer import Scoring, present_slots, to_slots
from gp_jax.trees import Stream, VisionFeatures, VisionInput


def slot_maps(taps: tuple[Array, ...], stream: Stream, slots: int) -> tuple[Array, Array]:
    """Attention maps at every vision slot (B, M, A), and the slots that hold a token (B, M)."""
    return to_slots(jnp.concatenate(taps, axis=-1), stream.image_slot, slots), present_slots(stream, slots)


def importance(
    model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, remat: bool = False, call: Callable = at_once
) -> Array:
    """The predictor's output for a stream's taps. call: see `ops.layers.at_once`. Returns: (heads, B, M) float32 logits, of which only
    the last head is used for pruning."""
    assert model.glimpse_config is not None and model.predictor is not None, "a model with a glimpse"
    taps = tuple(stream.taps[layer] for layer in model.glimpse_config.selected_layers)
    bare = dataclasses.replace(stream, kv=(), taps={})
    maps, present = call(slot_maps, taps, bare, slots=vision.token_image.shape[1])
    return model.predictor(maps, features.conditions, vision, present, remat, call)


def score(x: Scoring) -> Array:
    """The last head's logits."""
    return x.call(last_head, importance(x.model, x.stream, x.vision, x.features, call=x.call))


def last_head(heads: Array) -> Array:
    """Keeps the last head: it alone decides. (heads, B, M) -> (B, M)."""
    return heads[-1]
