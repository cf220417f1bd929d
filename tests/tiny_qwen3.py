"""Tiny random Qwen3-VL models of transformers, and a pruned forward pass written out with their own modules."""

import json
from pathlib import Path

import torch
from tiny_models import EOS, IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCABULARY, glimpse_weights
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

PATCH = 16
GLIMPSE = dict(
    selected_layers=[2],
    reduce_layer=2,
    le_layers=[0, 1, 2, 3],
    le_length=2,
    le_norm_type="rmsnorm",
    use_attention_logits=True,
    attn_fuse_type="AttnFuserV1",
    attn_fuse_size=16,
    attn_fuse_num_heads=2,
    attn_fuse_global=True,
    selected_visual_layers=[3, 1, 0],
    visual_cond_size=16,
    ori_attn_supervision=False,
    deep_supervision=False,
    reduce_threshold=0.5,
)
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=12,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    bos_token_id=88,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
VISION = dict(
    depth=4,
    hidden_size=24,
    intermediate_size=40,
    num_heads=2,
    out_hidden_size=32,
    patch_size=PATCH,
    num_position_embeddings=36,
    deepstack_visual_indexes=[0, 1, 3],
)
# Three levels of DeepStack and grouped heads; two levels, a tied head, other widths, and sections of which the last reaches over the end.
DEEP = dict(section=[2, 2, 2])
TIED = dict(
    section=[2, 3, 3],
    tied=True,
    seed=3,
    text=dict(head_dim=16, num_key_value_heads=4),
    vision=dict(hidden_size=32, num_heads=1, num_position_embeddings=9, deepstack_visual_indexes=[1, 2]),
)


def hf_model(
    section: list[int], tied: bool = False, seed: int = 0, text: dict | None = None, vision: dict | None = None
) -> Qwen3VLForConditionalGeneration:
    """A random Qwen3-VL whose logits differ enough between tokens for greedy choices to be safe."""
    torch.manual_seed(seed)
    rope = dict(rope_theta=5e6, rope_type="default", mrope_section=section, mrope_interleaved=True)
    config = Qwen3VLConfig(
        text_config=TEXT | dict(rope_parameters=rope) | (text or {}),
        vision_config=VISION | (vision or {}),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
        tie_word_embeddings=tied,
    )
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval().float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "pos_embed" in name:
                parameter.normal_(0.0, 0.5)
            else:
                parameter.normal_(0.0, 1.0 if "embed_tokens" in name else 1.2 / parameter[0].numel() ** 0.5)
        model.tie_weights()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def old_spelling(folder: Path) -> None:
    """Rewrites `config.json` as transformers 4.57 spells it, as in the released files."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    rope = config["text_config"].pop("rope_parameters")
    config["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config["vision_config"].pop("rope_parameters", None)
    config["vision_config"]["model_type"] = "qwen3_vl"
    path.write_text(json.dumps(config))


def save_glimpse(folder: Path) -> Path:
    """A folder with a random glimpse for `DEEP`, in the released format."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(glimpse_weights(GLIMPSE), folder / "new_modules_gp.pt")
    (folder / "config.json").write_text(json.dumps(GLIMPSE))
    return folder


@torch.no_grad()
def pruned_logits(model: Qwen3VLForConditionalGeneration, inputs: dict, keep, after: int, answer: list[int], past: bool = True):
    """Logits behind a prompt and `answer` when, after layer `after`, all visual tokens but `keep` (N,) bool are dropped.

    past: answer rows do not see dropped tokens in any layer; else in layers behind the cut alone. One sample, no padding. Returns: (V,).
    """
    inner, decoder = model.model, model.model.language_model
    ids = inputs["input_ids"]
    seen = inner.visual(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"], return_dict=True)
    visual, keep = ids[0] == IMAGE, torch.as_tensor(keep)
    hidden = decoder.embed_tokens(ids)[0]
    hidden[visual] = seen.pooler_output
    positions, _ = inner.get_rope_index(ids, inputs["mm_token_type_ids"], inputs["image_grid_thw"], attention_mask=inputs["attention_mask"])
    more = positions.max() + 1 + torch.arange(len(answer))
    positions = torch.cat([positions[:, 0], more.expand(3, -1)], dim=1)
    hidden = torch.cat([hidden, decoder.embed_tokens(torch.tensor(answer, dtype=torch.long))])
    length, prompt = len(hidden), ids.shape[1]
    number = torch.full((length,), -1)
    number[:prompt][visual] = torch.arange(int(visual.sum()))
    stays = (number < 0) | keep[number.clamp(min=0)]
    sees = torch.ones(length, length, dtype=torch.bool).tril()
    if past:
        sees[prompt:, ~stays] = False
    alive = torch.ones(length, dtype=torch.bool)
    for index in range(-1, len(decoder.layers)):
        if index >= 0:
            rope = decoder.rotary_emb(hidden[None], positions[:, None, alive])
            bias = torch.where(sees[alive][:, alive], 0.0, torch.finfo(torch.float32).min)[None, None]
            hidden = decoder.layers[index](hidden[None], position_embeddings=rope, attention_mask=bias)
            hidden = (hidden[0] if isinstance(hidden, tuple) else hidden)[0]
            if index < len(seen.deepstack_features):
                rows = number[alive] >= 0
                hidden[rows] += seen.deepstack_features[index][number[alive][rows]]
        if index == after:
            hidden, alive = hidden[stays[alive]], alive & stays
    return model.lm_head(decoder.norm(hidden[-1:]))[0]
