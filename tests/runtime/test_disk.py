"""Files from strangers, and what messages show."""

import errno
import json
import os

import pytest

from gp_jax.errors import LONGEST, GlimpseError, one_line, printable, some
from gp_jax.runtime.disk import (
    MAX_DEPTH,
    MAX_JSON,
    check_regular,
    kind_of,
    parse_json,
    path_of,
    read_bytes,
    read_json,
    read_text,
    whole,
    write_text,
    writing,
)

pytestmark = pytest.mark.quick


def test_messages_show_what_terminals_would_act_on():
    text = str(GlimpseError("tensor \x1b]0;x\x07 \u202eback\u2066 \ud800 caf\u00e9\n\tnext"))
    assert text == "tensor \\x1b]0;x\\x07 \\u202eback\\u2066 \\ud800 caf\u00e9\\n\\tnext", "and are one line"
    assert len(str(GlimpseError("x" * 10**6))) < LONGEST + 10
    assert one_line("a\n  b\x1b") == "a b\\x1b" and one_line(KeyError()) == "KeyError"
    assert some(["a", "b"]) == "a, b" and some(range(10), 3) == "0, 1, 2 and 7 more"
    assert printable("a" * 50, 20).startswith("a" * 15 + " ... ")


def test_of_a_file_that_is_not_finished_nothing_is_left(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("old")
    for error, seen in ((KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "No space left"), GlimpseError)):
        with pytest.raises(seen), whole(path) as scratch:
            scratch.write_text("half")
            raise error
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["table.csv"]
    with whole(path) as scratch:
        scratch.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["table.csv"]


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "text").write_bytes(b"\xff")
    for name, word in (("fifo", "not a regular file"), ("link", "not a regular file"), (".", "is a folder"), ("none", "missing")):
        with pytest.raises(GlimpseError, match=word):
            read_bytes(tmp_path / name, 100)
    for name in ("loop", "x" * 5000, "a\0b"):
        with pytest.raises(GlimpseError, match="is not a path"):
            kind_of(tmp_path / name)
    for name in ("\ud800", 5, "a\0b"):
        with pytest.raises(GlimpseError):
            check_regular(path_of(name))
    with pytest.raises(GlimpseError, match="larger than"):
        read_bytes(tmp_path / "text", 0)
    assert read_bytes(tmp_path / "text", 10**20) == b"\xff"  # no room is made for what a file might have
    with pytest.raises(GlimpseError, match="not UTF-8"):
        read_text(tmp_path / "text")
    assert kind_of(tmp_path / "text" / "below") is None


def test_json_of_strangers(tmp_path):
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH, "x") and parse_json("3", "x") == 3
    for text in ("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "[" * 10**6, '{"a":' * 10**5, "1" * 5000, "{", b"\xff\xfe0", ""):
        with pytest.raises(GlimpseError, match=r"file\.json: is not valid JSON"):
            parse_json(text, "file.json")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "large").write_text(json.dumps(" " * MAX_JSON))
    for name in ("list", "large", "none"):
        with pytest.raises(GlimpseError, match=name):
            read_json(tmp_path / name)
    assert read_json(tmp_path / "none", required=False) == {}


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_text(path, "\ud800 caf\u00e9")
    assert path.read_bytes() == b"\\ud800 caf\xc3\xa9"
    with pytest.raises(GlimpseError, match=r"a\.json: cannot be written \(No space left"), writing(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(GlimpseError, match="nowhere"):
        write_text(tmp_path / "nowhere" / "a", "x")
    (tmp_path / ".a.json.partial").mkdir()
    with pytest.raises(GlimpseError):
        write_text(path, "new")
    assert path.read_bytes() == b"\\ud800 caf\xc3\xa9"
