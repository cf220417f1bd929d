"""Pruning plans: an ordered list of cuts. No pruning is the empty plan, GlimpsePrune is one cut.

A cut says after which layer, which scorer ranks the visual tokens, and whether the cache of the layers already run is cut too.
How many tokens stay is `trees.KeepLimits`, numbers that change without recompiling.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
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
class Scoring:
    """What a scorer may look at."""

    model: LVLM
    cut: Cut
    stream: Stream
    vision: VisionInput
    features: VisionFeatures
    given: Array | None  # (B, M): the request's own array for this cut


@dataclass(frozen=True)
class Scorer:
    """Ranks visual tokens.

    score: Scoring -> (B, M) float32 logits.
    glimpse: it reads the glimpse's attention, so the prompt needs glimpse rows; the cut drops them.
    attention: it reads the last prompt row's attention in the cut's layer.
    """

    score: Callable[[Scoring], Array]
    glimpse: bool = False
    attention: bool = False


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


def _glimpse(x: Scoring) -> Array:
    return importance(x.model, x.stream, x.vision, x.features)[-1]


def _given(x: Scoring) -> Array:
    """Logits that came with the request: +inf and -inf for a reference mask."""
    return x.given


def _attention(x: Scoring) -> Array:
    """Log of the share of the last prompt row's attention that a visual token gets, mean over heads; nothing is trained."""
    logits = jnp.where(x.stream.valid[..., None], x.stream.taps[x.cut.after], -jnp.inf)
    share = jnp.mean(jax.nn.softmax(logits, axis=1), axis=-1)
    return jnp.log(to_slots(share, x.stream.image_slot, x.vision.token_image.shape[1]) + jnp.finfo(jnp.float32).tiny)


SCORERS = {"glimpse": Scorer(_glimpse, glimpse=True), "attention": Scorer(_attention, attention=True), "given": Scorer(_given)}
SCORER_OF = {"glimpse": "glimpse", "attention": "attention", "random": "given", "nothing": "given"}  # methods of `Prune`


def needs_glimpse(plan: Plan) -> bool:
    """Whether the prompt needs glimpse rows."""
    return any(SCORERS[cut.scorer].glimpse for cut in plan)


def tapped_layers(plan: Plan, config: GlimpseConfig | None) -> tuple[int, ...]:
    """Layers whose attention a plan's scorers read."""
    layers = {cut.after for cut in plan if SCORERS[cut.scorer].attention}
    return tuple(sorted(layers | (set(config.selected_layers) if needs_glimpse(plan) else set())))


def make_plan(prune: Prune, config: GlimpseConfig | None, depth: int) -> Plan:
    """The plan that `Prune` stands for. depth: decoder layers.

    Raises: GlimpseError when the glimpse is needed and there is none, or the cut is not one of the layers.
    """
    scorer = "given" if prune.reference_masks is not None else SCORER_OF[prune.method]
    if scorer == "glimpse" and config is None:
        raise GlimpseError("prune is set, but no glimpse is loaded: pass glimpse=... to from_pretrained, or prune=None")
    after = config.reduce_layer if config else middle_layer(depth)
    if prune.after is not None:
        after = prune.after
    if not 0 <= after < depth:
        raise GlimpseError(f"after={after} is not one of the model's {depth} layers (0..{depth - 1})")
    if scorer == "glimpse":
        if config.use_ref_masks:
            raise GlimpseError("this glimpse config has use_ref_masks=true: pass Prune(reference_masks=...)")
        if prune.after not in (None, config.reduce_layer):
            raise GlimpseError(f"after={after}: this glimpse was trained for layer {config.reduce_layer}")
        scorer = "given" if config.use_zero_masks else "glimpse"
    return (Cut(after, scorer),)


def middle_layer(depth: int) -> int:
    """Where the released models cut: two thirds of the depth."""
    return -(-depth * 2 // 3) - 1


def survivors_mask(stream: Stream, keep: Array, drop_glimpse: bool) -> Array:
    """Which stream rows stay. Text always does. keep: (B, M) over vision slots. Returns: (B, T) bool."""
    kept = take_rows(keep, jnp.maximum(stream.image_slot, 0))
    stays = jnp.where(stream.image_slot >= 0, kept, True) & stream.valid
    return stays & (stream.glimpse_row < 0) if drop_glimpse else stays
