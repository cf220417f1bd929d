"""Times of an evaluation: plans take turns, and a pass in which programs were made is not timed."""

import dataclasses

import pytest
from evaluation_tools import PLANS, answers, evaluate, made_up, make_home, row

from gp_jax import GlimpseVLM
from gp_jax.config.model import GlimpseConfig
from gp_jax.evaluation.plans import make_plans
from gp_jax.evaluation.results import read_predictions
from gp_jax.evaluation.runner import PASSES, in_turn

ROWS = [row(number) for number in range(5)]  # three batches


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("times"))


@pytest.fixture
def calls(monkeypatch):
    """A model whose calls make programs for the first `making[0]` passes over what is asked. Gives these and the calls per question."""
    making, seen = [1], {}

    def answer(vlm, images, questions, **options):
        key = tuple(questions), str(options.get("prune"))
        seen[key] = seen.get(key, 0) + 1
        first = seen[key] <= making[0]
        timings = {"compile": 50.0, "decode": 4.0} if first else {"compile": 0.0, "decode": 0.2}
        return [dataclasses.replace(one, timings=timings) for one in made_up(vlm, images, questions, **options)]

    monkeypatch.setattr(GlimpseVLM, "answer", answer)
    return making, seen


def test_passes_that_make_programs_are_not_timed(home, tmp_path, calls, capsys):
    assert evaluate(home, tmp_path, ROWS) == 0
    shares = {tuple(round(value, 3) for value in p.seconds.values()) for p in answers(tmp_path).values()}
    assert shares == {(26.9, 0.1), (53.8, 0.2)}, "of a batch of two, and of the last one; what the first pass took more is apart"
    assert set(calls[1].values()) == {2}, "a pass that is not timed, and one that is"
    said = capsys.readouterr().out
    assert f"first calls: {3 * len(PLANS) * 53.8:.1f} s" in said and "left out" not in said
    assert "not in the times" not in (tmp_path / "out" / "report" / "index.html").read_text()


def test_answers_without_a_time_are_left_out_and_counted(home, tmp_path, calls, capsys):
    calls[0][0] = PASSES
    assert evaluate(home, tmp_path, ROWS) == 0
    assert all(set(p.seconds) == {"compile"} and not p.timed for p in answers(tmp_path).values())
    assert set(calls[1].values()) == {PASSES}
    count = 5 * len(PLANS)
    assert f"{count} of {count} answers have no time" in capsys.readouterr().out


def test_plans_take_turns(home, tmp_path, calls):
    """All plans answer a batch before the next one; another plan is first each time; those that match the glimpse come behind it."""
    assert evaluate(home, tmp_path, ROWS) == 0
    order = [(p.plan, p.sample) for p in read_predictions(tmp_path / "out" / "predictions.jsonl") if p.plan != "random-pooled"]
    batches = [order[start : start + 6] for start in (0, 6, 12)]
    assert [len({sample for _, sample in batch}) for batch in batches] == [2, 2, 1]
    assert [list(dict.fromkeys(plan for plan, _ in batch)) for batch in batches] == [
        ["dense", "glimpse", "random"],
        ["glimpse", "dense", "random"],
        ["dense", "glimpse", "random"],
    ]


def test_every_plan_is_first_at_times():
    plans = make_plans(("dense", "oracle", "glimpse-11.1", "random", "glimpse"), GlimpseConfig((0,), 0))
    firsts = {in_turn(plans, turn)[0].name for turn in range(4)}
    assert firsts == {"dense", "oracle", "glimpse-11.1", "glimpse"}
