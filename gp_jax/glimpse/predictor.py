"""Visual importance predictor (released name `attn_fuser`, AttnFuserV1 and V2): from glimpse attention and visual conditions to logits.

B samples, M vision slots, A maps x heads, E `attn_fuse_size`, F condition width (0 in V2), N heads, C ViT width. All float32.
"""

from collections.abc import Callable

import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax import Array

from gp_jax.config.model import GlimpseConfig, ModelConfig
from gp_jax.ops.attention import attend
from gp_jax.ops.layers import GatedMLP, Linear, RMSNorm, at_once, rematerialised, xavier_uniform
from gp_jax.ops.rope import grid_angles, rotate
from gp_jax.sharding import constrained
from gp_jax.trees import VisionInput

NORM_EPS = 1e-6


class ConditionedAttention(nnx.Module):
    """Attention whose queries and keys also see the visual condition."""

    def __init__(self, config: GlimpseConfig, *, options: dict):
        width, joint = config.attn_fuse_size, config.attn_fuse_size + config.cond_size
        self.q_proj, self.k_proj = (Linear(joint, joint, bias=False, **options) for _ in range(2))
        self.v_proj, self.o_proj = (Linear(width, width, bias=False, **options) for _ in range(2))
        self.num_heads = config.attn_fuse_num_heads
        self.value_padding = config.cond_size if config.attn_fuse_use_flash_attn else 0

    def __call__(self, x: Array, joint: Array, angles: Array, segment: Array) -> Array:
        """x: (rows, length, E), joint: (rows, length, E + F), angles: (rows, length, (E + F) / N / 2)."""
        q, k = (rearrange(f(joint), "b m (n h) -> b n m h", n=self.num_heads) for f in (self.q_proj, self.k_proj))
        # The released flash-attention variant pads the values to the queries' width before it splits them into heads, so that each
        # head has other channels than without it.
        v = jnp.pad(self.v_proj(x), ((0, 0), (0, 0), (0, self.value_padding)), constant_values=1.0)
        v = rearrange(v, "b m (n h) -> b n m h", n=self.num_heads)
        out = rearrange(attend(rotate(q, angles), rotate(k, angles), v, segment, segment), "b n m h -> b m (n h)")
        return self.o_proj(out[..., : x.shape[-1]])


class PredictorLayer(nnx.Module):
    """Pre-norm conditioned attention and gated MLP."""

    def __init__(self, config: GlimpseConfig, *, options: dict):
        width = config.attn_fuse_size
        self.norm1, self.norm2 = (RMSNorm(width, NORM_EPS, dtype=jnp.float32) for _ in range(2))
        self.attn = ConditionedAttention(config, options=options)
        self.mlp = GatedMLP(width, 2 * width, config.attn_fuse_hidden_act, bias=True, **options)

    def __call__(self, x: Array, condition: Array | None, angles: Array, segment: Array) -> Array:
        y = self.norm1(x)
        joint = y if condition is None else jnp.concatenate([y, condition], axis=-1)
        x = x + self.attn(y, joint, angles, segment)
        return x + self.mlp(self.norm2(x))


