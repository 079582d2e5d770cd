"""Intervals and tests against hand-computed and simulated values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.core import stats


@pytest.mark.parametrize(
    ("percent", "smallest"),
    # The smallest n whose largest order statistic bounds the percentile from above at 97.5 %: p^n <= 0.025.
    [(50, 6), (90, 36), (95, 72), (99, 368)],
)
def test_upper_bound_exists_from_this_many_samples(percent: float, smallest: int) -> None:
    def high(n: int) -> float | None:
        return stats.percentile_interval(np.arange(n), percent).high

    assert high(smallest - 1) is None
    assert high(smallest) == smallest - 1


def test_percentile_interval_covers() -> None:
    generator = np.random.default_rng(0)
    truth = -math.log(0.1)  # p90 of the unit exponential
    hits = 0
    for _ in range(2000):
        found = stats.percentile_interval(generator.exponential(size=200), 90)
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.945 <= hits / 2000 <= 0.985


@given(st.lists(st.floats(0.1, 1e3), min_size=1, max_size=300), st.sampled_from([50.0, 90.0, 99.0]))
def test_percentile_is_a_sample_inside_its_interval(samples: list[float], percent: float) -> None:
    found = stats.percentile_interval(samples, percent)
    assert found.value in samples
    assert found.low is None or found.low <= found.value
    assert found.high is None or found.high >= found.value


@pytest.mark.parametrize(("samples", "percent"), [([], 50), ([1.0], 0), ([1.0], 100)])
def test_percentile_refuses(samples: list[float], percent: float) -> None:
    with pytest.raises(ValueError, match="percent"):
        stats.percentile_interval(samples, percent)


def test_binomial_cdf_by_hand_and_far_out() -> None:
    assert stats.binomial_cdf(1, 3, 0.5) == pytest.approx(0.5)
    assert stats.binomial_cdf(-1, 3, 0.5) == 0
    assert stats.binomial_cdf(3, 3, 0.5) == 1
    assert stats.binomial_cdf(99_000, 100_000, 0.99) == pytest.approx(0.5, abs=0.01)


def test_wilson_by_hand() -> None:
    found = stats.wilson(9, 10)
    assert (found.low, found.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert stats.wilson(0, 10).low == pytest.approx(0, abs=1e-12)
    assert stats.wilson(10, 10).high == pytest.approx(1)
    with pytest.raises(ValueError, match="trial"):
        stats.wilson(0, 0)


def test_mcnemar_by_hand() -> None:
    before = [True] * 90 + [True] * 8 + [False] * 2
    after = [True] * 90 + [False] * 8 + [True] * 2
    found = stats.mcnemar(before, after)
    assert (found.lost, found.won, found.n) == (8, 2, 100)
    assert found.difference == pytest.approx(-0.06)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)  # exact binomial
    assert found.low < -0.06 < found.high


def test_mcnemar_same_classifier() -> None:
    found = stats.mcnemar([True, False], [True, False])
    assert (found.difference, found.p_value) == (0, 1)
    with pytest.raises(ValueError, match="equally long"):
        stats.mcnemar([True], [True, False])


def test_mean_and_ratio_by_hand() -> None:
    found = stats.mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert stats.mean_interval([1.0]).low is None
    ratio = stats.ratio_interval([2.0, 8.0], [1.0, 1.0])
    assert ratio.value == pytest.approx(4)
    with pytest.raises(ValueError, match="positive"):
        stats.ratio_interval([0.0], [1.0])
