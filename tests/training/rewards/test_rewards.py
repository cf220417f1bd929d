"""Rewards: the named ones, those of users, what is missing, and the settings that are refused."""

import math
import sys
import threading
import time

import pytest

from gp_jax import GlimpseError
from gp_jax.evaluation.settings import JudgeConfig
from gp_jax.training.rewards import rewarding as module
from gp_jax.training.rewards.functions import JUDGE, REWARDS, find_boxes, find_choice
from gp_jax.training.rewards.rewarding import Completion, Rewarded, Rewards, Stopped, check_missing
from gp_jax.training.rewards.settings import COLUMNS, RewardConfig, RewardTerm, check_terms, columns_of, find_function

pytestmark = pytest.mark.quick


def made(text, answer="red", **more):
    return Completion(**dict(question="Which color?", answer=answer, text=text, tokens=(1, 2), limit=10, id="r1", dataset="own") | more)


def one(name, text, answer="red", **more):
    """The reward by a named function, None when it is missing."""
    return rewarded(name, [made(text, answer, **more)])[0].total


def rewarded(name, completions, tmp_path=None, **config):
    return Rewards(RewardConfig(terms=(RewardTerm(name),), **config), (), tmp_path)(completions)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes a file with reward functions and returns its path."""
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(text, name="mine.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


@pytest.mark.parametrize(
    ("name", "text", "answer", "reward"),
    [
        ("exact_match", " Red. ", "red", 1.0),
        ("exact_match", "a red one", "red", 0.0),
        ("exact_match", "crimson", ("red", "crimson"), 1.0),
        ("exact_match", "red", (), None),
        ("precision_match", " Yes ", "yes", 1.0),
        ("precision_match", "yes.", "yes", 0.0),
        ("precision_match", "no", ("yes", "No"), 1.0),
        ("vqa_accuracy", "The two", "2", 1.0),
        ("vqa_accuracy", "red", ("red",) * 2 + ("blue",) * 8, 0.6),
        ("anls", "abcd", "abce", 0.75),
        ("anls", "zzzz", "abce", 0.0),
        ("token_f1", "a red house", "red", 2 / 3),
        ("token_f1", "", "red", 0.0),
        ("choice_letter", "(b)", "B", 1.0),
        ("choice_letter", "B", "(B) blue", 1.0),
        ("choice_letter", "blue", "B", 0.0),
        ("choice_letter", "B", "blue", None),
        ("choice_letter", "C", ("B", "C"), 1.0),
    ],
)
def test_named_rewards_of_text(name, text, answer, reward):
    assert one(name, text, answer) == (reward if reward is None else pytest.approx(reward))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        *[
            (text, "A")
            for text in ("A", "a", "(a)", "a.", "[A]", "**A**", " A) ", '"A"', "Answer: A", "answer:a", "The answer is A because")
        ],
        ("The answer is (a).", "A"),
        ("**Answer:** C", "C"),
        ("The correct answer is: **C**", "C"),
        ("the final answer is option c", "C"),
        ("I would take option B here", "B"),
        ("B. blue", "B"),
        ("(b) blue", "B"),
        ("b) blue", "B"),
        ("It is blue (B)", "B"),
        ("I think it is D", "D"),
        ("The answer is C. Answer: B", "C"),
        ("The answer is a red car", None),
        ("A red car", None),
        ("I am not sure", None),
        ("A, B and C", None),
        ("B or C", None),
        ("blue", None),
        ("", None),
        ("The U.S. flag", None),
        ("Is the answer blue?", None),
        ("E" * 50_000, None),
        ("answer " * 50_000, None),
        ("(" * 50_000, None),
        ("answer is " + "*" * 50_000, None),
    ],
)
def test_the_letter_of_a_choice(text, letter):
    start = time.process_time()
    assert find_choice(text) == letter
    assert time.process_time() - start < 1, "no pattern goes through a text again and again"


def test_iou_of_boxes():
    half = {"boxes": ((0.0, 0.0, 0.5, 1.0),)}
    assert one("box_iou", "[0, 0, 10, 10]", "[0, 0, 10, 10]") == 1.0
    assert one("box_iou", "It is at [ 0,0 , 10, 5 ].", "[0, 0, 10, 10]") == 0.5
    assert one("box_iou", "[20, 20, 30, 30]", "[0, 0, 10, 10]") == 0.0
    assert one("box_iou", "[0, 0, 5, 10]", ("[0, 0, 10, 10]", "[0, 0, 5, 10]")) == 1.0, "the best reference counts"
    assert one("box_iou", "no box", "[0, 0, 10, 10]") == 0.0
    assert one("box_iou", "[0, 0, 10, 10] or [5, 5, 9, 9]", "[0, 0, 10, 10]") == 0.0, "several to choose from"
    assert one("box_iou", "[10, 10, 0, 0]", "[0, 0, 10, 10]") == 0.0
    assert one("box_iou", "[0, 0, 10, 10]", "[0, 0, 0, 10]") is None
    assert one("box_iou", "[0, 0, 0.5, 1]", **half) == 1.0, "shares"
    assert one("box_iou", "[0, 0, 50, 200]", size=(100, 200), **half) == 1.0, "pixels"
    assert one("box_iou", "[0, 0, 50, 200]", **half) is None, "pixels of a picture of unknown size"
    assert one("box_iou", "[0, 0, 50, 200]") is None, "no reference"
    assert one("box_iou", "nothing", **half) == 0.0
    assert find_boxes("[[1, 2, 3, 4], [.5, -1.5, 2., 3]] [1, 2, 3] (1, 2, 3, 4)") == [(1, 2, 3, 4), (0.5, -1.5, 2, 3)]
    assert find_boxes("[" * 100_000 + "1," * 100_000) == []


def test_length_penalty():
    def penalty(tokens, **more):
        return one("length_penalty", "x", tokens=(1,) * tokens, **more)

    assert [penalty(n) for n in (0, 5, 6, 10, 12)] == [0.0, 0.0, pytest.approx(-0.2), -1.0, -1.0]
    assert math.copysign(1, penalty(3)) == 1
    assert penalty(3, cut=True) == -1.0 and penalty(3, limit=0) is None
    assert rewarded("length_penalty", [made("x", tokens=(1,) * 5)], length_free=0.0)[0].total == -0.5


def test_terms_are_weighted_and_each_source_has_its_own(tmp_path):
    config = RewardConfig(terms=(RewardTerm("exact_match", 2.0), RewardTerm("length_penalty", 0.5)))
    rewards = Rewards(config, ((), (RewardTerm("precision_match"),)), tmp_path / "verdicts.jsonl")
    first, second = rewards([made("red.", cut=True), made("red.", source=1)])
    assert first == Rewarded(1.5, {"exact_match": 1.0, "length_penalty": -1.0}) and second == Rewarded(0.0, {"precision_match": 0.0})
    missing = rewards([made("red", answer=())])[0]
    assert missing.total is None and missing.terms == {"exact_match": None, "length_penalty": 0.0}
    assert missing.reason == "exact_match: no reference answer"
    assert rewards([]) == [] and not (tmp_path / "verdicts.jsonl").exists()
    huge = RewardConfig(terms=(RewardTerm("exact_match", 1e308), RewardTerm("token_f1", 1e308)))
    assert Rewards(huge, (), tmp_path)([made("red")])[0].total is None


# Functions of users ---------------------------------------------------------------------------------------------------------

MINE = """
import asyncio

