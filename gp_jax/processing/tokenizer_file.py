"""Checks that a `tokenizer.json` has only parts that tokenizers of language models need, with bounded time and memory.

The tokenizers library trusts the file. Its regular expressions backtrack (a pattern with nested repetitions needs 2**n steps, and the
library may panic), replacements may enlarge a text without bound, and a failed allocation ends the process.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from gp_jax.errors import GlimpseError, shown

PARTS = {
    "normalizer": "Sequence NFC NFD NFKC NFKD Prepend Replace Strip Lowercase StripAccents BertNormalizer Nmt Precompiled ByteLevel",
    "pre_tokenizer": "Sequence ByteLevel Split Metaspace Whitespace WhitespaceSplit Digits Punctuation BertPreTokenizer UnicodeScripts",
    "post_processor": "Sequence ByteLevel TemplateProcessing BertProcessing RobertaProcessing",
    "decoder": "Sequence ByteLevel Replace Fuse ByteFallback Strip Metaspace WordPiece BPEDecoder CTC",
}
LONGEST_PART = 1 << 16  # characters of JSON, without SentencePiece's table
LONGEST_PATTERN, LONGEST_TOKEN, MOST_GROWTH, MOST_REPEATS, MOST_OPEN = 4096, 1024, 1024, 1000, 4
TABLE = "precompiled_charsmap"

# Of a pattern: a class, an escape, the beginning or end of a group, a repetition, or any other character.
TOKEN = re.compile(r"\[(?:\\.|\[:\^?\w+:\]|[^\]\\])*\]|\\.|\(\?[a-zA-Z-]*:|\(\?<?[=!]|\(\?|\(|\)|[*+?]|\{\d*,?\d*\}|.", re.DOTALL)


def check_tokenizer(content: Mapping[str, Any], where: object) -> None:
    """Raises: GlimpseError when a `tokenizer.json` holds something that tokenizing does not need."""
    for name, kinds in PARTS.items():
        part, growth = content.get(name), 1
        if len(json.dumps(part, default=str)) - sum(len(str(one.get(TABLE, ""))) for one in _objects(part)) > LONGEST_PART:
            raise GlimpseError(f"{where}: {name} is longer than {LONGEST_PART >> 10} KiB")
        for one in _objects(part):
            if one.get("type", "Sequence") not in kinds.split():
                raise GlimpseError(f"{where}: {name} of type {shown(one['type'])} is not supported ({kinds.replace(' ', ', ')})")
            if "Regex" in one:
                _check_pattern(one["Regex"], f"{where}: {name}")
            if one.get("String") == "":
                raise GlimpseError(f"{where}: {name} looks for an empty text, which is everywhere")
            growth *= max(1, len(str(one.get("content", ""))), len(str(one.get("prepend", ""))))
        if growth > MOST_GROWTH:
            raise GlimpseError(f"{where}: {name} makes a text up to {growth} times as long")
    model = content.get("model")
    if not isinstance(model, dict):
        raise GlimpseError(f"{where}: model must be an object")
    if model.get("dropout"):
        raise GlimpseError(f"{where}: model.dropout={shown(model['dropout'])}: a text must always become the same tokens")
    vocabulary = model.get("vocab")
    words = vocabulary if isinstance(vocabulary, dict) else (one[0] for one in vocabulary or () if isinstance(one, list) and one)
    if any(len(str(word)) > LONGEST_TOKEN for word in words):
        raise GlimpseError(f"{where}: the vocabulary holds a token of more than {LONGEST_TOKEN} characters")


def _objects(part: Any) -> Iterator[Mapping[str, Any]]:
    """All JSON objects in a part, itself included."""
    if isinstance(part, dict):
        yield part
    for one in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from _objects(one)


def _check_pattern(pattern: Any, where: str) -> None:
    """Raises: GlimpseError unless every repetition in a pattern is of one character, or of a group in which nothing varies.

    That is what patterns of released tokenizers are, and what matches in few steps.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        raise GlimpseError(f"{where}: a pattern must be a text of at most {LONGEST_PATTERN} characters")

    def refuse(why: str) -> GlimpseError:
        return GlimpseError(f"{where}: the pattern {shown(pattern, 120)} {why}")

    # Per open group whether its length varies; the same for the group that was just closed; unbounded repetitions since the last |.
    varies, closed, repeated, endless = [False], None, False, 0
    for token in TOKEN.findall(pattern):
        if token == "(?" or re.fullmatch(r"\\[1-9gkRX]", token):
            raise refuse("holds a kind of group or a reference that is not supported")
        if token[0] == "(":
            varies.append(False)
        elif token == ")":
            closed = varies.pop() if len(varies) > 1 else None
            varies[-1] |= bool(closed)
        elif token in ("*", "+", "?") or re.fullmatch(r"\{\d*,?\d*\}", token):
            if repeated and token in ("+", "?"):  # a lazy or possessive quantifier
                repeated = False
                continue
            if (closed and token != "?") or repeated:
                raise refuse("repeats what repeats already, which may take for ever")
            if any(int(number) > MOST_REPEATS for number in re.findall(r"\d+", token)):
                raise refuse(f"repeats more than {MOST_REPEATS} times")
            repeated, closed, varies[-1], endless = True, None, True, endless + (token in ("*", "+") or token.endswith(",}"))
            if endless > MOST_OPEN:
                raise refuse(f"repeats more than {MOST_OPEN} things in a row without end")
            continue
        elif token == "|":
            varies[-1], endless = True, 0
        closed, repeated = closed if token == ")" else None, False
