"""Long work speaks: plain lines where there is no terminal, a bar on one, and names for what first calls wait for."""

import io
import re
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from gp_jax.runtime import clock, progress
from gp_jax.runtime.clock import COMPILES
from gp_jax.runtime.progress import HEART, Progress, Work, speaking, waiting

pytestmark = pytest.mark.quick


@pytest.fixture
def soon(monkeypatch):
    """Work speaks after hundredths of a second."""
    monkeypatch.setattr(progress, "BEATS", (0.02, 0.04))
    monkeypatch.setattr(progress, "EVERY", 0.04)
    monkeypatch.setattr(clock, "BEATS", (0.02, 5.0))


def until(found) -> None:
    end = time.monotonic() + 20
    while not found():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_beats_of_work():
    work = Work(lambda _: None, (2.0, 10.0, 30.0))
    dues = []
    for work.said in range(5):
        dues.append(work.due() - work.start)
    assert dues == pytest.approx([2, 10, 30, 60, 90])


def test_plain_lines_say_how_far_it_is(soon):
    file, before = io.StringIO(), len(HEART.work)
    with Progress(total=40, initial=10, desc="training", unit="step", file=file) as bar:
        until(lambda: "0 of" in file.getvalue())
        bar.update(20)
        bar.set_postfix_str("loss 0.41")
        until(lambda: "30 of 40" in file.getvalue())
        count = len(file.getvalue().splitlines())
        until(lambda: len(file.getvalue().splitlines()) > count)  # nothing happens, and it still speaks
    lines = file.getvalue().splitlines()
    assert lines[0].startswith("training: 10 of 40 steps (25%)")
    assert re.fullmatch(r"training: 30 of 40 steps \(75%\), [\d.e+-]+ (steps/s|s/step), \d+:\d\d left, loss 0.41", lines[-2]), lines[-2]
    assert re.fullmatch(r"training: 30 of 40 steps \(75%\), took \d+:\d\d, loss 0.41", lines[-1]) and "\r" not in file.getvalue()
    assert len(HEART.work) <= before, "nothing speaks for it any more"


def test_inner_work_speaks_alone_and_finished_work_promises_nothing(soon):
    outer, inner = io.StringIO(), io.StringIO()
    with Progress(total=2, desc="training", file=outer) as bar:
        bar.update(2)
        until(lambda: "2 of 2 steps (100%), 00:00" in outer.getvalue())
        assert "left" not in outer.getvalue()
        with Progress(total=3, desc="validating", file=inner):
            count = len(outer.getvalue().splitlines())
            until(lambda: len(inner.getvalue().splitlines()) > 3)
            assert len(outer.getvalue().splitlines()) <= count + 1, "it may have been speaking"
        until(lambda: len(outer.getvalue().splitlines()) > count + 1)


def test_work_that_fails_has_no_last_line(soon):
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Progress(total=3, desc="training", file=file):
        until(lambda: "0 of 3" in file.getvalue())
        raise KeyboardInterrupt
    assert "took" not in file.getvalue()


def test_short_work_and_silenced_work_say_nothing(soon, monkeypatch):
    file = io.StringIO()
    list(Progress(range(5), file=file, disable=True))
    monkeypatch.setattr(progress, "BEATS", (60.0,))
    assert list(Progress(range(5), desc="short", file=file)) == [0, 1, 2, 3, 4] and file.getvalue() == ""


def test_a_terminal_has_a_bar(soon):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    file = Terminal()
    list(Progress(range(3), desc="loading", unit="tensor", file=file))
    assert "3/3" in file.getvalue() and "\r" in file.getvalue() and "of 3 tensors" not in file.getvalue()


def test_work_that_ends_speaks_no_more(soon, capsys):
    said = threading.Event()
    with speaking(lambda _: said.set()):
        assert said.wait(20)
    said.clear()
    time.sleep(0.2)
    assert not said.is_set()
    with waiting("loading libraries"):
        until(lambda: "loading libraries ..." in capsys.readouterr().err)


def test_a_first_call_is_named_and_a_later_one_is_not(soon, capsys, monkeypatch):
    @jax.jit
    def slow(x):
        time.sleep(0.3)  # while it is traced
        return x + 1

    x = jnp.ones(3)
    with COMPILES.naming("what nobody waits for"):
        slow(x)
    assert capsys.readouterr().err == "", "only commands announce"
    progress.announce()
    try:
        jax.clear_caches()
        with COMPILES.naming(lambda: "vision for 1,024 patches"), COMPILES.naming("a part of it"):
            slow(x)
        assert capsys.readouterr().err == "compiling vision for 1,024 patches ...\n"
        with COMPILES.naming("vision for 1,024 patches"):
            slow(x)
            time.sleep(0.1)
        assert capsys.readouterr().err == ""
    finally:
        progress.ANNOUNCING.clear()


def test_kept_programs_that_are_read_are_called_so(soon, capsys):
    progress.announce()
    try:
        with COMPILES.naming("decoding of 32 new tokens"):
            COMPILES._note_begin(clock.COMPILE_EVENT, 0.0)
            COMPILES.count, COMPILES.read = COMPILES.count + 1, COMPILES.read + 1
            until(lambda: "reading kept programs of decoding of 32 new tokens ..." in capsys.readouterr().err)
    finally:
        progress.ANNOUNCING.clear()
