"""The attention that visual tokens get from the last prompt token, mean over heads; nothing is trained.

    s_i = 1/N sum_h softmax_j(q_h . k_hj / sqrt(H))_i        over all rows j of the prompt that are not pruned

The plan "attention" uses the last layer before the cut, with the same cut as the glimpse. FastV, PyramidDrop and VScan rank by it too.
"""

import jax
import jax.numpy as jnp
from jax import Array

from gp_jax.glimpse.prompt import tap
from gp_jax.pruning.compact import take_rows
from gp_jax.pruning.scorers.scorer import Scoring, to_slots


def score(x: Scoring) -> Array:
    """Log of the share, from the attention recorded in the last layer before the cut. Returns: (B, M) float32."""
    return log_share(x, x.stream.taps[x.cut.after])


def next_layer(x: Scoring, rope: bool = True) -> Array:
    """As `score`, from the attention of the first layer after the cut: its norm and projections, applied to the stream at the cut.

    rope: whether rope is applied to queries and keys, as that layer does.
    """
    layer, stream = x.model.decoder.layers[x.cut.after + 1], x.stream
    angles, last = x.model.decoder.angles(stream.positions), stream.tap_row[:, None]
    angles = angles if rope else jnp.zeros_like(angles)
    query, _, _ = layer.self_attn.project(layer.input_layernorm(take_rows(stream.hidden, last)), take_rows(angles, last))
    _, key, _ = layer.self_attn.project(layer.input_layernorm(stream.hidden), angles)
    return log_share(x, tap(query[:, :, 0], key, stream.valid, log_softmax=False))


def log_share(x: Scoring, logits: Array) -> Array:
    """(B, T, N) attention logits to the log of a visual token's share. Returns: (B, M) float32."""
    logits = jnp.where(x.stream.valid[..., None], logits, -jnp.inf)
    share = jnp.mean(jax.nn.softmax(logits, axis=1), axis=-1)
    return jnp.log(to_slots(share, x.stream.image_slot, x.slots) + jnp.finfo(jnp.float32).tiny)
