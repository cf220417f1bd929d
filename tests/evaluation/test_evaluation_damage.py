"""What a folder of answers survives: damage, other models, full disks, two processes at once."""

import json
import os
import shutil
from pathlib import Path

import pytest
from evaluation_tools import PLANS, answers, evaluate, made_up, make_home, row
from report_tools import made

from gp_jax import GlimpseError, GlimpseVLM
from gp_jax.evaluation.command import claim
from gp_jax.evaluation.jsonl import LONGEST, appending, mend, read_lines
from gp_jax.evaluation.results import Prediction, read_predictions, write_predictions
from gp_jax.evaluation.settings import EvalConfig
from gp_jax.runtime.lock import only_one

ROWS = [row(n) for n in range(3)]
BAD = {
    "kept": ["x", -1, True, None, 2**40, 1e999],
    "total": [0.5],
    "grid": [[2**20, 2**20], [1], "ab", [-1, 3]],
    "keep": [[3, 2], [0, 0], None, [-1]],
}
BAD |= {
    "metrics": [{"exact_match": 2}, {"exact_match": "1"}, [], None],
    "cuts": [[[5]], [[3, 1], [1, 1]], [[-7, 1]]],
    "seconds": [{"a": -1}, {"a": "b"}],
}
BAD |= {
    "sizes": [[[0, 4]], [[4]]],
    "ratio": [1.5, "1"],
    "cached": [-1],
    "boxes": [[[0, 0, 2, 1]]],
    "sample": [3, None],
    "prefill_retention": [-0.5],
    "windows": [[[-1]], [5], [[60, 5]]],
    "looked": [[[1]], [[1, -2]]],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return make_home(tmp_path_factory.mktemp("damage"))


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """A finished evaluation."""
    path = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GlimpseVLM, "answer", made_up)
        assert evaluate(home, path, ROWS) == 0
    return path


@pytest.fixture
def copy(whole, tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(GlimpseVLM, "answer", made_up)
    shutil.copytree(whole / "out", tmp_path / "out")
    return tmp_path


# Lines ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_values_that_cannot_be_are_damage(name, value):
    line = json.dumps(json.loads(made("1", "dense", "red", grid=(8, 8)).to_json()) | {name: value})
    with pytest.raises(GlimpseError, match="not a prediction"):
        Prediction.from_json(line)


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"9" * 5000, b"x" * (LONGEST + 9), b"\x00" * 99])
def test_damaged_lines_are_taken_out_and_nothing_is_lost(tmp_path, line):
    path, good = tmp_path / "predictions.jsonl", [made(str(n), "dense", "red") for n in range(3)]
    write_predictions(path, good[:2])
    with path.open("ab") as file:
        file.write(line + b"\n")
    write_predictions(path, good[2:])
    with path.open("ab") as file:
        file.write(b'{"task": "half')
    before = path.read_bytes()
    with pytest.raises(GlimpseError, match=r"predictions\.jsonl:3"):
        read_predictions(path)
    assert "not used: 1; the file as it was is predictions.jsonl.damaged now" in mend(path, Prediction.from_json)
    assert read_predictions(path) == good and (tmp_path / "predictions.jsonl.damaged").read_bytes() == before
    assert mend(path, Prediction.from_json) is None
    with path.open("ab") as file:
        file.write(line + b"\n")
    assert "predictions.jsonl.damaged-2 now" in mend(path, Prediction.from_json) and read_predictions(path) == good


def test_half_written_lines_go(tmp_path):
    path = tmp_path / "lines"
    for start in ("", "a\n", "a\n" + "b" * (LONGEST + 5), "b" * (LONGEST + 5)):
        path.write_text(start)
        with appending(path) as append:
            append("c \ud800")
        assert [line for _, line in read_lines(path)] == [b"a"] * start.startswith("a") + [b"c \\ud800"]


# Folders --------------------------------------------------------------------------------------------------------------------


def test_whatever_changes_in_the_model_is_named(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    config = EvalConfig(model=str(tmp_path / "model"), out=str(tmp_path / "out"))
    claim(tmp_path / "out", config.identity())
    assert claim(tmp_path / "out", config.identity()) == []
    for name, change in (("config.json", {"reduce_threshold": 0.7}), ("generation_config.json", {"eos_token_id": 3})):
        text = (tmp_path / "model" / name).read_text() if (tmp_path / "model" / name).exists() else None
        (tmp_path / "model" / name).write_text(json.dumps(json.loads(text or "{}") | change))
        with pytest.raises(GlimpseError, match=f"model/{name} (changed|is new)") as found:
            claim(tmp_path / "out", config.identity())
        assert len(str(found.value)) < 300
        (tmp_path / "model" / name).unlink() if text is None else (tmp_path / "model" / name).write_text(text)
    assert claim(tmp_path / "out", config.identity()) == []
    (tmp_path / "model" / "chat_template.jinja").write_text("{{ 'other' }}")
    with pytest.raises(GlimpseError, match="chat_template"):
        claim(tmp_path / "out", config.identity())


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b"[" * 100_000, b"", None, "folder", "fifo"])
def test_notes_that_cannot_be_read_put_the_answers_aside(copy, content, capsys):
    out = copy / "out"
    before, notes = (out / "predictions.jsonl").read_bytes(), out / "made_with.json"
    notes.unlink()
    if content == "fifo":
        os.mkfifo(notes)
    elif content == "folder":
        notes.mkdir()
    elif content is not None:
        notes.write_bytes(content)
    said = claim(out, {"model": "another"})
    assert (out / "predictions.jsonl.damaged").read_bytes() == before and not (out / "predictions.jsonl").exists()
    assert json.loads(notes.read_text()) == {"model": "another"} and 1 <= len(said) <= 2
    assert (out / "made_with.json.damaged").exists() == (content not in (b"{}", None))


