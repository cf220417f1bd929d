"""From numbers to answers: lines, links, the list of the page, what few samples have, and what only some plans have."""

import csv
import dataclasses
import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from report_tools import NASTY, Page, made

from gp_jax import GlimpseError
from gp_jax.evaluation import memory, summary
from gp_jax.evaluation.reporting import exports, tables
from gp_jax.evaluation.reporting.html import write_report
from gp_jax.evaluation.reporting.line_links import Lines, runs
from gp_jax.evaluation.reporting.page import LOGIC
from gp_jax.evaluation.reporting.plan_rows import aggregate, breakdown
from gp_jax.evaluation.results import line_numbers, write_predictions
from gp_jax.evaluation.settings import EvalConfig

pytestmark = pytest.mark.quick

LOTS = 600
JUDGED = {"glimpse": 550, "weak": 90}  # samples of a plan that have a verdict


def answers(plan: str, right: int) -> list:
    """600 in two tasks of unlike sizes; the first so many are right."""
    found = []
    for i in range(LOTS):
        first, good = i < 150, i < right
        metrics = {"exact_match": float(good), "judge": float(good) if i < JUDGED.get(plan, LOTS) else math.nan}
        kept = 64 if plan == "dense" else 16 if first else 4
        changes = dict(kept=kept, task="a" if first else "b", family=f"family {i % 3}", tokens=3, peak=1000 + i)
        found.append(made(f"s{i}", plan, "red" if good else f"wrong {NASTY}", metrics=metrics, **changes))
    return found


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """Predictions of a file in which another plan's and repeated answers stand too."""
    path = tmp_path_factory.mktemp("lines") / "in here" / "predictions.jsonl"
    path.parent.mkdir()
    asked = [*answers("dense", 500), *answers("glimpse", 510), *answers("weak", 300)]
    write_predictions(path, [made("old", "dense", "red"), made("s0", "dense", "first try", task="a"), *answers("other", 3), *asked])
    return Lines(asked, line_numbers(path), path, "task")


@pytest.fixture(scope="module")
def tallied(everything):
    return aggregate(everything.predictions), breakdown(everything.predictions, "task")


# Lines ----------------------------------------------------------------------------------------------------------------------


def test_json_names_the_lines_behind_every_row(everything, tallied):
    written = [json.loads(line) for line in everything.file.read_text().splitlines()]
    parts = json.loads(exports.grouped_json(tallied[1], everything))
    for group, rows in [(None, json.loads(exports.as_json(tallied[0], everything))), *parts.items()]:
        for row in rows:
            source = row["source"]
            lines = [written[n - 1] for first, last in source["lines"] for n in range(first, last + 1)]
            assert source["file"] == "predictions.jsonl" and len(lines) == row["samples"]
            assert {line["plan"] for line in lines} == {row["plan"]} == {source["where"]["plan"]}
            assert {line["task"] for line in lines} == ({"a", "b"} if group is None else {group} == {source["where"]["task"]} and {group})
            right = sum(line["metrics"]["exact_match"] for line in lines) / len(lines)
            assert right == pytest.approx(row["metrics"]["exact_match"]["mean"])
            assert "first try" not in {line["prediction"] for line in lines}
    assert runs([3, 1, 2, 9]) == [[1, 3], [9, 9]] and runs([]) == []


def test_tables_name_the_file(everything, tallied):
    for said in (tables.markdown(tallied[0], lines=everything), tables.grouped_markdown(tallied[1], "task", lines=everything)):
        assert "(predictions.jsonl)" in said and "whose `plan` is" in said
    read = list(csv.DictReader(io.StringIO(exports.grouped_csv(tallied[1], "task", everything))))
    assert {row["file"] for row in read} == {"predictions.jsonl"} and [row["task"] for row in read[:3]] == ["a"] * 3


@pytest.fixture(scope="module")
def page(everything, tallied):
    path = everything.file.parent.parent / "else where" / "page.html"
    path.parent.mkdir()
    write_report(path, "t", *tallied, [], [], everything)
    return path


def listed(page: Path) -> dict:
    return json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.DOTALL)[1])


