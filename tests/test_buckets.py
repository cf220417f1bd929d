"""Ladders: the smallest rung that fits, errors past the end."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_jax import GlimpseError, Ladder, Ladders
from gp_jax.buckets import geometric


@given(st.sets(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 6000))
def test_fit_is_the_smallest_rung(rungs, length):
    ladder = Ladder("x", tuple(sorted(rungs)))
    if length > max(rungs):
        with pytest.raises(GlimpseError, match=r"'x' ladder, which ends at"):
            ladder.fit(length)
    else:
        assert ladder.fit(length) == min(r for r in rungs if r >= length)
        assert ladder.upto(length) == tuple(r for r in sorted(rungs) if r <= ladder.fit(length))


def test_geometric():
    rungs = geometric("x", 128, 4096).rungs
    assert rungs[0] == 128 and rungs[-1] == 4096
    assert all(r % 128 == 0 for r in rungs)
    assert all(b <= 2 * a for a, b in zip(rungs, rungs[1:], strict=False))


@pytest.mark.parametrize("rungs", [(), (4, 4), (8, 4), (0, 3)])
def test_bad_ladders(rungs):
    with pytest.raises(GlimpseError, match="positive and ascending"):
        Ladder("x", rungs)


def test_keep_everything_always_fits():
    ladders = Ladders(kept=Ladder("kept", (64, 128)))
    assert ladders.kept_for(50, 512) == 64
    assert ladders.kept_for(100, 96) == 96, "never longer than the stream"
    assert ladders.kept_for(300, 512) == 512, "past the ladder: the stream's own length"
