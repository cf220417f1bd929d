"""Truncation of the distribution, against the definition."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gp_jax.inference.requests import sampling_settings
from gp_jax.inference.sampling import choose, start, truncate, write
from gp_jax.pretrained.known import SIZES
from gp_jax.trees import Prefix

pytestmark = pytest.mark.quick

truncate = jax.jit(truncate)


def kept_by_definition(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    order = sorted(range(len(logits)), key=lambda i: -logits[i])[: top_k or None]
    weights = np.exp(logits[order] - logits.max())
    weights /= weights.sum()
    kept, mass = set(), 0.0
    for index, weight in zip(order, weights, strict=True):
        if kept and mass >= top_p:
            break
        kept.add(index)
        mass += weight
    return kept


@settings(max_examples=60)
@given(st.lists(st.integers(-40, 40), min_size=8, max_size=8, unique=True), st.integers(0, 9), st.sampled_from([0.05, 0.5, 0.9, 1.0]))
def test_truncate(values, top_k, top_p):
    logits = np.array([values], np.float32) / 7
    out = np.asarray(truncate(logits, np.array([top_k]), np.array([top_p], np.float32)))[0]
    kept = {i for i in range(8) if np.isfinite(out[i])}
    expected = kept_by_definition(logits[0].astype(np.float64), top_k, top_p)
    assert kept == expected or (top_p == 1.0 and expected <= kept)
    np.testing.assert_array_equal(out[sorted(kept)], logits[0][sorted(kept)])


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))[None].repeat(4000, axis=0)
    draw = sampling_settings(SIZES["3b"], 1.0, 3, 1.0, 0, None, 4000)
    counts = np.bincount(np.asarray(choose(logits, draw, np.full(4000, 5))[0]), minlength=4) / 4000
    assert counts == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.03)
    assert counts[3] == 0


def test_logits_that_are_not_finite_are_remembered():
    """Of samples that have not ended; the program itself cannot raise."""
    model = SimpleNamespace(
        config=SimpleNamespace(text=SimpleNamespace(num_key_value_heads=1, head_dim=2)),
        decoder=SimpleNamespace(embed_tokens=np.zeros(1, np.float32), layers=[None]),
    )
    greedy = sampling_settings(SIZES["3b"], 0.0, 0, 1.0, 0, 3, 5)
    logits = np.eye(5, 4, dtype=np.float32)
    logits[1, 0], logits[2, 1], logits[4] = np.nan, np.inf, np.nan
    prefix = Prefix((), logits, np.zeros(5, np.int32))
    state = start(model, prefix, greedy, np.array([True, True, True, True, False]), np.int32(4), 4)
    assert state.broken.tolist() == [False, True, True, False, False], "the last one only fills the batch"
    later = np.eye(5, 4, dtype=np.float32)
    later[[0, 3]] = -np.inf
    assert write(state, later, greedy).broken.tolist() == [True, True, True, False, False], "the fourth had ended"
