"""Vision tower of Qwen3-VL (arXiv 2511.21631): ViT with learned positions and rope, full attention, a 2x2 merger, and DeepStack.

B samples, S patches, M = S / merge_unit visual tokens, C ViT width, H head width, P side of the table of positions, D decoder width.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.vision import DeepStackConfig
from gp_jax.models.vision import PatchEmbed, VisionAttention, VisionBlock, patch_angles, pooled, spread_windows
from gp_jax.ops.layers import LayerNorm, Linear, activation, at_once
from gp_jax.sharding import constrained
from gp_jax.trees import VisionFeatures, VisionInput

NORM_EPS = 1e-6


class VisionMLP(nnx.Module):
    """fc2(act(fc1 x))."""

    def __init__(self, size: int, inner: int, out: int, act: str, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.linear_fc1 = Linear(size, inner, bias=True, dtype=dtype, rngs=rngs)
        self.linear_fc2 = Linear(inner, out, bias=True, dtype=dtype, rngs=rngs)
        self.act = activation(act)

    def __call__(self, x: Array) -> Array:
        return self.linear_fc2(self.act(self.linear_fc1.wide(x)).astype(x.dtype))


class Merger(VisionMLP):
    """An MLP over the concatenated channels of a merge group. grouped_norm: normalise them together, not patch by patch before."""

    def __init__(self, config: DeepStackConfig, grouped_norm: bool, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = config.hidden_size * config.merge_unit
        super().__init__(inner, inner, config.out_hidden_size, "gelu", dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(inner if grouped_norm else config.hidden_size, dtype=dtype, eps=NORM_EPS)
        self.merge_unit, self.grouped_norm = config.merge_unit, grouped_norm

    def __call__(self, x: Array) -> Array:
        """(B, S, C) -> (B, M, D)."""
        x = x if self.grouped_norm else self.norm(x)
        x = rearrange(x, "b (m u) c -> b m (u c)", u=self.merge_unit)
        return constrained(super().__call__(self.norm(x) if self.grouped_norm else x), "batch")


class DeepStackBlock(VisionBlock):
    """Attention among all patches of an image, and an MLP of two layers."""

    def __init__(self, config: DeepStackConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1, self.norm2 = (LayerNorm(width, dtype=dtype, eps=NORM_EPS) for _ in range(2))
        self.attn = VisionAttention(width, config.num_heads, dtype=dtype, rngs=rngs)
        self.mlp = VisionMLP(width, config.intermediate_size, width, config.hidden_act, dtype=dtype, rngs=rngs)


def resampled(table: Array, patch_hw: Array, sides: Array) -> Array:
    """A table of positions (P * P, C), resampled bilinearly with aligned corners to the image of every patch.

    Coordinates and sums are float32, whatever the type of the table. Args: patch_hw, sides: (B, S, 2) int. Returns: (B, S, C) float32.
    """
    side = round(table.shape[0] ** 0.5)
    place = patch_hw.astype(jnp.float32) * (side - 1) / jnp.maximum(sides - 1, 1)
    low = jnp.floor(place)
    taps = jnp.clip(low.astype(jnp.int32)[..., None] + jnp.arange(2), 0, side - 1)  # (B, S, 2 axes, 2)
    far = place - low
    weights = jnp.stack([1 - far, far], axis=-1)
    added = jnp.zeros((*patch_hw.shape[:2], table.shape[1]), jnp.float32)
    for row in range(2):
        for column in range(2):
            value = table[taps[..., 0, row] * side + taps[..., 1, column]].astype(jnp.float32)
            added += (weights[..., 0, row] * weights[..., 1, column])[..., None] * value
    return added


class DeepStackTower(nnx.Module):
    """Patches to visual tokens and DeepStack features, with the outputs of chosen blocks on the way."""

    def __init__(self, config: DeepStackConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        options: dict[str, Any] = dict(dtype=dtype, rngs=rngs)
        self.patch_embed = PatchEmbed(config, bias=True, dtype=dtype, rngs=rngs)
        table = (config.num_position_embeddings, config.hidden_size)
        self.pos_embed = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), table, dtype))
        self.blocks = nnx.List([DeepStackBlock(config, **options) for _ in range(config.depth)])
        self.merger = Merger(config, False, **options)
        self.deepstack_merger_list = nnx.List([Merger(config, True, **options) for _ in config.deepstack_visual_indexes])

    def embed(self, patches: Array, patch_hw: Array, token_sides: Array) -> Array:
        """(B, S, patch_dim) -> (B, S, C), what enters the first block. token_sides: of whole images, see `trees.VisionInput`."""
        sides = jnp.repeat(token_sides * self.config.spatial_merge_size, self.config.merge_unit, axis=1)
        x = self.patch_embed(patches)
        x = x + resampled(self.pos_embed[...], patch_hw, sides).astype(x.dtype)
        return spread_windows(x, self.config.merge_unit * self.config.window_side**2)

    def __call__(
        self,
        vision: VisionInput,
        condition_layers: tuple[int, ...] = (),
        implementation: str = "auto",
        remat: bool = False,
        watch: tuple[int, ...] = (),
        call: Callable = at_once,
    ) -> VisionFeatures:
        """Runs the tower.

        Args: condition_layers: 0-based blocks whose outputs, averaged over each merge group, become conditions; remat: see
            `ops.layers.rematerialised`; watch: blocks whose received attention and keys are recorded; call: see `ops.layers.at_once`.
        Returns: VisionFeatures in vision slot order, conditions in the order of `condition_layers`, DeepStack features in that of blocks.
        """
        assert vision.patches is not None, "pixels"
        config, unit, image = self.config, self.config.merge_unit, vision.patch_image
        options = dict(window=unit * config.window_side**2, implementation=implementation, remat=remat)
        x = call(DeepStackTower.embed, self, vision.patches, vision.patch_hw, vision.token_sides)
        angles = call(patch_angles, vision.patch_hw, head_dim=config.head_dim)
        seen, received, keys, deepstack = {}, {}, {}, []
        for index, block in enumerate(self.blocks):
            if index in watch:
                received[index], keys[index] = call(DeepStackBlock.watched, block, x, angles, image, unit=unit)
            x = call(DeepStackBlock.whole, block, x, angles, image, **options, donate=(0,))
            if index in config.deepstack_visual_indexes:
                own = self.deepstack_merger_list[config.deepstack_visual_indexes.index(index)]
                deepstack.append(call(Merger.__call__, own, x))
            if index in condition_layers:
                seen[index] = call(pooled, x, unit=unit)
        tokens, conditions = call(Merger.__call__, self.merger, x), tuple(seen[i] for i in condition_layers)
        return VisionFeatures(tokens, conditions, received, keys, deepstack=tuple(deepstack))
