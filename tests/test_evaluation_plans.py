"""Plans through the runner: what is left, what an average layer saw, what decoding holds, what it costs."""

import numpy as np
import pytest

from gp_jax import Ladder, Ladders, tiny
from gp_jax.evaluation.plans import make_plans, shrunk_grid
from gp_jax.evaluation.results import read_predictions
from gp_jax.evaluation.rows import aggregate
from gp_jax.evaluation.runner import Runner, Task
from gp_jax.scenes.source import ScenesSource
from gp_jax.vlm import GlimpseVLM

NAMES = ["dense", "glimpse-30", "glimpse", "fastv-25", "pyramiddrop-25", "vscan-10", "visionzip", "downsample-25", "nothing"]
DEPTH, CUT = 6, 3  # of the tiny model
LADDERS = Ladders(
    patches=Ladder("patches", (1024, 4096)),
    prompt=Ladder("prompt", (512, 1280)),
    kept=Ladder("kept", (256,)),
    decode=Ladder("decode", (4,)),
    batch=Ladder("batch", (2,)),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    tiny.make_checkpoint(folder / "model")
    vlm = GlimpseVLM.from_pretrained(folder / "model", ladders=LADDERS)
    runner = Runner(vlm, Task("scenes", ScenesSource("test", 2, 0), max_new_tokens=2), folder / "predictions.jsonl", batch=2)
    predictions = runner.run(make_plans(NAMES, vlm.glimpse_config), quiet=True)
    assert predictions == read_predictions(folder / "predictions.jsonl"), "what is written comes back"
    return runner, {name: [p for p in predictions if p.plan == name] for name in NAMES}


def test_both_retentions(found):
    _, plans = found
    mean = {p.sample: sum(q.kept for q in plans["glimpse"]) / sum(q.total for q in plans["glimpse"]) for p in plans["dense"]}
    for name, own in plans.items():
        for p in own:
            n, share = p.total, p.kept / p.total
            least = {"fastv-25": 0.25, "pyramiddrop-25": 0.25, "vscan-10": 0.1, "visionzip": mean[p.sample]}.get(name)
            if least is not None:
                assert p.kept == max(1, int(least * n)) == len(p.keep)
            seen = {
                "dense": [n] * DEPTH,
                "fastv-25": [n] * 2 + [p.kept] * 4,
                "pyramiddrop-25": [n] + [int(0.25 ** (1 / 3) * n)] * 2 + [int(0.25 ** (2 / 3) * n)] + [p.kept] * 2,
                "vscan-10": [int(min(1.0, 3 * 0.1) * n)] * 3 + [p.kept] * 3,
                "visionzip": [p.kept] * DEPTH,
                "downsample-25": [p.kept] * DEPTH,
            }.get(name, [n] * (CUT + 1) + [p.kept] * (DEPTH - CUT - 1))
            assert p.prefill_retention == pytest.approx(np.mean(seen) / n)
            assert p.held == pytest.approx(np.mean(seen) if name in ("fastv-25", "pyramiddrop-25") else p.kept)
            if name not in ("downsample-25", "dense"):
                assert set(p.metrics) == {"exact_match", "recall", "iou"} and p.mask().mean() == pytest.approx(share)
            if name == "downsample-25":
                rows, columns = plans["dense"][[q.sample for q in plans["dense"]].index(p.sample)].grid
                assert p.grid == shrunk_grid((rows, columns), 0.25) and n == rows * columns and len(p.keep) == p.kept


def test_costs(found):
    runner, plans = found
    rows = {row.plan: row for row in aggregate([p for own in plans.values() for p in own], runner.flops)}
    ratios = {name: row.flops_ratio for name, row in rows.items()}
    assert ratios["dense"] == 1.0 and all(0 < ratio <= 1.3 for ratio in ratios.values())
    assert ratios["downsample-25"] < ratios["vscan-10"] < ratios["fastv-25"] < ratios["pyramiddrop-25"] < 1.0
    assert rows["fastv-25"].retention == rows["fastv-25"].prefill_retention
    assert rows["vscan-10"].retention < rows["vscan-10"].prefill_retention < 0.25
