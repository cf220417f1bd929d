"""Qwen3-VL's `config.json`, as transformers 4.57 writes it (rope in `rope_theta` and `rope_scaling`) and as transformers 5 does (all of it
in `rope_parameters`)."""

from collections.abc import Mapping
from typing import Any

from gp_jax.config.model import ModelConfig
from gp_jax.config.schema import RopeBase, Width
from gp_jax.config.vision import DeepStackConfig
from gp_jax.pretrained.fields import Section, end_and_pad, present, read, refuse_if, text_config, token, value

# Fields whose defaults in transformers are those of no released model: a file must say them.
REQUIRED = ("num_key_value_heads", "head_dim", "rms_norm_eps")
ROPE_BASE = 10000.0  # of the vision tower


def vision_config(vision: Mapping[str, Any], where: str) -> DeepStackConfig:
    """The tower."""
    config = read(DeepStackConfig, present(vision), where)
    taps, depth = config.deepstack_visual_indexes, config.depth
    outside = f"{where}: deepstack_visual_indexes={list(taps)} must be distinct blocks in 0..{depth - 1}"
    refuse_if(len(set(taps)) < len(taps) or max(taps, default=0) >= depth, outside)
    table = f"{where}: num_position_embeddings={config.num_position_embeddings} is not the square of a whole number"
    refuse_if(config.table_side**2 != config.num_position_embeddings, table)
    uneven = f"{where}: hidden_size={config.hidden_size} is not divisible by num_heads={config.num_heads}"
    refuse_if(config.hidden_size % config.num_heads != 0, uneven)
    refuse_if(config.head_dim % 4 != 0, f"{where}: head width {config.head_dim} is not divisible by 4, as a 2-D rope needs")
    rope = value(vision, "rope_parameters", Section, where, {})
    base = value(rope, "rope_theta", RopeBase, f"{where}: rope_parameters", ROPE_BASE)
    refuse_if(base != ROPE_BASE, f"{where}: rope_parameters: rope_theta={base} is not supported (supported: {ROPE_BASE})")
    return config


def read_model(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The model. Raises: GlimpseError on a missing field or an unsupported setting."""
    text, inside = value(hf, "text_config", Section, where), f"{where}: text_config"
    experts = hf["model_type"] == "qwen3_vl_moe" or text.get("num_experts")
    refuse_if(bool(experts), f"{where}: the mixture-of-experts models of Qwen3-VL are not supported, only the dense ones")
    vision = vision_config(value(hf, "vision_config", Section, where), f"{where}: vision_config")
    refuse_if(value(text, "attention_bias", bool, inside, False), f"{inside}: attention_bias=true is not supported")
    for name in REQUIRED:  # the rope's base too, which `text_config` finds in either place
        refuse_if(text.get(name) is None, f"{inside}: field '{name}' is missing")
    name = "rope_scaling" if value(text, "rope_scaling", Section, inside, {}) else "rope_parameters"
    turns = value(value(text, name, Section, inside, {}), "mrope_interleaved", bool, f"{inside}: {name}", True)
    refuse_if(not turns, f"{inside}: {name}: mrope_interleaved=false is not supported")
    own = dict(head_size=value(text, "head_dim", Width, inside), qk_norm=True, mrope_interleaved=True)
    decoder = text_config(text, hf, inside, where, defaults={}, axes=3, bias=False, **own)
    refuse_if(
        vision.out_hidden_size != decoder.hidden_size,
        f"{where}: vision_config.out_hidden_size={vision.out_hidden_size} differs from hidden_size={decoder.hidden_size}",
    )
    return ModelConfig(
        model_type="qwen3_vl",
        vision=vision,
        text=decoder,
        image_token_id=token(hf, "image_token_id", decoder.vocab_size, where),
        video_token_id=token(hf, "video_token_id", decoder.vocab_size, where, None),
        **end_and_pad(generation, hf, text, vocabulary=decoder.vocab_size, where=where),
    )
