"""VisionZip (arXiv 2412.04467): dominant tokens are kept and the others merged into contextual ones, before the decoder.

    dominant     those that receive most attention in the vision tower
    contextual   of the rest, in raster order, every (rest // contextual)-th is a target; each other one joins the target whose key is
                 most like its own (cosine), and a target becomes  itself + mean of those that joined

How many of k kept of N tokens are contextual, at least one where two are kept:

    CLIP tower   5 in 32 of the kept (54 + 10, 108 + 20, 162 + 30 in the paper)
    Qwen2.5-VL   int(0.05 N), as in the authors' and the released GlimpsePrune code (11.1 % is 6.1 % dominant and 5 % contextual); where
                 k is at most 0.05 N, for which that code has no rule, 5 in 32 of the kept

k itself is max(1, int(r N)), as for all methods here; that code rounds both parts down, which may give one token less.

Qwen2.5-VL has no CLS token: attention received is the mean over heads, summed over all queries, in the last block with full attention
(the last of all in released models), and a visual token has the mean of its 2x2 patches; so have the keys, which are taken after rope
and averaged over heads. This, and the sum instead of one mean over target and joined, is what the authors' Qwen2.5-VL code does. Samples
with several images are one set here (per image there).
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.config.vision import Vision
from gp_jax.ops.ranking import best
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.scorers.scorer import Scoring
from gp_jax.pruning.scorers.similarity import back, collect, nearest, raster, unit


def blocks(config: Vision) -> tuple[int, ...]:
    """The last block with full attention."""
    return (config.watchable[1],)


def contextual_count(kept: Array, count: Array, class_token: bool) -> Array:
    """How many of the `kept` tokens, out of `count`, are contextual. class_token: whether the tower has one."""
    share = kept * 5 // 32
    few = share if class_token else jnp.where(20 * kept > count, count // 20, share)
    return jnp.where(kept >= 2, jnp.maximum(1, few), 0)


def choose(received: Array, present: Array, kept: Array, class_token: bool) -> tuple[Array, Array]:
    """One sample, in raster order. received: (M,) float32; present: (M,) bool; kept: () int. Returns: dominant, targets, (M,) bool."""
    few = contextual_count(kept, jnp.sum(present), class_token)
    dominant = best(received[None], present[None], (kept - few)[None])[0]
    rest = present & ~dominant
    place, step = jnp.cumsum(rest) - 1, jnp.maximum(1, jnp.sum(rest) // jnp.maximum(few, 1))
    return dominant, rest & (place % step == 0) & (place // step < few)


def parts(x: Scoring) -> tuple[Array, Array]:
    """Dominant tokens and targets, twice (B, M) bool over slots."""
    order = raster(x.vision)
    (block,) = blocks(x.model.config.vision)
    received, present = (take_rows(a, order) for a in (x.features.received[block], x.present))
    one = partial(choose, class_token=x.model.config.vision.class_token)
    dominant, targets = (take_rows(part, back(order)) for part in jax.vmap(one)(received, present, x.limits.fixed))
    return dominant, targets


def score(x: Scoring) -> Array:
    """2 for dominant tokens, 1 for targets, -1 for the rest. Returns: (B, M) float32."""
    dominant, targets = parts(x)
    return jnp.where(dominant, 2.0, jnp.where(targets, 1.0, -1.0))


def merge(x: Scoring, keep: Array) -> Array:
    """What targets become; all others as they are. Returns: (B, M, D)."""
    _, targets = parts(x)
    (block,) = blocks(x.model.config.vision)

    def one(tokens: Array, keys: Array, targets: Array, members: Array) -> Array:
        sums, joined = collect(tokens, nearest(unit(keys), targets), members)
        return jnp.where(targets[:, None], tokens.astype(jnp.float32) + sums / jnp.maximum(joined, 1), tokens).astype(tokens.dtype)

    return jax.vmap(one)(x.features.tokens, x.features.keys[block], targets & keep, x.present & ~keep)
