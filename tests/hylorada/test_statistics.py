"""Intervals cover what they claim, pair what belongs together and repeat."""

import math

import numpy as np
import pytest

from hylorada.statistics import bootstrap_interval, paired_difference


def test_interval_is_that_of_the_normal_distribution_for_many_values():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    low, high = bootstrap_interval(values)
    spread = 1.96 * values.std(ddof=1) / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - spread, abs=0.1 * spread)
    assert high == pytest.approx(values.mean() + spread, abs=0.1 * spread)
    narrow = bootstrap_interval(values, confidence=0.5)
    assert low < narrow[0] < narrow[1] < high


def test_interval_covers_the_true_mean_as_often_as_it_says():
    random = np.random.default_rng(2)
    intervals = [bootstrap_interval(random.normal(0.0, 1.0, 40), resamples=1000, seed=i) for i in range(300)]
    covered = np.mean([low <= 0 <= high for low, high in intervals])
    # 95 % less what the bootstrap of 40 values lacks, and three standard errors of 300 trials
    assert 0.90 <= covered <= 0.985


def test_pairing_removes_what_both_sides_share():
    random = np.random.default_rng(3)
    shared, noise = random.normal(0, 10, 200), random.normal(0, 0.1, 200)
    difference = paired_difference(shared + 1 + noise, shared)
    assert difference.mean == pytest.approx(1 + noise.mean())
    assert 0.95 < difference.low < difference.mean < difference.high < 1.05


def test_weights_are_those_of_the_mean():
    difference = paired_difference([1.0, 4.0], [0.0, 0.0], weights=[3, 1])
    assert difference.mean == pytest.approx((3 * 1 + 1 * 4) / 4)
    # the samples of two: both the first, both the second, one of each
    assert (difference.low, difference.high) == (1.0, 4.0)
    repeated = paired_difference([1.0, 2.0, 6.0], [0.0] * 3, weights=[2.0, 2.0, 2.0])
    assert repeated == pytest.approx(paired_difference([1.0, 2.0, 6.0], [0.0] * 3))


def test_chunks_of_draws_do_not_show(monkeypatch):
    values = np.random.default_rng(4).normal(size=30)
    whole = bootstrap_interval(values, resamples=100)
    monkeypatch.setattr("hylorada.statistics._CHUNK", 30 * 7)
    assert bootstrap_interval(values, resamples=100) == whole


def test_draws_repeat_by_seed_and_leave_the_global_state():
    values = np.random.default_rng(5).normal(size=20)
    before = np.random.get_state()[1].copy()
    first = bootstrap_interval(values, seed=1)
    assert first == bootstrap_interval(values, seed=1)
    assert first != bootstrap_interval(values, seed=2)
    assert (np.random.get_state()[1] == before).all()
    assert bootstrap_interval([2.5]) == (2.5, 2.5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), "at least one value"),
        (lambda: bootstrap_interval([1.0, math.nan]), "values must be finite, got nan"),
        (lambda: bootstrap_interval([1.0], [0.0]), "weights must be positive and finite, got 0.0"),
        (lambda: bootstrap_interval([1.0, 2.0], [1.0]), "a weight for each of 2 values, got 1"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence must lie between 0 and 1, got 95"),
        (lambda: bootstrap_interval([1.0], resamples=0), "resamples must be at least 1, got 0"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "as many on both sides, got 1 and 2"),
    ],
)
def test_what_gives_no_interval_says_so(call, message):
    with pytest.raises(ValueError, match=message):
        call()
