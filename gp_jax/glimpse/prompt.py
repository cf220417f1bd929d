"""Glimpse rows and their attention (method: arXiv 2508.01548, section 3.2).

`le_length` rows are appended to the prompt. Before every layer i of `le_layers` the vector g_i = norm(W e_i + b) is added to them;
before layer 0 they are zero. The attention of the last row to the image tokens is the glimpse.

B samples, T rows, D decoder width, N heads, L glimpse rows, J entries of `le_layers`.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.model import GlimpseConfig, TextConfig
from gp_jax.ops.layers import LayerNorm, Linear, RMSNorm, xavier_uniform


class GlimpsePrompt(nnx.Module):
    """The learned glimpse vectors. Parameters are float32, for any dtype of the base model."""

    def __init__(self, config: GlimpseConfig, text: TextConfig, *, rngs: nnx.Rngs):
        shape = (len(config.le_layers), config.le_length, text.hidden_size)
        self.learnable_embeddings = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), shape, jnp.float32))
        self.le_proj = Linear(text.hidden_size, text.hidden_size, bias=True, dtype=jnp.float32, rngs=rngs, init=xavier_uniform)
        self.le_norm: LayerNorm | RMSNorm
        if config.le_norm_type == "layernorm":
            self.le_norm = LayerNorm(text.hidden_size, dtype=jnp.float32)
        else:
            self.le_norm = RMSNorm(text.hidden_size, text.rms_norm_eps, dtype=jnp.float32)

    def imitate(self, rows: Array) -> None:
        """Initialises the vectors of the first entry of `le_layers` with token embeddings (L, D), the others randomly at the same scale."""
        scale = jnp.sqrt(jnp.mean(jnp.square(rows.astype(jnp.float32))))
        self.learnable_embeddings[...] = (self.learnable_embeddings[...] * 50).at[0].set(rows / scale)
        self.le_proj.weight[...], self.le_norm.weight[...] = jnp.eye(rows.shape[-1]), jnp.full(rows.shape[-1], scale)

    def vectors(self) -> Array:
        """All glimpse vectors, in the order of `le_layers`. Returns: (J, L, D) float32."""
        return self.le_norm(self.le_proj(self.learnable_embeddings[...]))

    def per_layer(self) -> tuple[Array, ...]:
        """The glimpse vectors as one array (L, D) per entry of `le_layers`."""
        return tuple(self.vectors())


def drop(vectors: Array, rate: float, key: Array, number: Array) -> Array:
    """Dropout of glimpse vectors in training. The mask depends on the sample's number only, not on its device or batch.

    Args: vectors: (J, L, D); key: () of the step; number: (B,) int, of the sample in the step. Returns: (B, J, L, D).
    """
    keep = jax.vmap(lambda n: jax.random.bernoulli(jax.random.fold_in(key, n), 1 - rate, vectors.shape))(number)
    return jnp.where(keep, vectors[None] / (1 - rate), 0)


def add_rows(hidden: Array, vectors: Array, glimpse_row: Array) -> Array:
    """Adds one layer's vectors to the glimpse rows, which are zero before layer 0.

    Args: hidden: (B, T, D); vectors: (L, D); glimpse_row: (B, T) int, -1 elsewhere.
    Returns: (B, T, D). Computed as a product with a one-hot table: a gather or scatter would need communication under a mesh.
    """
    table = jax.nn.one_hot(glimpse_row, vectors.shape[0], dtype=jnp.float32)  # -1 gives a row of zeros
    added = jnp.einsum("btl,ld->btd", table, vectors, precision="highest")
    return hidden + added.astype(hidden.dtype)


def tap(row: Array, key: Array, visible: Array, *, log_softmax: bool) -> Array:
    """Attention of one query row to all rows of its sample.

    Args: row: (B, N, H), key: (B, K, T, H), both after rope; visible: (B, T) bool, what the row may see.
        log_softmax: normalise over all visible keys; else raw logits q.k / sqrt(H).
    Returns: (B, T, N) float32; values of rows that are not visible are undefined.
    """
    exact = "highest" if row.dtype == jnp.float32 else None
    grouped = rearrange(row, "b (k g) h -> b k g h", k=key.shape[1])
    logits = jnp.einsum("bkgh,bkth->btkg", grouped, key, preferred_element_type=jnp.float32, precision=exact) * row.shape[-1] ** -0.5
    logits = rearrange(logits, "b t k g -> b t (k g)")
    if not log_softmax:
        return logits
    return jax.nn.log_softmax(jnp.where(visible[..., None], logits, jnp.finfo(jnp.float32).min), axis=1)
