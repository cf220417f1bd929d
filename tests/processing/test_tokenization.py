"""Tokenizers from strangers: nothing of the folder runs, nothing is asked, and what would take for ever or fail is one line."""

import builtins
import json
import os
import shutil

import pytest
from transformers import AutoTokenizer

from gp_jax import GlimpseError
from gp_jax.pretrained.files import BUNDLED
from gp_jax.processing.library import guarded
from gp_jax.processing.qwen import Processor
from gp_jax.processing.tokenization import FILES, load_tokenizer
from gp_jax.processing.tokenizer_file import _check_pattern, check_tokenizer
from gp_jax.tiny import make_checkpoint

pytestmark = pytest.mark.quick

TEXT = "What's in the 2nd picture?\n\n  A café — 123 <|im_end|>"


@pytest.fixture
def folder(tmp_path):
    """The bundled tokenizer, which is of Qwen's kind."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUNDLED["scenes"] / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    return tmp_path


def edit(path, **changes):
    fields = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({name: value for name, value in (fields | changes).items() if value is not ...}))


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_5_vl_gp", "llava", "llava_next", "llava_llama"])
@pytest.mark.parametrize(
    "kind", ["Qwen2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend", ...]
)
def test_the_same_tokenizer_as_transformers_chooses(folder, model_type, kind):
    edit(folder / "config.json", model_type=model_type)
    edit(folder / "tokenizer_config.json", tokenizer_class=kind)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert type(ours) is type(theirs)
    assert ours(TEXT)["input_ids"] == theirs(TEXT)["input_ids"]
    assert ours.special_tokens_map == theirs.special_tokens_map and ours.name_or_path == str(folder)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "qwen2_5_vl_gp", "llava_llama"])
@pytest.mark.parametrize("kind", [..., "Qwen2Tokenizer", "OfTheFolder"])
def test_code_of_the_folder_is_not_asked_about_and_does_not_run(folder, monkeypatch, model_type, kind):
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("standard input was asked"))
    marker = folder / "ran"
    (folder / "code.py").write_text(f"open({str(marker)!r}, 'w').write('x')\nclass OfTheFolder: pass\n")
    auto_map = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor"), "code.OfTheFolder")
    for name in ("config.json", "processor_config.json", "preprocessor_config.json"):
        edit(folder / name, auto_map=auto_map | {"AutoTokenizer": ["code.OfTheFolder", "code.OfTheFolder"]}, model_type=model_type)
    edit(folder / "tokenizer_config.json", tokenizer_class=kind, auto_map={"AutoTokenizer": ["code.OfTheFolder", "code.OfTheFolder"]})
    assert load_tokenizer(folder)(TEXT)["input_ids"]
    edit(folder / "tokenizer_config.json", auto_map=5, trust_remote_code=True, gguf_file="../x", fast_tokenizer_files=["tokenizer.9.json"])
    assert load_tokenizer(folder)(TEXT)["input_ids"]
    assert not marker.exists()


def test_numbers_of_the_models_configuration_are_not_built(folder):
    """transformers would make a dict of a billion labels, or a list of as many layers."""
    edit(folder / "config.json", model_type="qwen2_5_vl_gp", num_labels=10**9, num_hidden_layers=10**9)
    assert load_tokenizer(folder)(TEXT)["input_ids"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_looked_at_before_it_is_opened(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(GlimpseError, match=f"{name}: is not a regular file"):
        load_tokenizer(folder)
    (folder / name).unlink()
    with (folder / name).open("wb") as file:
        file.truncate((FILES[name] << 20) + 1)
    with pytest.raises(GlimpseError, match=f"{name}: is larger than"):
        load_tokenizer(folder)
    if name.endswith(".json"):
        for content, message in (("[]", "must hold a JSON object"), ("{", "is not valid JSON"), ("[" * 99 + "]" * 99, "is not valid JSON")):
            (folder / name).write_text(content)
            with pytest.raises(GlimpseError, match=f"{name}: {message}"):
                load_tokenizer(folder)


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content, **pattern):
    return {"type": "Replace", "pattern": pattern, "content": content}


NONSENSE = {
    "pre_tokenizer: the pattern .* repeats what repeats already": {"pre_tokenizer": split("(a+)+$")},
    "pre_tokenizer of type 'FixedLength' is not supported": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    r"pre_tokenizer of type \[1\] is not supported": {"pre_tokenizer": {"type": [1]}},
    "pre_tokenizer: a pattern must be a text": {"pre_tokenizer": split(5)},
    "pre_tokenizer is longer than": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split("a" * 3000)] * 30}},
    "tokenizer files cannot be read": {"pre_tokenizer": split("(a")},
    "normalizer: the pattern .* repeats what repeats": {"normalizer": replace("x", Regex="(a|b)*c")},
    "normalizer looks for an empty text": {"normalizer": replace("x", String="")},
    "normalizer makes a text up to 2000 times": {"normalizer": replace("x" * 2000, String="a")},
    "normalizer makes a text up to 100000 times": {"normalizer": {"type": "Sequence", "normalizers": [replace("x" * 10, String="a")] * 5}},
    "normalizer makes a text up to 5000 times": {"normalizer": {"type": "Prepend", "prepend": "x" * 5000}},
    "decoder: the pattern": {"decoder": replace("x", Regex=r"(a*)*")},
    "post_processor is longer": {
        "post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "A", "type_id": 0}}] * 9999}
    },
    "model must be an object": {"model": 5},
    "model.dropout=0.5": {"model": {"type": "BPE", "dropout": 0.5, "vocab": {}, "merges": []}},
    "token of more than 1024 characters": {"model": {"type": "BPE", "vocab": {"x" * 1025: 0}, "merges": []}},
}


@pytest.mark.parametrize(("message", "change"), NONSENSE.items(), ids=NONSENSE)
def test_tokenizer_files_that_cannot_be_used(folder, message, change):
    edit(folder / "tokenizer.json", **change)
    with pytest.raises(GlimpseError, match=message) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value) and len(str(error.value)) < 600


PUBLISHED = [  # GPT-2, Qwen2, Llama 3, GPT-4o and its possessive form, DeepSeek, and what SentencePiece's become
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+",
    "[一-龥]+",
    " {2,}",
    r"(?=(\d{3})(?!\d))|(ab){3}",
]


@pytest.mark.parametrize("pattern", PUBLISHED)
def test_patterns_of_released_tokenizers(pattern):
    _check_pattern(pattern, "x")


FOR_EVER = r"(a+)+$ (a*)* (?:a|aa)+b (?:a?){30} ((ab)+)+ (\w|\d)*! (a)\1 (?>a) (?<n>a) \g<0> a{1000000} (a{9}){9} a** (?:(a+))*"


@pytest.mark.parametrize("pattern", [*FOR_EVER.split(), r"\w*\w*\w*\w*\w*!", "x" * 5000])
def test_patterns_that_may_take_for_ever(pattern):
    with pytest.raises(GlimpseError, match="x: "):
        _check_pattern(pattern, "x")


def test_what_panics_is_an_error_and_an_interrupt_is_none():
    panic = type("PanicException", (BaseException,), {})

    def fail(error):
        raise error

    for error in (panic("Onig: Regex search error: retry-limit-in-match over\nmore"), ValueError("a\nb"), MemoryError()):
        with pytest.raises(GlimpseError, match="tokenizer.json: cannot be used ") as found:
            guarded("tokenizer.json: cannot be used", lambda error=error: fail(error))
        assert len(str(found.value).splitlines()) == 1
    for error in (KeyboardInterrupt(), SystemExit(3)):
        with pytest.raises(type(error)):
            guarded("x", lambda error=error: fail(error))


def test_a_tokenizer_that_fails_while_it_works(tmp_path, monkeypatch):
    vlm = make_checkpoint(tmp_path)

    class Fails:
        name_or_path = "folder"

        def __call__(self, *args, **options):
            raise type("PanicException", (BaseException,), {})("retry-limit")

        decode = __call__

    processor = Processor(vlm.config, Fails(), vlm.processor.image_processor, vlm.processor.template)
    for call in (lambda: processor.refusal("Who?"), lambda: processor([[]], ["Who?"]), lambda: processor.text([1, 2])):
        with pytest.raises(GlimpseError, match="folder: the tokenizer cannot .*retry-limit"):
            call()


def test_a_tokenizer_that_splits_the_placeholder(tmp_path):
    vlm = make_checkpoint(tmp_path)
    edit(tmp_path / "tokenizer_config.json", split_special_tokens=True)
    processor = Processor.load(tmp_path, vlm.config)
    with pytest.raises(GlimpseError, match="the tokenizer does not fit the model: no text becomes its image token"):
        processor.chat(1, "Who?")


def test_the_bundled_tokenizer_passes():
    check_tokenizer(json.loads((BUNDLED["scenes"] / "tokenizer.json").read_text()), "x")
