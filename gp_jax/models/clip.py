"""CLIP ViT and LLaVA's projector (arXiv 2103.00020, 2310.03744): square tiles with learned positions and a class token.

B samples, S = M patches, one visual token each, in tiles of n patches, t tiles of a sample, C ViT width, N heads, H head width, D decoder
width. A tile is a full attention window of `processing.windows`, so its patches lie row by row and tiles are a reshape.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.vision import ClipConfig
from gp_jax.ops.attention import attend
from gp_jax.ops.layers import LayerNorm, Linear, activation, at_once, einsum, rematerialised
from gp_jax.trees import VisionFeatures, VisionInput


class ClipAttention(nnx.Module):
    """Attention among a tile's patches and its class token."""

    def __init__(self, config: ClipConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, bias=True, dtype=dtype, rngs=rngs) for _ in range(4))
        self.num_heads = config.num_heads

    def heads(self, x: Array) -> Array:
        """(tiles, 1 + n, C) -> (tiles, N, 1 + n, H)."""
        return rearrange(x, "t s (n h) -> t n s h", n=self.num_heads)

    def __call__(self, x: Array, implementation: str) -> Array:
        """(tiles, 1 + n, C), the class token first."""
        q, k, v = (self.heads(f(x)) for f in (self.q_proj, self.k_proj, self.v_proj))
        segment = jnp.zeros(x.shape[:2], jnp.int32)
        return self.out_proj(rearrange(attend(q, k, v, segment, segment, implementation=implementation), "t n s h -> t s (n h)"))

    def watch(self, x: Array) -> tuple[Array, Array]:
        """Attention that every patch receives from the class token (tiles, n) and its keys (tiles, n, H), mean over heads, float32."""
        q, k = self.heads(self.q_proj(x[:, :1])), self.heads(self.k_proj(x))
        logits = einsum("tnqh,tnsh->tns", q, k)
        shares = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1)
        return jnp.mean(shares, axis=1)[:, 1:], jnp.mean(k.astype(jnp.float32), axis=1)[:, 1:]


class TwoLayers(nnx.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, size: int, inner: int, out: int, act: str, *, bias: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.fc1 = Linear(size, inner, bias=bias, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner, out, bias=bias, dtype=dtype, rngs=rngs)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.act(self.fc1.wide(x)).astype(x.dtype))


class ClipBlock(nnx.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: ClipConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.layer_norm1, self.layer_norm2 = (LayerNorm(width, dtype=dtype, eps=config.layer_norm_eps) for _ in range(2))
        self.self_attn = ClipAttention(config, dtype=dtype, rngs=rngs)
        self.mlp = TwoLayers(width, config.intermediate_size, width, config.hidden_act, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, implementation: str = "auto") -> Array:
        x = x + self.self_attn(self.layer_norm1(x), implementation)
        return x + self.mlp(self.layer_norm2(x))

    def run(self, x: Array, implementation: str, remat: bool) -> Array:
        """The block. remat: see `ops.layers.rematerialised`."""
        block = partial(self.__call__, implementation=implementation)
        return (rematerialised(block) if remat else block)(x)

    def watched(self, x: Array, batch: int) -> tuple[Array, Array]:
        """What `ClipAttention.watch` gives, a row per sample: (B, M), (B, M, H), float32."""
        share, keys = self.self_attn.watch(self.layer_norm1(x))
        return share.reshape(batch, -1), keys.reshape(batch, -1, keys.shape[-1])


def patches_only(x: Array, batch: int) -> Array:
    """(B * t, 1 + n, C) -> (B, t * n, C): a row per sample, without class tokens."""
    return x[:, 1:].reshape(batch, -1, x.shape[-1])


class ClipTower(nnx.Module):
    """Tiles to visual tokens, with chosen hidden states on the way."""

    def __init__(self, config: ClipConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config, init, width = config, nnx.initializers.normal(0.02), config.hidden_size
        self.patch_embed = Linear(config.patch_dim, width, bias=False, dtype=dtype, rngs=rngs)
        self.class_embedding = nnx.Param(init(rngs.params(), (width,), dtype))
        self.position_embedding = nnx.Param(init(rngs.params(), (1 + config.window_side**2, width), dtype))
        # Nothing reads the output of `post_norm`, but checkpoints hold its weights.
        self.pre_norm, self.post_norm = (LayerNorm(width, dtype=dtype, eps=config.layer_norm_eps) for _ in range(2))
        self.blocks = nnx.List([ClipBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        out, bias = config.out_hidden_size, config.projector_bias
        self.projector = TwoLayers(width, out, out, config.projector_act, bias=bias, dtype=dtype, rngs=rngs)
        self.line_break = nnx.Param(init(rngs.params(), (out,), dtype)) if config.pinpoints else None

    def embed(self, patches: Array) -> Array:
        """(B, S, patch_dim) -> (B * t, 1 + n, C), what enters the first block."""
        weight = self.position_embedding[...]
        x = rearrange(self.patch_embed(patches.astype(weight.dtype)), "b (t s) c -> (b t) s c", s=weight.shape[0] - 1)
        first = jnp.broadcast_to(self.class_embedding[...], (x.shape[0], 1, x.shape[2]))
        return self.pre_norm(jnp.concatenate([first, x], axis=1) + weight)

    def __call__(
        self,
        vision: VisionInput,
        condition_layers: tuple[int, ...] = (),
        implementation: str = "auto",
        remat: bool = False,
        watch: tuple[int, ...] = (),
        call: Callable = at_once,
    ) -> VisionFeatures:
        """Runs the tower up to the deepest block whose output is needed.

        Args: condition_layers: hidden states that become conditions, counted as `ClipConfig.select_layer`; remat: see
            `ops.layers.rematerialised`; watch: blocks, counted from 0, whose attention and keys are recorded; call: see
            `ops.layers.at_once`.
        Returns: VisionFeatures in vision slot order, conditions in the order of `condition_layers`.
        """
        assert vision.patches is not None, "pixels"
        batch, received, keys = vision.patches.shape[0], {}, {}
        x = call(ClipTower.embed, self, vision.patches)
        wanted = {self.config.select_layer, *condition_layers}
        states = {}

        def see(index: int) -> None:
            if index in wanted:
                states[index] = call(patches_only, x, batch=batch)

        see(0)
        for index, block in enumerate(self.blocks[: max(wanted | {last + 1 for last in watch})], start=1):
            if index - 1 in watch:
                received[index - 1], keys[index - 1] = call(ClipBlock.watched, block, x, batch=batch)
            x = call(ClipBlock.run, block, x, implementation=implementation, remat=remat, donate=(0,))
            see(index)
        line_break = None if self.line_break is None else self.line_break[...]
        tokens = call(TwoLayers.__call__, self.projector, states[self.config.select_layer])
        return VisionFeatures(tokens, tuple(states[i] for i in condition_layers), received, keys, line_break)
