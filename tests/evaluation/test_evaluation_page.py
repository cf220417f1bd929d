"""What a reader of the report meets first, and how a keyboard moves through it."""

import json
import shutil
import subprocess

import pytest
from report_tools import Page, made

from gp_jax.evaluation.reporting.headline import headline
from gp_jax.evaluation.reporting.html import write_report
from gp_jax.evaluation.reporting.line_links import Lines
from gp_jax.evaluation.reporting.page import JS
from gp_jax.evaluation.reporting.plan_rows import aggregate

pytestmark = pytest.mark.quick

# A page without the browser: just enough of one for the script to run.
STUB = """
const listeners = {};
const element = () => ({ children: Array.from({ length: 7 }, () => ({})),
  append() {}, addEventListener(name, f) { (listeners[name] ||= []).push(f); }, replaceChildren() {},
  querySelector: () => element(), querySelectorAll: () => [], classList: { toggle() {} }, dataset: {}, style: {}, scrollTop: 0 });
const fields = Object.fromEntries(['task', 'family', 'plan', 'metric', 'against', 'outcome', 'words'].map(n => [n, { value: '' }]));
const theForm = Object.assign(element(), { elements: fields });
const shownText = element(), dataText = { textContent: DATA };
globalThis.document = Object.assign(element(), {
  getElementById: id => ({ data: dataText, filters: theForm, shown: shownText })[id] || element(),
  createElement: element, createDocumentFragment: element });
globalThis.window = element();
globalThis.location = { hash: HASH };
globalThis.history = { replaceState(state, title, url) { location.hash = url; } };
"""


def test_three_lines_say_what_it_shows():
    rows = aggregate([made(str(i), plan, "red" if i or plan == "dense" else "blue") for i in range(4) for plan in ("dense", "glimpse")])
    what, result, reading = headline(rows, "exact_match")
    assert what.startswith("What: 2 plans answered the same 4 questions")
    assert "glimpse drops" in result and "reaches 75.0 % exact match; dense, which keeps all, 100.0 % (-25.0 points, 95 %" in result
    assert reading.startswith("Reading: ")
    assert headline([], "exact_match") == [] and "have no judge" in headline(rows, "judge")[1]
    assert headline(rows[:1], "exact_match")[1] == "Result: dense drops 0.0 % of the visual tokens and reaches 100.0 % exact match."


def test_filters_come_before_tables_and_a_link_skips_both(tmp_path):
    predictions = [made(str(i), plan, "red") for i in range(3) for plan in ("dense", "glimpse")]
    path = tmp_path / "r.html"
    write_report(path, "t", aggregate(predictions), {}, [], [], Lines(predictions))
    page = Page(path.read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.index("a") < tags.index("h1") < tags.index("table") < tags.index("form"), "the small table has no stops"
    stops = [place for place, (tag, found) in enumerate(page.tags) if tag == "a" and "data-plan" in found]
    assert tags.index("form") < min(stops)
    assert page.all("a")[0]["href"] == "#samples" and page.all("h2", id="samples")[0]["tabindex"] == "-1"


def browse(page_data: dict, hash_: str, tmp_path, then: str = "") -> dict:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node to run the page's script")
    stub = STUB.replace("DATA", json.dumps(json.dumps(page_data))).replace("HASH", json.dumps(hash_))
    said = "const values = Object.fromEntries(Object.entries(fields).map(([name, field]) => [name, field.value]));\n"
    said += "console.log(JSON.stringify({hash: location.hash, fields: values}))"
    (tmp_path / "run.js").write_text(f"{stub}\n{JS}\n{then}\n{said}")
    done = subprocess.run([node, tmp_path / "run.js"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


DATA = {
    "plans": ["dense", "a & b"],
    "metrics": ["exact match"],
    "main": 0,
    "samples": [["t", "1", "q", "a", "f"]],
    "answers": [[["x", 1, 1.0]] * 2],
}


def test_the_address_holds_the_filters(tmp_path):
    found = browse(DATA, "#plan=a%20%26%20b&outcome=right", tmp_path)
    assert found["fields"]["plan"] == "1" and found["fields"]["outcome"] == "right"
    assert found["hash"] == "#plan=a%20%26%20b&outcome=right"
    changed = browse(DATA, "", tmp_path, "fields.plan.value = '0'; fields.words.value = 'two words'; filter();")
    assert changed["hash"] == "#plan=dense&words=two%20words"
    assert browse(DATA, "#card-3", tmp_path)["hash"] == "#card-3", "an ordinary anchor stays"
    assert browse(DATA, "#plan=dense", tmp_path, "fields.plan.value = ''; filter();")["hash"] == "#samples"
