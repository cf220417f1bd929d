"""Pictures from elsewhere: only from named hosts, by https, at public addresses, without redirects, in bounded size and time."""

import asyncio

import httpx2 as httpx
import pytest

from gp_jax.serving import pictures
from gp_jax.serving.errors import ApiError
from gp_jax.serving.settings import ServerSettings

pytestmark = pytest.mark.quick

PRIVATE = [
    "127.0.0.1",
    "10.0.0.1",
    "192.168.1.1",
    "172.16.0.1",
    "169.254.169.254",
    "0.0.0.0",
    "100.64.0.1",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1%eth0",
    "fc00::1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "2002:7f00:1::",
    "ff02::1",
]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_networks_are_not_public(address):
    assert not pictures.public(address)


def test_addresses_of_the_internet_are():
    assert pictures.public("93.184.216.34") and pictures.public("2606:2800:220:1:248:1893:25c8:1946")


HOSTS = ("example.com",)
REFUSED = [
    "http://example.com/a.png",
    "file:///etc/passwd",
    "ftp://example.com/a",
    "https://example.com:8443/a.png",
    "https://user:password@example.com/a.png",
    "https://example.com@evil.org/a.png",
    "https://evil.org/example.com",
    "https://example.com.evil.org/",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://example.com:x/",
    "//example.com/a.png",
    "gopher://example.com",
]


@pytest.mark.parametrize("url", REFUSED)
def test_only_https_of_named_hosts(url):
    with pytest.raises(ApiError) as found:
        pictures.checked_host(url, HOSTS, "picture 1")
    assert found.value.status == 400 and "password" not in found.value.message
    with pytest.raises(ApiError):
        pictures.checked_host(url, (), "picture 1")


def test_a_name_with_any_private_address_is_refused(monkeypatch):
    async def both(self, host, port, **kwargs):
        return [(0, 0, 0, "", ("93.184.216.34", 443)), (0, 0, 0, "", ("10.0.0.1", 443))]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", both)
    with pytest.raises(ApiError, match="not public"):
        asyncio.run(pictures.resolved("example.com", "picture 1"))


def fetch(monkeypatch, answer, **options):
    """Fetches with a host that answers in this way. Returns: the bytes and the request."""
    seen = []

    async def address(host, where):
        return "93.184.216.34"

    async def handle(request):
        seen.append(request)
        return await answer(request)

    real = httpx.AsyncClient
    monkeypatch.setattr(pictures, "resolved", address)
    monkeypatch.setattr(pictures.httpx, "AsyncClient", lambda **kw: real(transport=httpx.MockTransport(handle), **kw))
    settings = ServerSettings("scenes", fetch_hosts=HOSTS, **options)
    return asyncio.run(pictures.fetched("https://Example.com/a.png?b=1", settings, "picture 1")), seen[0]


def test_the_address_that_was_checked_is_the_one_that_is_asked(monkeypatch):
    async def answer(request):
        return httpx.Response(200, content=b"picture")

    data, request = fetch(monkeypatch, answer)
    assert data == b"picture" and str(request.url) == "https://93.184.216.34/a.png?b=1"
    assert request.headers["host"] == "example.com" and request.extensions["sni_hostname"] == "example.com"


@pytest.mark.parametrize("kind", ["redirect", "large", "slow", "missing", "broken"])
def test_hosts_that_misbehave(monkeypatch, kind):
    async def answer(request):
        if kind == "slow":
            await asyncio.sleep(5)
        if kind == "broken":
            raise httpx.ConnectError("no")
        status = {"redirect": 302, "missing": 404}.get(kind, 200)
        return httpx.Response(status, content=b"x" * 3000, headers={"Location": "https://127.0.0.1/"} if kind == "redirect" else {})

    words = dict(redirect="answers 302", large="larger than 2048", slow="took longer", missing="answers 404", broken="cannot be fetched")
    with pytest.raises(ApiError, match=words[kind]):
        fetch(monkeypatch, answer, fetch_bytes="2K", fetch_seconds=0.2)
