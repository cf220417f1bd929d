"""Ctrl-C ends a command within seconds, with one line, whatever it is doing."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gp_jax.runtime.exits import exit_status

pytestmark = pytest.mark.quick

HEAD = """
import ctypes, gc, sys, time
from gp_jax.runtime import exits
from gp_jax.runtime.exits import exit_status, saving_as
exits.GRACE = 1.0
def ready(): print("ready", flush=True)
"""
BODIES = {
    "python": "ready(); time.sleep(60)",
    # A foreign function, such as XLA's, does not come back to Python: no KeyboardInterrupt can be raised.
    "foreign": "libc = ctypes.CDLL(None); ready(); libc.sleep(60); libc.sleep(60); libc.sleep(60)",
    # In a callback it is raised and swallowed.
    "swallowed": """
    class Callback:
        def __del__(self): ready(); time.sleep(5)
    Callback(); time.sleep(60)""",
    "caught": """
    ready()
    while True:
        try: time.sleep(60)
        except BaseException: pass""",
}


def start(body: str, saved: str = "") -> subprocess.Popen:
    inside = f"    with saving_as({saved!r}, 1.0):\n        " if saved else "    "
    code = f"{HEAD}\ndef body():\n{inside}{body.replace(chr(10), chr(10) + '    ' * bool(saved))}\nsys.exit(exit_status('eval.py', body))"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("kind", BODIES)
def test_one_ctrl_c_ends_it_with_one_line(kind):
    process, began = start(BODIES[kind], "the answers so far are in out.jsonl; the same command goes on"), time.monotonic()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 130 and time.monotonic() - began < 30
    assert err == "eval.py: interrupted; the answers so far are in out.jsonl; the same command goes on\n" and out == ""


def test_a_second_ctrl_c_ends_it_at_once():
    process = start(BODIES["caught"].replace("ready()", "exits.NOW.grace = 1000; ready()"))
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    assert process.communicate(timeout=50)[1] == "eval.py: interrupted; nothing was written\n" and process.returncode == 130


def test_what_is_told_is_what_was_saved_when_it_was_interrupted(capsys):
    from gp_jax.runtime.exits import saving_as

    def body() -> None:
        with saving_as("nothing yet"):
            pass
        with saving_as(lambda: "step 3 is saved"), saving_as("a checkpoint is half written"):
            pass
        with saving_as(lambda: "step 4 is saved"):
            raise KeyboardInterrupt

    assert exit_status("train.py", body) == 130
    assert capsys.readouterr().err == "train.py: interrupted; step 4 is saved\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.set_wakeup_fd(-1) == -1


def test_a_reader_that_leaves_is_no_error(tmp_path: Path):
    code = "import sys\nfrom gp_jax.cli import main\nmain(['configs'])"
    done = subprocess.run(f'{sys.executable} -c "{code}" | head -1', shell=True, capture_output=True, text=True, check=False)
    assert "gp-jax" in done.stdout and done.stderr == ""
