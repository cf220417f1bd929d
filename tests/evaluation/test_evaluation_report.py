"""Predictions on disk, rows of plans, tables, and the report as a parser sees it."""

import base64
import csv
import dataclasses
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from report_tools import NASTY, PREDICTIONS, Page, made

from gp_jax import GlimpseError
from gp_jax.evaluation.reporting import exports, tables
from gp_jax.evaluation.reporting.gallery import Example, shown_size
from gp_jax.evaluation.reporting.html import write_report
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.plan_rows import aggregate, breakdown
from gp_jax.evaluation.reporting.plots import flops_plot, retention_plot, time_plot, time_retention_plot
from gp_jax.evaluation.reporting.statistics import Interval, Spread
from gp_jax.evaluation.results import Prediction, line_numbers, read_predictions, write_predictions
from gp_jax.evaluation.summary import times

pytestmark = pytest.mark.quick

# Results --------------------------------------------------------------------------------------------------------------------


def test_predictions_come_back(tmp_path):
    whole = made("1", "dense", NASTY, boxes=((0.0, 0.1, 0.5, 1.0),), grid=(2, 3), keep=(0, 4), tokens=7, metrics={"a": 0.5})
    assert Prediction.from_json(whole.to_json()) == whole and "\n" not in whole.to_json()
    np.testing.assert_array_equal(whole.mask(), [[True, False, False], [False, True, False]])
    missing = Prediction.from_json(made("1", "dense", "red", metrics={"recall": math.nan}).to_json())
    assert math.isnan(missing.metrics["recall"])
    numpy = made("1", "dense", "red", kept=np.int64(3), keep=tuple(np.arange(3)), metrics={"a": np.float32(0.5)})
    assert Prediction.from_json(numpy.to_json()).kept == 3

    path = tmp_path / "predictions.jsonl"
    write_predictions(path, PREDICTIONS[:2])
    write_predictions(path, [made("3", "dense", "\ud800")])  # half a character
    with path.open("ab") as file:
        file.write('{"task": "é'.encode()[:-1])  # a killed run
    assert len(read_predictions(path)) == 3
    write_predictions(path, [made("1", "dense", "again")])
    assert [p.prediction for p in read_predictions(path)] == ["again", "Red.", "\ud800"]
    assert line_numbers(path) == {("scenes", "1", "dense"): 4, ("scenes", "2", "dense"): 2, ("scenes", "3", "dense"): 3}


WITHOUT_PEAK = json.dumps({name: value for name, value in vars(PREDICTIONS[0]).items() if name != "peak"})


@pytest.mark.parametrize("line", ["{}", "[]", "null", "{", json.dumps(vars(PREDICTIONS[0]) | {"metrics": 3}), WITHOUT_PEAK])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "predictions.jsonl"
    path.write_text(PREDICTIONS[0].to_json() + "\n" + line + "\n")
    with pytest.raises(GlimpseError, match=r"predictions.jsonl:2: not a prediction"):
        read_predictions(path)


def test_rows():
    dense, cut = aggregate(PREDICTIONS, flops=lambda p: p.total + p.kept, kv_bytes={"dense": 100.0, "cut": 30.0})
    assert (dense.plan, dense.samples, dense.paired, dense.retention, dense.flops_ratio, dense.agreement) == ("dense", 3, 3, 1.0, 1.0, 1.0)
    assert dense.differences == {} and dense.seconds.median == pytest.approx(0.4), "first calls do not count"
    assert dense.first_calls == 27 and cut.first_calls == 0
    assert (cut.plan, cut.samples, cut.paired, cut.kv_bytes) == ("cut", 3, 2, 30.0)
    assert dense.sample_retention == 1.0 and cut.sample_retention == pytest.approx((16 / 64 + 0 / 64 + 4 / 32) / 3)
    assert cut.retention == 20 / 160 and cut.prefill_retention == pytest.approx((0.5 * 128 + 0.25 * 32) / 160)
    assert cut.metrics["exact_match"].mean == pytest.approx(2 / 3)
    assert cut.differences["exact_match"].mean == 0.5, "over the samples that both answered"
    assert cut.agreement == 1.0, "'Red.' and 'red' are the same answer"
    assert cut.flops_ratio == (80 + 64) / (128 + 128)
    assert dataclasses.astuple(cut.seconds) == pytest.approx((0.3, 0.25, 0.35, 2))
    assert {name: found.median for name, found in cut.stages.items()} == pytest.approx({"vision": 0.1, "decode": 0.2})


