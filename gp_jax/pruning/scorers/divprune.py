"""DivPrune (arXiv 2503.02175): the most diverse subset, independent of the question.

Max-min diversity, greedily: with d(i, j) = 1 - cos(v_i, v_j) between visual tokens at the decoder's input,

    first    argmax_i  min_{j != i}   d(i, j)
    then     argmax_i  min_{j chosen} d(i, j)        until enough are chosen

Later choices do not change earlier ones, so the order of choice is a ranking. The released code keeps round(r N); here it is int(r N), as
for every method.

On LLaVA the tokens are the projected patches, as published, without the class token; on Qwen2.5-VL the outputs of the 2x2 merger. No
attention is needed. A sample with several images is one set.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.pruning.scorers.scorer import Scoring
from gp_jax.pruning.scorers.similarity import closest_other, cosines, unit


def score(x: Scoring) -> Array:
    """Minus the order of choice. Returns: (B, M) float32; -M for those not chosen."""
    return -jax.vmap(greedy)(x.features.tokens, x.present, x.limits.fixed).astype(jnp.float32)


def greedy(tokens: Array, present: Array, count: Array) -> Array:
    """One sample. tokens: (M, D); present: (M,) bool; count: () int, how many to choose. Returns: (M,) int, when chosen, M: not."""
    x, slots = unit(tokens), tokens.shape[0]
    alone = 1 - closest_other(x, present)

    def choose(step: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        turn, distance = state
        worth = jnp.where(step == 0, alone, distance)
        best = jnp.argmax(jnp.where(present & (turn == slots), worth, -jnp.inf))
        return turn.at[best].set(step), jnp.minimum(distance, 1 - cosines(x, x[best]))

    start = jnp.full(slots, slots, jnp.int32), jnp.full(slots, jnp.inf, jnp.float32)
    return jax.lax.fori_loop(0, count, choose, start)[0]
