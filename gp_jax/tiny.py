"""A tiny random checkpoint in the released layout, to try every command in seconds and without a download.

    python -m gp_jax.tiny FOLDER [--model qwen3_vl] [--picture PICTURE.png] [--data DATA]

It is not trained, so its answers are random text. Its formats are the real ones, so what runs on it runs on Qwen2.5-VL (or Qwen3-VL) too.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from PIL import Image, ImageDraw
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from gp_jax.models.lvlm import LVLM
from gp_jax.pretrained.hf_config import glimpse_config, model_config
from gp_jax.processing.table import load_processor
from gp_jax.runtime.allocator import keep_memory
from gp_jax.scenes.architecture import CHAT_TEMPLATE, SPECIAL
from gp_jax.vlm import GlimpseVLM

ID = {token: 256 + i for i, token in enumerate(SPECIAL)}
CONFIG = {
    "model_type": "qwen2_5_vl",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
    "tie_word_embeddings": False,
    "image_token_id": ID["<|image_pad|>"],
    "video_token_id": ID["<|video_pad|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "vision_end_token_id": ID["<|vision_end|>"],
    "bos_token_id": ID["<|endoftext|>"],
    "eos_token_id": ID["<|im_end|>"],
    "vision_config": {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3],
        "window_size": 112,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
    # The glimpse, in the proportions of the released models: cut at two thirds of the depth, deepest condition first.
    "selected_layers": [3],
    "reduce_layer": 3,
    "le_layers": [0, 1, 2, 3, 4, 5],
    "use_attention_logits": True,
    "attn_fuse_size": 32,
    "attn_fuse_global": True,
    "selected_visual_layers": [3, 1],
    "visual_cond_size": 32,
    "ori_attn_supervision": False,
    "deep_supervision": False,
}
# Qwen3-VL's: a head width of its own, and a tower of which some blocks are taps of DeepStack.
QWEN3 = {name: value for name, value in CONFIG.items() if name.endswith("_token_id") or name == "tie_word_embeddings"} | {
    "model_type": "qwen3_vl",
    "text_config": {
        "model_type": "qwen3_vl_text",
        "vocab_size": 272,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5e6,
        "rope_scaling": {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [4, 4, 4]},
        "attention_bias": False,
    },
    "vision_config": {
        "depth": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_heads": 2,
        "out_hidden_size": 64,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1, 2],
        "patch_size": 16,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    },
}
GLIMPSE = ("selected_layers", "reduce_layer", "le_layers", "use_attention_logits", "ori_attn_supervision", "deep_supervision")
QWEN3 |= {name: CONFIG[name] for name in (*GLIMPSE, "attn_fuse_size", "attn_fuse_global", "selected_visual_layers", "visual_cond_size")}
CONFIGS = {"qwen2_5_vl": CONFIG, "qwen3_vl": QWEN3}
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 3136,
    "max_pixels": 12845056,
}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer: one token per byte, and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def make_checkpoint(folder: Path, seed: int = 0, hf_config: dict = CONFIG) -> GlimpseVLM:
    """Writes a random model with its glimpse, tokenizer and processor files. Returns: the model."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    generation = {"eos_token_id": ID["<|im_end|>"], "pad_token_id": ID["<|endoftext|>"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2))
    config = model_config(hf_config, generation)
    sizes = {"patch_size": hf_config["vision_config"]["patch_size"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR | sizes, indent=2))
    model = LVLM(config, glimpse_config(hf_config, config), dtype=jnp.float32, rngs=nnx.Rngs(seed))
    nested = "text_config" in hf_config  # as transformers writes such configs, its keys are nested too
    vlm = GlimpseVLM(model, hf_config, load_processor(folder, config), folder=folder, nested_keys=nested)
    vlm.save_pretrained(folder)
    return vlm