def test_times_of_first_calls_are_left_out_of_medians():
    slow = [made(str(i), "dense", "red", seconds={"decode": 0.1, "compile": 0.0}) for i in range(3)]
    slow += [made("3", "dense", "red", seconds={"compile": 50.0}), made("4", "dense", "red", seconds={"decode": 9.0, "compile": 7.0})]
    (row,) = aggregate(slow)
    assert (row.seconds.median, row.seconds.n, row.first_calls) == (0.1, 4, 57.0)
    assert "100 ms (100 ms to 2.33 s), n = 4" in tables.markdown([row])
    said = times(slow)
    assert "57.0 s" in said and "1 of 5 answers" in said and "left out" not in times(slow[:3])


def test_rows_without_dense_or_costs():
    (row,) = aggregate([made("1", "cut", "red", metrics={"recall": math.nan}, seconds={}, total=0, kept=0)])
    assert row.metrics == row.differences == {} and (row.flops_ratio, row.kv_bytes, row.agreement) == (None, None, None)
    assert row.retention == 1.0 and row.seconds is None and row.phases == {}
    assert aggregate(PREDICTIONS, flops={"dense": 10.0, "cut": 4.0})[1].flops_ratio == 0.4
    assert aggregate(PREDICTIONS, flops={"cut": 4.0})[1].flops_ratio is None
    assert aggregate([]) == []
    with pytest.raises(GlimpseError, match="'dense' answers scenes 1 twice"):
        aggregate([PREDICTIONS[0], PREDICTIONS[0]])


def test_metrics_that_do_not_apply_are_left_out():
    rows = aggregate([made(str(i), "dense", "red", metrics={"recall": value}) for i, value in enumerate((1.0, math.nan, 0.5))])
    assert rows[0].metrics["recall"].mean == 0.75


def test_breakdown():
    found = breakdown(PREDICTIONS)
    assert {name: [(row.plan, row.samples) for row in rows] for name, rows in found.items()} == {
        "color": [("dense", 2), ("cut", 2)],
        "text": [("dense", 1), ("cut", 1)],
    }
    assert list(breakdown(PREDICTIONS, "task")) == ["scenes"]


# Tables ---------------------------------------------------------------------------------------------------------------------


def rows_for_tables():
    first, second = aggregate(PREDICTIONS, flops=lambda p: p.total + p.kept)
    second = dataclasses.replace(second, plan="a|b", metrics={"exact_match": Interval(0.712, 0.671, 0.75, 3)})
    return [first, dataclasses.replace(second, differences={"exact_match": Interval(-0.032, -0.051, -0.0001, 2)})]


def test_tables():
    rows = rows_for_tables()
    lines = tables.text(rows).splitlines()
    assert len(lines) == 7 and len(set(map(len, lines[4:6]))) == 1, "aligned"
    assert lines[5].split("  ")[0] == "a|b" and "71.2 (67.1 to 75.0) " in lines[5] and "-3.2 (-5.1 to +0.0), n = 2 " in lines[5]
    assert "87.5" in lines[5] and "12.5" in lines[5] and "300 ms (250 to 350), n = 2" in lines[5]
    assert lines[6].startswith("warning: exact match: Only 3 samples")
    marked = tables.markdown(rows).split("\n")
    assert marked[3].startswith("| a\\|b | 71.2 (") and all(line.count(" | ") == 8 for line in marked[:4])
    read = list(csv.DictReader(io.StringIO(exports.as_csv(rows))))
    assert [row["plan"] for row in read] == ["dense", "a|b"] and float(read[1]["exact_match_difference_low"]) == -0.051
    assert read[0]["exact_match_difference_low"] == "" and float(read[1]["pruned"]) == 0.875 and read[1]["exact_match_difference_n"] == "2"
    assert float(read[1]["sample_retention"]) == pytest.approx(0.125) and "retention, mean of samples" in tables.markdown(rows)
    loaded = json.loads(exports.as_json(rows))
    assert loaded[1]["sample_retention"] == pytest.approx(0.125)
    assert loaded[1]["metrics"]["exact_match"] == {"mean": 0.712, "low": 0.671, "high": 0.75, "n": 3}
    assert tables.text([]) and tables.markdown([]) and exports.as_csv([]) and json.loads(exports.as_json([])) == []


@pytest.mark.parametrize(("seconds", "shown"), [(12.345, "12.35 s"), (0.5, "500 ms"), (0.0123, "12.3 ms")])
def test_durations(seconds, shown):
    assert tables.duration(seconds) == shown


