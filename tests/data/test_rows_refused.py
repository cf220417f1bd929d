"""Rows that no stage can use: named, counted and left out, whatever is wrong with them; the work around them goes on."""

import json
import os
import time
from pathlib import Path

import pytest
from PIL import Image

from gp_jax.data import work
from gp_jax.data.formats import LONGEST, BadRow, parse_row
from gp_jax.data.prepare import TooManyBad, prepare
from gp_jax.data.prepared import open_prepared
from gp_jax.errors import GlimpseError

pytestmark = pytest.mark.quick

GOOD = {"image": "a.png", "question": "Which?", "answer": "this", "boxes": [[1, 2, 30, 40]]}
TURNS = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "this"}]
HALF = "\ud800"


def own(**changes) -> str:
    return json.dumps(GOOD | changes)


def benchmark(question: str = "Which?", answer: str = "this", **changes) -> str:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return json.dumps({"question_id": 5, "image": ["a.png", "a.png###[1, 2, 30, 20]"], "conversations": turns} | changes)


BAD = {
    **{f"half a surrogate in {name}": (own(**{name: f"x{HALF}"}), "field not text") for name in ("question", "answer", "id", "dataset")},
    "half a surrogate in the split": (own(split=f"x{HALF}"), "field not text"),
    "half a surrogate in the format": (own(box_format=HALF), "unknown box format"),
    "half a surrogate in the path": (own(image=f"{HALF}.png"), "image missing"),
    "half a surrogate in the mask's path": (own(boxes=None, mask=HALF), "mask missing"),
    "half a surrogate in a turn": (benchmark(answer=HALF), "field not text"),
    "half a surrogate in the first turn": (benchmark(question=HALF), "field not text"),
    "half a surrogate in the question's number": (benchmark(question_id=HALF), "field not text"),
    "half a surrogate behind the path": (benchmark(image=[f"a.png###{HALF}"]), "box not numbers"),
    "a null character": (own(question="Which\0?"), "field not text"),
    "a null character in the path": (own(image="a\0.png"), "image missing"),
    "an answer without a value": (own(answer=float("nan")), "field not text"),
    "an answer without an end": (own()[:-1] + ', "answer": 1e999}', "field not text"),
    "an id that is a list": (own(id=[1]), "field not text"),
    "an id that is true": (own(id=True), "field not text"),
    "a long question": (own(question="why " * LONGEST), "field too long"),
    "a long answer in a turn": (benchmark(answer="why " * LONGEST), "field too long"),
    "a long id": (own(id="7" * 5000), "field too long"),
    "a long data set": (own(dataset="d" * 5000), "field too long"),
    "a long number": (own()[:-1] + f', "id": {"7" * 5000}}}', "not JSON"),
    "deep lists": (own()[:-1] + f', "boxes": {"[" * 90 + "]" * 90}}}', "not JSON"),
    "bottomless lists": ("[" * 200_000, "not JSON"),
    "bottomless lists in an answer": (benchmark(answer="[" * 90_000, image="a.png"), "no evidence"),
    "a size without a value": (own(width=float("nan"), height=48), "size not numbers"),
    "a size without an end": (own(width=float("inf"), height=48), "size not numbers"),
    "a box without a value": (own(boxes=[[float("nan"), 2, 30, 40]]), "box not numbers"),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (64, 48)).save(folder / "a.png")
    return folder


def run(folder: Path, rows: list[str], images: Path, **options):
    (folder / "rows.jsonl").write_text("".join(row + "\n" for row in rows))
    options = {"workers": 1, "progress": False, "max_bad_share": 1.0} | options
    return prepare([folder / "rows.jsonl"], images, folder / "out", **options)


