"""The rule by which a first look chooses windows, written out; on the host and on a device alike."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax.pruning.look import Look, as_logit, choose, look_limits

pytestmark = pytest.mark.quick

LOOKS = st.builds(
    Look,
    threshold=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    margin=st.integers(0, 2),
    floor=st.sampled_from([0.0, 0.2, 0.4]),
    cap=st.sampled_from([0.4, 0.7, 1.0]),
    sure=st.sampled_from([None, 0.0, 0.6, 1.0]),
)


def written_out(look: Look, score: np.ndarray, places: np.ndarray, present: np.ndarray) -> set[int]:
    """One sample's windows."""
    there = [n for n in range(score.size) if present[n]]
    ranked = sorted(there, key=lambda n: (-score[n], n))
    cap = max(1, int(look.cap * len(there)))
    floor = max(1, min(cap, math.ceil(look.floor * len(there))))
    seeds = {n for n in there if score[n] > as_logit(look.threshold)} | set(ranked[:floor])

    def near(a: int, b: int) -> bool:
        (view, row, column), (other, r, c) = places[a], places[b]
        return view == other and abs(row - r) <= look.margin and abs(column - c) <= look.margin

    seen = {n for n in there if any(near(n, seed) for seed in seeds)}
    if look.sure is None:
        return set([n for n in ranked if n in seen][:cap])
    unsure = len(seen) > cap or not any(score[n] >= as_logit(look.sure) for n in there)
    return set(there) if unsure else seen


@settings(max_examples=60)
@given(LOOKS, st.integers(0, 2**31))
def test_equals_the_rule_written_out(look, seed):
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(range(2), range(3), range(4), indexing="ij"), -1).reshape(1, -1, 3).repeat(2, axis=0)
    score = rng.choice([-4.0, -1.0, 0.5, 2.0], (2, places.shape[1])).astype(np.float32)  # ties
    present = rng.random(score.shape) < 0.8
    found = choose(score, places, present, look_limits(look, present.sum(axis=1)))
    for b in range(2):
        assert set(np.flatnonzero(found[b])) == written_out(look, score[b], places[b], present[b])


def test_the_device_chooses_as_the_host_does():
    rng, program = np.random.default_rng(0), jax.jit(choose)
    for look in (Look(), Look(margin=1, sure=None, cap=0.3), Look(threshold=0.0, sure=0.0)):
        places = rng.integers(0, 5, (3, 30, 3)).astype(np.int32)
        score, present = rng.normal(0, 3, (3, 30)).astype(np.float32), rng.random((3, 30)) < 0.9
        present[2] = False
        limits = look_limits(look, present.sum(axis=1))
        np.testing.assert_array_equal(program(score, places, present, limits), choose(score, places, present, limits))
