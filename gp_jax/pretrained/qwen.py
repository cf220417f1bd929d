"""Qwen2.5-VL's `config.json`, flat (text fields at the top; transformers 4, the Hub) or nested (`text_config`; transformers 5)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gp_jax.config import ModelConfig, VisionConfig
from gp_jax.pretrained.fields import check_activation, end_and_pad, get, mapping, refuse_if, sizes, text_config, typed

# What transformers takes for fields that a file leaves out; the 32B model on the Hub leaves some out.
VISION_DEFAULTS = {"depth": 32, "num_heads": 16, "fullatt_block_indexes": (7, 15, 23, 31)}


def vision_config(vision: Mapping[str, Any], where: str) -> VisionConfig:
    """The windowed tower."""
    where = f"{where}: vision_config"
    channels = vision.get("in_channels", vision.get("in_chans", 3))
    fields = {f.name: f for f in dataclasses.fields(VisionConfig)}
    values = {name: get(vision, name, where, ... if f.default is dataclasses.MISSING else f.default) for name, f in fields.items()}
    full = values["fullatt_block_indexes"]
    values |= {"in_channels": channels, "fullatt_block_indexes": tuple(full) if isinstance(full, list) else full}
    sizes(values, tuple(name for name, f in fields.items() if f.type in (int, "int")), where)
    config = typed(VisionConfig(**values), where)
    check_activation(config.hidden_act, "hidden_act", where)
    uneven = f"{where}: hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}"
    refuse_if(config.hidden_size % config.num_heads != 0, uneven)
    refuse_if(config.head_dim % 4 != 0, f"{where}: head width {config.head_dim} is not divisible by 4, as a 2-D rope needs")
    refuse_if(config.window_side < 1, f"{where}: window_size={config.window_size} is smaller than one visual token")
    return config


def read(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The model. Raises: GlimpseError on a missing field or an unsupported setting."""
    text = mapping(hf.get("text_config") or hf, "text_config", where)
    vision = vision_config(VISION_DEFAULTS | dict(mapping(get(hf, "vision_config", where), "vision_config", where)), where)
    refuse_if(bool(text.get("use_sliding_window")), f"{where}: use_sliding_window=true is not supported")
    decoder = text_config(text, hf, where, theta=1e6, axes=3, bias=True)
    refuse_if(
        vision.out_hidden_size != decoder.hidden_size,
        f"{where}: vision_config.out_hidden_size={vision.out_hidden_size} differs from hidden_size={decoder.hidden_size}",
    )
    return ModelConfig(
        model_type="qwen2_5_vl",
        vision=vision,
        text=decoder,
        image_token_id=get(hf, "image_token_id", where),
        video_token_id=hf.get("video_token_id"),
        **end_and_pad(generation, hf, text),
    )


def flat(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The flat layout, which transformers 4 and 5 and the released code read."""
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
    return flat