# The page -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    (path.parent / "out").mkdir()
    rng = np.random.default_rng(0)
    samples = []
    for number, size in enumerate([(64, 64), (300, 200), (1200, 900)]):
        picture = Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), np.uint8))
        keeps = {"dense": np.ones((4, 4), bool), NASTY: rng.random((4, 4)) < 0.3}
        said = {"dense": "red", NASTY: ["", NASTY, "red\x00\ud800"][number]}
        right, lines = {"dense": True, NASTY: False}, {"dense": number + 1, NASTY: number + 4}
        words = (f"question {number} {NASTY}", "red", f"family {number % 2}")
        samples.append(Example(*words, picture, keeps, said, right, task="scenes", id=str(number + 1), lines=lines))
    predictions = [dataclasses.replace(p, plan=NASTY if p.plan == "cut" else p.plan) for p in PREDICTIONS]
    notes = [f"command: {NASTY}", "seed: 0", "no colon"]
    write_predictions(path.parent / "out" / "predictions.jsonl", predictions)
    lines = Lines(predictions, line_numbers(path.parent / "out" / "predictions.jsonl"), path.parent / "out" / "predictions.jsonl")
    write_report(path, f"Title {NASTY}", aggregate(predictions), breakdown(predictions), samples, notes, lines)
    return path


@pytest.fixture(scope="module")
def page(report):
    return Page(report.read_text(encoding="utf-8"))


def test_the_page_is_well_formed(page):
    assert not page.errors and not page.open
    ids = [found["id"] for _, found in page.tags if "id" in found]
    assert len(ids) == len(set(ids))
    names = {f"#{name}" for name in ids}
    assert {found["href"] for _, found in page.tags if "href" in found} <= names | {"out/predictions.jsonl"}


def test_the_page_needs_nothing_from_outside(report, page):
    text = report.read_text(encoding="utf-8")
    assert not re.search(r"https?:|@import|//cdn", text)
    assert not page.all("link") and not any("src" in found for found in page.all("script"))
    assert all(found["src"].startswith("data:image/jpeg;base64,") for found in page.all("img"))
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{found['id']}" for _, found in page.tags if "id" in found}
    assert {p.name for p in report.parent.iterdir()} == {"out", "report.html"}, "nothing temporary is left"


def test_strangers_words_stay_words(page):
    words = "".join(page.words)
    assert words.count(NASTY) >= 3 + 2 + 1 and len(page.all("script")) == 2
    assert not any(name.startswith("on") for _, found in page.tags for name in found)
    assert "red\ufffd\ufffd" in words


def test_every_sample_is_there(page):
    found = page.all("article")
    assert [a["data-family"] for a in found] == ["family 0", "family 1", "family 0"]
    assert [a["id"] for a in found] == ["card-0", "card-1", "card-2"]
    assert [f["data-right"] for f in page.all("figure") if "data-plan" in f] == ["1", "0"] * 3
    assert len(page.all("svg")) == 3 and len(page.all("table")) == 5
    words = "".join(page.words)
    assert "16 of 16 tokens (100%)" in words and "Only 3 samples" in words and "nothing" in words


def test_pictures_can_be_seen(page):
    sizes = []
    for found in page.all("img"):
        image = Image.open(io.BytesIO(base64.b64decode(found["src"].partition(",")[2])))
        assert image.format == "JPEG" and image.size == (int(found["width"]), int(found["height"]))
        sizes.append(image.size)
    assert sizes == [(128, 128)] * 2 + [(300, 200)] * 2 + [(400, 300)] * 2
    assert shown_size((2, 4000)) == (1, 400)


def test_the_overlay_dims_what_was_dropped(tmp_path):
    keep = np.zeros((2, 2), bool)
    keep[0, 1] = True
    sample = Example("q", "a", "f", Image.new("RGB", (32, 32), (200, 40, 40)), {"cut": keep}, {"cut": "a"}, {"cut": True})
    write_report(tmp_path / "r.html", "t", [], {}, [sample], [], Lines())
    uri = Page((tmp_path / "r.html").read_text()).all("img")[0]["src"]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))), int)
    assert pixels[8, 56].max() > 180 and pixels[8, 8].max() < 90 and pixels[56, 56].max() < 90


def test_plots(page):
    rows = aggregate(PREDICTIONS)
    for plot, height in (
        (retention_plot, "exact match, %"),
        (flops_plot, "exact match, %"),
        (time_plot, "exact match, %"),
        (time_retention_plot, "median time per answer, ms"),
    ):
        svg = plot(rows)
        assert "currentColor" in svg and "#010203" not in svg and svg.count(height) == 2, "on the axis and for screen readers"
        assert not Page(svg).errors
    slow = dataclasses.replace(rows[0], seconds=Spread(2.0, 1.0, 3.0, 3))
    assert "time per answer, ms" in time_plot(rows) and "time per answer, s" in time_plot([slow])
    assert retention_plot([]) and time_retention_plot([]) and retention_plot(rows, "no such metric")


def test_without_times_there_is_no_plot_of_them(tmp_path):
    rows = aggregate([made("1", "dense", "red", seconds={})])
    write_report(tmp_path / "r.html", "t", rows, {}, [], [], Lines())
    found = Page((tmp_path / "r.html").read_text())
    assert len(found.all("svg")) == 1 and not found.all("form") and not found.errors
