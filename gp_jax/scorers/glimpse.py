"""GlimpsePrune (arXiv 2508.01548): the trained predictor on the attention of the glimpse rows."""

import jax.numpy as jnp
from jax import Array

from gp_jax.lvlm import LVLM
from gp_jax.scorers.scorer import Scoring, present_slots, to_slots
from gp_jax.trees import Stream, VisionFeatures, VisionInput


def importance(model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, remat: bool = False) -> Array:
    """What the predictor makes of a stream's taps. Returns: (heads, B, M) float32 logits, of which the last head decides."""
    slots = vision.token_image.shape[1]
    maps = jnp.concatenate([stream.taps[layer] for layer in model.glimpse_config.selected_layers], axis=-1)
    maps = to_slots(maps, stream.image_slot, slots)
    return model.predictor(maps, features.conditions, vision, present_slots(stream, slots), remat)


def score(x: Scoring) -> Array:
    """The last head's logits."""
    return importance(x.model, x.stream, x.vision, x.features)[-1]
