"""One process per folder: the lock dies with its holder, also where there are no locks."""

import errno
import itertools
import json
import subprocess
import sys
import time

import pytest
from etils import epath

from gp_jax import GlimpseError
from gp_jax.runtime import lock
from gp_jax.runtime.lock import FILE, MARK, only_one

pytestmark = pytest.mark.quick

HOLD = """
import sys, time
from pathlib import Path
from gp_jax.runtime.lock import only_one
with only_one(Path(sys.argv[1]), "train.py"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_holder_holds_nothing(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    with (
        pytest.raises(GlimpseError, match=f"{tmp_path}: train.py, process {holder.pid} on .* is writing there"),
        only_one(tmp_path, "eval.py"),
    ):
        pass
    holder.kill()
    holder.wait()
    with only_one(tmp_path, "eval.py"):
        assert "eval.py" in (tmp_path / FILE).read_text()
    with pytest.raises(OSError, match="mine"), only_one(tmp_path, "eval.py"):
        raise OSError("mine")  # what goes wrong inside is not the lock's


def test_a_folder_that_stayed_empty_goes_again(tmp_path):
    with only_one(tmp_path / "deep" / "new", "x"):
        pass
    assert (tmp_path / "deep").exists() and not (tmp_path / "deep" / "new").exists()
    with only_one(tmp_path / "new", "x"):
        (tmp_path / "new" / "result").touch()
    with only_one(tmp_path / "new", "x"):
        pass
    assert (tmp_path / "new" / "result").exists()


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_what_cannot_be_a_folder(tmp_path, folder):
    (tmp_path / "file").touch()
    with pytest.raises(GlimpseError, match="cannot be written"), only_one(tmp_path / folder, "x"):
        pass


def test_without_locks_a_mark_is_kept_alive(tmp_path, monkeypatch):
    """As on object stores: a second one is refused as soon as the first writes its mark again, and waits a little for one that is dead."""
    store, path = epath.Path(tmp_path), tmp_path / FILE
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with only_one(store, "train.py", local=False):
        first = json.loads(path.read_text())
        waited = next(n for n in itertools.count(1) if time.sleep(0.02) or json.loads(path.read_text())["time"] > first["time"] or n > 500)
        assert waited <= 500, "the mark is not written again"
        with pytest.raises(GlimpseError, match="train.py, process .* is writing there"), only_one(store, "train.py", local=False):
            pass
    assert not path.exists()
    for left in (json.dumps(first), json.dumps(first | {"time": 0}), "{", "[]", '{"who": 1}', "\0"):
        path.write_text(left)
        with only_one(store, "train.py", local=False):
            assert json.loads(path.read_text())["id"] != first["id"]


def test_file_systems_without_locks_have_marks(tmp_path, monkeypatch):
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with only_one(tmp_path, "train.py"):
        assert (tmp_path / MARK).exists()
        with pytest.raises(GlimpseError, match="is writing there"), only_one(tmp_path, "train.py"):
            pass
    assert not (tmp_path / MARK).exists()
