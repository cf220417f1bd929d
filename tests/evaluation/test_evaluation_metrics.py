"""Metrics and intervals against values worked out by hand."""

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from gp_jax import GlimpseError
from gp_jax.evaluation.metrics import (
    CONTRACTIONS,
    anls,
    edit_distance,
    exact_match,
    iou,
    normalise,
    precision,
    recall,
    token_f1,
    vqa_accuracy,
    vqa_normalise,
)
from gp_jax.evaluation.reporting.statistics import Interval, bootstrap, enough, paired_difference

pytestmark = pytest.mark.quick

# Answers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  Red\n Circle. ", "red circle"),
        ("3.5", "3.5"),
        ("...", ".."),  # one period only
        ("the cat", "the cat"),  # articles stay
        ("yes .", "yes"),
        ("CAFE\u0301", "caf\u00e9"),  # an accent in two spellings
        ("", ""),
    ],
)
def test_normalise(text, plain):
    assert normalise(text) == plain


def test_exact_match():
    assert exact_match("Red circle.", "red circle") == 1.0
    assert exact_match("a red circle", "red circle") == 0.0
    assert exact_match("blue", ["red", "Blue"]) == 1.0
    assert exact_match("", "red") == 0.0 and exact_match("", "") == 1.0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Cat.", "cat"),
        ("two dogs and a bird", "2 dogs and bird"),
        ("none", "0"),
        ("1,000", "1000"),  # a comma between digits
        ("3.5", "3.5"),  # a period before a digit stays
        ("black/white", "black white"),  # punctuation between letters
        ("yes, it is!", "yes it is"),  # ", " lies beside a space; "!" becomes one at the end
        ("black - white", "black white"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("y'alld've", "y'all'd've"),
        ("were", "were"),  # no contraction of VQA's table
        ("it's", "it's"),
        ("A", "a"),  # a letter of a multiple choice, not an article that leaves nothing
        ("", ""),
        ("\u00c9t\u00e9\tRouge", "\u00e9t\u00e9 rouge"),
    ],
)
def test_vqa_normalise(text, plain):
    assert vqa_normalise(text) == plain


def test_contractions_end_where_they_should():
    assert {"aint": "ain't", "twas": "'twas", "oclock": "o'clock", "theyre": "they're"}.items() <= CONTRACTIONS.items()
    assert all(word.replace("'", "") == short.replace("'", "") for short, word in CONTRACTIONS.items())


