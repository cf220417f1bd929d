"""From logits to tokens, and the loop that generates them.

B prompts, R rows that go on with them (R / B each), V vocabulary, n new-token slots.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.models.lvlm import LVLM
from gp_jax.ops.ranking import as_integers, smallest
from gp_jax.pipeline import decode_step
from gp_jax.sharding import constrained
from gp_jax.trees import DecodeState, LayerKV, Prefix, Sampling


def truncate(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Keeps the `top_k` largest logits, then the smallest set of them whose probability reaches `top_p`; others become -inf.

    Args: logits: (R, V) float32, already divided by the temperature; top_k: (R,) int, 0 off; top_p: (R,) float, 1 off.
    """
    order, (rows, count) = as_integers(logits), logits.shape
    top_k, top_p = top_k[:, None], top_p[:, None]
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


def choose(logits: Array, sampling: Sampling, step: Array) -> tuple[Array, Array]:
    """One token per row. step: (R,) int.

    Returns: (R,) int32, and the logits (R, V) of the distribution that it was drawn from: greedily, all of it lies on the token.
    """

    def draw(logits: Array) -> tuple[Array, Array]:
        keys, greedy = jax.vmap(draw_key)(sampling.seed, sampling.number, step), sampling.temperature <= 0
        scaled = logits / jnp.where(greedy, 1, sampling.temperature)[:, None]
        few = jnp.any(sampling.top_k > 0) | jnp.any(sampling.top_p < 1)  # else all tokens stay, and nothing has to be searched for
        scaled = jax.lax.cond(few, truncate, lambda logits, *_: logits, scaled, sampling.top_k, sampling.top_p)
        drawn, (best, alone) = jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32), largest(logits)
        return jnp.where(greedy, best, drawn), jnp.where(greedy[:, None], alone, scaled)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), draw, largest, logits)


def draw_key(seed: Array, number: Array, step: Array) -> Array:
    """The PRNG key of one draw."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), step)


def largest(logits: Array) -> tuple[Array, Array]:
    """The largest logit's place (R,) int32, and logits (R, V) that leave nothing else."""
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return best, jnp.where(jnp.arange(logits.shape[1]) == best[:, None], logits, -jnp.inf)


