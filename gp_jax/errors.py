"""The error type whose messages are written for users, and safe display of untrusted names in messages."""

import re
import reprlib
from collections.abc import Iterable

LONGEST = 2000  # characters of a message; a longer one would hide its cause
# Characters that are escaped in messages: control characters (terminals act on them, and a message is one line), changes of writing
# direction (the text would be displayed in another order) and unpaired surrogates.
UNSHOWN = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


class GlimpseError(ValueError):
    """Bad input or setting: one line that names the file, field or setting at fault."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(message))


class TooLong(GlimpseError):
    """A length exceeds the last rung of its ladder."""


def printable(text: object, most: int = LONGEST) -> str:
    """Text that is safe to print: control characters are escaped, and a text that is too long is shortened in the middle."""
    text = str(text)
    if len(text) > most:
        text = f"{text[: most * 3 // 4]} ... {text[-(most // 5) :]}"
    return UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def one_line(error: object, most: int = 200) -> str:
    """The message of a library's error on one line; its type if the message is empty."""
    return printable(" ".join(str(error).split()), most) or type(error).__name__


def reason(error: Exception, most: int = 300) -> str:
    """The cause of a failure on one line; with the type of the error, except for GlimpseError."""
    return one_line(error, most) if isinstance(error, GlimpseError) else f"{type(error).__name__}: {one_line(error, most)}"


def some(names: Iterable[object], most: int = 4) -> str:
    """The first few of many names, and how many more there are."""
    texts = [printable(name, 120) for name in names]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def shown(value: object, most: int = 80) -> str:
    """Any value for a message: on one line and shortened, without building its full representation."""
    short = reprlib.Repr()
    short.maxlist = short.maxtuple = short.maxset = short.maxdict = 10
    short.maxstring = short.maxlong = short.maxother = most
    try:
        return one_line(short.repr(value), most)
    except Exception:  # an integer of too many digits, an object whose repr fails
        return f"<{type(value).__name__}>"