def test_an_evaluation_goes_on_over_damage(home, copy, capsys):
    """Only what the damaged lines answered is asked again."""
    out = copy / "out"
    lines = (out / "predictions.jsonl").read_bytes().splitlines()
    first, second, looked = json.loads(lines[0]), json.loads(lines[1]), json.loads(lines[len(ROWS)])
    assert looked["plan"] == "glimpse" and looked["cuts"] == [[0, looked["kept"]]]
    lines[len(ROWS)] = json.dumps(looked | {"cuts": [[1, looked["kept"]]]}).encode()
    lines[0] = json.dumps(first | {"kept": "x"}).encode()
    lines[1] = json.dumps(second | {"kept": 1, "keep": [10**6]}).encode()  # can be read, but cannot be
    (out / "predictions.jsonl").write_bytes(b"\n".join(lines) + b'\n{"half')
    (out / "predictions-1.jsonl").write_bytes(b"\xff\n" + lines[2] + b"\n")
    (out / "predictions-2.jsonl").mkdir()
    (out / "left_out.jsonl").unlink()
    (out / "left_out.jsonl").mkdir()
    os.mkfifo(out / "verdicts.jsonl")
    assert evaluate(home, copy, ROWS) == 0
    said = capsys.readouterr().out
    assert said.count("not used: 1;") == 2 and said.count("is not a regular file") == 3 and "2 saved answers are not used" in said
    assert len(answers(copy)) == len(ROWS) * len(PLANS) and (out / "predictions.jsonl").read_bytes().count(b"\n") == len(lines) + 2
    assert (out / "left_out.jsonl").is_file() and not (out / "predictions-1.jsonl").exists()


def test_a_second_process_is_refused(home, copy, capsys):
    with only_one(copy / "out", "eval.py"):
        assert evaluate(home, copy, ROWS) == 1
    assert "eval.py, process" in capsys.readouterr().err
    assert evaluate(home, copy, ROWS) == 0, "a lock that is let go"


@pytest.mark.parametrize("name", ["predictions.jsonl", "table.csv", "left_out.jsonl"])
def test_a_full_disk_is_one_line_and_nothing_is_lost(home, copy, name, capsys, monkeypatch):
    out = copy / "out"
    lines = (out / "predictions.jsonl").read_bytes().splitlines()
    (out / "predictions.jsonl").write_bytes(b"\n".join(lines[:-2]) + b"\n")
    opening = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:5])
            self.file.flush()
            raise OSError(28, "No space left on device")

    def opened(path, mode="r", *args, **options):
        file = opening(path, mode, *args, **options)
        return Full(file) if name in path.name and mode != "rb" else file

    monkeypatch.setattr(Path, "open", opened)
    assert evaluate(home, copy, ROWS) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert name in said and "No space left on device" in said
    monkeypatch.setattr(Path, "open", opening)
    assert evaluate(home, copy, ROWS) == 0 and len(answers(copy)) == len(lines)
    assert (out / "predictions.jsonl").read_bytes().splitlines()[: len(lines) - 2] == lines[:-2]


def test_evidence_and_pictures_that_changed_are_asked_again(home, copy, capsys):
    """recall, iou and the plan "oracle" are about boxes that the question does not show."""
    for change in ({"boxes": [[0, 0, 20, 20]]}, {"boxes": [[0, 0, 28, 20]]}, {"boxes": [[0, 0, 0.5, 0.5]], "box_format": "normalized"}):
        assert evaluate(home, copy, [row(0, **change), *ROWS[1:]]) == 0
        assert f"{len(PLANS)} saved answers are not used" in capsys.readouterr().out
    assert evaluate(home, copy, [row(0, **change), *ROWS[1:]]) == 0 and "not used" not in capsys.readouterr().out


def test_metrics_are_computed_anew(home, copy):
    """An answer whose saved metric is another one counts by what it says."""
    path = copy / "out" / "predictions.jsonl"
    path.write_text(path.read_text().replace('"exact_match": 1.0', '"exact_match": 0.0'))
    assert evaluate(home, copy, ROWS) == 0
    assert json.loads((copy / "out" / "table.json").read_text())[0]["metrics"]["exact_match"]["mean"] == 1.0


@pytest.mark.parametrize(
    "changes", [{"out": ""}, {"out": "gs://bucket/out"}, {"out": "~nobody-at-all/out"}, {"out": "a\0b"}, {"report": "~nobody-at-all/x"}]
)
def test_folders_that_cannot_be(changes):
    with pytest.raises(GlimpseError):
        EvalConfig(**changes).check()