def logprob(logits: Array, token: Array) -> Array:
    """(R, V), (R,) int -> (R,) float32."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), token[:, None], axis=-1)[:, 0]


def write(state: DecodeState, logits: Array, sampling: Sampling, rows: Array | bool = True) -> DecodeState:
    """Chooses the next token of the given rows and notes it; rows that have ended get padding and stay as they are. A token of logits that
    are not finite means nothing, which `broken` says: a program cannot raise."""
    going, place = rows & ~state.done, jnp.arange(state.step.size)
    chosen, drawn_from = choose(logits, sampling, state.step)
    token, slot = jnp.where(going, chosen, sampling.pad), jnp.where(going, state.step, state.tokens.shape[1])
    step = state.step + going
    ended = jnp.any(token[:, None] == sampling.eos[None], axis=-1) | (step >= state.limit)
    noted = jnp.where(going, sampling.noted, 0)
    logprobs, best = _noted(state, logits, drawn_from, token, slot, noted)
    return _by_rows(
        state,
        tokens=state.tokens.at[place, slot].set(token, mode="drop"),
        step=step,
        done=state.done | (going & ended),
        last=jnp.where(rows, token, state.last),
        broken=state.broken | (going & ~jnp.all(jnp.isfinite(logits), axis=-1)),
        logprobs=logprobs,
        best=best,
    )


def _noted(
    state: DecodeState, logits: Array, drawn_from: Array, token: Array, slot: Array, noted: Array
) -> tuple[tuple[Array, Array] | None, tuple[Array, Array] | None]:
    """What is noted of the new tokens (R,): `logprobs` and `best` of the state. Nothing is computed that no row wants. slot: (R,) int."""
    place = jnp.arange(token.size)

    def kept(old: tuple[Array, Array], level: int, compute: Callable[[], tuple[Array, Array]]) -> tuple[Array, Array]:
        nothing = jax.eval_shape(compute)
        found = jax.lax.cond(jnp.any(noted >= level), compute, lambda: tuple(jnp.zeros(x.shape, x.dtype) for x in nothing))
        at = jnp.where(noted >= level, slot, state.tokens.shape[1])
        first, second = (x.at[place, at].set(new, mode="drop") for x, new in zip(old, found, strict=True))
        return first, second

    def own() -> tuple[Array, Array]:
        return logprob(drawn_from, token), logprob(logits, token)

    def others(count: int) -> tuple[Array, Array]:
        values, ids = jax.lax.top_k(logits, count)
        return ids.astype(jnp.int32), values - jax.nn.logsumexp(logits, axis=-1, keepdims=True)

    logprobs, best = state.logprobs, state.best
    logprobs = None if logprobs is None else kept(logprobs, 1, own)
    return logprobs, None if best is None else kept(best, 2, lambda: others(best[0].shape[2]))


def _by_rows(state: DecodeState, **changed: Any) -> DecodeState:
    """The state with other values. All that belongs to rows is split over the mesh in one way, so that no program meets another."""
    state = dataclasses.replace(state, **changed)
    names = ("tokens", "step", "limit", "done", "last", "next_position", "broken", "logprobs", "best")
    split = {name: jax.tree.map(lambda x: constrained(x, "batch"), getattr(state, name)) for name in names}
    return dataclasses.replace(state, **split)


def blank(model: LVLM, sampling: Sampling, slots: int, logprobs: bool = False, best: int = 0) -> DecodeState:
    """A state whose rows are all free. logprobs: with room for those of every token; best: and for this number of best tokens."""
    text, dtype, rows = model.config.text, model.decoder.embed_tokens.dtype, sampling.seed.size
    numbers, shape = jnp.zeros(rows, jnp.int32), (rows, text.num_key_value_heads, slots, text.head_dim)

    def cache() -> Array:
        return constrained(jnp.zeros(shape, dtype), "batch", "kv_heads")

    state = DecodeState(
        tokens=jnp.full((rows, slots), sampling.pad, jnp.int32),
        step=numbers,
        limit=numbers,
        done=jnp.ones(rows, bool),
        last=numbers,
        next_position=numbers,
        cursor=jnp.int32(0),
        new_kv=tuple((cache(), cache()) for _ in model.decoder.layers),
        broken=jnp.zeros(rows, bool),
        logprobs=(jnp.zeros((rows, slots), jnp.float32),) * 2 if logprobs else None,
        best=(jnp.zeros((rows, slots, best), jnp.int32), jnp.zeros((rows, slots, best), jnp.float32)) if best else None,
    )
    return _by_rows(state)


def empty_cache(nothing: Array, heads: int, length: int, width: int, dtype: str) -> LayerKV:
    """A layer's caches without prompts, (P, heads, length, width), split over the mesh as those of prompts are. nothing: (P,) bool, false:
    it says on which devices."""
    shape = (nothing.size, heads, length, width)
    key, value = (constrained(jnp.zeros(shape, dtype), "batch", "kv_heads") for _ in range(2))
    return LayerKV(key, value, constrained(jnp.repeat(nothing[:, None], length, axis=1), "batch"))


def begin(state: DecodeState, rows: Array, logits: Array, next_position: Array, limit: Array, sampling: Sampling) -> DecodeState:
    """Lets rows begin, with the first token of each.

    Args: rows: (R,) bool; logits (R, V), next_position (R,) and limit (R,) int, most new tokens: of all rows, read where they begin.
    """
    state = dataclasses.replace(
        state,
        tokens=jnp.where(rows[:, None], sampling.pad, state.tokens),
        step=jnp.where(rows, 0, state.step),
        limit=jnp.where(rows, limit, state.limit),
        done=state.done & ~rows,
        broken=state.broken & ~rows,
        next_position=jnp.where(rows, next_position, state.next_position),
    )
    return write(state, logits, sampling, rows)


def start(model: LVLM, prefix: Prefix, sampling: Sampling, active: Array, limit: Array, slots: int, logprobs: bool = False) -> DecodeState:
    """All rows with their first token chosen. R / B rows continue every prompt, whose caches are not needed.

    Args: active: (R,) bool, false on rows that only fill the batch; limit: () int; slots: static n; logprobs: note those of every token.
    """
    count = active.size
    logits, position = (jnp.repeat(x, count // x.shape[0], axis=0) for x in (prefix.logits, prefix.next_position))
    return begin(blank(model, sampling, slots, logprobs), active, logits, position, jnp.full(count, limit, jnp.int32), sampling)


def place(kv: tuple[LayerKV, ...], new: tuple[LayerKV, ...], prompt: Array, sample: Array) -> tuple[LayerKV, ...]:
    """Puts one prompt's caches in the place of another's.

    Args: kv: of P prompts, at least as long as the new one's in every layer; new: of a batch; prompt: () int, the place; sample: () int,
        of the batch.
    """

    def put(old: Array, new: Array) -> Array:
        put = jax.lax.dynamic_update_slice(old, new.astype(old.dtype), (prompt, *(0,) * (new.ndim - 1)))
        return constrained(put, "batch", *(("kv_heads",) if new.ndim == 4 else ()))

    def placed(old: LayerKV, new: LayerKV) -> LayerKV:
        """A longer cache keeps what it held behind the new one's end, where nothing is valid."""
        new = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, sample, 1), new)
        valid = jnp.pad(new.valid, ((0, 0), (0, old.valid.shape[1] - new.valid.shape[1])))
        return LayerKV(put(old.key, new.key), put(old.value, new.value), put(old.valid, valid))

    return tuple(placed(old, own) for old, own in zip(kv, new, strict=True))


