"""LLaVA's `config.json` in both layouts: `liuhaotian/llava-v1.5-7b` (and the released GlimpsePrune folders), which is Llama's with the
tower only named in `mm_vision_tower`, and `llava-hf/*` of transformers, which LLaVA-NeXT comes in too."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from gp_jax.config.model import Activation, ModelConfig, TextConfig
from gp_jax.config.schema import Layers, Several, Whole
from gp_jax.config.vision import ClipConfig, Pinpoint
from gp_jax.errors import shown
from gp_jax.pretrained.fields import Section, check_window, choice, end_and_pad, present, read, refuse_if, text_config, token, value

IMAGE_TOKEN = -200  # of the first layout: used in prompts, not part of the vocabulary
# transformers' defaults for fields that are missing in a file, as in files on the Hub.
ROPE = dict(rms_norm_eps=1e-6, rope_theta=1e4)
LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, eos_token_id=2)
MISTRAL = LLAMA | dict(intermediate_size=14336, num_key_value_heads=8)
TEXT_DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL}
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
CLIP_NAMES = {"depth": "num_hidden_layers", "num_heads": "num_attention_heads", "in_channels": "num_channels"}
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
MOST_TOKENS = 2**16  # of a picture in tiles; every request is padded for the largest picture


def decoder(text: Mapping[str, Any], top: Mapping[str, Any], where: str, above: str) -> TextConfig:
    """Llama, or Mistral without a sliding window."""
    bias = any(value(text, name, bool, where, False) for name in ("attention_bias", "mlp_bias"))
    refuse_if(bias, f"{where}: attention_bias=true and mlp_bias=true are not supported")
    sliding = text.get("sliding_window")
    refuse_if(sliding is not None, f"{where}: sliding_window={shown(sliding)} is not supported")
    config = text_config(text, top, where, above, defaults=ROPE, axes=1, bias=False)
    width = value(text, "head_dim", Whole, where, config.head_dim)
    refuse_if(width != config.head_dim, f"{where}: head_dim={width} differs from hidden_size / num_attention_heads")
    return config


def tower(hf: Mapping[str, Any], layer: str, where: str, **projector: Any) -> ClipConfig:
    """The CLIP tower. layer: the field with the index of the hidden state that the projector reads, as a Python index, e.g. -2; projector:
    the other fields of a ClipConfig."""
    vision, inside = value(hf, "vision_config", Section, where), f"{where}: vision_config"
    choice(vision, "model_type", ("clip_vision_model",), inside, "clip_vision_model")
    select, vision = value(hf, layer, Whole, where, -2), CLIP | present(vision)
    states = value(vision, "num_hidden_layers", Layers, inside) + 1
    refuse_if(not -states <= select < states, f"{where}: {layer}={select} must be one of {states} hidden states")
    refuse_if(select % states == 0, f"{where}: {layer}={select} reads no block of the tower")
    config = read(ClipConfig, vision, inside, CLIP_NAMES, select_layer=select % states, **projector)
    uneven = f"{inside}: hidden_size={config.hidden_size} is not divisible by num_attention_heads={config.num_heads}"
    refuse_if(config.hidden_size % config.num_heads != 0, uneven)
    check_window(config.window_side, 128, f"image_size={config.image_size}", inside)
    return config


def read_original(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The first layout, with the tower's config inserted as `vision_config` (`pretrained.tower.with_tower`)."""
    choice(hf, "mm_projector_type", ("mlp2x_gelu",), where, "linear")
    choice(hf, "mm_vision_select_feature", ("patch",), where, "patch")
    choice(hf, "image_aspect_ratio", ("pad", "square"), where, "pad")
    refuse_if(value(hf, "mm_use_im_start_end", bool, where, False), f"{where}: mm_use_im_start_end=true is not supported")
    text = decoder(hf, hf, where, where)
    vision = tower(hf, "mm_vision_select_layer", where, out_hidden_size=text.hidden_size)
    ends = end_and_pad(generation, hf, LLAMA, vocabulary=text.vocab_size, where=where)
    return ModelConfig("llava_llama", vision, text, image_token_id=IMAGE_TOKEN, **ends)


def read_model(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The layout of transformers."""
    text, inside = value(hf, "text_config", Section, where, {}), f"{where}: text_config"
    kind = choice(text, "model_type", TEXT_DEFAULTS, inside, "llama")
    choice(hf, "vision_feature_select_strategy", ("default",), where, "default")
    text = TEXT_DEFAULTS[kind] | present(text)
    shape = decoder(text, hf, inside, where)
    vision = tower(
        hf,
        "vision_feature_layer",
        where,
        out_hidden_size=shape.hidden_size,
        projector_act=value(hf, "projector_hidden_act", Activation, where, "gelu"),
        projector_bias=value(hf, "multimodal_projector_bias", bool, where, True),
    )
    if hf["model_type"] == "llava_next":
        vision = dataclasses.replace(vision, pinpoints=pinpoints(hf, vision, where))
    name = "image_token_index" if hf.get("image_token_index") is not None else "image_token_id"
    image = token(hf, name, shape.vocab_size, where, 32000)
    ends = end_and_pad(generation, hf, text, vocabulary=shape.vocab_size, where=where)
    return ModelConfig(hf["model_type"], vision, shape, image_token_id=image, **ends)


def pinpoints(hf: Mapping[str, Any], vision: ClipConfig, where: str) -> tuple[tuple[int, ...], ...]:
    """LLaVA-NeXT's resolutions, each a whole number of tiles."""
    name, side = "image_grid_pinpoints", vision.image_size
    points = value(hf, name, Several[Pinpoint], where, ()) or PINPOINTS
    uneven = next((point for point in points if any(n % side for n in point)), None)
    refuse_if(uneven is not None, f"{where}: {name} holds {uneven}: both must be multiples of the tile's {side} pixels")
    most = dataclasses.replace(vision, pinpoints=points).most_tokens
    refuse_if(most > MOST_TOKENS, f"{where}: {name} makes {most} visual tokens of a picture, supported are {MOST_TOKENS}")
    return points


def flat_original(hf: Mapping[str, Any]) -> dict[str, Any]:
    """The layout of the released code, which ignores `vision_config`."""
    return dict(hf) | {"model_type": "llava_llama_gp"}
