"""Requests of any plan and age side by side give what each gives alone; nothing compiles after warm-up; the memory budget holds."""

import threading

import numpy as np
import pytest
from serving_tools import job_of, outcome
from tiny_models import GLIMPSE, glimpse_weights, hf_model, inputs, save_glimpse

from gp_jax import GlimpseVLM, Ladder, Ladders, Look, Prune
from gp_jax.inference.engine import Engine
from gp_jax.runtime.clock import COMPILES
from gp_jax.serving.inbox import Busy, Draining
from gp_jax.serving.jobs import BEST, Failed
from gp_jax.serving.lengths import Lengths
from gp_jax.serving.loop import Loop
from gp_jax.serving.meters import Meters
from gp_jax.serving.vision_cache import VisionCache
from gp_jax.serving.warm_up import warm_up

SLOTS = 16
LADDERS = Ladders(
    patches=Ladder("patches", (512,)),
    prompt=Ladder("prompt", (128,)),
    kept=Ladder("kept", (32, 128)),
    decode=Ladder("decode", (SLOTS,)),
    batch=Ladder("batch", (1,)),
)
KINDS = [  # segments of the prompt, plan, temperature
    ([5, (4, 6), 7], Prune(fixed_remain_ratio=0.3), 0.0),
    ([3, (2, 2), 9], None, 0.8),
    ([12], None, 0.0),
    ([2, (6, 4), 3, (2, 4), 5], Prune(reduce_threshold=0.5), 0.9),
    ([4, (6, 8), 20], None, 0.0),
    ([4, (6, 8), 6], Prune(max_remain_ratio=0.1), 0.0),
    ([4, (8, 8), 6], Prune(look=Look(least=4, threshold=1.0, floor=0.3, cap=0.5, sure=None), fixed_remain_ratio=0.3), 0.0),
]
PLACE = 1000  # bytes, in the tests' units


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    model = hf_model()
    model.save_pretrained(folder / "base")
    save_glimpse(folder / "glimpse", model, GLIMPSE, glimpse_weights(GLIMPSE))
    return GlimpseVLM.from_pretrained(folder / "base", folder / "glimpse", ladders=LADDERS)


@pytest.fixture(scope="module")
def lengths(vlm):
    """Room for four small places and one large one, or fewer large ones."""
    found = Lengths(LADDERS, (32, 128), ((1, 3), (1, 2)), (PLACE, 3 * PLACE), SLOTS, 7 * PLACE)
    warm_up(vlm.engine, found, [(), vlm._resolve(Prune()).plan], pictures=2)
    return found


@pytest.fixture(scope="module")
def alone(vlm):
    """What `generate` makes of every kind."""
    found = []
    for number, (segments, prune, temperature) in enumerate(KINDS):
        raw = inputs([segments], seed=number)
        found.append(vlm.generate(**raw, prune=prune, max_new_tokens=SLOTS, temperature=temperature, seed=number))
    return found


@pytest.fixture
def start(vlm, lengths):
    loops = []

    def make(**options):
        loops.append(Loop(vlm.engine, lengths, VisionCache(1 << 20), Meters("tiny"), **options))
        return loops[-1]

    yield make
    for loop in loops:
        loop.stop()
        if loop.is_alive():
            loop.join(30)


def ask(vlm, number: int, **options):
    segments, prune, temperature = KINDS[number]
    return job_of(vlm, inputs([segments], seed=number), prune, temperature=temperature, seed=number, **options)


def test_side_by_side_equals_alone_and_compiles_nothing(vlm, lengths, alone, start):
    """Random arrivals, lengths and cancellations, more than the budget holds at once."""
    before, random = COMPILES.count, np.random.default_rng(0)
    loop = start(gap=1e-6, queue=200)
    asked = []
    for number in range(60):
        kind, most = int(random.integers(len(KINDS))), int(random.integers(1, SLOTS + 1))
        job, events = ask(vlm, kind, most=most)
        asked.append((kind, most, job, events, random.random() < 0.15))
        loop.submit(job)
        if number == 10:
            loop.start()
        if asked[-1][-1]:
            loop.cancel(job)
    largest = 0
    for kind, most, _, events, cancelled in asked:
        if cancelled:
            continue
        found = outcome(events)
        largest = max(largest, loop.pools.held)
        np.testing.assert_array_equal(found["tokens"], alone[kind].tokens[0][: len(found["tokens"])])
        expected = alone[kind].tokens[0][:most]
        assert len(found["tokens"]) == (most if found["reason"] == "length" else len(expected)), (kind, most)
        np.testing.assert_array_equal(found["started"].keep, alone[kind].keep[0])
        assert found["started"].seen == alone[kind].viewed[0].sum()
    assert COMPILES.count == before, "nothing compiles after warm-up"
    assert 0 < largest <= lengths.budget
    assert loop.cache.hits > loop.cache.misses
    assert 0 < alone[-1].viewed[0].sum() < alone[-1].viewed[0].size, "two looks stand side by side with others"