def length(completions, **kwargs):
    assert kwargs["limit"] == [10, 10] and kwargs["prompts"] == kwargs["question"] == ["Which color?"] * 2
    assert kwargs["boxes"] == [(), ()] and kwargs["id"] == ["r1", "r1"] and kwargs["completion_ids"] == [[1, 2]] * 2
    return [len(text) for text in completions]

def narrow(answer, completions):
    return [text == right for text, right in zip(completions, answer)]

async def later(prompts, completion_ids, id, dataset, source, boxes, **rest):
    await asyncio.sleep(0)
    return [len(ids) + number for ids, number in zip(completion_ids, source)]

def returns_a_coroutine(**columns):
    return later(**columns)

class Scorer:
    async def __call__(self, completions, **kwargs):
        return (1.0 for _ in completions)

    def own(self, completions):
        completions.reverse()
        return [0.5] * len(completions)

scorer = Scorer()

def some(completions, **kwargs):
    values = {"none": None, "nan": float("nan"), "inf": 10**400, "text": "1.0", "true": True, "int": 2}
    return [values[text] for text in completions]
"""


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("length", [3, 4]),
        ("narrow", [1, 0]),
        ("later", [2, 2]),
        ("returns_a_coroutine", [2, 2]),
        ("scorer", [1, 1]),
        ("scorer.own", [0.5, 0.5]),
    ],
)
def test_functions_of_users(file, function, expected):
    name = f"{file(MINE)}:{function}"
    assert [found.total for found in rewarded(name, [made("red"), made("blue")])] == expected


def test_a_module_in_the_working_directory(file, tmp_path, monkeypatch):
    file("def f(completions, **kwargs):\n    return [3.0] * len(completions)\n", "my_rewards_of_a_test.py")
    monkeypatch.chdir(tmp_path)
    assert rewarded("my_rewards_of_a_test:f", [made("x")])[0].total == 3.0


def test_what_is_no_number_is_missing(file):
    found = rewarded(f"{file(MINE)}:some", [made(text) for text in ("none", "nan", "inf", "text", "true", "int")])
    assert [one.total for one in found] == [None, None, None, None, 1.0, 2.0]
    assert "some: None" in found[0].reason and "nan is not a finite number" in found[1].reason


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return [1.0]", "got 2 completions and returned 1 rewards"),
        ("return [1.0] * 3", "got 2 completions and returned more"),
        ("return None", "returned None, which is not a list"),
        ("return 0.5", "returned 0.5, which is not a list"),
        ("return {0: 1.0, 1: 1.0}", "not a list"),
        ("return '11'", "not a list"),
        ("return (1 / 0 for _ in completions)", "not a list"),
        ("return completions[7]", "failed in mine.py line 2: IndexError: list index out of range"),
        ("raise StopIteration", "StopIteration"),
        ("raise SystemExit", "SystemExit"),
        ("import asyncio; raise asyncio.CancelledError", "CancelledError"),
        ("import json; json.loads('x')", "failed in mine.py line 2: JSONDecodeError"),
    ],
)
@pytest.mark.parametrize("kind", ["def", "async def"])
def test_a_fault_of_a_function_stops_the_run(file, body, said, kind):
    name = f"{file(f'{kind} f(completions, **kwargs):{chr(10)}    {body}')}:f"
    with pytest.raises(GlimpseError, match="mine.py:f") as error:
        rewarded(name, [made("a"), made("b")])
    assert said in str(error.value)


def test_functions_run_at_the_same_time(file):
    text = "import threading, asyncio\nboth = threading.Barrier(2, timeout=5)\n"
    text += "def f(completions):\n    both.wait()\n    return [1.0]\n"
    text += "async def g(completions):\n    await asyncio.to_thread(both.wait)\n    return [1.0]\n"
    path = file(text)
    config = RewardConfig(terms=(RewardTerm(f"{path}:f"), RewardTerm(f"{path}:g")))
    assert Rewards(config.check(), (), None)([made("x")])[0].total == 2.0


@pytest.mark.parametrize("body", ["def f(completions):\n    time.sleep(60)", "async def f(completions):\n    time.sleep(60)"])
def test_a_function_that_hangs_can_be_stopped(file, body, monkeypatch):
    monkeypatch.setattr(module, "POLL", 0.05)
    monkeypatch.setattr(module, "GRACE", 0.05)
    rewards = Rewards(RewardConfig(terms=(RewardTerm(f"{file(f'import time{chr(10)}{body}')}:f"),)), (), None)
    start = time.monotonic()
    with pytest.raises(Stopped):
        rewards([made("x")], stopped=lambda: True)
    assert time.monotonic() - start < 5
    assert all(thread.daemon for thread in threading.enumerate() if thread.name == "rewards"), "the process can end"


def test_functions_that_cannot_be_used_are_refused(file, tmp_path):
    good = file("import os\nVALUE = 1\nclass C: pass\ndef f(completions, solution): pass\ndef g(completions, /): pass\n", "good.py")
    for name, said in {
        "no_such_module_here:f": "cannot be imported",
        "os.path:no_such": "has no 'no_such'",
        f"{good}:VALUE": "is not a function",
        f"{good}:C": "is not a function",
        f"{good}:h": "it has C, f, g",
        f"{good}:f": "needs a parameter 'solution'",
        f"{good}:g": "needs a parameter 'completions'",
        f"{tmp_path}/absent.py:f": "no such file",
        f"{file('def f(:', 'broken.py')}:f": "SyntaxError",
        f"{file('raise SystemExit', 'quits.py')}:f": "SystemExit",
        ":f": "must be module:function",
        "os:": "must be module:function",
    }.items():
        with pytest.raises(GlimpseError, match=r"rewards\.terms\[0\]\.name") as error:
            RewardConfig(terms=(RewardTerm(name),)).check()
        assert said in str(error.value), error.value
    assert columns_of(find_function(f"{file(MINE, 'b.py')}:narrow"), "b") == ("answer", "completions")
    assert set(columns_of(find_function(f"{file(MINE, 'b.py')}:length"), "b")) == set(COLUMNS)


# Settings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (dict(terms=(RewardTerm("exct_match"),)), "rewards.terms[0].name='exct_match' is not one of .* did you mean 'exact_match'"),
        (dict(terms=()), "rewards.terms is empty"),
        (dict(terms=(RewardTerm(), RewardTerm())), "rewards.terms[1].name='exact_match' is named twice"),
        (dict(terms=("exact_match",)), "rewards.terms[0]='exact_match' must be a RewardTerm"),
        (dict(terms="judge"), "rewards.terms='judge' must be a list"),
        (dict(terms=(RewardTerm(3),)), "must be a RewardTerm with a name"),
        (dict(terms=(RewardTerm(weight=math.nan),)), "rewards.terms[0].weight=nan is not a finite number"),
        (dict(terms=(RewardTerm(weight=10**400),)), "is not a finite number"),
        (dict(terms=(RewardTerm(weight="1"),)), "rewards.terms[0].weight='1' is not a finite number"),
        (dict(terms=(RewardTerm("judge"),)), "rewards.terms[0].name='judge' needs an endpoint: judge.url"),
        (dict(judge=JudgeConfig(url="ftp://x")), "judge.url='ftp://x'"),
        (dict(judge=None), "rewards.judge=None"),
        (dict(most_missing=1.5), "rewards.most_missing=1.5 is not in 0..1"),
        (dict(most_missing=math.nan), "rewards.most_missing=nan"),
        (dict(outage_hours=-1), "rewards.outage_hours=-1"),
        (dict(outage_hours="12"), "rewards.outage_hours='12'"),
        (dict(length_free=1.0), "rewards.length_free=1 leaves no room"),
    ],
)
def test_settings_that_are_refused(config, said):
    with pytest.raises(GlimpseError, match=said.replace("[", r"\[").replace("]", r"\]")):
        RewardConfig(**config).check()


def test_settings_that_are_fine():
    assert RewardConfig().check() == RewardConfig()
    for name in (*REWARDS, JUDGE):
        check_terms((RewardTerm(name),), JudgeConfig(url="http://localhost/v1", model="m"), "data.sources[0].rewards")


def test_too_many_without_a_reward():
    good, bad = Rewarded(1.0, {}), Rewarded(None, {}, "judge: timeout")
    check_missing([], 0.0)
    check_missing([good] * 9 + [bad], 0.1)
    with pytest.raises(GlimpseError, match=r"3 of 10 completions have no reward \(most_missing=0.1\): 2 x judge: timeout, 1 x mine: None"):
        check_missing([good] * 7 + [bad, bad, Rewarded(None, {}, "mine: None")], 0.1)
    with pytest.raises(GlimpseError, match="1 of 10"):
        check_missing([good] * 9 + [bad], 0.0)
