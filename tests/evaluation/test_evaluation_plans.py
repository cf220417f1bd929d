"""Plans through the runner: what is left, what an average layer saw, what decoding holds, what it costs."""

import dataclasses

import numpy as np
import pytest

from gp_jax import GlimpseError, Ladder, Ladders, Look, Prune, tiny
from gp_jax.config.model import GlimpseConfig
from gp_jax.evaluation.matching import pooled_ratio
from gp_jax.evaluation.plans import make_plan, make_plans
from gp_jax.evaluation.reporting.plan_rows import aggregate
from gp_jax.evaluation.reporting.tables import main_columns
from gp_jax.evaluation.results import read_predictions
from gp_jax.evaluation.runner import Runner, Task
from gp_jax.flops import Workload, first_look, segments, stages
from gp_jax.processing.images import decode
from gp_jax.processing.llava import LlavaProcessor
from gp_jax.processing.qwen import Processor
from gp_jax.processing.views import shrunk_grid
from gp_jax.scenes.source import ScenesSource
from gp_jax.vlm import GlimpseVLM

NAMES = ["dense", "glimpse-30", "glimpse", "fastv-25", "pyramiddrop-25", "vscan-10", "visionzip", "downsample-25", "nothing"]
NAMES += ["visionzip-pooled", "downsample", "random"]
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
    written = {p.key: p for p in read_predictions(folder / "predictions.jsonl")}
    assert {p.key: p for p in predictions} == written and len(predictions) == len(written), "what is written comes back"
    return runner, {name: [p for p in predictions if p.plan == name] for name in NAMES}


def test_both_retentions(found):
    _, plans = found
    for name, own in plans.items():
        for p in own:
            n, share = p.total, p.kept / p.total
            least = {"fastv-25": 0.25, "pyramiddrop-25": 0.25, "vscan-10": 0.1, "visionzip": p.ratio, "visionzip-pooled": p.ratio}.get(name)
            if least is not None:
                assert p.kept == max(1, int(least * n)) == len(p.keep)
            seen = {
                "dense": [n] * DEPTH,
                "fastv-25": [n] * 2 + [p.kept] * 4,
                "pyramiddrop-25": [n] + [int(0.25 ** (1 / 3) * n)] * 2 + [int(0.25 ** (2 / 3) * n)] + [p.kept] * 2,
                "vscan-10": [int(min(1.0, 3 * 0.1) * n)] * 3 + [p.kept] * 3,
                **dict.fromkeys(("visionzip", "visionzip-pooled", "downsample"), [p.kept] * DEPTH),
                "downsample-25": [p.kept] * DEPTH,
            }.get(name, [n] * (CUT + 1) + [p.kept] * (DEPTH - CUT - 1))
            assert p.prefill_retention == pytest.approx(np.mean(seen) / n)
            assert p.held == pytest.approx(np.mean(seen) if name in ("fastv-25", "pyramiddrop-25") else p.kept)
            if name not in ("downsample-25", "downsample", "dense"):
                assert set(p.metrics) == {"exact_match", "recall", "iou"} and p.mask().mean() == pytest.approx(share)
            if name == "downsample-25":
                rows, columns = plans["dense"][[q.sample for q in plans["dense"]].index(p.sample)].grid
                assert p.grid == shrunk_grid((rows, columns), 0.25) and n == rows * columns and len(p.keep) == p.kept


def nearest(totals: list[int], kept: int) -> int:
    """The sum nearest to `kept` of max(1, int(r N)), over every r at which one of them grows."""
    ratios = {k / n for n in set(totals) for k in range(1, n + 1)}
    return min((sum(max(1, int(r * n)) for n in totals) for r in ratios), key=lambda amount: (abs(amount - kept), -amount))


