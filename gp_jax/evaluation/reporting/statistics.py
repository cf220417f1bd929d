"""How far a mean can be trusted: percentile bootstrap over samples (Efron 1979). And how times spread: median and quartiles.

Means are sums over samples divided by sums of weights, never means of means.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from gp_jax.errors import GlimpseError

ENOUGH = 500  # samples; below, a 95 % interval of an accuracy is up to 4.4 points to either side
CHUNK = 1 << 21  # resampled values held at a time
FEW = 32  # different values, such as right and wrong, whose numbers are drawn instead of every sample


@dataclass(frozen=True)
class Interval:
    """A mean with the ends of its 95 % interval. n: values behind it."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def clear(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles around it. n: values behind it."""

    median: float
    low: float
    high: float
    n: int


def spread(values: ArrayLike) -> Spread | None:
    """Of (n,) values; None without any. A few slow ones, which a mean would follow, hardly move it."""
    values = np.asarray(values, np.float64)
    if not values.size:
        return None
    low, median, high = np.percentile(values, (25, 50, 75))
    return Spread(float(median), float(low), float(high), int(values.size))


def bootstrap(values: ArrayLike, weights: ArrayLike | None = None, seed: int = 0, samples: int = 2000) -> Interval:
    """The mean of n values and its 95 % percentile interval over resampled sets of n.

    Values that are all equal give an interval without width: resampling cannot know better.
    Args: values, weights: (n,); weights are not negative and drawn together with their values. samples: resampled sets.
    Raises: GlimpseError without values, for values that are not finite and for weights that do not fit.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise GlimpseError(f"bootstrap needs finite values of shape (n,), not {values.shape}")
    if weights.shape != values.shape or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
        raise GlimpseError("bootstrap needs one weight per value, none negative and not all zero")
    rng, n, means = np.random.default_rng(seed), values.size, []
    parts, even = values * weights, bool((weights == weights[0]).all())
    kinds, counts = np.unique(parts, return_counts=True)
    if even and kinds.size <= FEW:  # how often each kind is drawn is all that matters
        means.append(rng.multinomial(n, counts / n, size=samples) @ kinds / (n * weights[0]))
        samples = 0
    for start in range(0, samples, step := max(1, CHUNK // n)):
        drawn = rng.integers(n, size=(min(step, samples - start), n), dtype=np.uint32)
        total = np.full(len(drawn), n * weights[0]) if even else weights[drawn].sum(axis=1)
        found = parts[drawn].sum(axis=1)
        means.append(found[total > 0] / total[total > 0])  # a set may hold weights of zero only
    low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
    return Interval(float(parts.sum() / weights.sum()), float(low), float(high), int(n))


def paired_difference(values: ArrayLike, baseline: ArrayLike, seed: int = 0, samples: int = 2000) -> Interval:
    """Mean of values - baseline over the same n samples, with its interval: pairs are drawn together, so what makes a sample easy or
    hard for both cancels out. Raises: GlimpseError for other shapes."""
    values, baseline = np.asarray(values, np.float64), np.asarray(baseline, np.float64)
    if values.shape != baseline.shape:
        raise GlimpseError(f"{values.size} values cannot be paired with {baseline.size}")
    return bootstrap(values - baseline, seed=seed, samples=samples)


def enough(count: int) -> str | None:
    """A warning for fewer than 500 samples: how wide the interval of an accuracy may be (normal approximation at 50 %)."""
    if count >= ENOUGH:
        return None
    if count < 1:
        return "No samples: there is nothing to compare."
    return f"Only {count} sample{'s' * (count > 1)}: accuracies are known to within about {98 / count**0.5:.0f} points either way."