def test_the_page_links_its_numbers_and_the_file(page, everything):
    found = Page(page.read_text())
    assert not found.errors and (page.parent / "../in here/predictions.jsonl").exists()
    assert [a["href"] for a in found.all("a") if a["href"] != "#samples"] == ["../in%20here/predictions.jsonl"]
    data = listed(page)
    links = [{name[5:]: value for name, value in a.items() if name != "href"} for a in found.all("a", href="#samples")]
    plans = range(3)
    for plan in plans:
        assert {"plan": str(plan), "metric": "0"} in links and {"plan": str(plan), "metric": "1"} in links
        assert all({"plan": str(plan), "metric": "0", "task": task} in links for task in "ab")
    assert {"plan": "2", "metric": "0", "against": "1"} in links and {"plan": "2", "metric": "0", "against": "0"} in links
    assert data["plans"] == ["dense", "glimpse", "weak"] and data["metrics"] == ["exact match", "judge"]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", page.read_text().split("</table>", 1)[1])  # behind the small table at the top
    assert all(cell.startswith('<a href="#samples"') or cell in ("-", "n/a") for cell in cells if cell)


def test_the_page_lists_every_answer(page, everything):
    data, written = listed(page), [json.loads(line) for line in everything.file.read_text().splitlines()]
    assert len(data["samples"]) == LOTS and NASTY in data["answers"][-1][2][0]
    for (task, name, *_), own in zip(data["samples"], data["answers"], strict=True):
        for plan, (text, line, exact, judge) in zip(data["plans"], own, strict=True):
            there = written[line - 1]
            assert (there["task"], there["sample"], there["plan"], there["prediction"]) == (task, name, plan, text)
            assert there["metrics"] == {"exact_match": exact, "judge": judge}


