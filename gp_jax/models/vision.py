"""Vision tower of Qwen2.5-VL (arXiv 2502.13923): windowed ViT with a few full-attention blocks and a 2x2 merger.

B samples, S patches, M = S / merge_unit visual tokens, C ViT width, N heads, H head width, W patches of a full window.
Patches come in blocks of W, each holding whole windows (`processing.windows`), so window attention is a reshape.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.vision import QwenVision, VisionConfig
from gp_jax.ops.attention import attend
from gp_jax.ops.layers import GatedMLP, Linear, RMSNorm, at_once, rematerialised
from gp_jax.ops.received import attention_received
from gp_jax.ops.rope import grid_angles, rotate
from gp_jax.ops.slices import in_slices, on_one_cpu
from gp_jax.sharding import constrained
from gp_jax.trees import VisionFeatures, VisionInput

NORM_EPS = 1e-6
CPU_PATCHES = 1024  # patches of a slice, where a block's rows or windows are independent


class PatchEmbed(Linear):
    """Patches to channels, a convolution with stride = kernel.

    Float32 towers of at most NARROW channels add their products as the released convolution does: one after the other (time, row, column,
    channel), each in a fused multiply-add. Its sum differs from the exact one by up to 7e-6, and the blocks and the predictor amplify that
    about 20 times. The released importance logits of such models are matched to 5e-5 in this order, to 1.3e-4 with an exact sum, and to
    1.8e-4 with the ordinary product. Wider towers use the product: it is closer to the exact sum, and 30 times faster at 1280 channels.
    A step is computed in float64 and rounded once, as a fused multiply-add is; XLA fuses the two operations or not, depending on its
    optimisation level and the machine.
    """

    NARROW = 64

    def __init__(self, config: QwenVision, *, bias: bool = False, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(config.patch_dim, config.hidden_size, bias=bias, dtype=dtype, rngs=rngs)
        self.shape = (config.in_channels, config.temporal_patch_size * config.patch_size, config.patch_size)

    def spread(self, patches: Array, window: int) -> Array:
        """(B, S, patch_dim) -> (B, S, C). window: see `spread_windows`."""
        return spread_windows(self(patches), window)

    def __call__(self, patches: Array) -> Array:
        """(B, S, patch_dim) -> (B, S, C)."""
        weight = self.weight[...]
        x = patches.astype(weight.dtype)
        if weight.dtype != jnp.float32 or weight.shape[0] > self.NARROW:
            return super().__call__(x)
        c, rows, columns = self.shape
        x_rows = rearrange(x, "b s (c r w) -> r (w c) b s", c=c, r=rows, w=columns)
        w_rows = rearrange(weight, "o (c r w) -> r (w c) o", c=c, r=rows, w=columns)

        def add_row(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
            for x_k, w_k in zip(*(part.astype(jnp.float64) for part in row), strict=True):
                total = (total + x_k[..., None] * w_k).astype(jnp.float32)
            return total, None

        with jax.enable_x64(True):
            total = jax.lax.scan(add_row, jnp.zeros((*x.shape[:2], weight.shape[0]), jnp.float32), (x_rows, w_rows))[0]
        return total if self.bias is None else total + self.bias[...]


class VisionAttention(nnx.Module):
    """Attention among patches of one image, or of one window."""

    def __init__(self, width: int, num_heads: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.qkv = Linear(width, 3 * width, bias=True, dtype=dtype, rngs=rngs)
        self.proj = Linear(width, width, bias=True, dtype=dtype, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: Array, angles: Array, segment: Array, implementation: str) -> Array:
        """x: (rows, length, C); angles: (rows, length, H / 2); segment: (rows, length)."""
        q, k, v = rearrange(self.qkv(x), "b s (three n h) -> three b n s h", three=3, n=self.num_heads)
        out = attend(rotate(q, angles), rotate(k, angles), v, segment, segment, implementation=implementation)
        return self.proj(rearrange(out, "b n s h -> b s (n h)"))

    def watch(self, x: Array, angles: Array, segment: Array) -> tuple[Array, Array]:
        """Attention that every patch receives (rows, length) and its keys after rope, mean over heads (rows, length, H), float32."""
        q, k, _ = rearrange(self.qkv(x), "b s (three n h) -> three b n s h", three=3, n=self.num_heads)
        q, k = rotate(q, angles), rotate(k, angles)
        return attention_received(q, k, segment), jnp.mean(k.astype(jnp.float32), axis=1)


def spread_windows(x: Array, window: int) -> Array:
    """Returns: x (B, S, ...), its blocks of `window` patches split over the mesh's `tensor` axis as well, where they divide.

    Chips that share a sample then share its patches: with channels split instead, as in the decoder, every one of them would compute all
    queries, keys and values, and they would exchange the output of every block.
    """
    if x.shape[1] % window:
        return x
    return constrained(x.reshape(x.shape[0], -1, window, *x.shape[2:]), "batch", "windows").reshape(x.shape)


def slices_of(x: Array) -> int:
    """The number of slices in which a function that does not mix rows, or windows, is applied to (B, S, C)."""
    return -(-x.shape[0] * x.shape[1] // CPU_PATCHES) if on_one_cpu() else 1


class VisionBlock(nnx.Module):
    """Pre-norm attention and an MLP: what the blocks of both Qwen towers share. Subclasses make `norm1`, `norm2`, `attn` and `mlp`."""

    norm1: Callable[[Array], Array]
    norm2: Callable[[Array], Array]
    attn: VisionAttention
    mlp: Callable[[Array], Array]

    def __call__(self, x: Array, angles: Array, segment: Array, implementation: str = "auto") -> Array:
        return self.transform(self.look(x, angles, segment, implementation))

    def look(self, x: Array, angles: Array, segment: Array, implementation: str = "auto") -> Array:
        """The half with attention."""
        return x + self.attn(self.norm1(x), angles, segment, implementation)

    def transform(self, x: Array) -> Array:
        """The half with the MLP."""
        return x + self.mlp(self.norm2(x))

    def whole(self, x: Array, angles: Array, segment: Array, window: int, implementation: str, remat: bool = False) -> Array:
        """The block with attention among all patches of an image. x: (B, S, C); angles: (B, S, H / 2); segment: (B, S) image number;
        window: see `spread_windows`."""
        x, angles = spread_windows(x, window), spread_windows(angles, window)
        if remat:
            return spread_windows(rematerialised(partial(self.__call__, implementation=implementation))(x, angles, segment), window)
        x = spread_windows(self.look(x, angles, segment, implementation), window)
        rows = x.reshape(-1, 1 if x.shape[1] % window else window, x.shape[-1])
        return spread_windows(in_slices(self.transform, (rows,), slices_of(x)).reshape(x.shape), window)

    def in_windows(self, x: Array, angles: Array, segment: Array, window: int, remat: bool = False) -> Array:
        """The block with attention inside blocks of `window` patches. x: (B, S, C), angles and segment alike. Returns: (B, S, C)."""
        rows = tuple(spread_windows(a, window).reshape(-1, window, *a.shape[2:]) for a in (x, angles, segment))
        out = rematerialised(self.__call__)(*rows) if remat else in_slices(self.__call__, rows, slices_of(x))
        return spread_windows(out.reshape(x.shape), window)

    def watched(self, x: Array, angles: Array, segment: Array, unit: int) -> tuple[Array, Array]:
        """Means over every merge group of what `VisionAttention.watch` gives: (B, M), (B, M, H), float32."""
        received, keys = self.attn.watch(self.norm1(constrained(x, "batch")), angles, segment)
        received, keys = (rearrange(a, "b (m u) ... -> b m u ...", u=unit).mean(axis=2) for a in (received, keys))
        return received, keys


class GatedVisionBlock(VisionBlock):
    """A block with RMS norms and a gated MLP."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.norm2 = RMSNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.attn = VisionAttention(config.hidden_size, config.num_heads, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act, bias=True, dtype=dtype, rngs=rngs)


