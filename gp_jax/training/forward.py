"""Forward passes for training: `forward_train` for a glimpse, `forward_packed` for a whole model.

B samples, T rows, M vision slots, D decoder width, V vocabulary, U rows of a tail.
"""

import dataclasses
from functools import partial

import jax.numpy as jnp
from jax import Array

from gp_jax.glimpse.prompt import drop, tap
from gp_jax.models.decoder import behind
from gp_jax.models.lvlm import LVLM
from gp_jax.ops.layers import rematerialised
from gp_jax.pipeline import add_deepstack, embed, run, see
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.scorers.glimpse import importance
from gp_jax.trees import PackedBatch, Stream, TrainBatch, TurnsInput


def forward_train(
    model: LVLM,
    batch: TrainBatch,
    dropout: Array | None = None,
    *,
    remat: bool = True,
    implementation: str = "auto",
    answer_in_denominator: bool = False,
) -> tuple[Array, Array]:
    """Prompt, glimpse and answer through all layers, nothing pruned.

    The prompt does not see the glimpse (attention is causal), so it does not depend on the trained parameters: it runs as in inference, and
    only the few rows of the tail and the predictor have a backward pass.

    Args:
        dropout: () PRNG key of the step; None: no dropout.
        remat: recompute attention and everything between matrix products in the backward pass instead of storing it.
        answer_in_denominator: if the attention map is a log-softmax, normalise over the answer's keys too, as the released training does.
    Returns: logits (B, U, V) float32 of every tail row, importance logits (heads, B, M) float32.
    """
    config, tail = model.glimpse_config, batch.tail
    assert config is not None, "the glimpse is trained"
    # cuDNN supports masks of valid prefixes only; vision rows are packed by windows, with padding in between.
    features = see(model, batch.vision, "auto" if implementation == "cudnn" else implementation)
    depth = model.config.text.num_hidden_layers
    stream = run(model, embed(model, batch.prompt, features), 0, depth, implementation=implementation)
    lead, x = config.rows or 1, model.decoder.embed(tail.ids)
    vectors: Array | None = None
    angles, tapped = model.decoder.angles(tail.positions), {}
    visible = behind(stream.valid, tail.valid)
    if model.glimpse is not None:
        x, vectors = x.at[:, :lead].set(0), model.glimpse.vectors()
        vectors = vectors[None] if dropout is None else drop(vectors, config.le_dropout_prob, dropout, batch.number)

    for index, (layer, kv) in enumerate(zip(model.decoder.layers, stream.kv, strict=True)):
        if vectors is not None and index in config.le_layers:
            x = x.at[:, :lead].add(vectors[:, config.le_layers.index(index)].astype(x.dtype))
        extend = rematerialised(layer.extend) if remat else layer.extend
        x, q, key = extend(x, angles, visible, kv)
        if index in config.selected_layers:
            seen = key.shape[2] if answer_in_denominator else lead
            keys = jnp.concatenate([kv.key, key[:, :, :seen]], axis=2)
            present = jnp.concatenate([kv.valid, tail.valid[:, :seen]], axis=1)
            maps = tap(q[:, :, lead - 1], keys, present, log_softmax=not config.use_attention_logits)
            tapped[index] = maps[:, : kv.key.shape[2]]
    logits = importance(model, dataclasses.replace(stream, taps=tapped), batch.vision, features, remat)
    return model.decoder.logits(x), logits


def forward_packed(
    model: LVLM, batch: PackedBatch, *, remat: bool = True, implementation: str = "auto", tap: int = -1
) -> tuple[Array, Array, Array]:
    """Several turns after one picture, with gradients for all parameters. Pruning is emulated with masks: after the cut nothing sees the
    visual tokens that pruning would remove, and generated rows do not see them in any layer.

    Returns: logits (B, U, V) float32 of every row of the turns, visual tokens (B, M, D), the rows after layer `tap` (B, U, D).
    """
    features, turns = see(model, batch.vision, implementation, remat), batch.turns
    stream = embed(model, batch.prompt, features)
    is_visual, slot = stream.image_slot >= 0, jnp.maximum(stream.image_slot, 0)
    seen = ~is_visual | take_rows(turns.seen, slot)
    before, after = turns_visible(turns, stream, model.config.text.num_hidden_layers)
    x, rows = stream.hidden, model.decoder.embed(turns.ids)
    angles, row_angles = model.decoder.angles(stream.positions), model.decoder.angles(turns.positions)

    def layer_pair(layer, x, rows, seen, visible):
        x, _, kv = layer.prefill(x, angles, stream.valid, implementation, seen)
        return x, layer.extend(rows, row_angles, visible, kv)[0]

    for index, layer in enumerate(model.decoder.layers):
        cut = turns.cut <= index
        pair = partial(layer_pair, layer)
        x, rows = (rematerialised(pair) if remat else pair)(x, rows, seen | ~cut[:, None], jnp.where(cut[:, None, None], after, before))
        if index in stream.deepstack:
            x = add_deepstack(x, stream.deepstack[index], stream.image_slot)
        if index == tap % len(model.decoder.layers):
            tapped = rows
    return model.decoder.logits(rows), features.tokens, tapped


def turns_visible(turns: TurnsInput, stream: Stream, depth: int) -> tuple[Array, Array]:
    """The rows of the prompt and of the turns that each of their rows sees, before and after the cut. Returns: two (B, U, T + U) bool."""
    length = turns.ids.shape[1]
    same = (turns.turn[:, :, None] == turns.turn[:, None]) & (turns.turn >= 0)[:, None] & jnp.tril(jnp.ones((length, length), bool))
    per_turn = jnp.take_along_axis(turns.keep, jnp.maximum(turns.turn, 0)[..., None], axis=1)  # (B, U, M)
    kept = jnp.take_along_axis(per_turn, jnp.maximum(stream.image_slot, 0)[:, None], axis=2)  # (B, U, T)
    kept = (kept | (stream.image_slot < 0)[:, None]) & stream.valid[:, None]
    all_of_it = jnp.broadcast_to(stream.valid[:, None], kept.shape)
    first = jnp.where((turns.generated & (turns.cut < depth)[:, None])[..., None], kept, all_of_it)
    return jnp.concatenate([first, same], axis=-1), jnp.concatenate([kept, same], axis=-1)
