"""One bad row ends nothing: it is named, counted and left out of every plan, and the others are answered."""

import csv
import json
import re

import pytest
from evaluation_tools import PLANS, answers, evaluate, left_out, made_up, make_home, row

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.evaluation.runner import GIVE_UP

HALF = "half \ud800 a character"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("rows"))


@pytest.fixture(autouse=True)
def batches(monkeypatch) -> list[list[str]]:
    """Questions of all batches that were answered."""
    found = []

    def answer(self, images, questions, **options):
        made = made_up(self, images, questions, **options)
        found.append(list(questions))
        return made

    monkeypatch.setattr(GlimpseVLM, "answer", answer)
    return found


def test_questions_that_cannot_be_asked_are_left_out(home, tmp_path, batches, capsys):
    words = ["<|image_pad|>", "<|vision_start|><|image_pad|><|vision_end|>", HALF, "<|image_pad|>" * 40, "\0<|image_pad|>"]
    rows = [row(0), row(2), row(3), *(row(1, question=f"what is {bad}?") for bad in words)]
    assert evaluate(home, tmp_path, rows) == 0
    assert {sample for sample, _ in answers(tmp_path)} == {"own.jsonl:1", "own.jsonl:2", "own.jsonl:3"}
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith(PLANS)][: len(PLANS)] == list(PLANS), "a line per plan"
    assert set(left_out(tmp_path)) == {f"own.jsonl:{n}" for n in range(4, 9)} and len(answers(tmp_path)) == 3 * len(PLANS)
    assert (said.out + said.err).count("own.jsonl:4 is left out") <= 1 and "5 of 8 rows" in said.out
    assert "5 of 8 rows" in (tmp_path / "out" / "report" / "index.html").read_text()
    assert {len(questions) for questions in batches} <= {1, 2} and len(batches) <= 3 * len(PLANS), "none is asked twice"
    before = (tmp_path / "out" / "predictions.jsonl").read_bytes()
    assert evaluate(home, tmp_path, rows) == 0 and (tmp_path / "out" / "predictions.jsonl").read_bytes() == before


def test_halves_of_characters_can_be_written_everywhere(home, tmp_path, capsys):
    rows = [row(0, answer=HALF, id=f"id {HALF}", dataset=f"=set {HALF}|<b>\n"), row(1), row(2)]
    assert evaluate(home, tmp_path, rows) == 0
    found = answers(tmp_path) | {(sample, None): why for sample, why in left_out(tmp_path).items()}
    assert len({sample for sample, _ in found}) == 3
    for name in ("table.csv", "by_family.csv", "table.md", "by_family.md", "report/index.html"):
        (tmp_path / "out" / name).read_text("utf-8").encode("utf-8")
    families = [line["family"] for line in csv.DictReader((tmp_path / "out" / "by_family.csv").open())]
    assert not any(name.startswith("=") for name in families)
    assert json.loads((tmp_path / "out" / "by_family.json").read_text())


def test_samples_that_fail_under_one_plan_are_left_out_of_all(home, tmp_path, monkeypatch):
    """Whatever is raised, and they are asked again by the next run."""
    errors = [GlimpseError("too long"), ValueError("shapes"), MemoryError(), RuntimeError("RESOURCE_EXHAUSTED")]

    def answer(self, images, questions, **options):
        for n, error in enumerate(errors):
            if options.get("prune") is not None and any(f"number {n}" in question for question in questions):
                raise error
        return made_up(self, images, questions, **options)

    monkeypatch.setattr(GlimpseVLM, "answer", answer)
    rows = [row(n) for n in range(5)]
    assert evaluate(home, tmp_path, rows) == 0
    for why, error in zip(left_out(tmp_path).values(), errors, strict=True):
        assert why.startswith("plan 'glimpse': ") and (str(error) or type(error).__name__) in why
    assert {line["samples"] for line in json.loads((tmp_path / "out" / "table.json").read_text())} == {1}
    monkeypatch.setattr(GlimpseVLM, "answer", made_up)
    assert evaluate(home, tmp_path, rows) == 0 and not left_out(tmp_path)
    assert {line["samples"] for line in json.loads((tmp_path / "out" / "table.json").read_text())} == {5}


def test_what_fails_for_every_row_is_one_line(home, tmp_path, monkeypatch, capsys):
    def broken(self, *args, **options):
        raise ValueError("device lost")

    monkeypatch.setattr(GlimpseVLM, "answer", broken)
    rows = [row(n % 5, question=f"what is {n}?") for n in range(GIVE_UP + 9)]
    assert evaluate(home, tmp_path, rows) == 1
    assert f"{GIVE_UP} questions one after the other could not be answered" in capsys.readouterr().err
    assert evaluate(home, tmp_path, [row(0, question="<|image_pad|>"), row(1, question="<|image_pad|>")]) == 1
    assert re.search("nothing could be asked|no record that can be asked", capsys.readouterr().err)


def test_plans_that_no_row_can_have_are_found_before_work(home, tmp_path, capsys, batches):
    """A model of two layers is too shallow for PyramidDrop."""
    assert evaluate(home, tmp_path, [row(0)], plans=("dense", "pyramiddrop-25")) == 1
    assert "pyramiddrop" in capsys.readouterr().err and not batches
    assert evaluate(home, tmp_path, [row(0)], "--max-new-tokens", "99999999") == 1 and not batches


def test_names_do_not_reach_the_terminal_as_they_are(home, tmp_path, capsys):
    evil = "\x1b]0;title\x07\x1b[2J\u202e"
    rows = [row(0), row(1, id=evil, question="<|image_pad|>"), row(2, image=f"{evil}.png"), row(3, id=evil + "b", dataset=evil)]
    assert evaluate(home, tmp_path, rows) == 0
    said = capsys.readouterr()
    assert not set("\x1b\x07\u202e") & set(said.out + said.err.replace("\x1b[A", "")), "but what progress bars write"
    for name in ("table.csv", "by_family.csv", "table.md", "by_family.md"):
        assert "\x1b" not in (tmp_path / "out" / name).read_text()
