"""The cost panel: what `python -m benchmarks.cost` writes becomes a table, and nothing else does."""

import json
from types import SimpleNamespace

import pytest
from report_tools import Page

from gp_jax import GlimpseError
from gp_jax.evaluation.reporting.cost_panel import lines, panel, read_cost, text
from gp_jax.evaluation.settings import EvalConfig

MEASURED = {"first_token_s": 2.0, "per_token_s": 0.05, "cache_bytes": 64 * 2**20, "requests": 12}
LESS = {"first_token_s": 1.5, "cache_bytes": 8 * 2**20, "requests": 96}
COMPUTED = {"prefill_flops": 80e12, "cache_bytes": 2**28, "requests": 30}
FACTS = {
    "command": "python -m benchmarks.cost --size <b>",
    "machine": "x86_64",
    "size": "mid",
    "retention": 0.074,
    "new_tokens": 16,
    "budget": 1.0,
    "budget_7b": 24.0,
    "measured": [
        {"tokens": 4096, "dense": MEASURED, "pruned": MEASURED | {"first_token_s": 1.5, "cache_bytes": 8 * 2**20, "requests": 96}}
    ],
    "computed": [{"tokens": 4096, "dense": COMPUTED, "pruned": COMPUTED | {"prefill_flops": 60e12, "requests": 300}}],
}


def test_the_panel_says_what_was_measured_and_computed(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps(FACTS))
    facts = read_cost(tmp_path / "cost.json")
    first, _, cache, fit, flops, *_ = lines(facts)
    assert first == ("measured, 4,096 visual tokens", "time to first token", "2.00 s", "1.50 s", "75%")
    assert cache[2:] == ("64.0 MiB", "8.0 MiB", "12%") and fit[1:] == ("requests in 1 GiB", "12", "96", "800%")
    assert flops == ("computed, Qwen2.5-VL 7B, 4,096 visual tokens", "FLOPs to first token", "80.0 TFLOP", "60.0 TFLOP", "75%")
    page = Page(panel(facts))
    assert not page.errors and "python -m benchmarks.cost --size <b>" in "".join(page.words)
    line = " ".join(text(FACTS).splitlines()[1].split())
    assert line == "measured, 4,096 visual tokens time to first token 2.00 s 1.50 s 75%"


@pytest.mark.parametrize("change", [{"measured": [{}]}, {"retention": "much"}, {"more": 1}])
def test_another_file_is_refused(tmp_path, change):
    (tmp_path / "cost.json").write_text(json.dumps(FACTS | change))
    with pytest.raises(GlimpseError, match=r"cost.json: .*; python -m benchmarks.cost writes such a file"):
        read_cost(tmp_path / "cost.json")


def test_a_file_that_is_missing_is_named_before_anything_is_answered(tmp_path):
    with pytest.raises(GlimpseError, match="cost='.*' is not a file; python -m benchmarks.cost --out"):
        EvalConfig(cost=str(tmp_path / "none.json")).check()


def test_the_benchmark_measures_both_kinds():
    from benchmarks import cost

    args = cost.Args(tokens=(64,), size="small", new_tokens=4, rounds=1, budget=0.1)
    (row,), (computed,) = cost.measure(args), cost.compute(SimpleNamespace(tokens=(4096,), new_tokens=128, retention=0.074, budget_7b=24.0))
    assert row["tokens"] == 64 and row["pruned"]["cache_bytes"] < row["dense"]["cache_bytes"]
    assert row["pruned"]["requests"] > row["dense"]["requests"] > 0 and row["dense"]["first_token_s"] > 0
    assert computed["pruned"]["cache_bytes"] < 0.12 * computed["dense"]["cache_bytes"] and 30 < computed["dense"]["requests"] < 50
