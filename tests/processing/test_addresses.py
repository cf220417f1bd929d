"""Pictures from addresses, bytes, open files and standard input, each within limits."""

import http.server
import io
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseError
from gp_jax.commands import ask
from gp_jax.processing import addresses, images
from gp_jax.processing.addresses import fetch, is_address, is_private, shown_address
from gp_jax.processing.images import open_image

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def encoded() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def server(encoded):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            where = {"/moved": "/a.png", "/round": "/round", "/file": "file:///etc/passwd"}.get(self.path.partition("?")[0])
            if where:
                self.send_response(302)
                self.send_header("Location", where)
                self.end_headers()
            elif self.path.startswith("/a.png"):
                self.send_response(200)
                self.end_headers()  # without a length
                self.wfile.write(encoded)
            elif self.path.startswith("/endless"):
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(b"\0" * 65536)
                except OSError:
                    pass
            elif self.path.startswith("/large"):
                self.send_response(200)
                self.send_header("Content-Length", str(10**12))
                self.end_headers()
            else:
                self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}"
    running.shutdown()


@pytest.mark.parametrize("kind", ["address", "redirect", "bytes", "bytearray", "memoryview", "BytesIO", "file", "path"])
def test_every_way_gives_the_same_picture(server, encoded, tmp_path, kind):
    (tmp_path / "a.png").write_bytes(encoded)
    with (tmp_path / "a.png").open("rb") as file:
        ways = {"address": f"{server}/a.png?key=x", "redirect": f"{server}/moved", "bytes": encoded, "bytearray": bytearray(encoded)}
        ways |= {"memoryview": memoryview(encoded), "BytesIO": io.BytesIO(encoded), "file": file, "path": tmp_path / "a.png"}
        found = open_image(ways[kind])
    assert np.array_equal(np.asarray(found), np.asarray(Image.open(io.BytesIO(encoded))))


@pytest.mark.parametrize(
    "path, said",
    [
        ("/none.png", "the server answers 404"),
        ("/round", "more than 5 redirects"),
        ("/file", "leads to an address that is not followed"),
        ("/large", "is larger than 1 KiB"),
        ("/endless", "is larger than 1 KiB"),
    ],
)
def test_addresses_that_give_no_picture(server, path, said):
    with pytest.raises(GlimpseError, match=said) as error:
        fetch(server.replace("//", "//user:secret@") + path + "?key=secret", 1024)
    assert "secret" not in str(error.value) and path in str(error.value)


def test_slow_and_absent_servers(server, monkeypatch):
    monkeypatch.setattr(addresses, "SECONDS", 0.0)
    with pytest.raises(GlimpseError, match="is not there after 0 s"):
        fetch(f"{server}/a.png", 10**6)
    with pytest.raises(GlimpseError, match="cannot be fetched"):
        fetch("http://127.0.0.1:9/a.png", 10)
    for odd in ("http://", "http://[::1", "https://a b/"):
        with pytest.raises(GlimpseError):
            fetch(odd, 10)


def test_a_redirect_does_not_lead_into_a_private_network(server, monkeypatch):
    monkeypatch.setattr(addresses, "is_private", lambda address: address.endswith("/a.png"))
    with pytest.raises(GlimpseError, match="leads to an address that is not followed"):
        fetch(f"{server}/moved", 10**6)


def test_what_is_an_address():
    assert is_address("https://a/b.png") and is_address("HTTP://a") and not is_address("a.png") and not is_address("file:///a.png")
    assert is_private("http://127.0.0.1:80/") and is_private("http://[::1]/") and is_private("http://10.0.0.1/")
    assert shown_address("https://me:pw@host:8/a.png?key=1#x") == "https://host:8/a.png"


@pytest.mark.parametrize(
    "source, said", [(b"", "not an image"), (io.BytesIO(), "is empty"), (io.StringIO("a"), "open for text"), (5, "not a path")]
)
def test_what_is_no_picture(source, said):
    with pytest.raises(GlimpseError, match=said):
        open_image(source)


def test_limits_of_bytes(monkeypatch, encoded):
    monkeypatch.setattr(images, "MAX_BYTES", 100)
    for source in (encoded, io.BytesIO(encoded)):
        with pytest.raises(GlimpseError, match="image: is larger than"):
            open_image(source, max_pixels=10)


def test_standard_input(monkeypatch, encoded):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded)))
    assert open_image(ask.given("-")).size == (30, 20)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(GlimpseError, match="-: standard input is a terminal"):
        ask.given("-")
    with pytest.raises(GlimpseError, match="only one picture can come from standard input"):
        ask.parse(["-", "-", "q", "--model", "m"]).check()
    assert ask.given("https://host/a.png") == "https://host/a.png"
