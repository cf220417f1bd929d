"""Tiny random models, saved the way the world saves them, and inputs for them."""

import json
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from gp_jax import Ladder, Ladders

# Few rungs: most tests are about numbers, and every rung costs compilations.
LADDERS = Ladders(
    patches=Ladder("patches", (512,)),
    prompt=Ladder("prompt", (128,)),
    kept=Ladder("kept", (48,)),
    decode=Ladder("decode", (16,)),
    batch=Ladder("batch", (4,)),
)
IMAGE, VIDEO, VISION_START, VISION_END, EOS, PAD = 93, 94, 91, 92, 90, 89
VOCABULARY = 96

GLIMPSE = dict(
    selected_layers=[1],
    reduce_layer=1,
    le_layers=[0, 1, 2],
    le_length=1,
    le_norm_type="rmsnorm",
    le_dropout_prob=0.0,
    use_attention_logits=True,
    attn_fuse_type="AttnFuserV1",
    attn_fuse_size=16,
    attn_fuse_num_heads=2,
    attn_fuse_hidden_act="silu",
    attn_fuse_global=True,
    selected_visual_layers=[3, 1],
    visual_cond_size=16,
    ori_attn_supervision=False,
    deep_supervision=False,
    reduce_threshold=0.5,
    min_remain_num=1,
    max_remain_ratio=None,
)


def hf_model(seed: int = 0, layers: int = 3, kv_heads: int = 2, tied: bool = False) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL whose logits differ enough between tokens for greedy choices to be safe."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            rope_parameters=dict(rope_theta=1e6, rope_type="default", mrope_section=[1, 1, 2]),
            tie_word_embeddings=tied,
            bos_token_id=88,
            eos_token_id=EOS,
            pad_token_id=PAD,
        ),
        vision_config=dict(
            depth=4,
            hidden_size=24,
            intermediate_size=40,
            num_heads=2,
            out_hidden_size=32,
            patch_size=14,
            window_size=56,
            fullatt_block_indexes=[1, 3],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_q" in name:
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, (1.0 if "embed_tokens" in name else 1.2 / fan_in**0.5))
        model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def glimpse_weights(glimpse: dict, text_size: int = 32, heads: int = 4, vision_size: int = 24, seed: int = 1) -> dict:
    """Random glimpse weights, nested as in the released file, made straight from the released names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    def linear(name: str, out: int, size: int, bias: bool = True) -> dict:
        return {f"{name}.weight": weight(out, size)} | ({f"{name}.bias": 0.1 * weight(out)} if bias else {})

    conditioned = glimpse["attn_fuse_type"] == "AttnFuserV1"
    width = glimpse["attn_fuse_size"]
    joint, blocks = width + (glimpse["visual_cond_size"] if conditioned else 0), len(glimpse["selected_visual_layers"])
    fuser = linear("attn_in_proj", width, len(glimpse["selected_layers"]) * heads)
    for m in range(blocks):
        if conditioned:
            fuser |= linear(f"cond_in_projs.{m}", glimpse["visual_cond_size"], vision_size)
        for norm in ("norm1", "norm2"):
            fuser[f"layers.{m}.{norm}.weight"] = 1 + 0.1 * weight(width)
        for name, size in (("q_proj", joint), ("k_proj", joint), ("v_proj", width), ("o_proj", width)):
            fuser |= linear(f"layers.{m}.attn.{name}", size, size, bias=False)
        for name, out, size in (("gate_proj", 2 * width, width), ("up_proj", 2 * width, width), ("down_proj", width, 2 * width)):
            fuser |= linear(f"layers.{m}.mlp.{name}", out, size)
        if glimpse["deep_supervision"] or m == blocks - 1:
            fuser |= linear(f"attn_out_projs.{m}", 1, width)
    tree: dict = {"attn_fuser": fuser}
    if glimpse["le_layers"]:
        tree["learnable_embeddings"] = torch.randn(len(glimpse["le_layers"]), glimpse["le_length"], text_size, generator=generator)
        tree["le_proj"] = linear("x", text_size, text_size)
        tree["le_proj"] = {"weight": tree["le_proj"]["x.weight"], "bias": tree["le_proj"]["x.bias"]}
        tree["le_norm"] = {"weight": 1 + 0.1 * weight(text_size)}
        if glimpse["le_norm_type"] == "layernorm":
            tree["le_norm"]["bias"] = 0.1 * weight(text_size)
    return tree


def save_glimpse(folder: Path, model: Qwen2_5_VLForConditionalGeneration, glimpse: dict, weights: dict) -> None:
    """Writes a released-style glimpse folder."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / "new_modules_gp.pt")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict() | {"model_type": "qwen2_5_vl_gp"} | glimpse, default=str))


def inputs(samples: list[list], seed: int = 0, left: bool = True, patch: int = 14) -> dict[str, np.ndarray | None]:
    """A batch as a processor returns it.

    samples: per sample a list of segments, an int for so many text tokens, a (rows, columns) pair for an image in merged tokens.
    patch: pixels of its side.
    """
    rng = np.random.default_rng(seed)
    rows, grids, pixels = [], [], []
    for segments in samples:
        row: list[int] = []
        for segment in segments:
            if isinstance(segment, int):
                row += rng.integers(0, 80, segment).tolist()
                continue
            height, width = segment
            row += [VISION_START, *[IMAGE] * (height * width), VISION_END]
            grids.append((1, 2 * height, 2 * width))
            pixels.append(rng.normal(size=(4 * height * width, 3 * 2 * patch * patch)).astype(np.float32))
        rows.append(row)
    length = max(map(len, rows))
    ids, mask = np.full((len(rows), length), PAD, np.int64), np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        part = slice(length - len(row), None) if left else slice(0, len(row))
        ids[i, part], mask[i, part] = row, 1
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": np.concatenate(pixels) if pixels else None,
        "image_grid_thw": np.array(grids, np.int64) if grids else None,
    }


def torch_inputs(batch: dict) -> dict:
    """The same for transformers, which needs token types to use its three-axis positions."""
    tensors = {name: torch.from_numpy(value) for name, value in batch.items() if value is not None}
    return tensors | {"mm_token_type_ids": (tensors["input_ids"] == IMAGE).int()}
