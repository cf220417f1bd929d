"""Whole evaluations: tasks by name, broken pictures, a judge, kills, several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import run_tools
from judge_server import Server
from PIL import Image

from gp_jax import GlimpseError, tiny
from gp_jax.data.formats import parse_row
from gp_jax.data.sources import cut, find_files, scan
from gp_jax.evaluation.command import main, parse
from gp_jax.evaluation.results import read_predictions
from gp_jax.evaluation.settings import BRIEF, EvalConfig, JudgeConfig
from gp_jax.evaluation.tasks import BRIEF_METRIC, metrics_of, open_tasks

REQUEST = " Please provide the bounding box coordinate of the region that can help you answer the question better."
PLANS = ("dense", "glimpse", "oracle", "random")


def benchmark_row(name: str, number: int, picture: str, box: list, answer: str) -> dict:
    """As Visual-CoT's benchmark is released."""
    human = {"from": "human", "value": f"<image>\nWhat is number {number}?{REQUEST}"}
    turns = [
        human,
        {"from": "gpt", "value": "[0.1, 0.1, 0.5, 0.5]"},
        {"from": "human", "value": "<image>"},
        {"from": "gpt", "value": answer},
    ]
    path = f"cot/{name}/{picture}"
    return {"dataset": name, "split": "val", "question_id": number, "image": [path, f"{path}###{box}"], "conversations": turns}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A tiny model with a glimpse, two released sets, pictures of which some are broken, and rows of one's own."""
    home = tmp_path_factory.mktemp("evaluation")
    tiny.make_checkpoint(home / "model", hf_config=run_tools.SMALL | {"max_remain_ratio": 0.3})
    (home / "benchmark").mkdir()
    for name, folder in (("gqa", "gqa"), ("docvqa", "docvqa/val")):
        (home / "images" / "cot" / folder).mkdir(parents=True)
        rows = []
        for number in range(6):
            width, height = 28 * (4 + number % 3), 28 * (3 + number % 2)
            Image.new("RGB", (width, height), (40 * number, 90, 200)).save(home / "images" / "cot" / folder / f"{number}.png")
            rows.append(benchmark_row(name, number, f"{number}.png", [0, 0, 30, 30], "red"))
        (home / "benchmark" / f"{name}.json").write_text(json.dumps(rows))
    gqa = home / "images" / "cot" / "gqa"
    (gqa / "1.png").write_bytes((gqa / "1.png").read_bytes()[:60])  # the header is whole, the picture is not
    (gqa / "2.png").write_text("no picture")
    own = [
        {"image": "0.png", "question": "which?", "answers": ["red", "red", "blue"]},
        {"image": "3.png", "question": "which?", "answer": "blue", "boxes": [[0, 0, 9000, 9000]], "box_format": "pixel", "id": "x"},
        {"image": ["3.png", "4.png"], "question": "which?", "answer": "blue", "boxes": [[[0, 0, 30, 30]], []], "id": "x"},
        {"image": "absent.png", "question": "which?", "answer": "blue"},
        "not a row",
    ]
    (home / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    return home


def options(home: Path, out: Path, *more: str) -> list[str]:
    words = {"model": home / "model", "tasks": f"viscot:{home}/benchmark", "images": home / "images", "out": out}
    words |= {"batch": 2, "max-new-tokens": 4, "pictures": 4}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))] + ["--plans", *PLANS, *more]


def table(out: Path) -> list[dict]:
    """Without what differs from run to run."""
    rows = json.loads((out / "table.json").read_text())
    return [
        {name: value for name, value in row.items() if name not in ("seconds", "stages", "phases", "peak", "source", "first_calls")}
        for row in rows
    ]