def picture() -> Image.Image:
    """A picture to ask about: a few plain shapes on a meadow."""
    image = Image.new("RGB", (448, 336), "#9fc5e8")
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 200, 448, 336), fill="#6aa84f")
    draw.ellipse((350, 24, 420, 94), fill="#f1c232")
    draw.rectangle((70, 120, 200, 260), fill="#b45f06")
    draw.polygon(((55, 120), (215, 120), (135, 50)), fill="#cc0000")
    draw.rectangle((118, 190, 156, 260), fill="#3d1e00")
    draw.ellipse((270, 150, 350, 230), fill="#38761d")
    draw.rectangle((302, 220, 318, 270), fill="#783f04")
    return image


def make_picture(path: Path) -> None:
    """Writes that picture."""
    picture().save(path)


COLORS = {"red": "#cc0000", "green": "#38761d", "blue": "#1155cc", "yellow": "#f1c232"}


def make_dataset(folder: Path, count: int = 64, seed: int = 0) -> None:
    """A prepared folder with drawn pictures, questions, answers and the boxes of what was asked for; splits train and val."""
    from gp_jax.data.prepare import prepare  # slow to import

    random = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for number in range(count):
            width, height = (int(28 * n) for n in random.integers(5, 13, 2))
            image = Image.new("RGB", (width, height), "#d9d9d9")
            draw, shapes = ImageDraw.Draw(image), []
            for left, kind in zip((0, width // 2), random.permutation(["circle", "square"]), strict=True):
                size = int(random.integers(24, min(width // 2, height) - 4))
                x, y = left + int(random.integers(0, width // 2 - size)), int(random.integers(0, height - size))
                color = str(random.choice(list(COLORS)))
                (draw.ellipse if kind == "circle" else draw.rectangle)((x, y, x + size, y + size), fill=COLORS[color])
                shapes.append((kind, color, [x, y, x + size, y + size]))
            image.save(Path(scratch) / f"{number}.png")
            kind, color, box = shapes[int(random.integers(2))]
            split = "val" if number % 4 == 3 else "train"
            question = f"What color is the {kind}?"
            rows.append(
                {"image": f"{number}.png", "question": question, "answer": color, "boxes": [box], "box_format": "pixel", "split": split}
            )
        (Path(scratch) / "shapes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        prepare([Path(scratch) / "shapes.jsonl"], Path(scratch), folder, workers=1, progress=False)


def ensure(folder: Path) -> Path:
    """A tiny checkpoint in `folder`/model and data in `folder`/data, made if they are missing. Returns: `folder`.

    A separate process makes them: this one may be one of several that must join before JAX is used.
    """
    if not all((folder / name).exists() for name in ("model", "data")):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making.", dir=folder) as scratch:
            made = {name: Path(scratch) / name for name in ("model", "data")}
            command = [sys.executable, "-m", "gp_jax.tiny", str(made["model"]), "--data", str(made["data"])]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            for name, path in made.items():
                with contextlib.suppress(OSError):  # another process of the same run was faster
                    path.rename(folder / name)
    return folder


@dataclass(frozen=True)
class Tiny:
    """Write a tiny random checkpoint with glimpse, tokenizer and processor files."""

    folder: Annotated[Path, tyro.conf.Positional]
    """Where to write it."""
    picture: Path | None = None
    """Also draw a picture to ask about."""
    data: Path | None = None
    """Also draw pictures to train on and prepare them there."""
    model: Literal["qwen2_5_vl", "qwen3_vl"] = "qwen2_5_vl"
    """Family of the model."""
    seed: int = 0
    """Of the random weights and pictures."""


def main() -> None:
    """Entry point."""
    args = tyro.cli(Tiny, prog="python -m gp_jax.tiny")
    make_checkpoint(args.folder, args.seed, CONFIGS[args.model])
    print(f"wrote a tiny random model to {args.folder}")
    if args.picture:
        make_picture(args.picture)
        print(f"drew {args.picture}")
    if args.data:
        make_dataset(args.data, seed=args.seed)
        print(f"prepared {args.data}")


if __name__ == "__main__":
    keep_memory()
    main()
