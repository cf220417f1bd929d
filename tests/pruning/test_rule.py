"""The keep rule against its released wording, and the settings' checks."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax import GlimpseError, Prune
from gp_jax.pruning.rule import anchor_indices, cap_trigger, keep_mask, limits, reference_mask

pytestmark = pytest.mark.quick

keep_mask = jax.jit(keep_mask)


def released_rule(logits: list[float], prune: Prune, always: set[int]) -> set[int]:
    """Kept indices, straight from the method's text, in Python floats."""
    count = len(logits)
    ranked = sorted(range(count), key=lambda i: -logits[i])
    if prune.fixed_remain_ratio is not None:
        kept = set(ranked[: max(1, int(prune.fixed_remain_ratio * count))])
    else:
        kept = {i for i in range(count) if 1 / (1 + math.exp(-logits[i])) > prune.reduce_threshold}
        if prune.max_remain_ratio is not None and len(kept) / count > prune.max_remain_ratio:
            kept = set(ranked[: int(prune.max_remain_ratio * count)])
        if len(kept) < (prune.min_remain_num or 0):
            kept |= set(ranked[: prune.min_remain_num])
    return kept | always


ratio = st.one_of(st.none(), st.floats(0, 1, width=32), st.sampled_from([0.0, 0.111, 0.222, 1 / 3, 0.5, 1.0]))
sample = st.lists(st.integers(-80, 80), min_size=1, max_size=17, unique=True)


@settings(max_examples=150)
@given(
    st.lists(sample, min_size=1, max_size=3),
    st.sampled_from([0.1, 0.5, 0.77, 0.999999]),
    ratio,
    ratio,
    st.sampled_from([None, 0, 1, 4, 50]),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_keep_mask_is_the_released_rule(rows, threshold, cap, fixed, floor, anchors, random):
    prune = Prune(reduce_threshold=threshold, max_remain_ratio=cap, fixed_remain_ratio=fixed, min_remain_num=floor)
    slots = 24
    logits, present, always = (
        np.full((len(rows), slots), 99.0, np.float32),
        np.zeros((len(rows), slots), bool),
        np.zeros((len(rows), slots), bool),
    )
    places = []
    for b, row in enumerate(rows):
        place = random.sample(range(slots), len(row))  # padding slots lie anywhere
        places.append(place)
        logits[b, place], present[b, place] = np.array(row) / 7, True
        always[b, place[0]] = anchors
    rule = limits(prune, np.array([len(row) for row in rows]), always)
    keep = np.asarray(keep_mask(logits, present, rule))
    for b, row in enumerate(rows):
        expected = released_rule([float(np.float32(v / 7)) for v in row], prune, {0} if anchors else set())
        assert {i for i, place in enumerate(places[b]) if keep[b, place]} == expected
        assert not keep[b][~present[b]].any()


@given(st.one_of(st.floats(0, 1), st.sampled_from([0.111, 0.1, 0.3, 1 / 3, 0.7])), st.integers(1, 16384))
def test_cap_trigger_is_the_float_comparison(ratio, count):
    trigger = cap_trigger(ratio, count)
    assert trigger / count <= ratio
    assert trigger == count or (trigger + 1) / count > ratio


def test_ties_keep_exactly_the_cap():
    rule = limits(Prune(max_remain_ratio=0.25), np.array([8]), np.zeros((1, 8), bool))
    assert np.asarray(keep_mask(np.full((1, 8), 40.0, np.float32), np.ones((1, 8), bool), rule)).sum() == 2


def test_anchors():
    assert anchor_indices(("tl", "tr", "bl", "br"), [(3, 5)]) == [0, 4, 10, 14]
    assert anchor_indices(("tl",), []) == []
    with pytest.raises(GlimpseError, match="one image, this one has 2"):
        anchor_indices(("tl",), [(3, 5), (2, 2)])


def test_reference_masks_of_any_shape():
    grids = [(2, 3), (1, 4)]
    flat = np.arange(10) % 2 == 0
    parts = [flat[:6].reshape(2, 3), flat[6:].reshape(1, 4)]
    for mask in (flat, list(flat), parts, [flat[:6], flat[6:]]):
        np.testing.assert_array_equal(reference_mask(mask, grids, "m"), flat)
    np.testing.assert_array_equal(reference_mask(parts[0], grids[:1], "m"), flat[:6])
    assert reference_mask(None, [], "m").size == 0
    for wrong in (flat[:6], parts[0], [parts[1], parts[0]], parts[0].T):
        with pytest.raises(GlimpseError, match="reference_masks"):
            reference_mask(wrong, grids, "reference_masks[0]")
    for wrong in (np.full(10, 0.3), ["a"] * 10):
        with pytest.raises(GlimpseError, match="true and false|must hold numbers"):
            reference_mask(wrong, grids, "m")
    with pytest.raises(GlimpseError, match="token grids"):
        reference_mask(parts[0].T, grids[:1], "m")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(max_remain_ratio=1.5), "max_remain_ratio=1.5"),
        (dict(fixed_remain_ratio=-0.1), "fixed_remain_ratio=-0.1"),
        (dict(min_remain_num=-1), "min_remain_num=-1"),
        (dict(min_remain_num=2.7), "min_remain_num=2.7"),
        (dict(max_remain_ratio="0.1"), "max_remain_ratio='0.1'"),
        (dict(reduce_threshold=None), "reduce_threshold=None"),
        (dict(anchor_positions=("middle",)), "anchor_positions\\[0\\]='middle': must be 'tl'"),
        (dict(anchor_positions=5), "anchor_positions=5"),
        (dict(reference_masks=5), "reference_masks must be a list"),
    ],
)
def test_bad_settings(setting, message):
    with pytest.raises(GlimpseError, match=message):
        Prune(**setting)


def test_reference_masks_that_are_no_arrays():
    class Raises:
        def __array__(self, *args, **kwargs):
            raise RuntimeError("elsewhere")

    ones = np.ones((2, 3), bool)
    for wrong, message in (
        (Raises(), "elsewhere"),
        ([Raises()], "elsewhere"),
        ([[1, 0], [1]], "is not an array"),
        (np.ma.masked_array(ones, mask=ones), "masked in parts"),
        (np.broadcast_to(np.int8(1), (10**6, 10**6)), "repeats 1 bytes"),
        ([None], "must hold numbers"),
        (ones.astype(float), "must hold true and false"),
    ):
        with pytest.raises(GlimpseError, match=rf"reference_masks\[0\].*{message}"):
            reference_mask(wrong, [(2, 3)], "reference_masks[0]")
