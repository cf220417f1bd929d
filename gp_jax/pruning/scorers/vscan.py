"""VScan (arXiv 2505.22654): two scans in the vision tower, then a cut by the question's attention in the middle of the decoder.

Before layer 0, of K tokens to keep:

    local    K // 2: those that receive most attention in a shallow block, at most ceil(K // 2 / windows) from each 4 x 4 window of tokens
             (what is left over at the right and the bottom belongs to the last window)
    global   K - K // 2: those of the others that receive most in the output block
    merging  every dropped token joins the kept one most like it (cosine); a kept token becomes the mean of itself and what joined

Before layer L/2 a third of these is kept: those that the last prompt token attends to most in the next layer, with queries and keys
without rope.

Choices. `fixed_remain_ratio` r is what the second half of the decoder and decoding see, so the tower keeps min(1, 3 r); the paper names
a setting by its average over layers (its 11.1 % is r = 5.6 %). Qwen2.5-VL has no CLS token: attention received is the mean over heads and
queries, the shallow block is the first one with full attention, the output block the last one, a token has the mean of its 2x2 patches;
all as in the authors' Qwen2.5-VL code, which leaves rope out of the decoder's scores too. Shares are per sample, not per image; windows
are per image.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.config.vision import Vision
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.scorers.attention import next_layer
from gp_jax.pruning.scorers.scorer import Scoring
from gp_jax.pruning.scorers.similarity import back, collect, nearest, raster, unit

WINDOW = 4  # tokens
STAYS = 3  # one in three of the tower's tokens stays in the middle of the decoder


def layers(depth: int) -> tuple[int, ...]:
    """The layers in front of the cuts."""
    return -1, depth // 2 - 1


def shares(ratio: float) -> tuple[float, ...]:
    """Of all visual tokens, what stays behind every cut."""
    return min(1.0, STAYS * ratio), ratio


def blocks(config: Vision) -> tuple[int, ...]:
    """The first and the last block with full attention."""
    return config.watchable


def windows(image: Array, hw: Array, present: Array) -> tuple[Array, Array]:
    """One sample. image: (M,) int; hw: (M, 2) int, row and column. Returns: window number of every token (M,), how many there are ()."""
    image, slots = jnp.maximum(image, 0), image.shape[0]
    sides = jnp.zeros((slots, 2), jnp.int32).at[image].max(jnp.where(present[:, None], hw + 1, 0))  # per image
    sides = jnp.where(sides > 0, jnp.maximum(1, sides // WINDOW), 0)
    many = sides[:, 0] * sides[:, 1]
    place = jnp.minimum(hw // WINDOW, sides[image] - 1)
    return (jnp.cumsum(many) - many)[image] + place[:, 0] * sides[image, 1] + place[:, 1], jnp.sum(many)


def choose(local: Array, whole: Array, window: Array, many: Array, present: Array, kept: Array) -> Array:
    """One sample, in raster order. local, whole: (M,) attention received in both blocks; kept: () int. Returns: (M,) bool, the tower's."""
    near = kept // 2
    most = -(-near // jnp.maximum(many, 1))
    window = jnp.where(present, window, many)
    order = jnp.lexsort((-local, window))
    starts = jnp.concatenate([jnp.ones(1, bool), window[order][1:] != window[order][:-1]])
    place = jnp.arange(order.size)
    rank = (place - jax.lax.cummax(jnp.where(starts, place, 0)))[jnp.argsort(order)]  # inside the window

    def best(values: Array, first: Array, others: Array, count: Array) -> Array:
        """The `count` best, `first` before `others`."""
        order = jnp.lexsort((-values, ~first, ~(first | others)))
        return (first | others) & (jnp.argsort(order) < count)

    scanned = best(local, present & (rank < most), present, near)
    return scanned | best(whole, present & ~scanned, jnp.zeros_like(present), kept - near)


def tower_score(x: Scoring) -> Array:
    """1 for the tokens of both scans, -1 for the rest. Returns: (B, M) float32."""
    order, (shallow, output) = raster(x.vision), blocks(x.model.config.vision)
    window, many = jax.vmap(windows)(x.vision.token_image, x.vision.token_hw, x.present)
    rows = (x.features.received[shallow], x.features.received[output], window, x.present)
    local, whole, window, present = (take_rows(a, order) for a in rows)
    chosen = jax.vmap(choose)(local, whole, window, many, present, x.limits.fixed)
    return jnp.where(take_rows(chosen, back(order)), 1.0, -1.0)


def score(x: Scoring) -> Array:
    """Log of the share of attention, in the middle of the decoder. Returns: (B, M) float32."""
    return next_layer(x, rope=False)


def merge(x: Scoring, keep: Array) -> Array:
    """The mean of every kept token and those that joined it; all others as they are. Returns: (B, M, D)."""

    def one(tokens: Array, keep: Array, members: Array) -> Array:
        sums, joined = collect(tokens, nearest(unit(tokens), keep), members)
        return jnp.where(keep[:, None], (tokens.astype(jnp.float32) + sums) / (1 + joined), tokens).astype(tokens.dtype)

    return jax.vmap(one)(x.features.tokens, keep, x.present & ~keep)


__all__ = ["blocks", "layers", "merge", "score", "shares", "tower_score"]
