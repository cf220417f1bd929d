"""Pictures of requests: from data: URLs, or by https from hosts that the server's settings name.

A fetched picture comes from the address that was checked: the name is resolved once, every address that it has must be public, and the
connection goes to one of them with the name for its certificate. Redirects are not followed, and proxies of the environment not used.
"""

import asyncio
import base64
import binascii
import ipaddress
import socket
from urllib.parse import urlsplit

import httpx2 as httpx
from PIL import Image

from gp_jax.errors import GlimpseError
from gp_jax.processing.images import read_picture
from gp_jax.serving.errors import ApiError
from gp_jax.serving.settings import ServerSettings


def refused(message: str) -> ApiError:
    """A picture that cannot be used."""
    return ApiError(400, message, "messages", "invalid_image")


def from_data(url: str, where: str) -> bytes:
    """The bytes of a data: URL. where: for messages. Raises: ApiError, which never shows its content."""
    head, comma, content = url[5:].partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise refused(f"{where}: a data: URL must look like data:image/png;base64,...")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise refused(f"{where}: is not valid base64") from None


def decoded(data: bytes, where: str, max_pixels: int) -> Image.Image:
    """An upright RGB picture; its size is checked before it is decoded. Raises: ApiError."""
    try:
        return read_picture(data, where, max_pixels).rgb()
    except GlimpseError as error:
        raise refused(str(error)) from None


def public(address: str) -> bool:
    """Whether an address is one of the internet, and not of this machine, its network or a cloud's metadata."""
    found = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    if mapped is not None:
        found = mapped
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


async def resolved(host: str, where: str) -> str:
    """A public address of a host. Raises: ApiError when any of its addresses is not."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, 443, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise refused(f"{where}: its host cannot be found") from None
    addresses = [str(entry[4][0]) for entry in found]
    if not addresses or not all(map(public, addresses)):
        raise refused(f"{where}: its host has an address that is not public")
    return addresses[0]


def checked_host(url: str, hosts: tuple[str, ...], where: str) -> tuple[str, str]:
    """Host and path of a picture to fetch. Raises: ApiError unless it is an https URL of a host in `hosts`."""
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower().rstrip("."), parts.port
    except ValueError:
        raise refused(f"{where}: is not a URL") from None
    if parts.scheme.lower() != "https":
        raise refused(f"{where}: only data: URLs are accepted" + (" and https" if hosts else "") + ", as image_url.url")
    if not hosts:
        raise refused(f"{where}: this server fetches no pictures (--fetch-hosts); send a data: URL")
    if host not in {own.lower() for own in hosts} or port not in (None, 443) or parts.username is not None or parts.password is not None:
        raise refused(f"{where}: this server does not fetch pictures from there (--fetch-hosts)")
    return host, (parts.path or "/") + (f"?{parts.query}" if parts.query else "")


async def fetched(url: str, settings: ServerSettings, where: str) -> bytes:
    """The bytes of a picture at an https URL. Raises: ApiError."""
    host, path = checked_host(url, settings.fetch_hosts, where)
    limit = settings.bytes_of("fetch_bytes")
    try:
        async with asyncio.timeout(settings.fetch_seconds):
            address = await resolved(host, where)
            literal = f"[{address}]" if ":" in address else address
            async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=settings.fetch_seconds) as client:
                request = client.build_request("GET", f"https://{literal}{path}", headers={"Host": host}, extensions={"sni_hostname": host})
                response = await client.send(request, stream=True)
                try:
                    if response.status_code != 200:
                        raise refused(f"{where}: its host answers {response.status_code}")
                    data = bytearray()
                    async for part in response.aiter_bytes():
                        data += part
                        if len(data) > limit:
                            raise refused(f"{where}: is larger than {limit} bytes (--fetch-bytes)")
                    return bytes(data)
                finally:
                    await response.aclose()
    except TimeoutError:
        raise refused(f"{where}: took longer than {settings.fetch_seconds:g} s to fetch") from None
    except (httpx.HTTPError, httpx.InvalidURL, OSError):
        raise refused(f"{where}: cannot be fetched") from None


async def read(url: str, settings: ServerSettings, where: str) -> Image.Image:
    """The picture behind a URL. Raises: ApiError that says what is wrong with it."""
    if url[:5].lower() == "data:":
        data = await asyncio.to_thread(from_data, url, where)
    else:
        data = await fetched(url, settings, where)
    return await asyncio.to_thread(decoded, data, where, settings.max_pixels)
