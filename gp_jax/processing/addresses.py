"""Pictures from an address (http, https), within limits on bytes, time and redirects.

Whoever names the address is trusted with it: a server that passes on the addresses of strangers must check them first. A redirect is not
trusted: it may not lead from the public network into a private one.
"""

import ipaddress
import socket
import time
from urllib.parse import urljoin, urlsplit

from gp_jax.errors import GlimpseError, one_line, printable

SCHEMES = ("http", "https")
SECONDS = 30.0  # for the whole picture
WAIT = 10.0  # for a connection, and for the next bytes
REDIRECTS = 5


def is_address(source: object) -> bool:
    """Whether a name is an address, not a path."""
    return isinstance(source, str) and source.partition("://")[0].lower() in SCHEMES and "://" in source


def shown_address(address: str) -> str:
    """An address for messages, without user, password and query."""
    try:
        parts = urlsplit(address)
        return printable(f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}", 200)
    except ValueError:
        return "the address"


def is_private(address: str) -> bool:
    """Whether an address is on this machine or in a private network."""
    try:
        parts = urlsplit(address)
        found = socket.getaddrinfo(parts.hostname, parts.port or 443, type=socket.SOCK_STREAM)
    except (OSError, ValueError):
        return False  # it cannot be reached either
    return any(not ipaddress.ip_address(entry[4][0]).is_global for entry in found)


def fetch(address: str, most: int) -> bytes:
    """What an address holds. most: bytes. Raises: GlimpseError that names the address without its secrets."""
    import httpx2  # slow to import

    name, start, private = shown_address(address), time.monotonic(), None
    try:
        with httpx2.Client(follow_redirects=False, timeout=WAIT, headers={"User-Agent": "gp_jax", "Accept": "image/*"}) as client:
            for _ in range(REDIRECTS + 1):
                with client.stream("GET", address) as reply:
                    if reply.is_redirect:
                        private = is_private(address) if private is None else private
                        address = urljoin(address, reply.headers.get("location", ""))
                        if not is_address(address) or (not private and is_private(address)):
                            raise GlimpseError(f"{name}: leads to an address that is not followed ({shown_address(address)})")
                        continue
                    if reply.status_code != 200:
                        raise GlimpseError(f"{name}: the server answers {reply.status_code} {reply.reason_phrase}")
                    return _body(reply, name, most, start)
            raise GlimpseError(f"{name}: more than {REDIRECTS} redirects")
    except httpx2.HTTPError as error:
        raise GlimpseError(f"{name}: cannot be fetched ({type(error).__name__}: {one_line(error)})") from error
    except (httpx2.InvalidURL, ValueError) as error:
        if isinstance(error, GlimpseError):
            raise
        raise GlimpseError(f"{name}: is not an address ({type(error).__name__})") from error


def _body(reply, name: str, most: int, start: float) -> bytes:
    """The bytes of a reply, as they arrive. An announced length is not trusted, but refused when it is too large."""
    told = reply.headers.get("content-length", "")
    parts, size = [], int(told) if told.isdecimal() and int(told) > most else 0
    for part in () if size else reply.iter_bytes():
        parts.append(part)
        size += len(part)
        if size > most:
            break
        if time.monotonic() - start > SECONDS:
            raise GlimpseError(f"{name}: is not there after {SECONDS:.0f} s")
    if size > most:
        raise GlimpseError(f"{name}: is larger than {most >> 10} KiB")
    return b"".join(parts)