def pooled(x: Array, unit: int) -> Array:
    """Mean over every merge group, (B, S, C) -> (B, M, C)."""
    return constrained(rearrange(x, "b (m u) c -> b m u c", u=unit).astype(jnp.float32).mean(axis=2).astype(x.dtype), "batch")


def patch_angles(patch_hw: Array, head_dim: int) -> Array:
    """(B, S, 2) -> (B, S, H / 2) float32."""
    return grid_angles(patch_hw, head_dim)


class PatchMerger(nnx.Module):
    """Norm, then an MLP of two layers over the concatenated channels of a merge group."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        inner = config.hidden_size * config.merge_unit
        self.ln_q = RMSNorm(config.hidden_size, NORM_EPS, dtype=dtype)
        self.fc1 = Linear(inner, inner, bias=True, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(inner, config.out_hidden_size, bias=True, dtype=dtype, rngs=rngs)
        self.merge_unit = config.merge_unit

    def __call__(self, x: Array) -> Array:
        """(B, S, C) -> (B, M, out_hidden_size)."""
        x = rearrange(self.ln_q(x), "b (m u) c -> b m (u c)", u=self.merge_unit)
        return constrained(self.fc2(jax.nn.gelu(self.fc1.wide(x), approximate=False).astype(x.dtype)), "batch")


class VisionTower(nnx.Module):
    """Patches to visual tokens, with the outputs of chosen blocks on the way."""

    def __init__(self, config: VisionConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([GatedVisionBlock(config, dtype=dtype, rngs=rngs) for _ in range(config.depth)])
        self.merger = PatchMerger(config, dtype=dtype, rngs=rngs)

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
            `ops.layers.rematerialised`; watch: blocks with full attention whose received attention and keys are recorded; call: see
            `ops.layers.at_once`.
        Returns: VisionFeatures in vision slot order, conditions in the order of `condition_layers`.
        """
        config, unit, window = self.config, self.config.merge_unit, self.config.merge_unit * self.config.window_side**2
        x = call(PatchEmbed.spread, self.patch_embed, vision.patches, window=window)
        angles = call(patch_angles, vision.patch_hw, head_dim=config.head_dim)
        seen, received, keys = {}, {}, {}
        for index, block in enumerate(self.blocks):
            if index in watch:
                received[index], keys[index] = call(VisionBlock.watched, block, x, angles, vision.patch_image, unit=unit)
            if index in config.fullatt_block_indexes:
                options = dict(window=window, implementation=implementation, remat=remat)
                x = call(VisionBlock.whole, block, x, angles, vision.patch_image, **options, donate=(0,))
            else:
                x = call(VisionBlock.in_windows, block, x, angles, vision.patch_window, window=window, remat=remat, donate=(0,))
            if index in condition_layers:
                seen[index] = call(pooled, x, unit=unit)
        return VisionFeatures(call(PatchMerger.__call__, self.merger, x), tuple(seen[i] for i in condition_layers), received, keys)
