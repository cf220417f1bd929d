"""What a model is, as frozen dataclasses, and how they are read from and written to Hugging Face `config.json`.

Two layouts of `config.json` exist: flat (text fields at the top; transformers 4, the released GlimpsePrune folders and the
Hub) and nested (`text_config`; transformers 5). Both are read; a folder that holds a glimpse is written flat, which both read.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gp_jax.errors import GlimpseError

MODEL_TYPES = ("qwen2_5_vl", "qwen2_5_vl_gp")
PREDICTORS = ("AttnFuserV1", "AttnFuserV2")
ANCHORS = ("tl", "tr", "bl", "br")


@dataclass(frozen=True)
class VisionConfig:
    """Windowed ViT of Qwen2.5-VL. Sizes in pixels where they end in `_size` of a patch or window, else in channels."""

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    fullatt_block_indexes: tuple[int, ...]
    window_size: int = 112
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    in_channels: int = 3
    hidden_act: str = "silu"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_dim(self) -> int:
        """Values in one flattened patch, in the order channel, time, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one visual token."""
        return self.spatial_merge_size**2

    @property
    def window_side(self) -> int:
        """Side of an attention window, in visual tokens."""
        return self.window_size // self.spatial_merge_size // self.patch_size


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
    vision: VisionConfig
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
        check(self.le_norm_type in ("rmsnorm", "layernorm"), "le_norm_type", "is not 'rmsnorm' or 'layernorm'")
        check(0 <= self.le_dropout_prob < 1, "le_dropout_prob", "is not in [0, 1)")
        check(self.attn_fuse_type in PREDICTORS, "attn_fuse_type", f"is not supported (supported: {', '.join(PREDICTORS)})")
        check(bool(self.selected_visual_layers), "selected_visual_layers", "is empty: the predictor would have no block")
        check(
            distinct(self.selected_visual_layers, vision.depth),
            "selected_visual_layers",
            f"must be distinct blocks in 0..{vision.depth - 1}",
        )
        check(self.attn_fuse_num_heads > 0, "attn_fuse_num_heads", "is not positive")
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
        for field in ("max_remain_ratio", "fixed_remain_ratio"):
            value = getattr(self, field)
            if value is not None and not 0 <= value <= 1:
                raise GlimpseError(f"{field}={value!r} is not in [0, 1]")
        if self.min_remain_num is not None and self.min_remain_num < 0:
            raise GlimpseError(f"min_remain_num={self.min_remain_num!r} is negative")
        for anchor in self.anchor_positions:
            if anchor not in ANCHORS:
                raise GlimpseError(f"anchor_positions: unknown anchor {anchor!r} (known: {', '.join(ANCHORS)})")
        if self.use_ref_masks and self.use_zero_masks:
            raise GlimpseError("use_ref_masks and use_zero_masks exclude each other")


def _get(source: Mapping[str, Any], name: str, where: str, default: Any = ...) -> Any:
    value = source.get(name, default)
    if value is ...:
        raise GlimpseError(f"{where}: field '{name}' is missing")
    return value


def _no(condition: bool, message: str) -> None:
    if condition:
        raise GlimpseError(message)


def _text_from_hf(text: Mapping[str, Any], top: Mapping[str, Any], where: str) -> TextConfig:
    rope = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    _no(kind not in ("default", "mrope"), f"{where}: rope type '{kind}' is not supported (supported: default, mrope)")
    _no(bool(text.get("use_sliding_window")), f"{where}: use_sliding_window=true is not supported")
    heads, width = _get(text, "num_attention_heads", where), _get(text, "hidden_size", where)
    kv_heads = text.get("num_key_value_heads") or heads
    _no(width % heads != 0, f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}")
    _no(heads % kv_heads != 0, f"{where}: num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
    section = tuple(rope.get("mrope_section", ()))
    _no(
        len(section) != 3 or sum(section) != width // heads // 2,
        f"{where}: mrope_section={list(section)} must be 3 numbers that add up to half the head width ({width // heads // 2})",
    )
    return TextConfig(
        vocab_size=_get(text, "vocab_size", where),
        hidden_size=width,
        intermediate_size=_get(text, "intermediate_size", where),
        num_hidden_layers=_get(text, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=_get(text, "rms_norm_eps", where, 1e-6),
        rope_theta=float(rope.get("rope_theta") or text.get("rope_theta") or 1e6),
        mrope_section=section,
        tie_word_embeddings=bool(top.get("tie_word_embeddings", False) or text.get("tie_word_embeddings", False)),
        hidden_act=_get(text, "hidden_act", where, "silu"),
    )


def _vision_from_hf(vision: Mapping[str, Any], where: str) -> VisionConfig:
    where = f"{where}: vision_config"
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    fields = {f.name: f for f in dataclasses.fields(VisionConfig)}
    values = {name: _get(vision, name, where, ... if f.default is dataclasses.MISSING else f.default) for name, f in fields.items()}
    values |= {"in_channels": channels, "fullatt_block_indexes": tuple(values["fullatt_block_indexes"])}
    config = VisionConfig(**values)
    _no(
        config.hidden_size % config.num_heads != 0,
        f"{where}: hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}",
    )
    _no(config.head_dim % 4 != 0, f"{where}: head width {config.head_dim} is not divisible by 4, as a 2-D rope needs")
    _no(config.window_side < 1, f"{where}: window_size={config.window_size} is smaller than one visual token")
    return config


def model_config(hf: Mapping[str, Any], generation: Mapping[str, Any] | None = None, where: str = "config.json") -> ModelConfig:
    """Reads a `config.json` dict, flat or nested, and a `generation_config.json` dict.

    Raises: GlimpseError on an unknown model type, a missing field or an unsupported setting.
    """
    kind = hf.get("model_type")
    _no(kind not in MODEL_TYPES, f"{where}: model_type '{kind}' is not supported (supported: {', '.join(MODEL_TYPES)})")
    text, generation = hf.get("text_config") or hf, generation or {}
    vision = _vision_from_hf(_get(hf, "vision_config", where), where)
    decoder = _text_from_hf(text, hf, where)
    _no(
        vision.out_hidden_size != decoder.hidden_size,
        f"{where}: vision_config.out_hidden_size={vision.out_hidden_size} differs from hidden_size={decoder.hidden_size}",
    )

    def token(name: str) -> Any:
        return generation.get(name, hf.get(name, text.get(name)))

    eos = token("eos_token_id")
    eos = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pad = token("pad_token_id")
    return ModelConfig(
        model_type="qwen2_5_vl",
        vision=vision,
        text=decoder,
        image_token_id=_get(hf, "image_token_id", where),
        video_token_id=hf.get("video_token_id"),
        eos_token_ids=eos,
        pad_token_id=pad if pad is not None else (eos[0] if eos else 0),
    )


def glimpse_config(hf: Mapping[str, Any], model: ModelConfig, where: str = "config.json") -> GlimpseConfig:
    """Reads the glimpse's fields of a released `config.json` and validates them against `model`."""
    values = {}
    for field in dataclasses.fields(GlimpseConfig):
        required = field.default is dataclasses.MISSING
        value = _get(hf, field.name, where, ... if required else field.default)
        values[field.name] = tuple(value or ()) if isinstance(value, list | tuple) or field.name == "anchor_positions" else value
    return GlimpseConfig(**values).validate(model)


def flat_hf_config(hf: Mapping[str, Any], glimpse: GlimpseConfig) -> dict[str, Any]:
    """`config.json` of a folder that holds a glimpse: flat, so that transformers 4 and 5 and the released code read it."""
    flat = {k: v for k, v in hf.items() if k != "text_config"}
    flat |= {k: v for k, v in (hf.get("text_config") or {}).items() if k not in ("model_type", "rope_parameters")}
    rope = (hf.get("text_config") or hf).get("rope_parameters")
    if rope:
        flat["rope_theta"] = rope.get("rope_theta", 1e6)
        flat["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
        flat.pop("rope_parameters", None)
    flat["model_type"] = "qwen2_5_vl"
    flat["vision_config"] = {**hf["vision_config"], "model_type": "qwen2_5_vl"}
    flat["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings") or (hf.get("text_config") or {}).get("tie_word_embeddings"))
    return flat | {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(glimpse).items()}
