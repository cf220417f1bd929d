"""The published sizes of Qwen2.5-VL, Qwen3-VL and LLaVA-1.5, for planning without a download."""

from dataclasses import replace

from gp_jax.config.model import ModelConfig, TextConfig
from gp_jax.config.vision import ClipConfig, DeepStackConfig, VisionConfig

IMAGE, VIDEO, ENDS, PAD = 151655, 151656, (151645, 151643), 151643


def _qwen2_5_vl(width: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, tied: bool) -> ModelConfig:
    vision = VisionConfig(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=width, fullatt_block_indexes=(7, 15, 23, 31)
    )
    text = TextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        mrope_section=(16, 24, 24),
        tie_word_embeddings=tied,
    )
    return ModelConfig("qwen2_5_vl", vision, text, image_token_id=IMAGE, video_token_id=VIDEO, eos_token_ids=ENDS, pad_token_id=PAD)


def _qwen3_vl(width: int, inner: int, layers: int, heads: int, small: bool) -> ModelConfig:
    """small: of the two sizes with the smaller tower and a tied output head."""
    depth, channels, tower_inner, taps = (24, 1024, 4096, (5, 11, 17)) if small else (27, 1152, 4304, (8, 16, 24))
    vision = DeepStackConfig(depth, channels, tower_inner, 16, width, num_position_embeddings=48**2, deepstack_visual_indexes=taps)
    text = TextConfig(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        mrope_section=(24, 20, 20),
        mrope_interleaved=True,
        tie_word_embeddings=small,
        attention_bias=False,
        head_size=128,
        qk_norm=True,
    )
    return ModelConfig("qwen3_vl", vision, text, image_token_id=IMAGE, video_token_id=VIDEO, eos_token_ids=ENDS, pad_token_id=PAD)


def _llava(width: int, inner: int, layers: int, heads: int) -> ModelConfig:
    vision = ClipConfig(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=width, select_layer=23)
    text = TextConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        rms_norm_eps=1e-5,
        rope_theta=1e4,
        attention_bias=False,
    )
    return ModelConfig("llava_llama", vision, text, image_token_id=-200, eos_token_ids=(2,))


def _larger(width: int, inner: int, layers: int, heads: int) -> ModelConfig:
    """From 7B's sizes. The vision tower of the two largest has a wider MLP, 3456 instead of 3420."""
    known = SIZES["7b"]
    text = replace(known.text, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads)
    vision = replace(known.vision, out_hidden_size=width, intermediate_size=3456)
    return replace(known, vision=vision, text=replace(text, num_key_value_heads=8))


SIZES = {
    "3b": _qwen2_5_vl(2048, 11008, 36, 16, 2, 151936, tied=True),
    "7b": _qwen2_5_vl(3584, 18944, 28, 28, 4, 152064, tied=False),
    "qwen3-vl-2b": _qwen3_vl(2048, 6144, 28, 16, small=True),
    "qwen3-vl-4b": _qwen3_vl(2560, 9728, 36, 32, small=True),
    "qwen3-vl-8b": _qwen3_vl(4096, 12288, 36, 32, small=False),
    "qwen3-vl-32b": _qwen3_vl(5120, 25600, 64, 64, small=False),
    "llava-1.5-7b": _llava(4096, 11008, 32, 32),
    "llava-1.5-13b": _llava(5120, 13824, 40, 40),
}
SIZES |= {"32b": _larger(5120, 27648, 64, 40), "72b": _larger(8192, 29568, 80, 64)}