class ImportancePredictor(nnx.Module):
    """One block per visual condition. V2 ignores the conditions; it carries `cond_in_projs` because the released class does."""

    def __init__(self, config: GlimpseConfig, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        """dtype: of the base model, from which the predictor's inputs come; it is float32 itself."""
        options = dict(dtype=jnp.float32, rngs=rngs, init=xavier_uniform, beside=dtype)
        blocks = range(len(config.selected_visual_layers))
        maps = len(config.selected_layers) * model.text.num_attention_heads
        self.attn_in_proj = Linear(maps, config.attn_fuse_size, bias=True, **options)
        self.cond_in_projs = nnx.List([Linear(model.vision.hidden_size, config.visual_cond_size, bias=True, **options) for _ in blocks])
        self.layers = nnx.List([PredictorLayer(config, options=options) for _ in blocks])
        heads = [config.deep_supervision or m == blocks[-1] for m in blocks]
        self.attn_out_projs = nnx.List([Linear(config.attn_fuse_size, 1, bias=True, **options) if has else None for has in heads])
        self.conditioned, self.head_dim = config.cond_size > 0, (config.attn_fuse_size + config.cond_size) // config.attn_fuse_num_heads
        self.window = None if config.attn_fuse_global else model.vision.window_side**2

    def __call__(
        self,
        maps: Array,
        conditions: tuple[Array, ...],
        vision: VisionInput,
        present: Array,
        remat: bool = False,
        call: Callable = at_once,
    ) -> Array:
        """Importance logits.

        Args:
            maps: (B, M, A) glimpse attention at every vision slot.
            conditions: per block (B, M, C).
            present: (B, M) bool, slots whose token is still in the stream.
            remat: the backward pass recomputes attention instead of storing it.
            call: see `ops.layers.at_once`.
        Returns: (heads, B, M) float32; the last head decides, the others exist under deep supervision.
        """
        place = vision.token_image if self.window is None else vision.token_window
        x = call(project_maps, self.attn_in_proj, maps)
        outs = []
        for layer, project, head, condition in zip(self.layers, self.cond_in_projs, self.attn_out_projs, conditions, strict=True):
            seen = call(project_maps, project, condition) if self.conditioned else None
            static = dict(head_dim=self.head_dim, window=self.window, remat=remat)
            x = call(predictor_layer, layer, x, seen, vision.token_hw, place, present, **static)
            if head is not None:
                outs.append(call(read_out, head, x))
        return call(stacked, tuple(outs))


def project_maps(project: Linear, maps: Array) -> Array:
    """A linear layer on float32 input."""
    return constrained(project(maps.astype(jnp.float32)), "batch")


def predictor_layer(
    layer: PredictorLayer,
    x: Array,
    condition: Array | None,
    token_hw: Array,
    place: Array,
    present: Array,
    head_dim: int,
    window: int | None,
    remat: bool,
) -> Array:
    """One block. x: (B, M, E); condition: (B, M, F); place: (B, M) int, tokens attend to those of equal number. Returns: (B, M, E)."""
    segment, angles = jnp.where(present, place, -1), grid_angles(token_hw, head_dim)

    def rows(a: Array) -> Array:  # windows are blocks of equal size, as in the vision tower
        return a if window is None else a.reshape(-1, window, *a.shape[2:])

    block = rematerialised(layer) if remat else layer
    condition = None if condition is None else rows(condition)
    return constrained(block(rows(x), condition, rows(angles), rows(segment)).reshape(x.shape), "batch")


def read_out(head: Linear, x: Array) -> Array:
    """(B, M, E) -> (B, M)."""
    return head(x)[..., 0]


def stacked(outs: tuple[Array, ...]) -> Array:
    """Stacks the outputs of the heads."""
    return jnp.stack(outs)


def mean_of_maps(maps: Array) -> Array:
    """(B, M, A) -> (1, B, M)."""
    return jnp.mean(maps.astype(jnp.float32), axis=-1)[None]


class MeanOfMaps(nnx.Module):
    """No predictor: the importance is the mean of the glimpse's attention over heads and layers. For ablations."""

    def __call__(
        self,
        maps: Array,
        conditions: tuple[Array, ...],
        vision: VisionInput,
        present: Array,
        remat: bool = False,
        call: Callable = at_once,
    ) -> Array:
        """As `ImportancePredictor`."""
        return call(mean_of_maps, maps)


def make_predictor(config: GlimpseConfig, model: ModelConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Module:
    """The predictor that `attn_fuse_type` names. dtype: of the base model."""
    return MeanOfMaps() if config.attn_fuse_type == "mean" else ImportancePredictor(config, model, dtype=dtype, rngs=rngs)