def enter(state: DecodeState, bare: Prefix, sampling: Sampling, prompt: Array, limit: Array, sample: Array, copies: int) -> DecodeState:
    """Lets the rows of a place begin. It does not know the caches, so that pools of any capacity share it.

    Args: bare: a prefix without its caches; prompt: () int, the place; limit: () int, most new tokens; sample: () int, of the prefix's
        batch; copies: static, rows of a place.
    """
    rows = jnp.arange(state.step.size) // copies == prompt
    logits, position = (jax.lax.dynamic_slice_in_dim(x, sample, 1) for x in (bare.logits, bare.next_position))
    logits, position = (jnp.broadcast_to(x, (rows.size, *x.shape[1:])) for x in (logits, position))
    return begin(state, rows, logits, position, jnp.full(rows.size, limit, jnp.int32), sampling)


def free(state: DecodeState, rows: Array) -> DecodeState:
    """Ends rows (R,) bool: their place can be taken."""
    return _by_rows(state, done=state.done | rows)


def widened(layer: LayerKV, length: int) -> LayerKV:
    """A layer's caches of prompts with room for `length` rows."""

    def wide(x: Array, axis: int) -> Array:
        padded = jnp.pad(x, [(0, length - size if a == axis else 0) for a, size in enumerate(x.shape)])
        return constrained(padded, "batch", *(("kv_heads",) if x.ndim == 4 else ()))

    return LayerKV(wide(layer.key, 2), wide(layer.value, 2), wide(layer.valid, 1))


def picked(caches: tuple[Array, ...], index: Array) -> tuple[Array, ...]:
    """Rows of arrays at the places `index` (n,) int; -1: an empty row."""

    def pick(x: Array) -> Array:
        own = index.reshape(-1, *(1,) * (x.ndim - 1))
        rows = jnp.where(own >= 0, jnp.take(x, jnp.maximum(index, 0), axis=0), jnp.zeros((), x.dtype))
        return constrained(rows, "batch", *(("kv_heads",) if x.ndim == 4 else ()))

    return tuple(map(pick, caches))


def picked_state(state: DecodeState, index: Array) -> DecodeState:
    """What belongs to the rows at these places, without their caches of new tokens; free rows at -1."""
    names = ("tokens", "step", "limit", "last", "next_position", "broken")
    rows = dict(zip(names, picked(tuple(getattr(state, name) for name in names), index), strict=True))
    done = picked((state.done,), index)[0] | (index < 0)
    logprobs, best = (None if noted is None else picked(noted, index) for noted in (state.logprobs, state.best))
    return _by_rows(state, **rows, done=done, logprobs=logprobs, best=best)


def advance(model: LVLM, prompt: tuple[LayerKV, ...], state: DecodeState, sampling: Sampling, steps: Array) -> DecodeState:
    """Generates `steps` () int tokens for every row, or fewer when all have ended."""

    def unfinished(carry: tuple[Array, DecodeState]) -> Array:
        taken, state = carry
        return (taken < steps) & ~jnp.all(state.done)

    def body(carry: tuple[Array, DecodeState]) -> tuple[Array, DecodeState]:
        taken, state = carry
        logits, new_kv = decode_step(model, prompt, state)
        slot, position = (state.cursor + 1) % state.tokens.shape[1], state.next_position + ~state.done
        return taken + 1, write(dataclasses.replace(state, next_position=position, cursor=slot, new_kv=new_kv), logits, sampling)

    return jax.lax.while_loop(unfinished, body, (jnp.int32(0), state))[1]
