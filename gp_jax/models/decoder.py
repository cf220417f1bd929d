"""The decoder of Qwen2, Qwen3 and Llama: grouped-query attention, rope of one or three axes, gated MLP.

B samples, T rows, D width, N query heads, K key-value heads, H head width, P prompt slots of a cache, n new-token slots.

A generating step reads two caches per layer and writes one row of the second:

    prompt cache (B, K, P, H)  | x x x x . . |   left-aligned, '.' = padding, read only; may be shared by several rows
    new cache    (R, K, n, H)  | t2 _ _ t0 t1 |  a ring with one write slot for all rows; a row sees the slots of its own tokens
"""

import functools
import operator

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.model import TextConfig
from gp_jax.ops.attention import attend
from gp_jax.ops.dense import dense_attention
from gp_jax.ops.layers import GatedMLP, Linear, RMSNorm, lookup, product
from gp_jax.ops.rope import rotate, text_angles
from gp_jax.trees import LayerKV


class Attention(nnx.Module):
    """Causal self-attention with grouped heads."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width, bias = config.head_dim, config.attention_bias
        query, key_value = config.num_attention_heads * width, config.num_key_value_heads * width
        self.q_proj = Linear(config.hidden_size, query, bias=bias, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(config.hidden_size, key_value, bias=bias, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(config.hidden_size, key_value, bias=bias, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(query, config.hidden_size, bias=False, dtype=dtype, rngs=rngs)
        norms = (RMSNorm(width, config.rms_norm_eps, dtype=dtype) if config.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms
        self.head_dim = width

    def project(self, x: Array, angles: Array) -> tuple[Array, Array, Array]:
        """(B, T, D) -> queries (B, N, T, H), keys and values (B, K, T, H), norms and rope applied."""
        q, k, v = (rearrange(f(x), "b t (n h) -> b n t h", h=self.head_dim) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (x if norm is None else norm(x) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return rotate(q, angles), rotate(k, angles), v

    def output(self, heads: Array) -> Array:
        """(B, N, T, H) -> (B, T, D)."""
        return self.o_proj(rearrange(heads, "b n t h -> b t (n h)"))


class Layer(nnx.Module):
    """Pre-norm attention and gated MLP."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.self_attn = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=False, dtype=dtype, rngs=rngs)

    def finish(self, x: Array, heads: Array) -> Array:
        """Output projection, residual and MLP after the attention heads."""
        x = x + self.self_attn.output(heads)
        return x + self.mlp(self.post_attention_layernorm(x))

    def prefill(
        self, x: Array, angles: Array, valid: Array, implementation: str = "auto", seen: Array | None = None
    ) -> tuple[Array, Array, LayerKV]:
        """All rows at once.

        Args: x: (B, T, D), angles: (B, T, H / 2), valid: (B, T) bool, a prefix of every row; seen: (B, T) bool, rows that others may
            attend to; None: all valid ones.
        Returns: x (B, T, D), queries (B, N, T, H) for taps, and the layer's keys and values.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        rows = jnp.where(valid, 0, -1)
        keys = rows if seen is None else jnp.where(valid & seen, 0, -1)
        heads = attend(q, k, v, rows, keys, causal=True, prefix=seen is None, implementation=implementation)
        return self.finish(x, heads), q, LayerKV(k, v, valid)

    def decode(
        self, x: Array, angles: Array, prompt: LayerKV, new: tuple[Array, Array], slot: Array, written: Array
    ) -> tuple[Array, tuple[Array, Array]]:
        """One new token per row.

        Args: x: (R, 1, D), angles: (R, 1, H / 2), prompt: of the prompts, each for as many rows; new: keys and values (R, K, n, H);
            slot: () int, where all rows write; written: (R, n) bool, slots that hold a row's own tokens, the new one among them.
        Returns: x (R, 1, D) and the new cache with that slot written.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        key, value = (cache.at[:, :, slot].set(row[:, :, 0]) for cache, row in zip(new, (k, v), strict=True))
        seen = jnp.repeat(prompt.valid, x.shape[0] // prompt.valid.shape[0], axis=0)
        visible = jnp.concatenate([seen, written], axis=1)
        return self.finish(x, two_part_attention(q, ((prompt.key, prompt.value), (key, value)), visible[:, None])), (key, value)

    def extend(self, x: Array, angles: Array, visible: Array, prompt: LayerKV) -> tuple[Array, Array, Array]:
        """Several more rows after a prompt, all at once.

        Args: x: (B, U, D), angles: (B, U, H / 2), visible: (B, U, T + U) bool, what a row sees of the prompt and of these rows.
        Returns: x (B, U, D), queries (B, N, U, H) and keys (B, K, U, H) for taps.
        """
        q, k, v = self.self_attn.project(self.input_layernorm(x), angles)
        keys, values = (jnp.concatenate(pair, axis=2) for pair in ((prompt.key, k), (prompt.value, v)))
        return self.finish(x, dense_attention(q, keys, values, visible)), q, k


def behind(prompt: Array, rows: Array) -> Array:
    """What rows after a prompt see: all of it, and each other causally. prompt: (B, T) bool; rows: (B, U) bool. Returns: (B, U, T + U)."""
    batch, length = rows.shape
    causal = jnp.tril(jnp.ones((length, length), bool)) & rows[:, None]
    return jnp.concatenate([jnp.broadcast_to(prompt[:, None], (batch, length, prompt.shape[1])), causal], axis=-1)


def two_part_attention(q: Array, parts: tuple[tuple[Array, Array], ...], visible: Array) -> Array:
    """A few queries per row over several caches, without joining the caches or copying those that rows share.

    Args: q: (R, N, U, H); parts: (keys, values) pairs, (P, K, s, H) each, where P divides R: every one for R / P rows; visible: (R, U or
        1, sum of s) bool, at least one true per row of interest (other rows get an average, never NaN).
    Returns: (R, N, U, H).
    """
    exact, count = "highest" if q.dtype == jnp.float32 else None, q.shape[0]
    grouped = rearrange(q, "r (k g) u h -> r k g u h", k=parts[0][0].shape[1])

    def product(form: str, rows: Array, shared: Array) -> Array:
        """Rows that share a cache become further queries of it, so the cache is read once."""
        together = rearrange(rows, "(p c) k g u x -> p k (c g) u x", p=shared.shape[0])
        out = jnp.einsum(form, together, shared, preferred_element_type=jnp.float32, precision=exact)
        return rearrange(out, "p k (c g) u x -> (p c) k g u x", c=count // shared.shape[0])

    logits = [product("pkguh,pksh->pkgus", grouped, key) for key, _ in parts]
    joined = jnp.concatenate(logits, axis=-1) * q.shape[-1] ** -0.5
    weights = nnx.softmax(jnp.where(visible[:, None, None], joined, jnp.finfo(jnp.float32).min), axis=-1).astype(q.dtype)
    out, start = [], 0
    for _, value in parts:
        out.append(product("pkgus,pksh->pkguh", weights[..., start : start + value.shape[2]], value))
        start += value.shape[2]
    return rearrange(functools.reduce(operator.add, out), "r k g u h -> r (k g) u h").astype(q.dtype)


def row_angles(positions: Array, config: TextConfig) -> Array:
    """(A, B, T) int -> (B, T, H / 2) float32."""
    return text_angles(positions, config.head_dim, config.rope_theta, config.mrope_section, config.mrope_interleaved)


class Decoder(nnx.Module):
    """Embedding, layers, final norm and output head. The caller runs the layers."""

    def __init__(self, config: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Param(init(rngs.params(), (config.vocab_size, config.hidden_size), dtype))
        self.layers = nnx.List([Layer(config, dtype=dtype, rngs=rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, bias=False, dtype=dtype, rngs=rngs)

    def embed(self, ids: Array) -> Array:
        """(B, T) int -> (B, T, D)."""
        return lookup(self.embed_tokens[...], ids)

    def angles(self, positions: Array) -> Array:
        """(A, B, T) int -> (B, T, H / 2) float32."""
        return row_angles(positions, self.config)

    def logits(self, hidden: Array) -> Array:
        """Final norm and output head: (..., D) -> (..., vocabulary) float32."""
        weight = self.embed_tokens[...] if self.lm_head is None else self.lm_head.weight[...]
        return product(self.norm(hidden), weight)
