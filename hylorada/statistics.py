"""Bootstrap confidence intervals of means and of paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# numbers held at a time
_CHUNK = 2**22


class Difference(NamedTuple):
    """A mean difference and its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean: values are drawn again, with replacement.

    From few values it is too narrow: from one it is that value, from three it hardly passes the smallest and largest.

    weights: of the values in their mean, such as their tokens; drawn together with them. None: all the same.
    confidence: in (0, 1).   resamples: how many means the interval is read from.   seed: of the draws.

    Raises:
        ValueError: no values, others than finite ones, weights that are not positive or not as many, a confidence
            outside (0, 1), fewer than 1 resample.
    """
    sample, weight = _checked(values, weights)
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    random = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _CHUNK // len(sample))
    for start in range(0, resamples, rows):
        drawn = random.integers(len(sample), size=(min(rows, resamples - start), len(sample)))
        means[start : start + rows] = (sample * weight)[drawn].sum(1) / weight[drawn].sum(1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Difference:
    """Return the mean of first - second, entry by entry, with its bootstrap interval; see `bootstrap_interval`.

    Entry i of both belongs to the same window, text or seed: what makes that one hard for both cancels.
    """
    if len(first) != len(second):
        raise ValueError(f"paired values must be as many on both sides, got {len(first)} and {len(second)}")
    differences = [a - b for a, b in zip(first, second, strict=True)]
    sample, weight = _checked(differences, weights)
    interval = bootstrap_interval(differences, weights, confidence=confidence, resamples=resamples, seed=seed)
    return Difference(float((sample * weight).sum() / weight.sum()), *interval)


def _checked(values: Sequence[float], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray]:
    if len(values) == 0:
        raise ValueError("an interval needs at least one value, got none")
    if weights is not None and len(weights) != len(values):
        raise ValueError(f"there must be a weight for each of {len(values)} values, got {len(weights)}")
    sample = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(sample) if weights is None else np.asarray(weights, dtype=np.float64)
    for name, numbers in (("values", sample), ("weights", weight)):
        bad = [float(number) for number in numbers if not math.isfinite(number) or (name == "weights" and number <= 0)]
        if bad:
            allowed = "finite" if name == "values" else "positive and finite"
            raise ValueError(f"{name} must be {allowed}, got {bad[0]}")
    return sample, weight
