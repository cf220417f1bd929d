"""Ladders: the smallest rung that fits, errors past the end."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gp_jax import GlimpseError, Ladder, Ladders
from gp_jax.buckets import octaves

pytestmark = pytest.mark.quick


@given(st.sets(st.integers(1, 5000), min_size=1, max_size=12), st.integers(1, 6000))
def test_fit_is_the_smallest_rung(rungs, length):
    ladder = Ladder("x", tuple(sorted(rungs)))
    if length > max(rungs):
        with pytest.raises(GlimpseError, match=r"'x' ladder, which ends at"):
            ladder.fit(length)
    else:
        assert ladder.fit(length) == min(r for r in rungs if r >= length)
        assert ladder.upto(length) == tuple(r for r in sorted(rungs) if r <= ladder.fit(length))


@given(st.integers(1, 8), st.sampled_from([1, 16, 64]), st.integers(7, 12))
def test_octaves(parts, multiple, power):
    ladder = octaves("x", 128, 2**power, parts, multiple)
    assert ladder.rungs[0] == 128 and ladder.rungs[-1] == 2**power
    assert all(r % multiple == 0 for r in ladder.rungs)
    assert all(ladder.fit(n) - n <= n / parts + multiple for n in range(128, 2**power, 7))


@pytest.mark.parametrize("ladder", [Ladders().patches, Ladders().prompt, Ladders().kept], ids=lambda ladder: ladder.name)
def test_defaults_waste_little(ladder):
    """On average over uniformly random counts, at most 8 % of a bucket, in every range that begins with a small picture."""
    for end in (512, 1024, 5000, 60000):
        counts = np.arange(ladder.rungs[0], end)
        fits = np.array([ladder.fit(n) for n in counts])
        assert np.mean(1 - counts / fits) < 0.08 and np.mean(fits - counts) / np.mean(fits) < 0.08


def test_long_prompts_have_closer_rungs():
    rungs = Ladders().prompt.rungs
    assert all(high - low <= low / 16 + 16 for low, high in itertools.pairwise(rungs) if low >= 1024)
    assert {*octaves("prompt", 128, 65536, multiple=16).rungs} < {*rungs} and Ladders().prompt.fit(1068) == 1088


@pytest.mark.parametrize("rungs", [(), (4, 4), (8, 4), (0, 3), (5, 2**40), (-1,), ("a",), (1.5,), 5, None])
def test_bad_ladders(rungs):
    with pytest.raises(GlimpseError, match="'x' must be (positive and ascending|whole numbers)"):
        Ladder("x", rungs)


def test_ladders_of_anything_else():
    assert Ladder("x", np.array([4, 8])) == Ladder("x", [4, 8]) == Ladder("x", (4, 8))
    with pytest.raises(GlimpseError, match=r"Ladders.prompt must be a Ladder, not a int"):
        Ladders(prompt=5)
    for wrong in ((0, 8), (-4, 8), (9, 8), (1, 2**40), (1, 8, 0), (1, 8, 4, 0)):
        with pytest.raises(GlimpseError, match="make no rungs"):
            octaves("x", *wrong)


def test_keep_everything_always_fits():
    ladders = Ladders(kept=Ladder("kept", (64, 128)))
    assert ladders.kept_for(50, 512) == 64
    assert ladders.kept_for(100, 96) == 96, "never longer than the stream"
    assert ladders.kept_for(300, 512) == 512, "past the ladder: the stream's own length"
