"""Removes keys and passwords from everything that is shown or stored: notes, logs, reports, verdicts."""

import base64
import html
import re
from collections.abc import Callable, Iterable
from urllib.parse import quote, quote_plus, unquote

HIDDEN = "***"
SHORT = 4  # characters; shorter secrets are not hidden, as they occur in too many words


def _split(url: str) -> tuple[str, str, str]:
    """Splits a URL into scheme with ://, user and host, and the rest."""
    scheme, slashes, rest = url.partition("://")
    if not slashes:
        scheme, rest = "", url
    end = next((i for i, char in enumerate(rest) if char in "/?#\\"), len(rest))
    return scheme + slashes, rest[:end], rest[end:]


def bare_url(url: str) -> str:
    """The URL without user and password."""
    scheme, place, path = _split(url)
    return scheme + place.rpartition("@")[2] + path


def shown_url(url: str) -> str:
    """The URL without user, password and query, for messages; works for invalid URLs too."""
    scheme, place, path = _split(url)
    if "@" in path:  # may be a password that contains a slash
        return f"{scheme}{HIDDEN}@{path.rpartition('@')[2]}"
    return scheme + place.rpartition("@")[2] + re.split("[?#]", path)[0]


def redactor(key: str | None, url: str) -> Callable[[str], str]:
    """Returns a function that hides a key and a URL's password in text from a server, also when they are quoted or encoded."""
    user, _, password = _split(url)[1].rpartition("@")[0].partition(":")
    secrets = {key or "", password, unquote(password)}
    pairs = {f"{user}:{password}", f"{unquote(user)}:{unquote(password)}"} if password else set()
    forms = {form for secret in secrets | pairs for form in _quoted(secret) if len(secret) >= SHORT}
    if not forms:
        return lambda text: text
    longest_first = sorted(forms, key=len, reverse=True)
    escaped = r"[\\\0]*"  # characters that nested JSON and UTF-16 put between others
    pattern = re.compile("|".join(escaped.join(map(re.escape, form)) for form in longest_first), re.IGNORECASE)
    return lambda text: pattern.sub(HIDDEN, text)


def _quoted(secret: str) -> Iterable[str]:
    encoded = secret.encode("utf-8", "replace")
    yield from (secret, quote(encoded, safe=""), quote(encoded), quote_plus(encoded), html.escape(secret))
    for code in (base64.b64encode, base64.urlsafe_b64encode):
        yield code(encoded).decode().rstrip("=")
