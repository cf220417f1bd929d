"""A judge whose server sends whatever it likes: no reply ends an evaluation, and no key is shown or kept."""

import asyncio
import base64
import contextlib
import gzip
import json
import os
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gp_jax import GlimpseError
from gp_jax.evaluation import judge as judging
from gp_jax.evaluation.judge import _seconds, judge
from gp_jax.evaluation.redaction import bare_url, redactor, shown_url
from gp_jax.evaluation.settings import EvalConfig, JudgeConfig
from gp_jax.evaluation.summary import command
from gp_jax.evaluation.verdicts import digest, read_cache, read_score

KEY = "sk-/A&b%c+secret"
PASSWORD = "pa%73sword/with"  # as it stands in a URL, percent-encoded
OK = json.dumps({"choices": [{"message": {"content": "score: 1"}}]}).encode()


def echoed() -> bytes:
    """The key and the password in every way in which programs quote them."""
    pair = base64.b64encode(b"me:password/with").decode()
    forms = [KEY, urllib.parse.quote(KEY, safe=""), json.dumps(KEY), KEY.replace("/", "\\/"), base64.b64encode(KEY.encode()).decode(), pair]
    return json.dumps({"error": " ".join(forms)}).encode()


REPLIES = {  # word in the model's answer -> status, headers, body
    "deep": (200, {}, b"[" * 200_000),
    "deep object": (200, {}, b'{"a":' * 100_000),
    "idna": (400, {"Content-Type": "text/html; charset=idna"}, b"x" * 99),
    "codec": (400, {"Content-Type": "text/html; charset=rot13"}, b"x" * 99),
    "utf-16": (200, {"Content-Type": "application/json; charset=utf-16"}, OK),
    "wide": (200, {}, OK.decode().encode("utf-16")),
    "bytes": (200, {}, b"\xff\xfe\x00\xd8"),
    "bad bytes": (400, {}, b"\xff\x00\x1b]0;title\x07"),
    "bomb": (200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * (200 << 20), 1)),
    "packed": (200, {"Content-Encoding": "gzip"}, gzip.compress(OK)),
    "not packed": (200, {"Content-Encoding": "gzip"}, OK),
    "brotli": (200, {"Content-Encoding": "br"}, OK),
    "redirect": (302, {"Location": "http://127.0.0.1:9/"}, b""),
    "loop": (307, {"Location": "/v1/chat/completions"}, b""),
    "digits": (200, {}, b'{"choices":' + b"1" * 9000 + b"}"),
    "cookies": (200, {"Set-Cookie": "=;\x01; Domain=[; Expires=never"}, OK),
    "long": (200, {}, json.dumps({"choices": [{"message": {"content": "score: 1" + " " * 900_000}}]}).encode()),
    "surrogate": (200, {}, json.dumps({"choices": [{"message": {"content": "\ud800 score: 1"}}]}).encode()),
    "numbers": (200, {}, b'{"choices": [{"message": {"content": 1}}]}'),
    "moderated": (400, {}, b""),
    "echo": (400, {}, b""),
    "echo wide": (400, {}, b""),
    "endless": (200, {}, b""),
}
SCORED = {"utf-16", "wide", "packed", "cookies", "surrogate", "fine"}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = asked["messages"][1]["content"].rpartition("model's answer: ")[2].strip()
        status, headers, body = REPLIES.get(word, (200, {}, OK))
        body = echoed() if word == "echo" else echoed().decode().encode("utf-16") if word == "echo wide" else body
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if word != "endless":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(body)
            while word == "endless":
                self.wfile.write(b" " * 65536)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def config():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://me:{PASSWORD}@127.0.0.1:{server.server_address[1]}/v1"
    yield JudgeConfig(url=url.replace("/with", "%2Fwith"), model="m", key="A_KEY", retries=0, timeout=5.0, patience=0.0)
    server.shutdown()