def test_every_bad_row_is_counted_and_named(images, tmp_path):
    """All of them between good ones, in one preparation that ends well, and whose every file is text."""
    rows = [row for bad, _ in BAD.values() for row in (own(), bad)]
    begun = time.monotonic()
    report = run(tmp_path, rows, images)
    assert time.monotonic() - begun < 20
    found = {where: reason for reason, tally in report.reasons.items() for where, _ in tally.first}
    assert found == {f"rows.jsonl:{2 * i + 2}": reason for i, (_, reason) in enumerate(BAD.values())}
    assert report.good == len(BAD) == len(open_prepared(tmp_path / "out").entries)
    assert run(tmp_path, rows, images).as_dict() == report.as_dict(), "again: it only reports"
    assert "rows.jsonl:2  'question' has half a surrogate" in (tmp_path / "out" / "report.txt").read_text(encoding="utf-8")


def test_a_sentence_behind_many_spaces_is_found_at_once():
    """A pattern that begins with any number of spaces looks at each of them again and again."""
    request = " Please provide the bounding box coordinate of the region that can help you answer the question better."
    for question, expected in ((f"Which?{request} \n", "Which?"), ("a" + " " * 90_000 + "b", None), (" " * 90_000, "")):
        begun = time.monotonic()
        row = parse_row(benchmark(question).encode(), "x:1", "x")
        assert row.question == (question if expected is None else expected) and time.monotonic() - begun < 1


def test_what_nobody_expected_of_a_row_does_not_end_the_work(images, tmp_path, monkeypatch):
    encode = work.encode

    def odd(record, sizes):
        if record.question == "odd":
            raise KeyError("a fault of ours\x1b[0m")
        return encode(record, sizes)

    monkeypatch.setattr(work, "encode", odd)
    report = run(tmp_path, [own(), own(question="odd"), own()], images)
    assert report.good == 2 and report.reasons["unexpected"].first == [("rows.jsonl:2", "KeyError: 'a fault of ours\\x1b[0m'")]


def test_a_disk_that_fails_is_no_bad_row(images, tmp_path, monkeypatch):
    def failing(row, evidence=True):
        raise OSError(5, "Input/output error", "a.png")

    monkeypatch.setattr(work.Checker, "check", lambda self, row: failing(row))
    with pytest.raises(GlimpseError, match=r"a\.png: cannot be written \(Input/output error\); run again to go on"):
        run(tmp_path, [own()], images)
    monkeypatch.undo()
    assert run(tmp_path, [own()], images).good == 1


def test_names_of_files_that_are_no_text(images, tmp_path):
    source = os.fsencode(tmp_path) + b"/\xff\x1b.jsonl"
    with open(source, "w") as file:
        file.write(own() + "\n" + own(answer="") + "\n")
    report = prepare([os.fsdecode(source)], images, tmp_path / "out", workers=1, progress=False, max_bad_share=1.0)
    assert report.reasons["empty answer"].first[0][0] == "\\udcff\\x1b.jsonl:2"
    (entry,) = open_prepared(tmp_path / "out").entries
    assert (entry.id, entry.dataset) == ("\\udcff\\x1b.jsonl:1", "\\udcff\\x1b")


@pytest.mark.parametrize("name", ["none", "pipe", "~nobody-here/x", "x" * 300, "null\0", HALF, "/dev/zero"])
@pytest.mark.parametrize("role", ["source", "images", "out"])
def test_names_that_are_no_files_or_folders(images, tmp_path, name, role):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "rows.jsonl").write_text(own() + "\n")
    if role == "out" and name == "none":
        return  # a new folder
    given = {"source": str(tmp_path / "rows.jsonl"), "images": str(images), "out": str(tmp_path / "out")}
    given[role] = name if name[0] in "~/" else str(tmp_path / name)
    with pytest.raises(GlimpseError):
        prepare([given["source"]], given["images"], given["out"], workers=1, progress=False)
    assert not (tmp_path / "out").exists()


def test_all_bad_rows_are_too_many(images, tmp_path):
    with pytest.raises(TooManyBad, match="all 2 rows are bad.*field not text"):
        run(tmp_path, [own(question=HALF), own(question=HALF)], images)


def test_details_are_one_short_line_for_any_terminal():
    assert BadRow("x", "a\n b\x1b]0;t\x07\u202e" + HALF).detail == "a b\\x1b]0;t\\x07\\u202e\\ud800"
    assert len(BadRow("x", "é" * 10**6).detail) < 400
