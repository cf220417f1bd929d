"""From logits to tokens, and the loop that generates them.

B samples, V vocabulary, n new-token slots.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.lvlm import LVLM
from gp_jax.ops.ranking import as_integers, smallest
from gp_jax.pipeline import decode_step
from gp_jax.sharding import constrained
from gp_jax.trees import DecodeState, LayerKV, Sampling


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Keeps the `top_k` largest logits, then the smallest set of them whose probability reaches `top_p`; others become -inf.

    Args: logits: (B, V) float32, already divided by the temperature; top_k: () int, 0 off; top_p: () float, 1 off.
    """
    order, (rows, count) = as_integers(logits), logits.shape
    k = jnp.where((top_k <= 0) | (top_k > count), count, top_k)

    def above(edge: Array, values: Array | int) -> Array:
        return jnp.sum(jnp.where(order > edge, values, 0), axis=-1, keepdims=True)

    kth = smallest(lambda edge: above(edge, 1) < k, rows)
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    at_kth = jnp.max(jnp.where(order == kth, weights, 0), axis=-1, keepdims=True)
    total = above(kth, weights) + (k - above(kth, 1)) * at_kth  # of exactly k, whatever equals the k-th
    nucleus = smallest(lambda edge: above(edge, weights) < top_p * total, rows)
    edge = jnp.where(top_p < 1, jnp.maximum(kth, nucleus), kth)
    return jnp.where(order >= edge, logits, -jnp.inf)


def choose(logits: Array, sampling: Sampling, step: Array) -> Array:
    """One token per sample. Random draws depend on the seed, the sample's row and the step only. Returns: (B,) int32."""

    def draw(logits: Array) -> Array:
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(sampling.key, row), step))(jnp.arange(logits.shape[0]))
        scaled = truncate(logits / sampling.temperature, sampling.top_k, sampling.top_p)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    return jax.lax.cond(sampling.temperature > 0, draw, lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32), logits)


def write(state: DecodeState, logits: Array, sampling: Sampling) -> DecodeState:
    """Chooses the next tokens and notes them; samples that have ended get padding. A token of logits that are not finite means nothing,
    which `broken` says: a program cannot raise."""
    token = jnp.where(state.done, sampling.pad, choose(logits, sampling, state.step))
    ended = jnp.any(token[:, None] == sampling.eos[None], axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[:, state.step].set(token),
        step=state.step + 1,
        done=state.done | ended,
        last=token,
        broken=state.broken | ~(state.done | finite),
    )


def start(model: LVLM, logits: Array, sampling: Sampling, active: Array, next_position: Array, slots: int) -> DecodeState:
    """The state after the first token.

    Args: logits: (B, V); active: (B,) bool, false on rows that only fill the batch; next_position: (B,) int; slots: static n.
    """
    text, batch = model.config.text, logits.shape[0]
    shape, dtype = (batch, text.num_key_value_heads, slots, text.head_dim), model.decoder.embed_tokens.dtype

    def cache() -> Array:
        return constrained(jnp.zeros(shape, dtype), "batch", "kv_heads")

    blank = DecodeState(
        tokens=jnp.full((batch, slots), sampling.pad, jnp.int32),
        step=jnp.int32(0),
        done=~active,
        last=jnp.zeros(batch, jnp.int32),
        next_position=next_position,
        new_kv=tuple((cache(), cache()) for _ in model.decoder.layers),
        broken=jnp.zeros(batch, bool),
    )
    return write(blank, logits, sampling)


def advance(model: LVLM, prompt: tuple[LayerKV, ...], state: DecodeState, sampling: Sampling, until: Array) -> DecodeState:
    """Generates until `until` tokens stand in the state or every sample has ended. until: () int."""

    def unfinished(state: DecodeState) -> Array:
        return (state.step < until) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        logits, new_kv = decode_step(model, prompt, state)
        return write(dataclasses.replace(state, next_position=state.next_position + 1, new_kv=new_kv), logits, sampling)

    return jax.lax.while_loop(unfinished, body, state)