def test_no_reply_ends_an_evaluation_and_none_shows_the_key(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("A_KEY", KEY)
    EvalConfig(judge=config).check()
    began, words = time.monotonic(), [*REPLIES, "fine"]
    found = judge(config, [("q", "a", word) for word in words], tmp_path / "verdicts.jsonl", quiet=True)
    assert time.monotonic() - began < 5
    assert {answer for _, _, answer in found.scores} == SCORED and set(found.scores.values()) == {1.0}
    reasons = {answer: reason for (_, _, answer), reason in found.failures.items()}
    assert set(reasons) == {*words} - SCORED
    assert "too large" in reasons["bomb"] and "too large" in reasons["endless"] and "status 302" in reasons["redirect"]
    assert all(reason.isprintable() and len(reason) < 200 for reason in reasons.values())
    kept = "".join([found.text(), *reasons.values(), (tmp_path / "verdicts.jsonl").read_text(), capsys.readouterr().out])
    assert "secret" not in kept and "password" not in kept and base64.b64encode(KEY.encode()).decode()[:12] not in kept
    assert "***" in reasons["echo"] and "***" in reasons["echo wide"]


def test_urls_are_shown_and_kept_without_passwords():
    config = EvalConfig(judge=JudgeConfig(url="http://me:pass@host:8000/v1", model="m"))
    config.check()
    assert config.judge.shown == "http://host:8000/v1" and "pass" not in command(config) and "http://host:8000/v1" in command(config)
    same = JudgeConfig(url="http://host:8000/v1", model="m")
    assert digest(config.judge, ("q", "a", "p")) == digest(same, ("q", "a", "p")), "another password, the same judge"
    assert bare_url("http://a/@x") != bare_url("http://b/@x") == "http://b/@x"
    for url in (
        "ftp://me:pass@host",
        "me:pass@host/v1",
        "http://me:pass@[::1",
        "http://me:pa/ss@host/v1",
        "http://me:pass@",
        "http://h/v1?k=pass",
    ):
        with pytest.raises(GlimpseError, match=r"judge\.url") as found:
            JudgeConfig(url=url, model="m").check()
        assert "pa" not in str(found.value).replace("password", "").replace("path", "") and "ss@" not in str(found.value)
        assert "pass" not in shown_url(url)
    with pytest.raises(GlimpseError, match=r"judge\.key is not the name") as found:
        JudgeConfig(url="http://host/v1", model="m", key=KEY).check()
    assert "secret" not in str(found.value)


def test_short_words_are_no_secrets():
    """A local server's key may be any letter."""
    assert redactor("a", "http://h/v1")("a banana") == "a banana" and redactor(None, "http://h/v1")("x") == "x"
    assert redactor("EMPTY", "http://h/v1")("it is empty") == "it is ***"


@pytest.mark.parametrize("name", ["at_once", "per_minute", "retries", "timeout", "patience", "max_tokens"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1])
def test_numbers_without_sense_are_no_settings(name, value):
    with pytest.raises(GlimpseError, match=rf"judge\.{name}"):
        JudgeConfig(url="http://x/v1", model="m", **{name: value}).check()


@pytest.mark.parametrize(
    "header", ["nan", "inf", "-inf", "-1", "1e999", "soon", "", "Fri, 99 Zzz 2020 00:00:00", "Wed, 21 Oct 2015 07:28:00 GMT", "٣x"]
)
def test_pauses_without_sense_are_none(header):
    assert _seconds(header) == 0.0


def test_pauses():
    assert _seconds("2.5") == 2.5 and _seconds(None) == 0.0 and _seconds("Wed, 21 Oct 2999 07:28:00 GMT") > 1e9


@pytest.mark.parametrize(
    "line",
    [
        '{"key": "k", "score": NaN}',
        '{"key": "k", "score": Infinity}',
        '{"key": "k", "score": 1e999}',
        '{"key": "k", "score": -0.1}',
        '{"key": "k", "score": true}',
        '{"key": "k", "score": "1"}',
        '{"key": "k", "score": null}',
        '{"key": 3, "score": 1}',
        '{"key": ["k"], "score": 1}',
        '{"key": "k", "verdict": 3}',
        '{"key": "k", "verdict": null}',
        '{"score": 1}',
        '["key", "score"]',
        '"key"',
        "null",
        "{",
        "[" * 100_000,
        '{"key": "k", "score": ' + "9" * 5000 + "}",
        '{"key": "k", "score": 1, "x": "' + "x" * (5 << 20) + '"}',
        "\udcff",
    ],
    ids=range(20),
)
def test_damaged_verdicts_are_none(tmp_path, line, capsys):
    """What is whole beside them counts."""
    good = '{"key": "a", "score": 0.5}\n'
    path = tmp_path / "verdicts.jsonl"
    path.write_bytes((good + line + "\n" + good.replace('"a"', '"b"') + '{"key": "half').encode("utf-8", "surrogateescape"))
    assert read_cache(path) == {"a": 0.5, "b": 0.5}
    assert "damaged lines, not used: 1" in capsys.readouterr().out


def test_a_cache_that_is_no_file_is_named(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(GlimpseError, match=r"judge\.cache"):
            JudgeConfig(url="http://x/v1", model="m", cache=str(path)).check()
        with pytest.raises(GlimpseError, match="regular file|folder"):
            read_cache(path)


def test_long_verdicts_are_read_at_once():
    began = time.monotonic()
    for text in (
        "score: 1" + " " * 60_000,
        "score: 1" + ", " * 30_000,
        "score: 1 " * 7000,
        "score " * 10_000,
        "score:" + "\n" * 60_000 + "1",
    ):
        read_score(text)
    assert time.monotonic() - began < 2


def test_a_full_disk_is_one_line(config, tmp_path, monkeypatch):
    monkeypatch.setenv("A_KEY", KEY)

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def flush(self):
            raise OSError(28, "No space left on device")

    opening = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode: Full(opening(path, mode)))
    with pytest.raises(GlimpseError, match=r"verdicts\.jsonl: cannot be written \(No space left"):
        judge(config, [("q", "a", f"fine {i}") for i in range(20)], tmp_path / "verdicts.jsonl", quiet=True)


def test_a_question_that_breaks_the_client_breaks_nothing_else(config, tmp_path, monkeypatch):
    """Whatever a library raises."""
    monkeypatch.setenv("A_KEY", KEY)
    asking = judging._Asking.once

    async def once(self, client, question):
        await asyncio.sleep(0)
        if question[2] == "odd":
            raise KeyError("odd")
        return await asking(self, client, question)

    monkeypatch.setattr(judging._Asking, "once", once)
    found = judge(config, [("q", "a", "odd"), ("q", "a\ud800", "fine")], tmp_path / "verdicts.jsonl", quiet=True)
    assert found.failures == {("q", "a", "odd"): "reply that cannot be read (KeyError)"} and len(found.scores) == 1
