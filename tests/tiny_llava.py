"""Tiny random LLaVA and LLaVA-NeXT models in both layouts, with a tokenizer and processor files."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)

from gp_jax import Ladder, Ladders

BOS, EOS, PAD, IMAGE = 256, 257, 258, 259
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
SIDE, PATCH, LAYERS = 56, 14, 3
TOKENS = (SIDE // PATCH) ** 2
PINPOINTS = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
VISION = dict(
    hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=2, image_size=SIDE, patch_size=PATCH, projection_dim=8
)
TEXT = dict(
    model_type="llama",
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=272,
    bos_token_id=BOS,
    eos_token_id=EOS,
    pad_token_id=PAD,
)
# Few rungs: every one costs compilations.
LADDERS = Ladders(
    patches=Ladder("patches", (64, 192)),
    prompt=Ladder("prompt", (256,)),
    kept=Ladder("kept", (128,)),
    decode=Ladder("decode", (16,)),
    batch=Ladder("batch", (4,)),
)
GLIMPSE = dict(
    selected_layers=[1],
    reduce_layer=1,
    le_layers=[0, 1, 2],
    use_attention_logits=False,
    attn_fuse_size=16,
    attn_fuse_num_heads=2,
    attn_fuse_global=True,
    selected_visual_layers=[3, 1],
    visual_cond_size=16,
    ori_attn_supervision=False,
    deep_supervision=False,
)
TEMPLATE = (  # as llava-hf's
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def spread_weights(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Weights that make logits differ enough between tokens for greedy choices to be safe."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.normal_(1.0, 0.2)
            elif parameter.ndim == 1:
                parameter.normal_(0.0, 0.1)
            else:
                parameter.normal_(0.0, 1.0 if "embed_tokens" in name else 1.2 / parameter[0].numel() ** 0.5)
    return model.eval().float()


def hf_model(following: bool = False, seed: int = 0, **text: object) -> torch.nn.Module:
    """LLaVA-1.5; following: LLaVA-NeXT."""
    kind, config = (LlavaNextForConditionalGeneration, LlavaNextConfig) if following else (LlavaForConditionalGeneration, LlavaConfig)
    options = dict(image_grid_pinpoints=PINPOINTS) if following else {}
    vision = dict(model_type="clip_vision_model", **VISION)
    made = config(vision_config=vision, text_config=TEXT | text, image_token_index=IMAGE, image_seq_length=TOKENS, **options)
    model = spread_weights(kind._from_config(made, attn_implementation="eager"), seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
    return model


def write_tokenizer(folder: Path, template: str | None = None) -> None:
    """One token per byte and the special ones; prompts begin with <s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def clip_settings(**more: object) -> dict:
    return {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}, **more}


def save_hf(folder: Path, model: torch.nn.Module) -> Path:
    """The layout of transformers."""
    model.save_pretrained(folder)
    write_tokenizer(folder, TEMPLATE)
    points = {"image_grid_pinpoints": PINPOINTS} if hasattr(model.config, "image_grid_pinpoints") else {}
    (folder / "preprocessor_config.json").write_text(json.dumps(clip_settings(**points)))
    return folder


def save_original(folder: Path, model: torch.nn.Module, tower: str = "vision_tower", inside: bool = True) -> Path:
    """The layout of LLaVA's own code. inside: the tower's weights are in the checkpoint, not only in the tower's folder."""
    model.save_pretrained(folder / "hf")
    tensors = load_file(folder / "hf" / "model.safetensors")
    rename = (
        ("language_model.model.", "model."),
        ("language_model.lm_head.", "lm_head."),
        ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
        ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
        ("vision_tower.", "model.vision_tower.vision_tower.vision_model."),
    )
    named = {next(new + k[len(old) :] for old, new in rename if k.startswith(old)): v for k, v in tensors.items()}
    save_file({k: v for k, v in named.items() if inside or ".vision_tower." not in k}, folder / "model.safetensors")
    config = TEXT | dict(
        model_type="llava_llama",
        rms_norm_eps=model.config.text_config.rms_norm_eps,
        mm_vision_tower=tower,
        mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2,
        image_aspect_ratio="pad",
    )
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    clip = CLIPVisionModel(CLIPVisionConfig(**VISION))
    clip.load_state_dict({k.removeprefix("vision_tower."): torch.tensor(v) for k, v in tensors.items() if k.startswith("vision_tower.")})
    clip.save_pretrained(folder / tower)
    (folder / tower / "preprocessor_config.json").write_text(json.dumps(clip_settings()))
    return folder


def save_glimpse(folder: Path, glimpse: dict = GLIMPSE) -> Path:
    """A released glimpse folder for these models."""
    from tiny_models import glimpse_weights

    folder.mkdir(parents=True, exist_ok=True)
    whole = dict(attn_fuse_type="AttnFuserV1", le_length=1, le_norm_type="rmsnorm") | glimpse
    torch.save(glimpse_weights(whole, text_size=32, heads=4, vision_size=24), folder / "new_modules_gp.pt")
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def photo(width: int, height: int, seed: int = 0):
    """A smooth picture: resizing must not decide about tokens."""
    from PIL import Image

    small = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
