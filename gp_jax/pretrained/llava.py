"""LLaVA's `config.json` in both layouts: `liuhaotian/llava-v1.5-7b` (and the released GlimpsePrune folders), which is Llama's with the
tower only named in `mm_vision_tower`, and `llava-hf/*` of transformers, which LLaVA-NeXT comes in too."""

from collections.abc import Mapping
from typing import Any

from gp_jax.config import ClipConfig, ModelConfig, TextConfig
from gp_jax.pretrained.fields import check_activation, end_and_pad, get, mapping, refuse_if, sizes, text_config, typed

IMAGE_TOKEN = -200  # of the first layout: it stands in prompts but in no vocabulary
# What transformers takes for fields that a file leaves out, as the Hub's files do.
LLAMA = dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, eos_token_id=2)
MISTRAL = LLAMA | dict(intermediate_size=14336, num_key_value_heads=8)
TEXT_DEFAULTS = {"llama": LLAMA, "mistral": MISTRAL}
CLIP = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, image_size=224, patch_size=32)
PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))


def decoder(text: Mapping[str, Any], top: Mapping[str, Any], where: str) -> TextConfig:
    """Llama, or Mistral where its window does not slide."""
    refuse_if(
        bool(text.get("attention_bias")) or bool(text.get("mlp_bias")), f"{where}: attention_bias=true and mlp_bias=true are not supported"
    )
    refuse_if(text.get("sliding_window") is not None, f"{where}: sliding_window={text.get('sliding_window')!r} is not supported")
    config = text_config(text, top, where, theta=1e4, axes=1, bias=False)
    width = text.get("head_dim")
    refuse_if(width not in (None, config.head_dim), f"{where}: head_dim={width!r} differs from hidden_size / num_attention_heads")
    return config


def tower(vision: Mapping[str, Any], where: str, **projector: Any) -> ClipConfig:
    """The CLIP tower. projector: the rest of a ClipConfig, with `select_layer` counted as in Python, e.g. -2."""
    where = f"{where}: vision_config"
    kind = vision.get("model_type", "clip_vision_model")
    refuse_if(kind != "clip_vision_model", f"{where}: model_type '{kind}' is not supported (supported: clip_vision_model)")
    vision = CLIP | vision
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    depth, width, inner, heads, side, patch = sizes(vision, names, where)
    refuse_if(width % heads != 0, f"{where}: hidden_size={width} is not divisible by num_attention_heads={heads}")
    refuse_if(side < patch, f"{where}: image_size={side} is smaller than patch_size={patch}")
    select = projector.pop("select_layer")
    inside = isinstance(select, int) and not isinstance(select, bool) and -depth - 1 <= select <= depth
    refuse_if(not inside, f"{where}: vision_feature_layer={select!r} must be one of {depth + 1} hidden states")
    select %= depth + 1
    refuse_if(select == 0, f"{where}: vision_feature_layer=0 reads no block of the tower")
    config = ClipConfig(
        depth=depth,
        hidden_size=width,
        intermediate_size=inner,
        num_heads=heads,
        select_layer=select,
        image_size=side,
        patch_size=patch,
        in_channels=get(vision, "num_channels", where, 3),
        hidden_act=get(vision, "hidden_act", where, "quick_gelu"),
        layer_norm_eps=get(vision, "layer_norm_eps", where, 1e-5),
        **projector,
    )
    check_activation(config.hidden_act, "hidden_act", where)
    check_activation(config.projector_act, "projector_hidden_act", where)
    return typed(config, where)


def read_original(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The first layout, the tower's config already put in as `vision_config` (`pretrained.tower.with_tower`)."""
    kind, feature = hf.get("mm_projector_type", "linear"), hf.get("mm_vision_select_feature", "patch")
    refuse_if(kind != "mlp2x_gelu", f"{where}: mm_projector_type '{kind}' is not supported (supported: mlp2x_gelu)")
    refuse_if(feature != "patch", f"{where}: mm_vision_select_feature '{feature}' is not supported (supported: patch)")
    ratio = hf.get("image_aspect_ratio")
    refuse_if(ratio not in (None, "pad", "square"), f"{where}: image_aspect_ratio '{ratio}' is not supported (supported: pad, square)")
    refuse_if(bool(hf.get("mm_use_im_start_end")), f"{where}: mm_use_im_start_end=true is not supported")
    text = decoder(hf, hf, where)
    select = get(hf, "mm_vision_select_layer", where, -2)
    vision = tower(
        mapping(get(hf, "vision_config", where), "vision_config", where), where, select_layer=select, out_hidden_size=text.hidden_size
    )
    return ModelConfig("llava_llama", vision, text, image_token_id=IMAGE_TOKEN, **end_and_pad(generation, hf, LLAMA))


def read(hf: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> ModelConfig:
    """The layout of transformers."""
    text = mapping(hf.get("text_config") or {}, "text_config", where)
    kind = text.get("model_type", "llama")
    refuse_if(
        kind not in TEXT_DEFAULTS, f"{where}: text_config: model_type '{kind}' is not supported (supported: {', '.join(TEXT_DEFAULTS)})"
    )
    strategy = hf.get("vision_feature_select_strategy", "default")
    refuse_if(strategy != "default", f"{where}: vision_feature_select_strategy '{strategy}' is not supported (supported: default)")
    text = TEXT_DEFAULTS[kind] | {name: value for name, value in text.items() if value is not None}
    shape = decoder(text, hf, where)
    vision = tower(
        mapping(get(hf, "vision_config", where), "vision_config", where),
        where,
        select_layer=get(hf, "vision_feature_layer", where, -2),
        out_hidden_size=shape.hidden_size,
        projector_act=get(hf, "projector_hidden_act", where, "gelu"),
        projector_bias=get(hf, "multimodal_projector_bias", where, True),
        pinpoints=pinpoints(hf, where) if hf.get("model_type") == "llava_next" else (),
    )
    image = next((hf[name] for name in ("image_token_index", "image_token_id") if hf.get(name) is not None), 32000)
    return ModelConfig(hf["model_type"], vision, shape, image_token_id=image, **end_and_pad(generation, hf, text))


def pinpoints(hf: Mapping[str, Any], where: str) -> tuple[tuple[int, int], ...]:
    """LLaVA-NeXT's resolutions, each a whole number of tiles."""
    points, side = hf.get("image_grid_pinpoints") or PINPOINTS, mapping(hf["vision_config"], "vision_config", where).get("image_size", 224)

    def fits(point: Any) -> bool:
        return isinstance(point, list | tuple) and len(point) == 2 and all(isinstance(n, int) and n > 0 and n % side == 0 for n in point)

    good = isinstance(points, list | tuple) and all(fits(point) for point in points)
    refuse_if(not good, f"{where}: image_grid_pinpoints={points!r} must be pairs of multiples of the tile's {side} pixels")
    return tuple(map(tuple, points))


def flat_original(hf: Mapping[str, Any]) -> dict[str, Any]:
    """As the released code names it, which ignores `vision_config`."""
    return dict(hf) | {"model_type": "llava_llama_gp"}
