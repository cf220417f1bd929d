"""The spine: pure functions from pixels and prompt to logits. Training, generation, evaluation and benchmarks call these.

    see -> embed -> run(0, c) -> score (-> merge) -> compact -> run(c, L) -> head -> decode_step, decode_step, ...
    see -> embed -> run(0, L) -> forward_train                                                 learning the glimpse
    see -> embed -> forward_packed                                                             learning the whole model

B samples, T rows, M vision slots, D decoder width, L layers, V vocabulary, U rows of a tail. Nothing here is jitted; `engine` does that.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.glimpse.prompt import GlimpsePrompt, add_rows, tap
from gp_jax.models.decoder import Layer, row_angles
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import at_once
from gp_jax.ops.ranking import to_front
from gp_jax.pruning.compact import take_kv, take_rows
from gp_jax.pruning.plan import SCORERS, survivors_mask
from gp_jax.pruning.rule import keep_mask
from gp_jax.pruning.scorers.scorer import Cut, Scoring, present_slots
from gp_jax.sharding import constrained
from gp_jax.trees import (
    DecodeState,
    KeepLimits,
    LayerKV,
    PromptInput,
    Stream,
    VisionFeatures,
    VisionInput,
)


def see(
    model: LVLM,
    vision: VisionInput,
    implementation: str = "auto",
    remat: bool = False,
    watch: tuple[int, ...] = (),
    call: Callable = at_once,
) -> VisionFeatures:
    """Vision tower: visual tokens (B, M, D) and the predictor's conditions. remat: of a backward pass through it; watch: blocks whose
    attention scorers read; call: see `ops.layers.at_once`."""
    layers = model.glimpse_config.selected_visual_layers if model.glimpse_config else ()
    return model.vision(vision, layers, implementation, remat, watch, call)


def embed(model: LVLM, prompt: PromptInput, features: VisionFeatures | None, call: Callable = at_once) -> Stream:
    """Token embeddings with visual tokens in their places; glimpse rows are zero until layer 0 adds their vector. call: see
    `ops.layers.at_once`."""
    if features is None:
        return call(embed_rows, model, prompt, None)
    stream = call(embed_rows, model, prompt, dataclasses.replace(features, deepstack=()))
    return dataclasses.replace(stream, deepstack=dict(enumerate(features.deepstack)))


def embed_rows(model: LVLM, prompt: PromptInput, features: VisionFeatures | None) -> Stream:
    """What `embed` computes, as one program."""
    hidden = model.decoder.embed(prompt.ids)
    if features is not None:
        visual = take_rows(features.tokens, jnp.maximum(prompt.image_slot, 0)).astype(hidden.dtype)
        if features.line_break is not None:
            breaks = (prompt.ids == model.config.image_token_id) & (prompt.image_slot < 0)
            hidden = jnp.where(breaks[..., None], features.line_break.astype(hidden.dtype), hidden)
        hidden = jnp.where((prompt.image_slot >= 0)[..., None], visual, hidden)
    hidden = jnp.where((prompt.valid & (prompt.glimpse_row < 0))[..., None], hidden, 0)
    rest = {name: getattr(prompt, name) for name in ("positions", "valid", "image_slot", "glimpse_row", "tap_row")}
    return Stream(hidden=constrained(hidden, "batch"), **rest, kv=(), taps={})


def prefill_layer(layer: Layer, x: Array, angles: Array, valid: Array, implementation: str) -> tuple[Array, Array, Array]:
    """One layer over all rows. Returns: hidden (B, T, D), keys and values (B, K, T, H)."""
    x, _, kv = layer.prefill(x, angles, valid, implementation)
    return constrained(x, "batch"), constrained(kv.key, "batch", "kv_heads"), constrained(kv.value, "batch", "kv_heads")


def add_vectors(x: Array, vectors: Array, glimpse_row: Array) -> Array:
    """A layer's glimpse vectors (L, D) on their rows."""
    return constrained(add_rows(x, vectors, glimpse_row), "batch")


def add_deepstack(x: Array, features: Array, image_slot: Array) -> Array:
    """A layer's DeepStack features (B, M, D) on the rows of their visual tokens, those that are left."""
    added = take_rows(features, jnp.maximum(image_slot, 0)).astype(x.dtype)
    return constrained(x + jnp.where((image_slot >= 0)[..., None], added, 0), "batch")


def looking_row(x: Array, angles: Array, row: Array) -> tuple[Array, Array]:
    """Every sample's `row` (B,) of what enters a layer: hidden (B, 1, D) and angles (B, 1, H / 2)."""
    own, turned = (constrained(jnp.take_along_axis(a, row[:, None, None], axis=1), "batch") for a in (x, angles))
    return own, turned


def tap_layer(layer: Layer, x: Array, angles: Array, valid: Array, row: Array, key: Array, log_softmax: bool) -> Array:
    """The attention (B, T, N) in a layer of the rows of `looking_row`, with the layer's keys: their query is computed again, a row's
    worth, so that layers that are looked at need no program of their own."""
    query = layer.self_attn.project(layer.input_layernorm(x), angles)[0][:, :, 0]
    visible = valid & (jnp.arange(valid.shape[1]) <= row[:, None])
    return constrained(tap(query, key, visible, log_softmax=log_softmax), "batch")