def left_out(out: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    return {(line["sample"], line.get("plan")): line["reason"] for line in lines}


@pytest.fixture(scope="module")
def whole(home) -> Path:
    """One process, from beginning to end."""
    assert main(options(home, home / "whole")) == 0
    return home / "whole"


def test_broken_pictures_are_named_and_not_fatal(whole, capsys):
    found = read_predictions(whole / "predictions.jsonl")
    assert {p.task for p in found} == {"viscot:gqa", "viscot:docvqa"} and len(found) == (4 + 6) * len(PLANS)
    reasons = left_out(whole)
    assert set(reasons) == {("gqa/1", None), ("gqa.json#3", None)}, "by id, or by place where there is no id yet"
    assert all("image broken" in reason for reason in reasons.values())
    rows = table(whole)
    assert [row["plan"] for row in rows] == list(PLANS) and {row["samples"] for row in rows} == {10}
    assert rows[0]["retention"] == 1 and 0 < rows[1]["retention"] <= 0.3 and abs(rows[1]["retention"] - rows[3]["retention"]) < 0.1
    assert next(iter(rows[0]["metrics"])) == "token_f1" and {"exact_match", "anls", "vqa_accuracy"} <= set(rows[0]["metrics"])
    parts = json.loads((whole / "by_task.json").read_text())
    assert {name: rows[0]["samples"] for name, rows in parts.items()} == {"viscot:docvqa": 6, "viscot:gqa": 4}
    assert (whole / "by_task.csv").read_text().startswith("task,plan,samples") and "| viscot:gqa | 4 |" in (
        whole / "by_task.md"
    ).read_text()
    page = (whole / "report" / "index.html").read_text()
    assert "left out of viscot:gqa:</b> 2 of 6 rows" in page


def test_killed_and_finished_by_two_processes(home, whole, tmp_path):
    """SIGKILL; then two processes go on: the same table, and what was answered is as it was."""
    command, out = [sys.executable, str(run_tools.ROOT / "eval.py"), *options(home, tmp_path / "out")], tmp_path / "out"
    started = dict(env=run_tools.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    process = subprocess.Popen(command, **started)
    path = out / "predictions.jsonl"
    while not path.exists() or path.read_bytes().count(b"\n") < 5:
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = path.read_bytes()[: path.read_bytes().rfind(b"\n") + 1].splitlines()
    assert 5 <= len(before) < 10 * len(PLANS)
    with path.open("ab") as file:
        file.write(before[0][:50])  # as if it had been killed while it wrote
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    both = [subprocess.Popen([*command, "--coordinator", address, "--processes", "2", "--process", str(n)], **started) for n in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert "report:" in said[0] and "report:" not in said[1]
    after = path.read_bytes().splitlines()
    assert set(before) <= set(after) and len(after) == 10 * len(PLANS) and not list(out.glob("predictions-*"))
    assert table(out) == table(whole) and left_out(out) == left_out(whole)


def test_devices_share_batches(home, whole, tmp_path):
    assert main(options(home, tmp_path / "out", "--devices", "2")) == 0
    assert table(tmp_path / "out") == table(whole)
    assert main(options(home, tmp_path / "more", "--devices", "99")) == 1


def test_finished_runs_answer_nothing_again_and_take_other_metrics(home, whole, monkeypatch):
    from gp_jax import GlimpseVLM

    monkeypatch.setattr(GlimpseVLM, "answer", None)
    server, before = Server(), (whole / "predictions.jsonl").read_bytes()
    judge = ("--judge.url", server.url, "--judge.model", "m", "--judge.patience", "0.01")
    words = options(home, whole, *judge, "--report", str(home / "judged.html"))
    assert main([*words, "--metrics", "judge", "exact_match"]) == 0
    rows = table(whole)
    assert rows[0]["metrics"]["judge"]["mean"] == 1.0 and "judge" in (whole / "table.md").read_text()
    asked = len(server.requests)
    assert main([*words, "--metrics", "judge"]) == 0 and len(server.requests) == asked, "from the file"
    server.shutdown()
    server.server_close()
    (whole / "verdicts.jsonl").unlink()
    assert main([*words, "--metrics", "judge", "exact_match", "--judge.retries", "0"]) == 0
    assert "judge" not in table(whole)[0]["metrics"], "no verdict is no score"
    assert sum(plan is not None for _, plan in left_out(whole)) == 10 * len(PLANS)
    assert "not scored" in (home / "judged.html").read_text()
    assert main(options(home, whole)) == 0 and (whole / "predictions.jsonl").read_bytes() == before


def test_own_rows(home, tmp_path):
    """Several references, boxes that do not fit, several pictures, ids that come twice."""
    words = options(home, tmp_path / "out", "--tasks", str(home / "own.jsonl"), "--images", str(home / "images" / "cot" / "docvqa" / "val"))
    assert main([*words, "--metrics", "vqa_accuracy", "--prompt", "brief"]) == 0
    found = {(p.sample, p.plan): p for p in read_predictions(tmp_path / "out" / "predictions.jsonl")}
    assert {name for name, _ in found} == {"own.jsonl:1", "x", "x~2"}
    assert found["x", "oracle"].kept == found["x", "oracle"].total, "without evidence the oracle keeps all"
    several = found["x~2", "oracle"]
    assert several.more_grids and 0 < several.kept < several.total and several.mask().shape == several.grid
    assert set(left_out(tmp_path / "out")) == {("own.jsonl:4", None), ("own.jsonl:5", None)}
    config = EvalConfig(tasks=(str(home / "own.jsonl"),), images=str(home / "images" / "cot" / "docvqa" / "val"), metrics=("vqa_accuracy",))
    (task,) = open_tasks(config)
    assert task.references(0) == ("red", "red", "blue") and 0 < task.score(0, "red")["vqa_accuracy"] < 1
    made_with = json.loads((tmp_path / "out" / "made_with.json").read_text())
    assert made_with["suffix"] == BRIEF


def test_prepared_folders_are_tasks_by_data_set(home, tmp_path):
    from gp_jax.data.prepare import prepare

    prepare([home / "benchmark"], home / "images", tmp_path / "data", workers=1, progress=False, max_bad_share=0.5)
    tasks = open_tasks(EvalConfig(tasks=(f"{tmp_path}/data:val",), limit=3, prompt="brief"))
    assert {task.name: len(task.entries) for task in tasks} == {f"{tmp_path}/data:val/docvqa": 3, f"{tmp_path}/data:val/gqa": 3}
    assert {task.metrics[0] for task in tasks} == {"anls", "exact_match"} and all(task.suffix == BRIEF for task in tasks)
    assert tasks[0].source[0].dataset == tasks[0].entries[0].dataset


def test_released_files_parse(shared):
    """All sets, emotic too."""
    folder = shared / "visual_cot" / "benchmark"
    if not folder.is_dir():
        pytest.skip("../shared/visual_cot is not here")
    for path in find_files([folder]):
        (chunk,) = cut(scan([path])[0], 10**6)
        rows = [parse_row(data, where, stem) for where, stem, data in chunk.read()]
        assert path.stem in BRIEF_METRIC and {row.dataset for row in rows} <= set(BRIEF_METRIC)
        assert all(row.question and row.answer and row.boxes[0] and "bounding box" not in row.question for row in rows)


def test_metrics_by_data_set():
    brief, judged = EvalConfig(prompt="brief"), EvalConfig(judge=JudgeConfig(url="http://x", model="m"))
    assert metrics_of("scenes", brief) == ("exact_match",) and metrics_of("scenes", judged) == ("exact_match", "judge")
    assert [metrics_of(name, brief)[0] for name in ("docvqa", "textvqa", "gqa", "emotic")] == [
        "anls",
        "vqa_accuracy",
        "exact_match",
        "token_f1",
    ]
    assert metrics_of("docvqa", EvalConfig())[0] == "token_f1" and metrics_of("docvqa", judged)[0] == "judge"
    assert metrics_of("docvqa", EvalConfig(metrics=("anls",))) == ("anls",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tasks=("scens",)), "did you mean 'scenes'"),
        (dict(tasks=("scenes:tset",)), "did you mean 'scenes:test'"),
        (dict(tasks=("viscot:",)), "viscot:PATH"),
        (dict(tasks=("viscot:/absent",)), "no such file"),
        (dict(tasks=("{home}/owm.jsonl",)), "did you mean '.*own.jsonl'"),
        (dict(tasks=("{home}/benchmark",)), "viscot:"),
        (dict(tasks=("{home}/own.jsonl",)), "--images is missing"),
        (dict(tasks=("scenes", "scenes")), "named twice"),
        (dict(metrics=("exact_mach",)), "did you mean 'exact_match'"),
        (dict(metrics=("judge",)), "needs an endpoint"),
    ],
)
def test_unknown_names(home, changes, message):
    changes = {name: tuple(word.format(home=home) for word in value) for name, value in changes.items()}
    with pytest.raises(GlimpseError, match=message):
        open_tasks(EvalConfig(**changes))


def test_options_and_help(capsys):
    config = parse(["--config", "configs/eval_scenes.py", "--judge.url", "http://x/v1", "--judge.model", "m", "--prompt", "brief"])
    assert config.judge.model == "m" and config.tasks == ("scenes:test",) and config.ending == BRIEF
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in ("--tasks", "viscot:PATH", "--judge.url", "--metrics", "vqa_accuracy"))
    assert os.environ.get("GP_JAX_TRACEBACK") is None