@pytest.mark.parametrize(
    ("agree", "score"),
    # k of ten agree: k sets hold k - 1 of them, 10 - k sets hold k. k = 1: 9/10 * 1/3. k = 2: (2 * 1/3 + 8 * 2/3) / 10.
    # k = 3: (3 * 2/3 + 7) / 10. From 4 on every set holds three.
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_of_ten(agree, score):
    references = ["Two."] * agree + [f"other {i}" for i in range(10 - agree)]
    assert vqa_accuracy("2", references) == pytest.approx(score)


def test_vqa_accuracy_of_few():
    assert vqa_accuracy("the cat", "Cat") == 1.0 and vqa_accuracy("dog", "cat") == 0.0
    assert vqa_accuracy("", "cat") == 0.0
    assert vqa_accuracy("cat", ["cat", "cat"]) == 1.0
    assert vqa_accuracy("cat", ["cat", "dog"]) == 0.5


def test_edit_distance():
    assert edit_distance("kitten", "sitting") == 3
    assert edit_distance("", "abc") == edit_distance("abc", "") == 3
    assert edit_distance("\u8d64\u3044\u5186", "\u8d64\u3044\u7dda") == 1


@hypothesis.given(st.text("ab c", max_size=6), st.text("ab c", max_size=6))
def test_edit_distance_is_a_distance(one, other):
    assert edit_distance(one, other) == edit_distance(other, one)
    assert abs(len(one) - len(other)) <= edit_distance(one, other) <= max(len(one), len(other))
    assert (edit_distance(one, other) == 0) == (one == other)


def test_anls():
    assert anls("Hello  World", "hello world") == 1.0
    assert anls("kitten", "sitting") == pytest.approx(1 - 3 / 7)
    assert anls("ab", "ac") == 0.0, "a distance of exactly the threshold is too far"
    assert anls("abc", "abd") == pytest.approx(2 / 3)
    assert anls("", "abc") == 0.0 and anls("", "") == 1.0
    assert anls("abd", ["xyz", "abc", "abd"]) == 1.0


def test_token_f1():
    assert token_f1("The red circle", "red circle!") == 1.0
    # 2 of 3 said, 2 of 2 given: 2 * (2/3 * 1) / (2/3 + 1)
    assert token_f1("red big circle", "red circle") == pytest.approx(0.8)
    assert token_f1("red red", "red") == pytest.approx(2 / 3), "a word counts as often as it stands there"
    assert token_f1("", "red") == 0.0 and token_f1("the", "a") == 1.0
    assert token_f1("green", ["red", "green square"]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("metric", [exact_match, vqa_accuracy, anls, token_f1])
def test_a_reference_is_needed(metric):
    with pytest.raises(GlimpseError, match="at least one reference"):
        metric("yes", [])


# Evidence -------------------------------------------------------------------------------------------------------------------


def test_evidence():
    keep, reference = np.array([[1, 1, 1], [0, 0, 0]], bool), np.array([[0, 1, 1], [0, 1, 1]], bool)
    assert recall(keep, reference) == 2 / 4
    assert precision(keep, reference) == 2 / 3
    assert iou(keep, reference) == 2 / 5
    nothing = np.zeros_like(keep)
    assert recall(nothing, reference) == precision(nothing, reference) == iou(nothing, reference) == 0.0
    assert all(math.isnan(metric(keep, nothing)) for metric in (recall, precision, iou)), "without evidence there is nothing to find"
    with pytest.raises(GlimpseError, match="does not fit"):
        recall(keep, reference.T)


# Intervals ------------------------------------------------------------------------------------------------------------------


def test_bootstrap_agrees_with_the_normal_approximation():
    values = np.random.default_rng(1).random(900) < 0.7
    found = bootstrap(values)
    error = 1.96 * math.sqrt(found.mean * (1 - found.mean) / 900)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(found.mean - error, abs=0.005) and found.high == pytest.approx(found.mean + error, abs=0.005)


def test_bootstrap_is_repeatable_and_covers():
    rng = np.random.default_rng(2)
    draws = [bootstrap(rng.random(200) < 0.6, seed=i, samples=500) for i in range(200)]
    assert 0.89 < np.mean([one.low <= 0.6 <= one.high for one in draws]) < 0.99
    assert bootstrap([0, 1, 1, 0, 1], seed=3) == bootstrap([0, 1, 1, 0, 1], seed=3) != bootstrap([0.0, 1, 1, 0, 0.9], seed=3)
    assert bootstrap(np.ones(40)) == Interval(1.0, 1.0, 1.0, 40)
    assert bootstrap([0.25]) == Interval(0.25, 0.25, 0.25, 1)


def test_bootstrap_in_pieces_is_the_same(monkeypatch):
    values = np.random.default_rng(4).random(30)
    whole = bootstrap(values)
    monkeypatch.setattr("gp_jax.evaluation.reporting.statistics.CHUNK", 64)
    assert bootstrap(values) == whole


def test_weights_are_sums_over_sums():
    assert bootstrap([1.0, 0.0], [3, 1]).mean == 0.75
    values, weights = np.random.default_rng(5).random((2, 50))
    found, same = bootstrap(values, weights), bootstrap(values, np.full(50, 7.0))
    assert found.mean == pytest.approx((values * weights).sum() / weights.sum()) and found.low < found.mean < found.high
    assert same.low == pytest.approx(bootstrap(values).low)
    assert bootstrap([1.0, 0.0, 0.0], [1, 0, 0]) == Interval(1.0, 1.0, 1.0, 3), "sets without weight do not count"


def test_pairs_are_drawn_together():
    hard = np.random.default_rng(6).random(400)
    mine, baseline = (hard < 0.55).astype(float), (hard < 0.6).astype(float)
    paired = paired_difference(mine, baseline)
    assert paired.mean == pytest.approx(mine.mean() - baseline.mean()) and paired.clear
    alone = bootstrap(mine)
    assert paired.high - paired.low < (alone.high - alone.low) / 2
    assert not paired_difference(mine, mine).clear
    with pytest.raises(GlimpseError, match="cannot be paired"):
        paired_difference([1.0], [1.0, 0.0])


@pytest.mark.parametrize("values", [[], [math.nan], [[1.0]]])
def test_bootstrap_refuses(values):
    with pytest.raises(GlimpseError, match="finite values"):
        bootstrap(values)


@pytest.mark.parametrize("weights", [[1.0], [-1.0, 1.0], [0.0, 0.0], [math.inf, 1.0]])
def test_bootstrap_refuses_weights(weights):
    with pytest.raises(GlimpseError, match="weight"):
        bootstrap([1.0, 0.0], weights)


def test_enough():
    assert enough(500) is None
    assert enough(100) == "Only 100 samples: accuracies are known to within about 10 points either way."
    assert "Only 1 sample:" in enough(1) and "No samples" in enough(0)
