"""The judge against a local server that works, fails, is slow and talks nonsense."""

import json

import pytest
from judge_server import Server

from gp_jax import GlimpseError
from gp_jax.evaluation.judge import GIVE_UP, REFUSALS, judge
from gp_jax.evaluation.settings import EvalConfig, JudgeConfig
from gp_jax.evaluation.verdicts import read_score

pytestmark = pytest.mark.quick


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()


def config(server, **changes) -> JudgeConfig:
    return JudgeConfig(**dict(url=server.url, model="m", retries=1, timeout=0.5, patience=0.01) | changes)


def question(answer: str) -> tuple[str, str, str]:
    return ("which color?", "red", answer)


def test_scores_failures_and_what_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    cache = tmp_path / "verdicts.jsonl"
    words = ["fine", "half", "busy", "broken", "refused", "slow", "garbage", "nonsense"]
    found = judge(config(server), [question(word) for word in words] + [question("fine")], cache, quiet=True)
    assert found.scores == {question("fine"): 1.0, question("half"): 0.5, question("busy"): 1.0}
    reasons = {word: found.failures[question(word)] for word in words[3:]}
    assert reasons["broken"] == "status 503" and reasons["refused"].startswith("status 400") and "filtered" in reasons["refused"]
    assert reasons["slow"] == "timeout" and "no chat completion" in reasons["garbage"] and "cannot be read" in reasons["nonsense"]
    path, asked = server.requests[0]
    assert path == "/v1/chat/completions" and (asked["model"], asked["temperature"], asked["seed"]) == ("m", 0, 0)
    assert set(server.keys) == {"Bearer secret"} and "secret" not in cache.read_text()
    assert sum("fine" in asked["messages"][1]["content"] for _, asked in server.requests) == 1, "equal answers are asked about once"

    before = len(server.requests)
    with cache.open("ab") as file:
        file.write(b'{"key": "half-writ')  # a killed run
    again = judge(config(server), [question("fine"), question("half"), question("new")], cache, quiet=True)
    assert len(again.scores) == 3 and again.cached == 2 and len(server.requests) == before + 1
    assert "3 answers scored (2 known before)" in again.text()
    assert judge(config(server), [question("new")], cache, quiet=True).cached == 1, "behind the half-written line"
    other = judge(config(server, seed=1), [question("fine")], cache, quiet=True)
    assert other.cached == 0, "another seed is another question"


def test_a_key_that_is_refused_and_a_server_that_is_gone_are_not_asked_forever(server, tmp_path):
    found = judge(config(server, at_once=1), [question(f"denied {i}") for i in range(30)], tmp_path / "a", quiet=True)
    assert len(server.requests) == 1 and len(found.failures) == 30 and "401" in found.text()
    found = judge(config(server, at_once=1), [question(f"blocked {i}") for i in range(30)], tmp_path / "c", quiet=True)
    assert len(server.requests) == 1 + REFUSALS and len(found.failures) == 30 and "403" in found.text()
    gone = JudgeConfig(url="http://127.0.0.1:9/v1", model="m", retries=0, at_once=1)
    found = judge(gone, [question(str(i)) for i in range(3 * GIVE_UP)], tmp_path / "b", quiet=True)
    assert len(found.failures) == 3 * GIVE_UP and not found.scores and "in a row" in found.text()


def test_one_refused_question_does_not_end_the_asking(server, tmp_path):
    """As by moderation. Only several in a row do, with no verdict in between."""
    words = [f"{'blocked' if i % REFUSALS else 'fine'} {i}" for i in range(4 * REFUSALS)]
    found = judge(config(server, at_once=1), [question(word) for word in words], tmp_path / "a", quiet=True)
    assert len(server.requests) == len(words) and len(found.scores) == 4 and "403" in found.text()


def test_so_many_a_minute(server, tmp_path):
    judge(config(server, per_minute=1200), [question(str(i)) for i in range(6)], tmp_path / "a", quiet=True)
    assert server.times[-1] - server.times[0] >= 0.2, "five pauses of 50 ms, less what connections take"