def test_logprobs_are_those_of_the_full_softmax(vlm, alone, start):
    loop = start()
    jobs = [ask(vlm, 0, noted=2), ask(vlm, 0), ask(vlm, 0, noted=1)]
    for job, _ in jobs:
        loop.submit(job)
    loop.start()
    noted, silent, few = (outcome(events) for _, events in jobs)
    first = alone[0].first_logits[0].astype(np.float64)
    expected = first[noted["tokens"][0]] - np.log(np.exp(first).sum())
    assert noted["logprobs"][0] == pytest.approx(expected, abs=1e-4)
    assert len(noted["logprobs"]) == len(noted["tokens"]) and not silent["logprobs"]
    assert few["logprobs"] == pytest.approx(noted["logprobs"], abs=1e-4) and not few["best"] and not silent["best"]
    ids, values = noted["best"][0]
    assert ids == np.argsort(-first, kind="stable")[:BEST].tolist()
    np.testing.assert_allclose(values, first[ids] - np.log(np.exp(first).sum()), atol=1e-4)
    assert [ids[0] for ids, _ in noted["best"]] == noted["tokens"].tolist(), "greedy takes the best"


def test_budget_limits_what_runs_at_once(vlm, lengths, start):
    """Large prompts: two at most, though there are more places for small ones."""
    loop, most = start(visit=1e-9), []
    settle = loop.pools.settle
    loop.pools.settle = lambda: (most.append((loop.pools.running, loop.pools.held)), settle())
    asked = [ask(vlm, 4, most=6) for _ in range(5)]
    for job, _ in asked:
        loop.submit(job)
    loop.start()
    for _, events in asked:
        assert len(outcome(events)["tokens"]) == 6
    assert max(running for running, _ in most) == 2 and max(held for _, held in most) <= lengths.budget


def test_full_queue_refuses_and_draining_too(vlm, start):
    loop = start(queue=2)
    for _ in range(2):
        loop.submit(ask(vlm, 2)[0])
    with pytest.raises(Busy):
        loop.submit(ask(vlm, 2)[0])
    loop.drain()
    with pytest.raises(Draining):
        loop.submit(ask(vlm, 2)[0])


def test_cancelled_requests_free_their_places_within_a_step(vlm, start):
    loop = start(visit=1e-9)
    job, events = ask(vlm, 2, most=SLOTS)
    loop.submit(job)
    loop.turn()
    assert loop.pools.running == 1
    loop.cancel(job)
    loop.turn()
    assert loop.pools.running == 0 and loop.idle
    late, events = ask(vlm, 2, seconds=-1)
    loop.submit(late)
    loop.turn()
    assert outcome(events)["failed"].status == 504


def test_prefill_gives_way_and_running_rows_do_not_wait(vlm, alone, start):
    """Between the programs of a prefill the running row gets tokens; a request that is given up meanwhile ends there."""
    loop = start(gap=1e-9, visit=1e-9)
    running, events = ask(vlm, 2, most=SLOTS)
    loop.submit(running)
    loop.turn()
    sent = running.sent
    other, _ = ask(vlm, 4)
    loop.submit(other)
    loop.turn()
    assert running.sent > sent + 1, "several tokens while the other prompt was read"
    for _ in range(SLOTS):
        loop.turn()
    np.testing.assert_array_equal(outcome(events)["tokens"], alone[2].tokens[0])


def test_a_failing_request_takes_nobody_with_it(vlm, alone, start, monkeypatch):
    loop = start(visit=1e-9)
    good, events = ask(vlm, 2, most=SLOTS)
    loop.submit(good)
    loop.turn()
    prefill = Engine.prefill
    monkeypatch.setattr(Engine, "prefill", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("broken")))
    bad, failed = ask(vlm, 0)
    loop.submit(bad)
    loop.turn()
    assert outcome(failed)["failed"] == Failed(500, "the server failed to answer this request")
    monkeypatch.setattr(Engine, "prefill", prefill)
    for _ in range(SLOTS):
        loop.turn()
    np.testing.assert_array_equal(outcome(events)["tokens"], alone[2].tokens[0])


def test_a_failing_program_ends_its_own_requests_and_the_server_goes_on(vlm, alone, start, monkeypatch):
    loop = start(visit=1e-9)
    loop.start()
    advance = Engine.advance
    for _ in range(3):
        monkeypatch.setattr(Engine, "advance", lambda *a: (_ for _ in ()).throw(RuntimeError("broken")))
        job, events = ask(vlm, 2)
        loop.submit(job)
        assert outcome(events)["failed"].status == 500
    assert not loop.healthy
    monkeypatch.setattr(Engine, "advance", advance)
    job, events = ask(vlm, 2, most=SLOTS)
    loop.submit(job)
    np.testing.assert_array_equal(outcome(events)["tokens"], alone[2].tokens[0])
    assert loop.healthy


def test_stopping_ends_what_is_here(vlm, start):
    loop = start()
    job, events = ask(vlm, 2)
    loop.submit(job)
    loop.stop()
    loop.start()
    assert outcome(events)["failed"].status == 503
    loop.join(10)
    assert not loop.is_alive() and threading.active_count() >= 1
