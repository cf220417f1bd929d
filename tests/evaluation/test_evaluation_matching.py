"""Plans that keep as many visual tokens as the glimpse: of every sample, or of all together."""

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest

from gp_jax import GlimpseError, Prune
from gp_jax.config.model import GlimpseConfig
from gp_jax.evaluation.matching import pooled_ratio, sample_ratio
from gp_jax.evaluation.plans import AT_RATIO, make_plan, make_plans
from gp_jax.inference.requests import keep_rules
from gp_jax.processing.views import shrunk_grid
from gp_jax.pruning.plan import make_plan as cuts_of
from gp_jax.pruning.plan import shares

pytestmark = pytest.mark.quick

GLIMPSE = GlimpseConfig((0,), 0)


def sample(count: int) -> SimpleNamespace:
    numbers = np.arange(count)
    return SimpleNamespace(
        image_token=np.full(3, -1),
        count=count,
        total=count,
        tokens=numbers,
        slot_of_token=numbers,
        grids=((1, count),),
        ids=numbers,
        pixels=np.ones(count),
    )


def test_every_number_of_every_sample_is_met_exactly():
    totals = [*range(1, 200), *random.Random(0).sample(range(200, 20_000), 8)]
    for total in totals:
        for kept in range(1, total + 1):
            ratio = sample_ratio([(1, total)], kept)
            assert int(ratio * total) == kept and ratio <= 1
    assert sample_ratio([(4, 4), (3, 5)], 7) * 31 == pytest.approx(7)
    assert sample_ratio([(4, 4)], 0) * 16 == 1 and sample_ratio([(4, 4)], 99) == 1 and sample_ratio([], 0) == 1


def test_pictures_are_scaled_to_the_grid_nearest_to_a_number():
    rng = random.Random(0)
    for _ in range(100):
        grids = [(rng.randint(1, 40), rng.randint(1, 40)) for _ in range(rng.choice((1, 1, 2)))]
        total = sum(rows * columns for rows, columns in grids)
        kept = rng.randint(len(grids), total)
        ratio = sample_ratio(grids, kept, shrink=True)
        found = [shrunk_grid(grid, ratio) for grid in grids]
        plain = [shrunk_grid(grid, kept / total) for grid in grids]  # never more than that share
        off, before = (abs(sum(map(math.prod, some)) - kept) for some in (found, plain))
        assert off <= before and (off <= 1 + 0.1 * kept or min(map(min, grids)) < 4)


@pytest.mark.parametrize("method", ["random", "attention", "fastv", "pyramiddrop", "visionzip", "divprune", "cdpruner", "vscan", "glimpse"])
def test_a_batch_keeps_another_number_of_every_sample(method):
    """Behind the last cut; cuts in front of it take the shares that the method says."""
    totals, kept = (60, 7, 100, 1), (13, 7, 29, 1)
    ratios = [sample_ratio([(1, n)], k) for n, k in zip(totals, kept, strict=True)]
    prune = Prune(method=method, fixed_remain_ratio=ratios)
    plan = cuts_of(prune, GLIMPSE, 12)
    rules = keep_rules([sample(n) for n in totals], plan, prune, 6, 128)
    assert rules[-1].limits.fixed.tolist() == [*kept, 0, 0], "and of padding none"
    for n, ratio, own in zip(totals, ratios, zip(*shares(prune, plan), strict=True), strict=True):
        alone = Prune(method=method, fixed_remain_ratio=ratio)
        assert list(own) == [share[0] if isinstance(share, tuple) else share for share in shares(alone, plan)]
        (row,) = [i for i, total in enumerate(totals) if total == n]
        one = keep_rules([sample(n)], plan, alone, 1, 128)
        assert [int(cut.limits.fixed[0]) for cut in one] == [int(cut.limits.fixed[row]) for cut in rules]


def test_shares_of_samples_must_be_as_many_and_numbers():
    prune = Prune(method="random", fixed_remain_ratio=(0.5, 0.2))
    with pytest.raises(GlimpseError, match="2 shares for 3 samples"):
        keep_rules([sample(9)] * 3, cuts_of(prune, GLIMPSE, 4), prune, 4, 16)
    one = Prune(fixed_remain_ratio=[0.5])
    with pytest.raises(GlimpseError, match="1 shares for 3 samples"):
        keep_rules([sample(9)] * 3, cuts_of(one, GLIMPSE, 4), one, 4, 16)
    for wrong in ([], [None, 0.5], [0.5, 1.5], [True], ["1"], [float("nan")], [[0.5]], np.zeros((2, 2)), {}, {"a": 1}, "half"):
        with pytest.raises(GlimpseError, match="fixed_remain_ratio"):
            Prune(method="random", fixed_remain_ratio=wrong)
    assert Prune(fixed_remain_ratio=np.array([1.0, 1.0])).keeps_everything and not Prune(fixed_remain_ratio=(1, 0.5)).keeps_everything


def test_plans_by_name():
    for name in ("random", "random-3", *AT_RATIO):
        plan, pooled = make_plan(name, GLIMPSE), make_plan(f"{name}-pooled", GLIMPSE)
        assert (plan.matched, pooled.matched, pooled.name) == ("sample", "pooled", f"{name}-pooled")
        if name != "downsample":
            assert plan.rule([], [0.5, 0.2]).ratios == (0.5, 0.2) and pooled.rule([], 0.25).ratios == (0.25,)
    for name in ("dense", "glimpse", "glimpse-11.1", "random-0-11.1", "fastv-25", "nothing", "oracle"):
        assert make_plan(name, GLIMPSE).matched is None
        with pytest.raises(GlimpseError, match=f"'{name}-pooled': only plans that match"):
            make_plan(f"{name}-pooled", GLIMPSE)
    with pytest.raises(GlimpseError, match="names? that one too"):
        make_plans(["dense", "random-pooled"], GLIMPSE)
    assert [plan.name for plan in make_plans(["random", "fastv-pooled", "glimpse"], GLIMPSE)] == ["glimpse", "random", "fastv-pooled"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("fastv-pool", "fastv-pooled"),
        ("random-poold", "random-pooled"),
        ("random-1-pooled-", "number"),
        ("fastw-pooled", "fastv"),
        ("pooled", "-pooled"),
        ("random-" + "9" * 5000, "whole number"),
        ("random-pooled-3", "seed"),
    ],
)
def test_names_that_are_none(name, near):
    with pytest.raises(GlimpseError, match=near):
        make_plan(name, GLIMPSE)


def test_pooled_shares_keep_other_numbers_of_single_samples():
    """Why the plans match sample by sample: of small pictures a glimpse keeps more."""
    grids, kept = [[(6, 6)]] * 4 + [[(20, 20)]] * 4, [9] * 4 + [20] * 4
    ratio = pooled_ratio(grids, sum(kept))
    assert abs(4 * int(ratio * 36) + 4 * int(ratio * 400) - sum(kept)) <= 4 and int(ratio * 36) < 4 < 20 < int(ratio * 400)