@pytest.mark.parametrize(
    ("verdict", "score"),
    [
        ("score: 0.8", 0.8),
        ("Score: 1", 1.0),
        ('{"score": 0.25}', 0.25),
        ("**score:** 0", 0.0),
        ("score: 1.0.", 1.0),
        ("score: .5", 0.5),
        ("score: 1/1", 1.0),
        ("0.7", 0.7),
        ("Score: 0.5. So the score: 0.5", 0.5),
        ("score: 0.5 or score: 0.6", None),
        ("score: 8", None),
        ("score: 8/10", None),
        ("score: 0.8 out of 10", None),
        ("score: 80%", None),
        ("score: 1%", None),
        ("score: 1 %", None),
        ("score: 0.5 percent", None),
        ("Score (0-1): 0.8", 0.8),
        ("**Score** (0 to 1): **0.8**", 0.8),
        ("Score (0-10): 1", None),
        ("Score (out of 1): 0.5", 0.5),
        ("score: 0,5", None),
        ("score: 1,0", None),
        ("score: 0-1", None),
        ("score: 0 \u2013 1", None),
        ("score: 0 to 1 is the range", None),
        ("score: 0.5 or 0.6", None),
        ("score: 0.5-0.7", None),
        ("score: 1e-1", None),
        ("score: 1 x 10^-1", None),
        ("score: 1.2.3", None),
        ("score: 1st", None),
        ("Score: 1 of 10", None),
        ("Score: 1 of a possible 10", None),
        ("score: 1 (out of 5)", None),
        ("score: **1** / 5", None),
        ("score: 1 on a scale of 5", None),
        ("score: 1 on a scale from 0 to 10", None),
        ("score: 0.7 on a scale from 0 to 1", 0.7),
        ("score: 0.8 out of 1", 0.8),
        ("score: 0.8 (out of 1.0)", 0.8),
        ("score: 0.8/1.0.", 0.8),
        ("score: 1/1.5", None),
        ("underscore 0", None),
        ("scored 0 goals", None),
        ("I cannot score. 1 fact is missing", None),
        ("score: 0.8\n- 1 fact is missing", 0.8),
        ("score: <0.8>", 0.8),
        ("score: 0-1\nscore: 0.8", None),
        ("score: -1", None),
        ("score: <score>", None),
        ("The score is high.", None),
        ("", None),
    ],
)
def test_scores_are_read_or_not(verdict, score):
    assert read_score(verdict) == score


def test_settings_that_cannot_be():
    wrong = [(dict(url="x"), "url"), (dict(url="http://x"), "model"), (dict(url="http://x", model="m", at_once=0), "at_once")]
    wrong += [(dict(url=url, model="m"), "judge.url") for url in ("http://[::1", "http://", "http://x:port", "http://x\n/v1")]
    for changes, name in wrong:
        with pytest.raises(GlimpseError, match=name):
            EvalConfig(judge=JudgeConfig(**changes)).check()


@pytest.mark.parametrize("key", ["sécret", "secret\n", "sec ret"])
def test_keys_that_no_request_can_carry_are_found_before_work_begins(monkeypatch, key):
    """And are not shown."""
    monkeypatch.setenv("A_KEY", key)
    with pytest.raises(GlimpseError, match="A_KEY") as found:
        EvalConfig(judge=JudgeConfig(url="http://x/v1", model="m", key="A_KEY")).check()
    assert key not in str(found.value)
    monkeypatch.delenv("A_KEY")
    EvalConfig(judge=JudgeConfig(url="http://x/v1", model="m", key="A_KEY")).check()


def test_verdicts_that_are_kept_are_read_as_new_ones(server, tmp_path):
    """What an older reader scored wrongly is asked again."""
    cache = tmp_path / "verdicts.jsonl"
    judge(config(server), [question("fine")], cache, quiet=True)
    line = json.loads(cache.read_text())
    cache.write_text(json.dumps(line | {"score": 0.0, "verdict": "score: 0,5"}) + "\n")
    again = judge(config(server), [question("fine")], cache, quiet=True)
    assert again.cached == 0 and again.scores == {question("fine"): 1.0}
