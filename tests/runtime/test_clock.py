"""What only a first call costs is counted apart from the stages."""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from gp_jax import GlimpseVLM, tiny
from gp_jax.runtime import clock
from gp_jax.runtime.clock import COMPILE, COMPILES, MAKING, Clock, CompileWatch

SMALLEST = 0.005  # seconds, below which a stage's time is mostly noise


@pytest.fixture
def watch(monkeypatch):
    """One with a clock that is set by hand, and the hand."""
    now = [100.0]
    monkeypatch.setattr(clock.jax.monitoring, "register_event_duration_secs_listener", lambda _: None)
    monkeypatch.setattr(clock.jax.monitoring, "register_event_listener", lambda _: None)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])
    return CompileWatch(), now


@pytest.mark.quick
def test_time_inside_other_time_counts_once(watch):
    watch, now = watch
    trace, lower, compile_ = MAKING
    for moment, event, duration in ((101, trace, 0.5), (102, trace, 0.5), (103, trace, 3), (105, lower, 1), (109, compile_, 4)):
        now[0] = float(moment)  # the first two are traced within the third
        watch._note(event, duration)
    assert watch.seconds == pytest.approx(3 + 1 + 4) and watch.count == 1
    watch._note("/jax/checkpoint/write", 50.0)
    assert watch.seconds == pytest.approx(8)


@pytest.mark.quick
def test_a_call_that_makes_a_program_counts_as_a_whole(watch):
    watch, now = watch
    with watch.call():
        now[0] += 5
        watch._note(MAKING[-1], 2.0)
        now[0] += 1
    assert watch.seconds == pytest.approx(6)
    with watch.call():
        now[0] += 7
    assert watch.seconds == pytest.approx(6), "nothing was made"
    with watch.once():
        now[0] += 3
    assert watch.seconds == pytest.approx(9)


def test_tracing_and_lowering_are_not_in_a_stage():
    """A function that is slow to trace and quick to run."""

    @jax.jit
    def slow(x):
        time.sleep(0.5)
        return x + 1

    x, own = jnp.ones(3), Clock(enabled=True)
    own.lap("vision", x)
    own.seconds |= dict.fromkeys(own.seconds, 0.0)
    own.lap("decode", slow(x))
    assert own.seconds["decode"] < 0.5 <= own.seconds[COMPILE]


def test_equal_requests_take_equal_times(tmp_path):
    """A first call's stages are at most tenfold those of the same call later. Machines are busy at times: one of three tries must do."""
    tiny.make_checkpoint(tmp_path / "model")
    vlm = GlimpseVLM.from_pretrained(tmp_path / "model")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (112, 112, 3), np.uint8))
    worst = []
    for _ in range(3):
        jax.clear_caches()
        first, *later = (vlm.answer(picture, "what is it?", max_new_tokens=8).timings for _ in range(4))
        assert first[COMPILE] > 0 and all(one[COMPILE] == 0 for one in later), "a mark by which first calls are known"
        usual = {stage: max(SMALLEST, statistics.median(one[stage] for one in later)) for stage in first}
        worst.append(max(max(first[stage], SMALLEST) / usual[stage] for stage in first if stage != COMPILE))
        if worst[-1] < 10:
            return
    pytest.fail(f"a first call takes {worst} times as long as others")


def test_the_process_that_renders_templates_is_started_once(tmp_path):
    from gp_jax.processing import templates

    templates._worker.close()
    before = COMPILES.seconds
    templates.Template("hello", tmp_path).render([], {})
    started = COMPILES.seconds
    templates.Template("hello", tmp_path).render([], {})
    assert before < started == COMPILES.seconds