def test_plans_that_match_the_glimpse_keep_as_many(found):
    """On the engine; and for the grids of many scenes, where the mean share would lose half a token of each."""
    runner, plans = found
    totals, kept = [p.total for p in plans["glimpse"]], sum(p.kept for p in plans["glimpse"])
    assert sum(p.kept for p in plans["visionzip-pooled"]) == nearest(totals, kept)
    assert len({p.ratio for p in plans["visionzip-pooled"]}) == 1
    for name in ("visionzip", "random"):
        assert [p.kept for p in plans[name]] == [p.kept for p in plans["glimpse"]], "of every sample"
    assert all(abs(p.kept - q.kept) <= max(q.grid) / 2 for p, q in zip(plans["downsample"], plans["glimpse"], strict=True)), "half a row"
    sizes = [entry.sizes for entry in ScenesSource("test", 200, 0).entries]
    grids = [[grid for size in own for grid in runner.vlm.processor.plot(*size).grids] for own in sizes]
    totals = [sum(rows * columns for rows, columns in own) for own in grids]
    for share in (0.02, 0.074, 0.111, 0.5, 1.0):
        kept = int(share * sum(totals))
        ratio = pooled_ratio(grids, kept)
        amount = sum(max(1, int(ratio * n)) for n in totals)
        assert amount == nearest(totals, kept)
        assert share == 0.02 or abs(amount - kept) <= 0.01 * kept, "one or two tokens of each are too coarse for that"
        if share == 0.074:
            assert sum(max(1, int(share * n)) for n in totals) < 0.99 * kept, "what rounding down would lose"
        small = pooled_ratio(grids, kept, shrink=True)
        assert (
            abs(sum(rows * columns for own in grids for rows, columns in (shrunk_grid(grid, small) for grid in own)) - kept) <= 0.1 * kept
        )
    assert pooled_ratio(grids, 0) == 1e-6 and pooled_ratio([], 0) == 1e-6


def test_a_batch_of_unlike_shares_equals_its_samples_alone(found):
    vlm, source = found[0].vlm, ScenesSource("test", 2, 0)
    pictures, questions = [decode(source[n].images[0], "a") for n in range(2)], [entry.question for entry in source.entries]
    for method in ("attention", "pyramiddrop", "visionzip"):
        both = vlm.answer([[p] for p in pictures], questions, prune=Prune(method=method, fixed_remain_ratio=(0.1, 0.6)), max_new_tokens=2)
        for picture, question, ratio, together in zip(pictures, questions, (0.1, 0.6), both, strict=True):
            alone = vlm.answer(picture, question, prune=Prune(method=method, fixed_remain_ratio=ratio), max_new_tokens=2)
            assert alone.kept == int(ratio * alone.total) and alone.seen == together.seen
            np.testing.assert_array_equal(alone.keep[0], together.keep[0])
            np.testing.assert_array_equal(alone.tokens, together.tokens)


