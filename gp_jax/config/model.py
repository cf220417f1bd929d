"""What a model is, as frozen dataclasses. `pretrained.hf_config` reads them from a Hugging Face `config.json`."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from gp_jax.config.choices import Activation, Norm, PredictorKind
from gp_jax.config.families import Family, family_of
from gp_jax.config.schema import LARGEST, Count, Layer, Layers, Number, RopeBase, Several, Share, Size, Small, TokenId, Width, checked
from gp_jax.config.vision import Vision
from gp_jax.errors import GlimpseError, shown

Anchor = Literal["tl", "tr", "bl", "br"]
Anchors = Several[Anchor]
ANCHORS = get_args(Anchor)


@dataclass(frozen=True)
class TextConfig:
    """Decoder of the Qwen2 / Llama / Qwen3 kind.

    head_size: `head_dim` of files that have their own; None: hidden_size / num_attention_heads. qk_norm: whether queries and keys are
    normalised per head before the rope.
    """

    vocab_size: Size
    hidden_size: Width
    intermediate_size: Size
    num_hidden_layers: Layers
    num_attention_heads: Width
    num_key_value_heads: Width
    rms_norm_eps: Small
    rope_theta: RopeBase
    mrope_section: Several[Count] = ()  # frequencies per axis (time, row, column); empty: ordinary 1-D rope
    mrope_interleaved: bool = False  # the axes take turns among the frequencies; else each has its section of them
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    hidden_act: Activation = "silu"
    head_size: Width | None = None
    qk_norm: bool = False

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.head_size or self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model without its glimpse."""

    model_type: str
    vision: Vision
    text: TextConfig
    image_token_id: Annotated[int, Field(ge=-200, le=LARGEST)]  # negative: LLaVA's own, used in prompts only and not part of the vocabulary
    video_token_id: TokenId | None = None
    eos_token_ids: Several[TokenId] = ()
    pad_token_id: TokenId = 0

    @property
    def family(self) -> Family:
        """The record of its family. Raises: GlimpseError when no family has this `model_type`."""
        return family_of(self.model_type)

    @property
    def position_axes(self) -> int:
        """Axes of a position id: 3 (time, row, column) under M-RoPE, else 1."""
        return 3 if self.text.mrope_section else 1


@dataclass(frozen=True)
class GlimpseConfig:
    """The glimpse and its predictor. Field names and meanings are those of the released `config.json`.

    `ori_attn_supervision` is accepted and has no effect: with it the released code only adds a map at the front of a list whose last
    entry alone is used. `attn_fuse_use_flash_attn` is more than a choice of a kernel there: it assigns the value channels to the heads
    differently, and so it does here.
    """

    selected_layers: Annotated[Several[Layer], Field(min_length=1)]  # the predictor needs at least one attention map
    reduce_layer: Count
    le_layers: Several[Layer] = (0,)
    le_length: Annotated[int, Field(ge=0, le=1024)] = 1
    le_norm_type: Norm = "rmsnorm"
    le_dropout_prob: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_attention_logits: bool = False
    attn_fuse_type: PredictorKind = "AttnFuserV1"
    attn_fuse_size: Width = 256
    attn_fuse_num_heads: Width = 4
    attn_fuse_hidden_act: Activation = "silu"
    attn_fuse_global: bool = False
    attn_fuse_use_flash_attn: bool = False
    selected_visual_layers: Annotated[Several[Layer], Field(min_length=1)] = (8,)  # one per block of the predictor
    visual_cond_size: Width = 256
    ori_attn_supervision: bool = True
    deep_supervision: bool = True
    reduce_threshold: Number = 0.5
    max_remain_ratio: Share | None = None
    fixed_remain_ratio: Share | None = None
    min_remain_num: Count | None = 1
    anchor_positions: Anchors = ()
    use_ref_masks: bool = False
    use_zero_masks: bool = False

    @property
    def rows(self) -> int:
        """Glimpse rows appended to the prompt. If there are none, the attention of the last prompt row is used."""
        return self.le_length if self.le_layers else 0

    @property
    def cond_size(self) -> int:
        """Width of the visual condition inside the predictor: none in V2."""
        return self.visual_cond_size if self.attn_fuse_type == "AttnFuserV1" else 0

    def validate(self, model: ModelConfig, where: str = "glimpse config") -> "GlimpseConfig":
        """Checks every field, alone and against the model. where: prefix of messages.

        Returns: itself, with `reduce_layer` clamped to the last layer (the released default of 1000 means that).
        Raises: GlimpseError that names the first field that cannot work.
        """
        self = checked(self, where)
        depth, vision, heads = model.text.num_hidden_layers, model.vision, self.attn_fuse_num_heads
        qk_size = self.attn_fuse_size + self.cond_size

        def check(ok: bool, field: str, why: str) -> None:
            if not ok:
                raise GlimpseError(f"{where}: {field}={shown(getattr(self, field))} {why}")

        def distinct(values: tuple[int, ...], end: int) -> bool:
            return len(set(values)) == len(values) and all(0 <= v < end for v in values)

        last, blocks = min(self.reduce_layer, depth - 1), vision.conditions
        check(distinct(self.selected_layers, last + 1), "selected_layers", f"must be distinct layers in 0..{last} (reduce_layer)")
        check(not self.le_layers or self.le_length > 0, "le_length", "must be positive when le_layers is not empty")
        check(distinct(self.le_layers, depth), "le_layers", f"must be distinct layers in 0..{depth - 1}")
        check(not self.le_layers or 0 in self.le_layers, "le_layers", "must contain 0, the layer that creates the glimpse rows")
        inside = distinct(self.selected_visual_layers, blocks.stop)
        check(inside, "selected_visual_layers", f"must be distinct blocks in 0..{blocks[-1]}")
        check(self.attn_fuse_global or vision.windowed, "attn_fuse_global", "must be true: the model's vision tower has no windows")
        divides = f"x 4 must divide attn_fuse_size + visual condition ({qk_size}), for a 2-D rope"
        check(qk_size % (4 * heads) == 0, "attn_fuse_num_heads", divides)
        even = self.attn_fuse_use_flash_attn or self.attn_fuse_size % heads == 0
        check(even, "attn_fuse_size", f"is not divisible by attn_fuse_num_heads={heads}")
        check(not (self.use_ref_masks and self.use_zero_masks), "use_ref_masks", "excludes use_zero_masks=True")
        return dataclasses.replace(self, reduce_layer=last)