@pytest.mark.parametrize(
    ("wanted", "samples", "rows"),
    [
        ({}, 600, 1800),
        ({"plan": "2", "metric": "0"}, 600, 600),
        ({"plan": "2", "metric": "1"}, 90, 90),
        ({"plan": "1", "metric": "1", "task": "b"}, 400, 400),
        ({"plan": "2", "metric": "1", "against": "1"}, 90, 180),
        ({"plan": "0", "task": "a", "family": "family 1"}, 50, 50),
        ({"plan": "2", "outcome": "right"}, 300, 300),
        ({"outcome": "wrong"}, 300, 100 + 90 + 300),
        ({"outcome": "mixed"}, 210, 630),
        ({"plan": "1", "words": "WRONG b:s1"}, 0, 0),
        ({"plan": "1", "words": "ONERROR b:s599"}, 1, 1),
    ],
)
def test_the_script_finds_what_is_behind_a_number(page, wanted, samples, rows, tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script")
    whole = dict.fromkeys(("task", "family", "plan", "metric", "against", "outcome", "words"), "") | wanted
    code = f"{LOGIC}\nconst found = matching({json.dumps(listed(page))}, {json.dumps(whole)});"
    (tmp_path / "run.js").write_text(code + "console.log(JSON.stringify([found.length, found.flatMap(([, plans]) => plans).length]))")
    said = subprocess.run([node, tmp_path / "run.js"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(said) == [samples, rows]


# Rows -----------------------------------------------------------------------------------------------------------------------


def test_metrics_carry_their_own_numbers(tallied):
    dense, glimpse, weak = tallied[0]
    assert (weak.samples, weak.metrics["exact_match"].n, weak.metrics["judge"].n) == (600, 600, 90)
    assert glimpse.differences["judge"].n == 550 and weak.differences["judge"].n == weak.leads["judge"].n == 90, "pairs that both have"
    assert dense.differences == {} == glimpse.leads and dense.leads["judge"].n == 550
    assert weak.leads["exact_match"].mean == pytest.approx(0.35) and weak.leads["exact_match"].clear
    assert (weak.tokens, weak.peak, weak.phases["vision"].median, weak.phases["prefill"].median) == (3, 1599, pytest.approx(0.1), 0)
    assert glimpse.retention == pytest.approx((150 * 16 + 450 * 4) / (600 * 64))
    assert glimpse.task_retention == pytest.approx((16 / 64 + 4 / 64) / 2)
    assert tallied[1]["a"][1].task_retention is None, "one task is no mean of tasks"


def test_few_samples_are_said_everywhere(everything, tallied, page):
    rows, groups = tallied
    said = "judge of weak: Only 90 samples"
    for text in (tables.text(rows), tables.markdown(rows), "".join(Page(page.read_text()).words)):
        assert said in text and "exact match: Only" not in text
    assert "Only 90 samples" in json.loads(exports.as_json(rows))[2]["warnings"]["judge"]
    warned = [row["warning"] for row in csv.DictReader(io.StringIO(exports.as_csv(rows)))]
    assert warned[:2] == ["", ""] and warned[2].startswith("judge: Only 90 samples")
    parts = "a (150), b (450). Only 150 samples"
    assert parts in tables.grouped_markdown(groups, "task") and parts in "".join(Page(page.read_text()).words)
    assert all("Only 150" in row["warnings"]["exact_match"] for row in json.loads(exports.grouped_json(groups))["a"])
    read = list(csv.DictReader(io.StringIO(exports.grouped_csv(groups, "task"))))
    assert all("exact_match: Only" in row["warning"] for row in read)
    assert "n = 90" in tables.markdown(rows) and "n = 600" not in tables.markdown(rows) and "n = 90" in page.read_text()
    nobody = [dataclasses.replace(row, metrics={}) for row in rows]
    assert "No samples" in tables.text(nobody, "judge") and "No samples" in exports.as_json(nobody, metric="judge")


def test_all_costs_are_in_all_tables(everything, tallied, page):
    rows = [dataclasses.replace(row, kv_bytes=2048.0) for row in tallied[0]]
    words, marked = "".join(Page(page.read_text()).words), tables.markdown(rows)
    for name in ("KV cache", "tokens generated", "peak memory", *(f"{n} time" for n in ("processing", "vision", "prefill", "decode"))):
        assert name in words and name in marked
    assert all(name in words and name in marked for name in ("same answer as dense", "glimpse minus plan", "mean of tasks", "judge"))
    assert "glimpse\n" in tables.text(rows) and "+35.0 (" in tables.text(rows) and "+35.0 (" in marked and "+35.0" in words
    (*_, weak) = csv.DictReader(io.StringIO(exports.as_csv(rows)))
    assert (weak["tokens"], weak["peak"], weak["kv_bytes"], weak["seconds_n"]) == ("3.0", "1599", "2048.0", "600")
    assert float(weak["seconds_vision_median"]) == pytest.approx(0.1)
    assert float(weak["exact_match_glimpse_minus_plan_mean"]) == pytest.approx(0.35)
    loaded = json.loads(exports.as_json(rows))[2]
    assert loaded["glimpse_minus_plan"]["exact_match"]["n"] == 600 and loaded["task_retention"] == pytest.approx(0.15625)
    unknown = dataclasses.replace(rows[0], peak=None)
    assert "n/a" in tables.markdown([unknown]) and json.loads(exports.as_json([unknown]))[0]["peak"] is None


# Memory and pictures --------------------------------------------------------------------------------------------------------


def test_a_plan_does_not_inherit_the_peak_of_another():
    if not memory._forget():
        pytest.skip("this system does not forget peaks")
    first, block = memory.Peak(), np.ones(40 << 20)
    most = first.bytes()
    assert most >= block.nbytes
    del block
    assert memory.Peak().bytes() < most - (200 << 20)


def test_a_peak_that_cannot_be_forgotten_counts_where_it_was_raised(monkeypatch):
    now = iter([100, 100, 150])
    monkeypatch.setattr(memory, "_forget", lambda: False)
    monkeypatch.setattr(memory, "_resident", lambda: next(now))
    peak = memory.Peak()
    assert peak.bytes() is None and peak.bytes() == 150


def test_a_picture_that_broke_later_is_named_and_left_out(capsys):
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")

    class Source:
        def __getitem__(self, number):
            if number == 1:
                raise GlimpseError("image broken: gone")
            return SimpleNamespace(images=[file.getvalue() if number == 0 else b"no picture"])

    entries = [SimpleNamespace(id=f"s{i}", sizes=[(8, 8)]) for i in range(3)]
    task = SimpleNamespace(name="a", entries=entries, source=Source())
    processor = SimpleNamespace(views=lambda picture: [picture], areas=lambda *size: [(0, 0, 1, 1)])
    runner = SimpleNamespace(task=task, vlm=SimpleNamespace(processor=processor))
    own = [made(f"s{i}", "dense", "red", task="a", grid=(1, 1), keep=(0,)) for i in range(3)]
    numbers = {p.key: i + 5 for i, p in enumerate(own)}
    samples, notes = summary.gallery(EvalConfig(plans=("dense",)), [(runner, own)], "exact_match", Lines(own, numbers))
    assert [(s.task, s.id, s.lines) for s in samples] == [("a", "s0", {"dense": 5})]
    assert len(notes) == 2 and "a:s1" in notes[0] and "image broken" in notes[0] and "a:s2" in notes[1]
    assert "a:s1" in capsys.readouterr().out