def test_plans_with_two_looks(found, tmp_path):
    """What is seen, what layers see, and FLOPs counted by hand."""
    vlm = found[0].vlm
    names = ["dense", "look-least4-above100-floor30-cap30-sureoff", "look-random-floor30", "look-oracle", "look-first-share25", "look"]
    runner = Runner(vlm, Task("scenes", ScenesSource("test", 2, 0), max_new_tokens=2), tmp_path / "predictions.jsonl", batch=2)
    predictions = runner.run(make_plans(names, vlm.glimpse_config), quiet=True)
    assert {p.key: p for p in predictions} == {p.key: p for p in read_predictions(tmp_path / "predictions.jsonl")}
    plans = {name: [p for p in predictions if p.plan == name] for name in names}
    side, config, glimpse = vlm.config.vision.window_side, vlm.config, vlm.glimpse_config
    for name in names[1:4]:
        for p in plans[name]:
            rows, columns = p.grid
            windows = -(-rows // side) * -(-columns // side)
            assert p.viewed == sum(p.windows[0]) < p.total and p.cuts in ((), ((CUT, p.kept),))
            assert name == "look-oracle" or len(p.windows[0]) == max(1, -(-3 * windows // 10) if "random" in name else int(0.3 * windows))
            assert p.prefill_retention == pytest.approx((p.viewed * (CUT + 1) + p.kept * (DEPTH - CUT - 1)) / DEPTH / p.total)
            assert bool(p.looked) == (name == names[1])
    for p in plans[names[1]]:
        work = Workload(4 * p.viewed, p.viewed, 0, 1, windows=p.windows)
        text = runner.flops(dataclasses.replace(p, windows=(), looked=())), runner.flops(dataclasses.replace(p, looked=()))
        assert segments(config.vision, work) == ([4 * size for size in p.windows[0]], [4 * p.viewed])
        assert text[1] < text[0] and runner.flops(p) > text[1]
        small = Workload.of(config.vision, p.looked, 20, 1)
        by_hand = stages(config, glimpse, small, [(glimpse.reduce_layer, 0.0)], itemsize=4)
        parts = ("vision", "merger", f"layers 0..{glimpse.reduce_layer}", "glimpse rows", "predictor")
        assert first_look(config, glimpse, small, itemsize=4).flops == sum(by_hand[part].flops for part in parts)
    for p in plans["look-first-share25"]:
        assert p.viewed == sum(rows * columns for rows, columns in p.grids) <= 0.25 * p.total and not p.looked
    rows = {row.plan: row for row in aggregate(predictions, runner.flops)}
    assert rows["look-random-floor30"].vision_retention < 0.5 and rows["dense"].vision_retention == 1
    named = [{column.name for column in main_columns(own)} for own in (list(rows.values()), [rows["dense"]])]
    assert "picture seen" in named[0] and "picture seen" not in named[1]


def test_names_of_looks():
    glimpse = GlimpseConfig((0,), 0)
    rule = make_plan("look-share6.25-above10-margin1-cap40-sure30-keep11.1", glimpse).rule([], None)
    assert rule.look == Look(share=0.0625, threshold=0.1, margin=1, cap=0.4, sure=0.3) and rule.max_remain_ratio == pytest.approx(0.111)
    assert make_plan("look-random-seed3-floor20", glimpse).rule([], None).look.random == 3
    assert make_plan("look-tokens64-least9-sureoff", glimpse).rule([], None).look == Look(tokens=64, least=9, sure=None)
    assert make_plan("look", glimpse).rule([], None).look == Look()
    for name in ("look-shaer25", "look-25", "look-share", "look-margin1.5", "look-capoff", "look-seed3", "look-share200", "look-"):
        with pytest.raises(GlimpseError, match=f"plan '{name}'|share"):
            make_plan(name, glimpse)
    with pytest.raises(GlimpseError, match="needs a glimpse"):
        make_plan("look", None)


def test_shares_and_seeds_of_random():
    plain, seeded, fixed = (make_plan(name, None) for name in ("random", "random-3", "random-3-11.1"))
    rules = [plan.rule([], 0.2 if plan.matched else plan.ratio) for plan in (plain, seeded, fixed)]
    assert [(rule.seed, rule.fixed_remain_ratio) for rule in rules] == [(0, 0.2), (3, 0.2), (3, pytest.approx(0.111))]
    assert plain.matched and seeded.matched and not fixed.matched
    for name in ("random-11.1", "random-", "random--1", "random-1e2", "random-nan", "random-x", "random-1-"):
        with pytest.raises(GlimpseError, match=f"'{name}'"):
            make_plan(name, None)
    with pytest.raises(GlimpseError, match="random-0-11.1"):
        make_plan("random-11.1", None)


def test_pictures_of_a_fixed_size_are_not_scaled_down():
    """Found before anything is answered."""
    assert not LlavaProcessor.shrinks and Processor.shrinks
    for names in (["dense", "downsample-25"], ["glimpse", "downsample"]):
        with pytest.raises(GlimpseError, match=f"'{names[1]}'.*fewer visual tokens"):
            make_plans(names, GlimpseConfig((0,), 0), resizable=False)
    assert len(make_plans(["dense", "downsample-25"], None)) == 2


def test_limits_on_visual_tokens(found):
    """As lmms-eval's model argument: small pictures are scaled up, large ones down."""
    processor = found[0].vlm.processor
    side = processor.config.vision.patch_size * processor.config.vision.spatial_merge_size
    both = processor.limited(40, 16)
    tokens = {size: [np.prod(p.plot(side * size, side * size).grids[0]) for p in (processor, both)] for size in (2, 5, 12)}
    assert [own[0] for own in tokens.values()] == [4, 25, 144] and [own[1] for own in tokens.values()] == [16, 25, 36]
    with pytest.raises(GlimpseError, match="min_visual_tokens=41"):
        processor.limited(40, 41)


def test_costs(found):
    runner, plans = found
    rows = {row.plan: row for row in aggregate([p for own in plans.values() for p in own], runner.flops)}
    ratios = {name: row.flops_ratio for name, row in rows.items()}
    assert ratios["dense"] == 1.0 and all(0 < ratio <= 1.3 for ratio in ratios.values())
    assert ratios["downsample-25"] < ratios["vscan-10"] < ratios["fastv-25"] < ratios["pyramiddrop-25"] < 1.0
    assert rows["fastv-25"].retention == rows["fastv-25"].prefill_retention
    assert rows["vscan-10"].retention < rows["vscan-10"].prefill_retention < 0.25