def run(
    model: LVLM,
    stream: Stream,
    low: int,
    high: int,
    taps: tuple[int, ...] = (),
    glimpse: bool = False,
    implementation: str = "auto",
    call: Callable = at_once,
) -> Stream:
    """Layers low .. high-1, with their keys and values. As programs of their own they overwrite the stream's hidden states.

    Args: taps: layers in which the attention of every sample's `tap_row` is recorded; glimpse: the stream holds glimpse rows, whose
        vectors are added; call: see `ops.layers.at_once`.
    """
    if low == high:
        return stream
    config, x = model.glimpse_config if glimpse else None, stream.hidden
    vectors = call(GlimpsePrompt.per_layer, model.glimpse) if config and model.glimpse is not None else None
    le_layers, log_softmax = (config.le_layers, not config.use_attention_logits) if config else ((), False)
    angles = call(row_angles, stream.positions, config=model.config.text)
    kv, tapped = list(stream.kv), dict(stream.taps)
    for index in range(low, high):
        layer = model.decoder.layers[index]
        if vectors is not None and index in le_layers:
            x = call(add_vectors, x, vectors[le_layers.index(index)], stream.glimpse_row, donate=(0,))
        looking = call(looking_row, x, angles, stream.tap_row) if index in taps else None
        x, key, value = call(prefill_layer, layer, x, angles, stream.valid, implementation=implementation, donate=(0,))
        kv.append(LayerKV(key, value, stream.valid))
        if index in stream.deepstack:
            x = call(add_deepstack, x, stream.deepstack[index], stream.image_slot, donate=(0,))
        if looking is not None:
            tapped[index] = call(tap_layer, layer, *looking, stream.valid, stream.tap_row, key, log_softmax=log_softmax)
    left = {layer: features for layer, features in stream.deepstack.items() if layer >= high}
    return dataclasses.replace(stream, hidden=x, kv=tuple(kv), taps=tapped, deepstack=left)


def score(
    model: LVLM,
    stream: Stream,
    vision: VisionInput,
    features: VisionFeatures,
    cut: Cut,
    limits: KeepLimits,
    given: Array | None = None,
    logits: Array | None = None,
) -> tuple[Array, Array, Array, Array]:
    """Ranks the visual tokens at a cut. logits: the scorer's, where they are known already.

    Returns: logits (B, M) float32 and keep (B, M) bool over vision slots; stays (B, T) bool over stream rows; need () int, rows
    of the longest sample that stay.
    """
    scorer = SCORERS[cut.scorer]
    if logits is None:
        logits = scorer.score(Scoring(model, cut, stream, vision, features, limits, given))
    keep = keep_mask(logits, present_slots(stream, logits.shape[1]), limits)
    stays = survivors_mask(stream, keep, scorer.glimpse)
    return logits, keep, stays, jnp.max(jnp.sum(stays, axis=-1))


def merge(model: LVLM, stream: Stream, vision: VisionInput, features: VisionFeatures, keep: Array, cut: Cut, limits: KeepLimits) -> Stream:
    """Lets kept tokens take in dropped ones, for scorers that do: the stream before layer 0 with the hidden states they make."""
    method = SCORERS[cut.scorer].merge
    assert method is not None, "a scorer that merges"
    tokens = method(Scoring(model, cut, stream, vision, features, limits), keep)
    merged = take_rows(tokens, jnp.maximum(stream.image_slot, 0)).astype(stream.hidden.dtype)
    return dataclasses.replace(stream, hidden=jnp.where((stream.image_slot >= 0)[..., None], merged, stream.hidden))


def compact(stream: Stream, stays: Array, cut: Cut, length: int) -> Stream:
    """Applies a cut: surviving rows move to the front of `length` rows, with their old positions.

    Args: stays: (B, T) bool; length: static, at least `need` of `score`.
    """
    order = to_front(stays, length)
    valid = take_rows(stays, order)
    kv = stream.kv
    if cut.past:
        taken = (take_kv(layer, order, valid) for layer in stream.kv)
        kv = tuple(LayerKV(constrained(a.key, "batch", "kv_heads"), constrained(a.value, "batch", "kv_heads"), valid) for a in taken)
    return Stream(
        hidden=constrained(jnp.where(valid[..., None], take_rows(stream.hidden, order), 0), "batch"),
        positions=jax.vmap(take_rows, (0, None))(stream.positions, order),
        valid=valid,
        image_slot=jnp.where(valid, take_rows(stream.image_slot, order), -1),
        glimpse_row=jnp.where(valid, take_rows(stream.glimpse_row, order), -1),
        tap_row=jnp.argmax(order == stream.tap_row[:, None], axis=-1),
        kv=kv,
        taps={} if SCORERS[cut.scorer].glimpse else {layer: take_rows(t, order) for layer, t in stream.taps.items()},
        deepstack=stream.deepstack,  # by vision slot, to which the rows that are left still refer
    )


def head(model: LVLM, stream: Stream) -> Array:
    """Logits of the first answer token, from every sample's last row. Returns: (B, V) float32."""
    last = jnp.maximum(jnp.sum(stream.valid, axis=-1) - 1, 0)
    return model.decoder.logits(take_rows(stream.hidden, last[:, None])[:, 0])


def decode_step(model: LVLM, prompt: tuple[LayerKV, ...], state: DecodeState) -> tuple[Array, tuple[tuple[Array, Array], ...]]:
    """Feeds the newest token of every row.

    Returns: logits (R, V) float32 and the new-token cache with the slot `cursor` written.
    """
    positions = jnp.broadcast_to(state.next_position[None, :, None], (model.config.position_axes, state.last.shape[0], 1))
    angles, x, caches = model.decoder.angles(positions), model.decoder.embed(state.last[:, None]), []
    written = state.written
    for layer, prompt_kv, new in zip(model.decoder.layers, prompt, state.new_kv, strict=True):
        x, (key, value) = layer.decode(x, angles, prompt_kv, new, state.cursor, written)
        caches.append((constrained(key, "batch", "kv_heads"), constrained(value, "batch", "kv_heads")))
    return model.decoder.logits(x[:, 0]), tuple(caches)
