"""Ranking without sorting, against sorting."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax.ops import ranking

pytestmark = pytest.mark.quick

best, to_front = jax.jit(ranking.best), jax.jit(ranking.to_front, static_argnums=1)  # as they run: XLA simplifies arithmetic

value = st.one_of(
    st.sampled_from([0.0, -0.0, np.inf, -np.inf, 1e-30, -1e-30, 3.4e38]),
    st.integers(-3, 3).map(float),
    st.floats(-1e3, 1e3, width=32, allow_subnormal=False),
)


@settings(max_examples=150)
@given(st.lists(st.tuples(value, st.booleans()), min_size=9, max_size=9), st.integers(-1, 10))
def test_the_best_are_those_that_a_stable_sort_puts_first(rows, count):
    values, among = (np.array([column]) for column in zip(*rows, strict=True))
    ranked = sorted(np.flatnonzero(among[0]), key=lambda i: -values[0, i])
    found = np.asarray(best(np.repeat(values.astype(np.float32), 2, 0), np.repeat(among, 2, 0), np.array([count, 4])))
    for own, n in zip(found, (count, 4), strict=True):
        assert {*np.flatnonzero(own)} == {*ranked[: max(0, n)]}


def test_what_is_no_number_comes_last():
    values = np.array([[np.nan, -np.inf, 2.0, np.nan]], np.float32)
    for count, expected in ((1, {2}), (2, {1, 2}), (3, {0, 1, 2})):
        assert {*np.flatnonzero(best(values, np.ones((1, 4), bool), np.array([count])))} == expected


@settings(max_examples=60)
@given(st.lists(st.booleans(), min_size=8, max_size=8), st.lists(st.booleans(), min_size=8, max_size=8), st.integers(1, 9))
def test_rows_that_stay_come_first_and_keep_their_order(first, second, length):
    stays = np.array([first, second])
    np.testing.assert_array_equal(to_front(stays, length), np.argsort(~stays, axis=1, kind="stable")[:, :length])
