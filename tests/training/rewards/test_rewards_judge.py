"""The judge of a training run, against a local server: an outage costs waiting, a question that cannot be judged is missing."""

import threading
import time

import pytest
from judge_server import Server

from gp_jax import GlimpseError
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.training.rewards import judge as reward_judge
from gp_jax.training.rewards import rewarding as module
from gp_jax.training.rewards.rewarding import Completion, RewardConfig, Rewards, RewardTerm, Stopped, check_missing

pytestmark = pytest.mark.quick


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(reward_judge, "LEAST_WAIT", 0.02)
    monkeypatch.setattr(reward_judge, "LONGEST_WAIT", 0.1)
    monkeypatch.setattr(module, "POLL", 0.05)
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


class Judged:
    """Rewards by the judge alone, and what was told."""

    def __init__(self, server, tmp_path, hours=0.01, terms=("judge",), **changes):
        judge = JudgeConfig(**dict(url=server.url, model="m", retries=0, timeout=0.7, patience=0.01) | changes)
        self.said, self.stop = [], False
        config = RewardConfig(terms=tuple(map(RewardTerm, terms)), judge=judge, outage_hours=hours).check()
        self.rewards = Rewards(config, (), tmp_path / "verdicts.jsonl", self.said.append)

    def __call__(self, *texts, answer="red"):
        return self.rewards([Completion("Which color?", answer, text) for text in texts], lambda: self.stop)

    def totals(self, *texts):
        return [found.total for found in self(*texts)]


def later(seconds, do):
    threading.Timer(seconds, do).start()


def when(true, do):
    """Does something as soon as a condition holds, however slow the machine is."""

    def wait():
        while not true():
            time.sleep(0.005)
        do()

    threading.Thread(target=wait, daemon=True).start()


def times(server, word):
    return sum(word in asked["messages"][1]["content"] for _, asked in server.requests)


def test_verdicts_are_asked_for_once_and_kept(server, tmp_path):
    judged = Judged(server, tmp_path)
    assert judged.totals("fine", "half", "fine") == [1.0, 0.5, 1.0] and len(server.requests) == 2
    assert judged.totals("half", "new") == [0.5, 1.0] and len(server.requests) == 3
    assert Judged(server, tmp_path).totals("new", "fine") == [1.0, 1.0] and len(server.requests) == 3, "known after a restart"
    assert judged("several", answer=("red", "crimson", "red"))[0].total == 1.0
    assert "standard answer: red or crimson\n" in server.requests[-1][1]["messages"][1]["content"]
    assert judged("nothing", answer=())[0].reason == "judge: no reference answer" and not judged.said


def test_questions_without_a_verdict_are_missing(server, tmp_path):
    """Whatever the server does with one question: it serves others, so it is not waited for."""
    judged = Judged(server, tmp_path)
    words = ["fine", "nonsense", "lies", "refused", "blocked", "slow", "broken", "garbage", "half"]
    found = judged(*words)
    assert [one.total for one in found] == [1.0, *[None] * 7, 0.5] and not judged.said
    assert {word: one.reason.removeprefix("judge: ") for word, one in zip(words[1:-1], found[1:-1], strict=True)} == {
        "nonsense": "verdict that cannot be read",
        "lies": "verdict that cannot be read",
        "refused": 'status 400 {"error": "filtered"}',
        "blocked": 'status 403 {"error": "moderation"}',
        "slow": "timeout",
        "broken": "status 503",
        "garbage": "reply that is no chat completion",
    }
    # On a busy machine a try may time out before the server has read it.
    assert 1 <= times(server, "blocked") <= 2 and 1 <= times(server, "broken") <= 2 and times(server, "nonsense") == 1
    with pytest.raises(GlimpseError, match="7 of 9 completions have no reward"):
        check_missing(found, 0.5)
    alone = judged("broken again")[0]
    assert alone.reason == "judge: status 503" and not judged.said, "a question of ours shows that the server is there"


def test_many_questions_that_are_not_served_do_not_hide_others(server, tmp_path):
    """After several refusals in a row the others of a round are not asked, which does not count against them."""
    words = [f"blocked {i}" for i in range(12)] + [f"broken {i}" for i in range(12)] + ["fine", "half"]
    assert Judged(server, tmp_path, at_once=1).totals(*words) == [None] * 24 + [1.0, 0.5]


