"""Intervals and tests against hand-computed and simulated values."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.core import stats
from kdpipe.runtime.task import TASKS


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


def test_median_of_few_lies_in_the_middle() -> None:
    """Of an even number the lower of the two middle ones is too small on the average."""
    assert stats.median_interval([6.0, 1.0, 5.0, 2.0, 4.0, 3.0]) == stats.Interval(3.5, 1.0, 6.0, 6)
    assert stats.median_interval([3.0, 1.0, 2.0]) == stats.Interval(2.0, None, None, 3)
    generator = np.random.default_rng(0)
    medians = [stats.median_interval(generator.normal(size=6)).value for _ in range(300)]
    assert abs(np.mean(medians)) < 4 * np.std(medians) / math.sqrt(len(medians))
    with pytest.raises(ValueError, match="samples"):
        stats.median_interval([])


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.7062), (31, 2.0423), (61, 2.0003), (121, 1.9799), (1001, 1.9623)])
def test_students_t_stays_wider_than_the_normal(n: int, quantile: float) -> None:
    """Table values of t for 97.5 %: 1.96 is the limit, not what 32 values have."""
    values = np.arange(n, dtype=float)
    found = stats.mean_interval(values)
    half = (found.high - found.low) / 2
    assert half / (values.std(ddof=1) / math.sqrt(n)) == pytest.approx(quantile, abs=6e-5)


def test_mean_and_ratio_by_hand() -> None:
    found = stats.mean_interval([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high == pytest.approx(2 + 4.303 / math.sqrt(3), abs=1e-3)
    assert stats.mean_interval([1.0]).low is None
    ratio = stats.ratio_interval([2.0, 8.0], [1.0, 1.0])
    assert ratio.value == pytest.approx(4)
    with pytest.raises(ValueError, match="positive"):
        stats.ratio_interval([0.0], [1.0])


@pytest.mark.parametrize(
    ("value", "low", "high", "answer"),
    [
        (0.0, -0.4, 0.4, "holds"),
        (-0.3, -0.5, -0.1, "holds"),  # the bound itself is allowed
        (-0.3, -0.6, 0.0, "cannot tell"),
        (-0.8, -1.6, 0.0, "cannot tell"),
        (-0.8, -1.0, -0.6, "fails"),
    ],
)
def test_no_worse_is_decided_by_the_whole_interval(value: float, low: float, high: float, answer: str) -> None:
    found = stats.no_worse(stats.Interval(value / 100, low / 100, high / 100, 1000), 0.5)
    assert found.answer == answer
    assert found.drop_points == pytest.approx(-value) and found.possible_points == pytest.approx(-low)
    assert found.detectable_points == pytest.approx((high - low) / 2)
    assert (found.images_needed is not None) == (answer == "cannot tell")


def test_no_worse_without_an_interval_cannot_tell() -> None:
    found = stats.no_worse(stats.Interval(0.0, None, None, 3), 0.5)
    assert (found.answer, found.images_needed, found.possible_points) == ("cannot tell", None, None)
    assert found.words() == "lost 0.00 points by the point value"


@pytest.mark.parametrize(
    ("value", "low", "high", "words"),
    [
        (-0.2, -1.9, 1.5, "lost 0.20 points, up to 1.90 possible, about 1,200 images would tell"),
        (-0.2, -0.4, 0.0, "lost 0.20 points, up to 0.40 possible"),
        (1.39, -0.3, 3.1, "won 1.39 points, a loss of up to 0.30 possible"),
        (1.0, -0.7, 2.7, "won 1.00 points, a loss of up to 0.70 possible, about 1,200 images would tell"),
        (1.39, 0.2, 2.6, "won 1.39 points, 0.20 or more surely"),
        (-0.8, -1.0, -0.6, "lost 0.80 points, up to 1.00 possible, surely above 0.5"),
        (0.001, -0.001, 0.001, "lost 0.00 points, up to 0.00 possible"),
    ],
)  # fmt: skip
def test_what_is_lost_is_positive_and_what_is_won_is_told_as_won(
    value: float, low: float, high: float, words: str
) -> None:
    found = stats.no_worse(stats.Interval(value / 100, low / 100, high / 100, 100), 0.5)
    assert found.words().replace(" by the point value", "", 1) == words
    assert "-" not in found.words()


# ---- shares of several classes, and confidence ----------------------------------------------------------------


def wilson(right: int, n: int) -> stats.Interval:
    return stats.Interval(*TASKS["classification"].summary(np.arange(n) < right))


def test_a_mean_of_shares_covers_what_it_is_of() -> None:
    """Simulated: a balanced accuracy of five classes, two of them nearly always right, one of ten images."""
    generator, truth, sizes = np.random.default_rng(3), np.array([0.99, 0.98, 0.9, 0.7, 0.6]), [60, 30, 50, 10, 40]
    covered = 0
    for _ in range(400):
        found = stats.mean_of_shares([wilson(generator.binomial(n, p), n) for n, p in zip(sizes, truth, strict=True)])
        assert found.low is not None and found.high is not None and found.n == sum(sizes)
        covered += found.low <= truth.mean() <= found.high
    assert 0.92 <= covered / 400 <= 0.99
    alone = wilson(7, 9)
    assert stats.mean_of_shares([alone]) == alone
    assert stats.mean_of_shares([wilson(5, 5), wilson(9, 9)]).low < 0.9, "that all are right leaves something open"
    assert stats.mean_of_shares([alone, stats.Interval(1.0, None, None, 0)]).low is None
    with pytest.raises(ValueError, match="at least one"):
        stats.mean_of_shares([])


def test_calibration_error_by_hand() -> None:
    # Two bins: four images at 0.9 of which three are right, six at 0.55 of which three are.
    sure = np.array([0.9] * 4 + [0.55] * 6)
    right = np.array([1, 1, 1, 0] + [1, 0] * 3, bool)
    found = stats.calibration_error(sure, right)
    assert found.error == pytest.approx(0.4 * 0.15 + 0.6 * 0.05)
    assert (found.bins, found.images) == (15, 10)
    # The ends of a bin belong to the bin below, as in the paper: (0, 1/15], (1/15, 2/15], ...
    assert stats.calibration_error(np.array([1.0, 1.0]), np.array([True, False])).error == pytest.approx(0.5)
    for confidence, scores in (([], []), ([0.5], [1, 0]), ([1.1], [1]), ([math.nan], [1])):
        with pytest.raises(ValueError, match="equally long"):
            stats.calibration_error(np.array(confidence), np.array(scores))


def test_what_calibration_shows_by_chance() -> None:
    """Networks that are exactly as sure as they are right stay below it in 95 of 100 cases; others do not."""
    generator = np.random.default_rng(5)
    below = []
    for _ in range(100):
        sure = generator.uniform(0.3, 1, 300)
        found = stats.calibration_error(sure, generator.random(300) < sure)
        below.append(found.error <= found.by_chance)
    assert 88 <= sum(below) <= 100
    sure = np.full(300, 0.95)
    found = stats.calibration_error(sure, generator.random(300) < 0.8)
    assert found.error > 3 * found.by_chance
    few, many = (stats.calibration_error(np.full(n, 0.7), np.arange(n) < 0.7 * n).by_chance for n in (100, 10_000))
    assert few > 5 * many, "the fewer images, the more by chance"


def test_the_images_that_would_tell() -> None:
    """With 3 % of the images changing, half a point takes 4,600: 1.96^2 * 0.03 / 0.005^2."""
    task, before = TASKS["classification"], np.ones(2000, dtype=bool)
    before[:30] = False
    change = task.change(before, np.roll(before, 30))
    assert (change.lost, change.won) == (30, 30)
    found = stats.no_worse(stats.Interval(change.difference, change.low, change.high, change.n), 0.5)
    assert found.answer == "cannot tell" and found.images_needed in (4600, 4700)
    # With so many the same change is told.
    before = np.ones(4700, dtype=bool)
    before[:70] = False
    change = task.change(before, np.roll(before, 70))
    assert stats.no_worse(stats.Interval(change.difference, change.low, change.high, change.n), 0.5).answer == "holds"


@pytest.mark.parametrize(("count", "rounded"), [(1.2, 2), (9, 9), (11, 11), (101, 110), (4601, 4700), (4600, 4600)])
def test_forecasts_have_two_digits(count: float, rounded: int) -> None:
    assert stats.rounded_up(count) == rounded


def test_an_interval_that_bounds_nothing_is_none() -> None:
    """Two rounds of a machine gone wild, at the level of one of many pairs: no infinity gets into a manifest."""
    wild = [np.log(np.array([1.0, 9.0])) - np.log(np.array([1.0 + at, 0.1])) for at in range(40)]
    for ratio, differ in stats.compare_logs(wild, [0.1] * 40):
        assert math.isfinite(ratio.value) and ratio.low is None and ratio.high is None and not differ
    assert stats.ratio_interval([1, 1e150], [1, 1e-150]).low is None
