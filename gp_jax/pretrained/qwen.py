"""Qwen2.5-VL's `config.json`, flat (text fields at the top; transformers 4, the Hub) or nested (`text_config`; transformers 5)."""

from collections.abc import Mapping
from typing import Any

from gp_jax.config.model import ModelConfig
from gp_jax.config.vision import VisionConfig
from gp_jax.pretrained.fields import Section, check_window, end_and_pad, present, read, refuse_if, text_config, token, value

# transformers' defaults for missing fields; some are missing in the 32B model on the Hub.
TEXT_DEFAULTS = {"rms_norm_eps": 1e-5, "rope_theta": 1e6}
VISION_DEFAULTS = {"depth": 32, "num_heads": 16, "fullatt_block_indexes": (7, 15, 23, 31)}


def vision_config(vision: Mapping[str, Any], where: str) -> VisionConfig:
    """The windowed tower."""
    channels = {} if vision.get("in_channels") is not None else {"in_channels": "in_chans"}
    config = read(VisionConfig, VISION_DEFAULTS | present(vision), where, channels)
    full, depth = config.fullatt_block_indexes, config.depth
    outside = f"{where}: fullatt_block_indexes={list(full)} must be distinct blocks in 0..{depth - 1}"
    refuse_if(len(set(full)) < len(full) or max(full) >= depth, outside)
    uneven = f"{where}: hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}"
    refuse_if(config.hidden_size % config.num_heads != 0, uneven)
    refuse_if(config.head_dim % 4 != 0, f"{where}: head width {config.head_dim} is not divisible by 4, as a 2-D rope needs")
    check_window(config.window_side, 32, f"window_size={config.window_size}", where)
    return config


def read_model(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The model. Raises: GlimpseError on a missing field or an unsupported setting."""
    nested = value(hf, "text_config", Section, where, {})
    text, inside = (nested, f"{where}: text_config") if nested else (hf, where)
    vision = vision_config(value(hf, "vision_config", Section, where), f"{where}: vision_config")
    sliding = value(text, "use_sliding_window", bool, inside, False)
    refuse_if(sliding, f"{inside}: use_sliding_window=true is not supported")
    decoder = text_config(text, hf, inside, where, defaults=TEXT_DEFAULTS, axes=3, bias=True)
    refuse_if(
        vision.out_hidden_size != decoder.hidden_size,
        f"{where}: vision_config.out_hidden_size={vision.out_hidden_size} differs from hidden_size={decoder.hidden_size}",
    )
    return ModelConfig(
        model_type="qwen2_5_vl",
        vision=vision,
        text=decoder,
        image_token_id=token(hf, "image_token_id", decoder.vocab_size, where),
        video_token_id=token(hf, "video_token_id", decoder.vocab_size, where, None),
        **end_and_pad(generation, hf, text, vocabulary=decoder.vocab_size, where=where),
    )


def flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The flat layout, which transformers 4 and 5 and the released code read."""
    nested = hf.get("text_config") or {}
    flat = {k: v for k, v in hf.items() if k != "text_config"}
    flat |= {k: v for k, v in nested.items() if k not in ("model_type", "rope_parameters")}
    text = nested or hf
    rope = text.get("rope_parameters")
    if rope and not text.get("rope_scaling"):
        flat["rope_theta"] = present(rope).get("rope_theta", present(text).get("rope_theta", TEXT_DEFAULTS["rope_theta"]))
        flat["rope_scaling"] = {"type": "mrope", "rope_type": "default", "mrope_section": rope["mrope_section"]}
    flat.pop("rope_parameters", None)
    flat["model_type"] = "qwen2_5_vl"
    flat["vision_config"] = {**hf["vision_config"], "model_type": "qwen2_5_vl"}
    flat["tie_word_embeddings"] = bool(hf.get("tie_word_embeddings") or nested.get("tie_word_embeddings"))
    return flat
