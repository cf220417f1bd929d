"""What a scorer is, its inputs, and the mapping between stream rows and vision slots.

B samples, T stream rows, M vision slots, D decoder width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.config.vision import Vision
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import at_once
from gp_jax.trees import KeepLimits, Stream, VisionFeatures, VisionInput


@jax.tree_util.register_static
@dataclass(frozen=True)
class Cut:
    """Where a plan prunes, and by which scorer. A static argument of jitted functions: it is part of the program.

    after: last layer that sees everything (-1: cut before layer 0). past: also cut the cache of layers 0 .. after."""

    after: int
    scorer: str
    past: bool = True


@dataclass(frozen=True)
class Scoring:
    """The inputs of a scorer."""

    model: LVLM
    cut: Cut
    stream: Stream
    vision: VisionInput
    features: VisionFeatures
    limits: KeepLimits
    given: Array | None = None  # (B, M): the request's own array for this cut
    call: Callable = at_once  # see `ops.layers.at_once`

    @property
    def slots(self) -> int:
        """Vision slots M."""
        return self.vision.token_image.shape[1]

    @property
    def present(self) -> Array:
        """(B, M) bool, slots whose token is still in the stream."""
        return present_slots(self.stream, self.slots)


def no_blocks(config: Vision) -> tuple[int, ...]:
    """None of the vision tower's."""
    return ()


@dataclass(frozen=True)
class Scorer:
    """Ranks visual tokens.

    score: Scoring -> (B, M) float32 logits. A method that selects a set instead of a ranking gives the set the largest logits.
    glimpse: it reads the glimpse's attention, so the prompt needs glimpse rows; the cut drops them.
    given: it ranks by an array that comes with the request (`Scoring.given`), so it may also cut before layer 0.
    attention: it reads the last prompt row's attention in the cut's layer.
    blocks: vision blocks (with full attention) in which it reads the attention that visual tokens receive, and their keys.
    in_parts: `score` calls its parts by `Scoring.call`, as separate programs; otherwise it is one program with the keep rule.
    merge: Scoring, keep (B, M) bool -> (B, M, D), visual tokens with dropped ones merged into kept ones (cuts before layer 0 only).
    """

    score: Callable[[Scoring], Array]
    glimpse: bool = False
    given: bool = False
    attention: bool = False
    blocks: Callable[[Vision], tuple[int, ...]] = no_blocks
    in_parts: bool = False
    merge: Callable[[Scoring, Array], Array] | None = None


def to_slots(rows: Array, image_slot: Array, slots: int) -> Array:
    """Moves a value per stream row to its vision slot. (B, T, ...) -> (B, M, ...), zeros in other slots."""
    batch = jnp.arange(rows.shape[0])[:, None]
    target = jnp.where(image_slot >= 0, image_slot, slots)
    return jnp.zeros((rows.shape[0], slots, *rows.shape[2:]), rows.dtype).at[batch, target].set(rows, mode="drop")


def present_slots(stream: Stream, slots: int) -> Array:
    """Vision slots whose token is still in the stream. Returns: (B, M) bool."""
    return to_slots(stream.valid, stream.image_slot, slots)
