"""Going on with an evaluation whose data or whose number of questions is another one by now."""

import json
from pathlib import Path

import pytest
from evaluation_tools import PLANS, SIZES, make_home, row

from gp_jax.evaluation.command import main
from gp_jax.evaluation.results import Prediction, part_path, read_predictions


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("resume"))


def evaluate(home: Path, path: Path, rows: list[dict], *more: str) -> dict[tuple[str, str], Prediction]:
    """The predictions of a run over these rows, by sample and plan."""
    (path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"model": home / "model", "tasks": path / "own.jsonl", "images": home, "out": path / "out"}
    words |= {"batch": 2, "max-new-tokens": 2, "pictures": 0}
    assert main([word for name, value in words.items() for word in (f"--{name}", str(value))] + ["--plans", *PLANS, *more]) == 0
    return {(p.sample, p.plan): p for p in read_predictions(path / "out" / "predictions.jsonl")}


def lines(path: Path) -> int:
    return (path / "out" / "predictions.jsonl").read_bytes().count(b"\n")


def test_a_row_that_is_another_one_now_is_answered_again(home, tmp_path, capsys):
    """Rows without an id are called by their line: one more at the top moves them all."""
    rows = [row(0, id="a"), row(1), row(2)]
    evaluate(home, tmp_path, rows)
    before = lines(tmp_path)
    assert before == 3 * len(PLANS)
    evaluate(home, tmp_path, rows)
    assert lines(tmp_path) == before and "not used" not in capsys.readouterr().out

    found = evaluate(home, tmp_path, [rows[0], row(3), *rows[1:]])
    asked = {name: p.question[-2] for (name, plan), p in found.items() if plan == "dense"}
    assert asked == {"a": "0", "own.jsonl:2": "3", "own.jsonl:3": "1", "own.jsonl:4": "2"}
    said = capsys.readouterr().out
    assert f"{2 * len(PLANS)} saved answers are not used: questions" in said
    again = "1 saved answers of 'random-pooled' are not used" in said  # of the row that is the same, where another share matches now
    assert lines(tmp_path) == before + 3 * len(PLANS) + again and "'random'" not in said
    assert len({p.ratio for p in found.values() if p.plan == "random-pooled"}) == 1
    assert all(p.kept == found[name, "glimpse"].kept for (name, plan), p in found.items() if plan == "random")

    for change in (dict(answer="blue"), dict(image="4.png")):
        found = evaluate(home, tmp_path, [row(0, id="a", **change), row(3), *rows[1:]])
        assert f"{len(PLANS)} saved answers are not used: questions" in capsys.readouterr().out
    assert found["a", "dense"].sizes == ((28 * 11, 28 * 6),) and found["a", "dense"].total == 66


def test_other_limits_match_another_retention(home, tmp_path, capsys):
    """And parts of a killed run do not come before what is answered later."""
    rows = [row(number) for number in range(len(SIZES))]
    few = evaluate(home, tmp_path, rows, "--limit", "2")
    path = tmp_path / "out" / "predictions.jsonl"
    part_path(path, 1).write_bytes(path.read_bytes())
    capsys.readouterr()
    more = evaluate(home, tmp_path, rows)
    said = capsys.readouterr().out
    assert "2 saved answers of 'random-pooled' are not used" in said and "'random'" not in said and not part_path(path, 1).exists()
    ratios = {p.ratio for p in more.values() if p.plan == "random-pooled"}
    assert len(ratios) == 1 and ratios != {p.ratio for p in few.values() if p.plan == "random-pooled"}
    assert all((p.ratio is None) == (p.plan in ("dense", "glimpse")) for p in more.values())
    kept = {plan: [p.kept for p in more.values() if p.plan == plan] for plan in PLANS}
    assert abs(sum(kept["random-pooled"]) - sum(kept["glimpse"])) <= 1 and kept["random"] == kept["glimpse"]
    (tmp_path / "anew").mkdir()
    anew = evaluate(home, tmp_path / "anew", rows)
    assert {name: (p.prediction, p.keep) for name, p in more.items()} == {name: (p.prediction, p.keep) for name, p in anew.items()}
