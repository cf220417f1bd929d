"""Logits that are part of the request: +inf and -inf for a reference mask, random numbers for the method "random"."""

from jax import Array

from gp_jax.pruning.scorers.scorer import Scoring


def score(x: Scoring) -> Array:
    """The request's own logits. Returns: (B, M) float32."""
    assert x.given is not None, "logits that came with the request"
    return x.given
