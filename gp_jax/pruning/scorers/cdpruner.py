"""CDPruner (arXiv 2506.10967): conditional diversity, a determinantal point process given the instruction.

    K = diag(r) S diag(r),   S_ij = cos(v_i, v_j),   r = relevance to the instruction, scaled to (0, 1]
    keep = argmax det(K_keep),   greedily (fast MAP by an incremental Cholesky factor, Chen et al. 2018):
        j = argmax d2;   e = (K_j - sum_t c_tj c_t) / sqrt(d2_j);   d2 <- d2 - e^2;   c <- c, e

The order of choice is a ranking. K is never held in memory, its rows are computed as needed; the factor takes M x M floats.

Qwen2.5-VL has no CLIP text tower, and LLaVA's checkpoints hold CLIP's vision tower alone. v are the visual tokens at the decoder's input;
relevance is their mean cosine to the embeddings of the instruction's tokens (text rows after the first image, including the few of the
template), which are in the same space.
The released LLaVA code flips the sign of relevance, because CLIP's patches correlate negatively with their caption. That is not known for
these embeddings, so the sign is kept. On LLaVA this is therefore not the published baseline, which takes relevance from CLIP's text tower.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.pruning.scorers.scorer import Scoring
from gp_jax.pruning.scorers.similarity import EXACT, cosines, unit

SMALL = 1e-6  # the released code's
EXHAUSTED = 1e-10  # squared distance below which what a token adds is rounding error


def score(x: Scoring) -> Array:
    """Minus the order of choice. Returns: (B, M) float32; -M for those not chosen."""
    relevant = jax.vmap(relevance)(x.features.tokens, x.present, x.stream.hidden, instruction(x))
    return -jax.vmap(greedy)(x.features.tokens, relevant, x.present, x.limits.fixed).astype(jnp.float32)


def instruction(x: Scoring) -> Array:
    """Text rows behind the first visual token. Returns: (B, T) bool."""
    stream = x.stream
    visual = stream.valid & (stream.image_slot >= 0)
    return stream.valid & ~visual & (stream.glimpse_row < 0) & (jnp.cumsum(visual, axis=-1) > 0)


def relevance(tokens: Array, present: Array, hidden: Array, text: Array) -> Array:
    """One sample. tokens: (M, D); hidden: (T, D); text: (T,) bool. Returns: (M,) in (0, 1], scaled over the present ones."""
    mean = jnp.sum(jnp.where(text[:, None], unit(hidden), 0), axis=0) / jnp.maximum(jnp.sum(text), 1)
    raw = cosines(unit(tokens), mean)
    low = jnp.min(jnp.where(present, raw, jnp.inf))
    span = jnp.max(jnp.where(present, raw, -jnp.inf)) - low
    return jnp.where(present, (raw - low + SMALL) / jnp.maximum(span, SMALL), 0)


def greedy(tokens: Array, relevant: Array, present: Array, count: Array) -> Array:
    """One sample. relevant: (M,); count: () int, how many to choose. Returns: (M,) int, when chosen, M: not."""
    x, slots = unit(tokens), tokens.shape[0]

    def choose(step: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        turn, left, factor = state
        best = jnp.argmax(jnp.where(present & (turn == slots), left, -jnp.inf))
        row = relevant[best] * relevant * cosines(x, x[best]) - jnp.einsum("t,tm->m", factor[:, best], factor, precision=EXACT)
        new = jnp.where(left[best] > EXHAUSTED, row / jnp.sqrt(jnp.maximum(left[best], EXHAUSTED)), 0)
        return turn.at[best].set(step), left - new**2, factor.at[step].set(new)

    start = jnp.full(slots, slots, jnp.int32), relevant**2, jnp.zeros((slots, slots), jnp.float32)
    return jax.lax.fori_loop(0, count, choose, start)[0]
