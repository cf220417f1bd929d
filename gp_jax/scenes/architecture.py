"""The small model for scenes, as an ordinary Qwen2.5-VL checkpoint folder without weights. A visual token is 16 x 16 pixels."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from gp_jax.scenes.palette import COLORS, FILLS, SHAPES
from gp_jax.scenes.questions import PHRASES, SIDES

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
VOCABULARY = 512  # 256 bytes, the special tokens and whole words
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"  # that of Qwen2
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 8,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 16 * 16 * 16,
    "max_pixels": 16 * 16 * 1024,
}


def config(special: dict[str, int]) -> dict:
    """The content of config.json. special: ids of the special tokens."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "torch_dtype": "float32",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 20.0,  # pictures are 8 to 24 tokens wide: the low frequencies, which M-RoPE uses for columns, must still rotate
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 7, 7]},
        "tie_word_embeddings": True,
        "image_token_id": special["<|image_pad|>"],
        "video_token_id": special["<|video_pad|>"],
        "vision_start_token_id": special["<|vision_start|>"],
        "vision_end_token_id": special["<|vision_end|>"],
        "bos_token_id": special["<|endoftext|>"],
        "eos_token_id": special["<|im_end|>"],
        "vision_config": {
            "depth": 6,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": 128,
            "fullatt_block_indexes": [3, 5],
            "window_size": 64,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
    }


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE tokenizer in which every word of the benchmark is one token, and every digit too, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    parts = [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def words() -> Iterator[str]:
    """The texts that the tokenizer is trained on: every word at every position that it can have. They do not depend on the scenes, so the
    tokenizer stays the same when the rules of the benchmark change."""
    ranks, sides = ("tallest", "shortest", "taller", "shorter"), tuple(SIDES.values())
    for phrase in itertools.chain(*PHRASES.values()):
        for filler in (*COLORS, *SHAPES, *FILLS, *ranks, *sides, f"{COLORS[0]} {SHAPES[0]}"):
            yield f"user\n{phrase.format(*[filler] * phrase.count('{}'))}\nassistant\n"
    for color, shape in itertools.product(COLORS, SHAPES):
        for fill in FILLS:
            yield from (f"{fill} {color}", f"{fill} {shape}", f"{color} {shape}", f"{shape}, {shape}")
    for one, other in itertools.permutations(COLORS, 2):
        yield from (f"{one}, {other}", f"no, {one} and {other}", f"yes, both are {one}", f"the {one} tag with 1")


def ensure_architecture(folder: Path) -> Path:
    """Writes the folder if it does not exist. Several processes may call this at once; the folder appears complete. Returns: the folder."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".making.", dir=folder.parent) as scratch:
            made = Path(scratch) / folder.name
            write_architecture(made)
            with contextlib.suppress(OSError):  # another process has written the folder already
                made.rename(folder)
    return folder


def write_architecture(folder: Path) -> None:
    """Writes config.json and the files of tokenizer and processor."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(words())
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = tokenizer.get_vocab()
    special = {token: ids[token] for token in SPECIAL}
    files = {
        "config.json": config(special),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {"eos_token_id": special["<|im_end|>"], "pad_token_id": special["<|endoftext|>"]},
        "preprocessor_config.json": PROCESSOR,
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
