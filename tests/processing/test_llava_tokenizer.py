"""Tokenizers of released LLaVA checkpoints: a SentencePiece file alone, against SentencePiece itself."""

import io
import json
import re

import pytest
import tiny_llava as tiny

from gp_jax import GlimpseError
from gp_jax.pretrained.hf_config import model_config, read_config
from gp_jax.processing import tokenization
from gp_jax.processing.llava import IMAGE, OriginalLlavaProcessor, vicuna_v1
from gp_jax.processing.tokenization import load_tokenizer

pytestmark = pytest.mark.quick

BOS, EOS = 1, 2
SAMPLE = "A chat between a curious user and an assistant. USER: What is there in the picture? ASSISTANT: a cat and a dog"
TURNS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is there?"}]},
    {"role": "assistant", "content": "a cat"},
    {"role": "user", "content": "And where?"},
]


@pytest.fixture(scope="module")
def pieces():
    """A tiny SentencePiece file of Llama's kind: pairs with bytes to fall back on, a space put in front, no text changed."""
    trainer = pytest.importorskip("sentencepiece", reason="sentencepiece reads and makes tokenizer.model").SentencePieceTrainer
    file = io.BytesIO()
    trainer.train(
        sentence_iterator=iter([SAMPLE] * 20),
        model_writer=file,
        vocab_size=330,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return file.getvalue()


def slowly(pieces: bytes, text: str) -> list[int]:
    """As transformers 4's slow tokenizer: what is between special tokens is SentencePiece's, each with a space in front."""
    from sentencepiece import SentencePieceProcessor

    encode = SentencePieceProcessor(model_proto=pieces).encode
    parts = [[EOS] if part == "</s>" else encode(part) for part in re.split("(</s>)", text) if part]
    return [BOS, *(token for part in parts for token in part)]


def write(folder, pieces: bytes, model_type: str | None, settings: dict | None) -> None:
    (folder / "tokenizer.model").write_bytes(pieces)
    for name, content in (("config.json", model_type and {"model_type": model_type}), ("tokenizer_config.json", settings)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("model_type", ["llava", "llava_llama", "llava_llama_gp"])
@pytest.mark.parametrize("settings", [None, {"tokenizer_class": "LlamaTokenizer"}, {"tokenizer_class": "LlamaTokenizer", "legacy": False}])
def test_tokens_are_those_of_sentencepiece(pieces, tmp_path, model_type, settings):
    write(tmp_path, pieces, model_type, settings)
    tokenizer = load_tokenizer(tmp_path)
    for text in ("USER: What is there?\nASSISTANT:", "\nWhat is there?", "a cat</s>", "écrit"):
        assert tokenizer(text)["input_ids"] == slowly(pieces, text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text.removesuffix("</s>")
    # Behind a special token a space comes in front again, unless the file says that it need not.
    assert (tokenizer("a</s>b")["input_ids"] == slowly(pieces, "a</s>b")) == ("legacy" not in (settings or {}))


def test_the_file_decides_about_the_first_token(pieces, tmp_path):
    write(tmp_path, pieces, "llava", {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False})
    assert load_tokenizer(tmp_path)("a cat")["input_ids"] == slowly(pieces, "a cat")[1:]


def test_prompts_of_the_original_layout(pieces, tmp_path):
    """Text is tokenized between pictures, each part as if it stood alone but for its `<s>`."""
    tiny.save_original(tmp_path, tiny.hf_model())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    write(tmp_path, pieces, None, None)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"model_type": "llava", "vocab_size": 400}))
    processor = OriginalLlavaProcessor.load(tmp_path, model_config(read_config(tmp_path)))
    text = vicuna_v1(TURNS)
    before, behind = text.split(IMAGE)
    assert processor.tokenize([text])[0] == [*slowly(pieces, before), -200, *slowly(pieces, behind)[1:]]
    assert processor.tokenize(["a cat"], prompts=False)[0] == slowly(pieces, "a cat")[1:]


def test_without_sentencepiece_the_error_names_it(tmp_path, monkeypatch):
    write(tmp_path, b"", "llava", None)
    monkeypatch.setattr(tokenization, "find_spec", lambda name: None)
    with pytest.raises(GlimpseError, match=r"tokenizer.model: cannot be read without sentencepiece \(pip install sentencepiece\)"):
        load_tokenizer(tmp_path)