@pytest.mark.parametrize("down", [401, 403, 404, 429, 500, 503, "hang"])
def test_an_outage_costs_waiting(server, tmp_path, down):
    judged, server.down = Judged(server, tmp_path), down
    when(lambda: judged.said, lambda: setattr(server, "down", None))
    assert judged.totals("fine", "half") == [1.0, 0.5]
    assert len(judged.said) == 2 and "does not answer" in judged.said[0] and "answers again" in judged.said[1]
    assert str(down) in judged.said[0] or "timeout" in judged.said[0]


def test_an_outage_in_the_middle(server, tmp_path):
    judged, words = Judged(server, tmp_path, at_once=1), [f"fine {i}" for i in range(12)]
    when(lambda: len(server.requests) > 4, lambda: setattr(server, "down", 503))
    when(lambda: judged.said, lambda: setattr(server, "down", None))
    assert judged.totals(*words) == [1.0] * 12 and len(judged.said) == 2
    assert Judged(server, tmp_path).totals(*words) == [1.0] * 12


def test_a_rate_limit_is_no_fault_of_a_question(server, tmp_path):
    judged = Judged(server, tmp_path)
    assert judged.totals("limited") == [1.0] and times(server, "limited") == 4 and not judged.said
    with pytest.raises(GlimpseError, match=r"no verdict for 1e-06 hours \(outage_hours\), last: status 429"):
        Judged(server, tmp_path, hours=1e-6)("limited too")


def test_a_server_that_is_not_there_yet(server, tmp_path):
    gone = Server()
    gone.shutdown()
    gone.server_close()
    started = []
    later(0.5, lambda: started.append(Server(gone.server_address[1])))
    judged = Judged(gone, tmp_path)
    assert judged.totals("fine") == [1.0] and "ConnectError" in judged.said[0]
    started[0].shutdown()


@pytest.mark.parametrize("down", [401, 429, "hang"])
def test_an_outage_that_does_not_end(server, tmp_path, down):
    judged, server.down = Judged(server, tmp_path, hours=0.5 / 3600), down
    start = time.monotonic()
    with pytest.raises(GlimpseError, match=r"judge.url='http://127.0.0.1:\d+/v1': no verdict for .* hours"):
        judged("fine", "half")
    assert 0.4 < time.monotonic() - start < 5 and len(judged.said) == 1


def test_stopping_while_waiting(server, tmp_path):
    judged, server.down = Judged(server, tmp_path), 503
    later(0.5, lambda: setattr(judged, "stop", True))
    start = time.monotonic()
    with pytest.raises(Stopped):
        judged("fine")
    assert time.monotonic() - start < 2 and len(judged.said) == 1
    asked = len(server.requests)
    time.sleep(0.3)
    assert len(server.requests) == asked, "nothing goes on behind"
    server.down, judged.stop = None, False
    assert judged.totals("fine") == [1.0]


def test_verdicts_before_a_stop_are_kept(server, tmp_path):
    judged = Judged(server, tmp_path, at_once=1, timeout=5)
    later(0.5, lambda: setattr(judged, "stop", True))
    with pytest.raises(Stopped):
        judged("fine", "slow")
    assert Judged(server, tmp_path).totals("fine") == [1.0] and times(server, "fine") == 1


def test_other_rewards_do_not_wait_for_the_judge(server, tmp_path):
    (tmp_path / "mine.py").write_text("calls = []\nasync def f(completions):\n    calls.append(1)\n    return [2.0] * len(completions)\n")
    judged = Judged(server, tmp_path, terms=("judge", "exact_match", f"{tmp_path}/mine.py:f"))
    assert judged.totals("red", "nonsense") == [4.0, None]
    assert judged("nonsense")[0].terms == {"judge": None, "exact_match": 0.0, f"{tmp_path}/mine.py:f": 2.0}
    server.down = 503
    (tmp_path / "bad.py").write_text("def f(completions):\n    return 1\n")
    with pytest.raises(GlimpseError, match="not a list"):  # at once: a fault is not waited with
        Judged(server, tmp_path, terms=("judge", f"{tmp_path}/bad.py:f"))("new")
