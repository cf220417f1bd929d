"""A model folder's tokenizer. Its files are checked before transformers opens them, and errors of the library are reported in one line."""

import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gp_jax.errors import GlimpseError
from gp_jax.processing.library import guarded, load_class
from gp_jax.processing.tokenizer_file import LONGEST_TOKEN, check_tokenizer
from gp_jax.runtime.disk import kind_of, parse_json, read_bytes, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL = "ModelProto"  # the library makes this class at run time: type checkers do not know it
PIECES, WHOLE, SETTINGS = "tokenizer.model", "tokenizer.json", "tokenizer_config.json"
FILES = {  # files that transformers reads for the tokenizers of these models, with their size limits in MiB
    WHOLE: 32,
    PIECES: 8,
    SETTINGS: 4,
    "vocab.json": 16,
    "merges.txt": 16,
    "special_tokens_map.json": 1,
    "added_tokens.json": 4,
}
CLASSES = ("Qwen2Tokenizer", "LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")  # and each with the suffix Fast
ELSEWHERE = ("auto_map", "chat_template", "fast_tokenizer_files", "gguf_file", "init_inputs", "tokenizer_object", "trust_remote_code")


def has_tokenizer(folder: Path) -> bool:
    """Whether there is anything to load."""
    return any(kind_of(folder / name) is not None for name in (WHOLE, SETTINGS, "vocab.json", PIECES))


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """The folder's tokenizer. Raises: GlimpseError when it is damaged, or when what reads it is not installed.

    transformers gets a copy with only the tokenizer's files: no code, no settings that refer to other files, and of the model's config
    only its type.
    """
    files = {name: read_bytes(folder / name, most << 20) for name, most in FILES.items() if kind_of(folder / name) is not None}
    content = {name: parse_json(files[name], folder / name) for name in files if name.endswith(".json")}
    for name, value in content.items():
        if not isinstance(value, dict):
            raise GlimpseError(f"{folder / name}: must hold a JSON object")
    if WHOLE in content:
        check_tokenizer(content[WHOLE], folder / WHOLE)
    elif PIECES in files:
        _check_pieces(files[PIECES], folder / PIECES)
    own = read_json(folder / "config.json", required=False)
    settings = {name: value for name, value in content.get(SETTINGS, {}).items() if name not in ELSEWHERE}
    if not _known(settings.get("tokenizer_class")):
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the class that uses the files as they are
    kept = {"model_type": isinstance(own.get("model_type"), str), "tokenizer_class": _known(own.get("tokenizer_class"))}
    if SETTINGS in files:
        files[SETTINGS] = json.dumps(settings).encode()
    files["config.json"] = json.dumps({name: own.get(name) for name in kept if kept[name]}).encode()
    with tempfile.TemporaryDirectory(prefix="gp_jax_tokenizer_") as place:
        for name, data in files.items():
            (Path(place) / name).write_bytes(data)
        load = _llama if WHOLE not in files and PIECES in files else _auto
        names = ", ".join(name for name in FILES if name in files)
        tokenizer = guarded(f"{folder}: tokenizer files cannot be read, {names}", lambda: load(place, settings))
    tokenizer.name_or_path = str(folder)
    return tokenizer


def _known(name: Any) -> bool:
    return name is None or (isinstance(name, str) and name.removesuffix("Fast") in CLASSES)


def _auto(place: str, settings: dict[str, Any]) -> "PreTrainedTokenizerBase":
    AutoTokenizer, logging = load_class("transformers", "AutoTokenizer"), load_class("transformers.utils", "logging")
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns about the glimpse's model type
    try:
        return AutoTokenizer.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    finally:
        logging.set_verbosity(level)


def _llama(place: str, settings: dict[str, Any]) -> "PreTrainedTokenizerBase":
    """A SentencePiece file's tokenizer, equal to the slow one of transformers 4 that Llama and LLaVA were trained with.

    For the model type "llava" AutoTokenizer gives one without SentencePiece's leading space. Missing settings have the defaults of
    transformers 4: a leading `<s>`, and that space also after every special token.
    """
    then = {"add_bos_token": True, "legacy": True}
    options = {name: default if settings.get(name) is None else settings[name] for name, default in then.items()}
    return load_class("transformers", "LlamaTokenizer").from_pretrained(place, local_files_only=True, **options)


def _check_pieces(data: bytes, path: Path) -> None:
    """Raises: GlimpseError unless a SentencePiece file can be read and has a valid vocabulary."""
    if find_spec("sentencepiece") is None:  # transformers would ask for tiktoken
        raise GlimpseError(f"{path}: cannot be read without sentencepiece (pip install sentencepiece)")
    from sentencepiece import sentencepiece_model_pb2

    model = guarded(f"{path}: is not a SentencePiece file", lambda: getattr(sentencepiece_model_pb2, MODEL).FromString(data))
    if not model.pieces or any(len(piece.piece) > LONGEST_TOKEN for piece in model.pieces):
        raise GlimpseError(f"{path}: must hold tokens of at most {LONGEST_TOKEN} characters")
