"""What a model is, as frozen dataclasses. `pretrained.hf_config` reads them from a Hugging Face `config.json`."""

import dataclasses
import math
from dataclasses import dataclass

from gp_jax.choices import NORMS, PREDICTORS
from gp_jax.errors import GlimpseError
from gp_jax.vision_config import ClipConfig as ClipConfig
from gp_jax.vision_config import Vision as Vision
from gp_jax.vision_config import VisionConfig as VisionConfig

ANCHORS = ("tl", "tr", "bl", "br")


@dataclass(frozen=True)
class TextConfig:
    """Decoder of the Qwen2 / Llama kind."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...] = ()  # frequencies per axis (time, row, column); empty: ordinary 1-D rope
    tie_word_embeddings: bool = False
    attention_bias: bool = True
    hidden_act: str = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model without its glimpse."""

    model_type: str
    vision: Vision
    text: TextConfig
    image_token_id: int
    video_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0

    @property
    def position_axes(self) -> int:
        """Axes of a position id: 3 (time, row, column) under M-RoPE, else 1."""
        return 3 if self.text.mrope_section else 1


@dataclass(frozen=True)
class GlimpseConfig:
    """The glimpse and its predictor. Field names and meanings are those of the released `config.json`.

    `ori_attn_supervision` is accepted and changes nothing: the released code puts one more map in front of the list of
    which only the last one decides. `attn_fuse_use_flash_attn` is not a mere kernel choice there: it deals the value
    channels out to the heads differently, and so it does here.
    """

    selected_layers: tuple[int, ...]
    reduce_layer: int
    le_layers: tuple[int, ...] = (0,)
    le_length: int = 1
    le_norm_type: str = "rmsnorm"
    le_dropout_prob: float = 0.0
    use_attention_logits: bool = False
    attn_fuse_type: str = "AttnFuserV1"
    attn_fuse_size: int = 256
    attn_fuse_num_heads: int = 4
    attn_fuse_hidden_act: str = "silu"
    attn_fuse_global: bool = False
    attn_fuse_use_flash_attn: bool = False
    selected_visual_layers: tuple[int, ...] = (8,)
    visual_cond_size: int = 256
    ori_attn_supervision: bool = True
    deep_supervision: bool = True
    reduce_threshold: float = 0.5
    max_remain_ratio: float | None = None
    fixed_remain_ratio: float | None = None
    min_remain_num: int | None = 1
    anchor_positions: tuple[str, ...] = ()
    use_ref_masks: bool = False
    use_zero_masks: bool = False

    @property
    def rows(self) -> int:
        """Glimpse rows appended to the prompt; without any the last prompt row looks at the image."""
        return self.le_length if self.le_layers else 0

    @property
    def cond_size(self) -> int:
        """Width of the visual condition inside the predictor: none in V2."""
        return self.visual_cond_size if self.attn_fuse_type == "AttnFuserV1" else 0

    def validate(self, model: ModelConfig) -> "GlimpseConfig":
        """Checks every field against the model.

        Returns: itself, with `reduce_layer` clamped to the last layer (the released default of 1000 means that).
        Raises: GlimpseError that names the first field that cannot work.
        """
        depth, vision = model.text.num_hidden_layers, model.vision
        qk_size = self.attn_fuse_size + self.cond_size

        def check(ok: bool, field: str, why: str) -> None:
            if not ok:
                raise GlimpseError(f"glimpse config: {field}={getattr(self, field)!r} {why}")

        def distinct(values: tuple[int, ...], end: int) -> bool:
            return len(set(values)) == len(values) and all(0 <= v < end for v in values)

        last = min(self.reduce_layer, depth - 1)
        check(self.reduce_layer >= 0, "reduce_layer", "is negative")
        check(bool(self.selected_layers), "selected_layers", "is empty: the predictor needs at least one attention map")
        check(distinct(self.selected_layers, last + 1), "selected_layers", f"must be distinct layers in 0..{last} (reduce_layer)")
        check(self.le_length >= 0, "le_length", "is negative")
        check(not self.le_layers or self.le_length > 0, "le_length", "must be positive when le_layers is not empty")
        check(distinct(self.le_layers, depth), "le_layers", f"must be distinct layers in 0..{depth - 1}")
        check(not self.le_layers or 0 in self.le_layers, "le_layers", "must contain 0, the layer that creates the glimpse rows")
        check(self.le_norm_type in NORMS, "le_norm_type", "is not 'rmsnorm' or 'layernorm'")
        check(0 <= self.le_dropout_prob < 1, "le_dropout_prob", "is not in [0, 1)")
        check(self.attn_fuse_type in PREDICTORS, "attn_fuse_type", f"is not supported (supported: {', '.join(PREDICTORS)})")
        check(bool(self.selected_visual_layers), "selected_visual_layers", "is empty: the predictor would have no block")
        check(
            distinct(self.selected_visual_layers, vision.conditions.stop),
            "selected_visual_layers",
            f"must be distinct blocks in 0..{vision.conditions[-1]}",
        )
        for size in ("attn_fuse_num_heads", "attn_fuse_size", "visual_cond_size"):
            check(getattr(self, size) > 0, size, "is not positive")
        heads = self.attn_fuse_num_heads
        check(
            qk_size % (4 * heads) == 0,
            "attn_fuse_num_heads",
            f"x 4 must divide attn_fuse_size + visual condition ({qk_size}), for a 2-D rope",
        )
        check(
            self.attn_fuse_use_flash_attn or self.attn_fuse_size % heads == 0,
            "attn_fuse_size",
            f"is not divisible by attn_fuse_num_heads={heads}",
        )
        self.validate_rule()
        return dataclasses.replace(self, reduce_layer=last)

    def validate_rule(self) -> None:
        """Checks the keep rule's fields alone (they can also be given per request)."""

        def number(value: object) -> bool:
            return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

        if not number(self.reduce_threshold):
            raise GlimpseError(f"reduce_threshold={self.reduce_threshold!r} is not a number")
        for field in ("max_remain_ratio", "fixed_remain_ratio"):
            value = getattr(self, field)
            if value is not None and not (number(value) and 0 <= value <= 1):
                raise GlimpseError(f"{field}={value!r} is not in [0, 1]")
        floor = self.min_remain_num
        if floor is not None and not (isinstance(floor, int) and not isinstance(floor, bool) and floor >= 0):
            raise GlimpseError(f"min_remain_num={floor!r} is not a count")
        for anchor in self.anchor_positions:
            if anchor not in ANCHORS:
                raise GlimpseError(f"anchor_positions: unknown anchor {anchor!r} (known: {', '.join(ANCHORS)})")
        if self.use_ref_masks and self.use_zero_masks:
            raise GlimpseError("use_ref_masks and use_zero_masks exclude each other")
