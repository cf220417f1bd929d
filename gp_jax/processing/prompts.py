"""Checks of texts and conversations before a chat template is applied, and of the prompt afterwards."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gp_jax.errors import GlimpseError, shown

MAX_TEXT = 1 << 19  # bytes in UTF-8: enough for the longest context of these models; tokenizing takes about 200 bytes of memory per byte

Message = dict[str, Any]  # role, and content: a text, or parts {"type": "image"} and {"type": "text", "text": ...}


def unreadable(text: object) -> str | None:
    """Why a text cannot be tokenized; None: it can."""
    if not isinstance(text, str):
        return f"is of type {type(text).__name__}, not text"
    if not text.strip():
        return "is empty"
    return untextual(text)


def untextual(text: str) -> str | None:
    """As `unreadable`, for a text that may be empty."""
    size = len(text) if len(text) > MAX_TEXT else len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_TEXT:
        return f"is longer than {MAX_TEXT >> 10} KiB"
    if not text.isprintable() and text.encode("utf-8", "ignore").decode() != text:
        return "is not valid text (it holds half of a surrogate pair)"
    return None


def conversation(messages: object) -> list[Message]:
    """Messages with nothing but role and content. Raises: GlimpseError that names the message at fault."""
    if not isinstance(messages, list | tuple) or not messages:
        raise GlimpseError("messages must be a list of at least one message")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: object, where: str) -> Message:
    role, content = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str | list | tuple):
        raise GlimpseError(f"{where} must have a role, and as content a text or a list of parts")
    if isinstance(content, str):
        return {"role": role, "content": _text(content, where)}
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            parts.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": _text(part["text"], where)})
        else:
            raise GlimpseError(f"{where} has a part that is neither text nor image: {shown(part)}")
    return {"role": role, "content": parts}


def _text(text: str, where: str) -> str:
    if reason := untextual(text):
        raise GlimpseError(f"{where} {reason}")
    return text


def parts_of(message: Mapping[str, Any]) -> list[dict[str, str]]:
    """The content of a message as parts."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def images_in(messages: Sequence[Message]) -> int:
    return sum(part["type"] == "image" for message in messages for part in parts_of(message))


def check_rendered(text: str, messages: Sequence[Message], placeholder: str, file: Path) -> None:
    """Raises: GlimpseError, naming the template's file, unless a prompt holds every picture once and every question.

    Templates may change spaces and capitals.
    """
    said = [(message["role"], part["text"]) for message in messages for part in parts_of(message) if part["type"] == "text"]
    if placeholder:
        wanted, found = images_in(messages), text.count(placeholder) - sum(own.count(placeholder) for _, own in said)
        if found != wanted:
            raise GlimpseError(f"{file}: the chat template makes {found} placeholders {placeholder} of {wanted} image(s)")
    squeezed = _squeezed(text)
    for role, own in said:
        if role == "user" and _squeezed(own) not in squeezed:
            raise GlimpseError(f"{file}: the chat template leaves out the question {shown(own)}")


def _squeezed(text: str) -> str:
    return "".join(text.split()).casefold()
