"""Intervals for the numbers that are shown, by scipy where it has them; nothing is trimmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval; ``low`` or ``high`` is None where n is too small for it."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        return asdict(self)


@dataclass(frozen=True)
class NoWorse:
    """Whether the second of two networks is shown to lose at most ``max_drop_points`` on the same images.

    All drops are in points; a negative one is a gain. ``possible_points`` is the largest that the interval of the
    difference holds, ``detectable_points`` half its width: the smallest drop that so many images tell from none.
    ``images_needed`` is about how many would tell a drop of ``max_drop_points``; None where it is told already, or
    where there is no interval.
    """

    answer: Literal["holds", "fails", "cannot tell"]
    max_drop_points: float
    drop_points: float
    possible_points: float | None
    detectable_points: float | None
    images: int
    images_needed: int | None

    def words(self) -> str:
        """The figures behind the answer, as in "0.20 points by the point value, up to 1.90 possible"."""
        lost = f"{_plain(self.drop_points)} points by the point value"
        if self.possible_points is not None:
            lost += f", up to {_plain(self.possible_points)} possible"
        if self.answer == "fails":
            return f"{lost}, surely above {self.max_drop_points:g}"
        return lost if self.images_needed is None else f"{lost}, about {self.images_needed:,} images would tell"

    def as_dict(self) -> dict[str, float | int | str | None]:
        """The fields by name, for JSON."""
        return asdict(self)


def no_worse(difference: Interval, max_drop_points: float) -> NoWorse:
    """Non-inferiority by the interval of a paired difference: the whole of it decides, never the point value.

    It holds where the lower bound does, fails where even the upper bound lies beyond the limit, and cannot be told
    otherwise. One true drop at the limit is let through with the probability that the interval misses it on that
    side, 2.5 % of a 95 % interval. The interval's width shrinks with the root of the number of images as long as
    as many of a hundred change.

    Args:
        difference: the second network's figure less the first one's, as a share, with its two-sided interval.
        max_drop_points: above 0; no number of images shows a loss of nothing.

    Source: the confidence interval approach to non-inferiority (Blackwelder 1982).
    """
    limit, low, high = max_drop_points / 100, difference.low, difference.high
    if low is None or high is None:
        return NoWorse("cannot tell", max_drop_points, -100 * difference.value, None, None, difference.n, None)
    answer: Literal["holds", "fails", "cannot tell"] = (
        "holds" if low >= -limit else "fails" if high < -limit else "cannot tell"
    )
    half = (high - low) / 2
    needed = None
    if answer == "cannot tell" and limit > 0:
        # Also a drop that lies near the limit may stay untold: never fewer than there are.
        needed = rounded_up(max(difference.n * (half / limit) ** 2, difference.n + 1))
    return NoWorse(answer, max_drop_points, -100 * difference.value, -100 * low, 100 * half, difference.n, needed)


def _plain(points: float) -> str:
    """Two decimals, and no sign before a zero."""
    return f"{round(points, 2) + 0.0:.2f}"


def rounded_up(count: float) -> int:
    """The next number of two significant digits: a forecast has no more."""
    unit = int(10 ** max(0, math.floor(math.log10(count)) - 1))
    return math.ceil(count / unit) * unit


def percentile_interval(samples: Sequence[float] | np.ndarray, percent: float) -> Interval:
    """A percentile with its distribution-free 95 % interval between order statistics.

    The interval [x(r), x(s)] covers the percentile p with probability P(r <= X < s), X ~ Binomial(n, p)
    (David and Nagaraja, Order Statistics, 7.1); each tail gets half of what is left. A bound that no
    order statistic reaches at this n is None ("n too small").

    Args:
        samples: any one-dimensional numbers, in any unit.
        percent: 0 < percent < 100.

    Raises:
        ValueError: no samples, or percent outside (0, 100).
    """
    from scipy.stats import quantile_test

    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n == 0 or not 0 < percent < 100:
        raise ValueError(f"wanted samples and 0 < percent < 100, found {n} samples and percent={percent}")
    p = percent / 100
    value = float(ordered[max(0, math.ceil(p * n) - 1)])
    bounds = quantile_test(ordered, p=p).confidence_interval(CONFIDENCE)
    low, high = (None if math.isnan(bound) else float(bound) for bound in (bounds.low, bounds.high))
    return Interval(value, low, high, n)


def percentile_within(samples: Sequence[float] | np.ndarray, percent: float) -> float | None:
    """A percentile of so many samples that an order statistic bounds it on both sides; else None ("n too small").

    A two-sided 95 % interval takes 36 samples for p90, 72 for p95 and 368 for p99. Raises as ``percentile_interval``.
    """
    found = percentile_interval(samples, percent)
    return None if found.low is None or found.high is None else found.value


def early_stopping(samples: Sequence[float] | np.ndarray, percent: float, confidence: float = 0.99) -> float | None:
    """An upper estimate of a percentile that holds with ``confidence`` however few samples there are; or None.

    The largest t is taken for which so many or fewer of n samples lie above the true percentile with a probability of
    at most 1 - confidence; the t-th largest sample is the estimate. MLPerf's "early stopping" (LoadGen, d = 0) does
    the same; p90 takes at least 64 samples, p99 662.

    Raises:
        ValueError: percent outside (0, 100).
    """
    from scipy.special import betainc

    if not 0 < percent < 100:
        raise ValueError(f"wanted 0 < percent < 100, found {percent}")
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    above = np.arange(1, len(ordered))
    # The regularised incomplete beta function is the binomial distribution of how many lie below.
    enough = betainc(len(ordered) - above, above + 1, percent / 100) <= 1 - confidence
    kept = int(np.argmin(enough)) if not enough.all() else len(enough)
    return float(ordered[-kept]) if kept else None


def median_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """The median (of an even number: the mean of the two middle ones) with ``percentile_interval``'s bounds.

    For few values: the lower of the two middle ones would lie below the median more often than above it.

    Raises:
        ValueError: no values.
    """
    found = percentile_interval(values, 50)
    return Interval(float(np.median(np.asarray(values, dtype=np.float64))), found.low, found.high, found.n)


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """A mean with Student's 95 % interval; no interval for a single value. Raises ValueError for none."""
    from scipy.stats import t

    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n == 0:
        raise ValueError("wanted at least one value")
    mean = float(numbers.mean())
    if n == 1:
        return Interval(mean, None, None, n)
    half = float(t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * float(numbers.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def ratio_interval(numerators: Sequence[float] | np.ndarray, denominators: Sequence[float] | np.ndarray) -> Interval:
    """Geometric mean of paired ratios with Student's 95 % interval of their logarithms.

    One pair a round of an interleaved session: the process is the unit, not the inference.

    Raises:
        ValueError: different lengths, none, or a value that is not positive.
    """
    top, bottom = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    if top.shape != bottom.shape or len(top) == 0 or (top <= 0).any() or (bottom <= 0).any():
        raise ValueError("wanted two equally long vectors of positive numbers")
    logs = mean_interval(np.log(top / bottom))
    low, high = (None if end is None else math.exp(end) for end in (logs.low, logs.high))
    return Interval(math.exp(logs.value), low, high, logs.n)


def holm_levels(p_values: Sequence[float] | np.ndarray, level: float = 1 - CONFIDENCE) -> tuple[np.ndarray, np.ndarray]:
    """Which of several hypotheses are rejected when none of the true ones may be with more than ``level``.

    Holm's step-down procedure (Holm 1979): the smallest p-value against level / m, the next against
    level / (m - 1) and so on, up to the first that stays; whatever the dependence between them. NaN stays.

    Returns:
        ``rejected`` [m], and the levels [m] that each was held against (the last step's, from where it stopped).
    """
    p = np.asarray(p_values, dtype=np.float64)
    steps = level / (len(p) - np.arange(len(p)))
    order = np.argsort(p, kind="stable")
    kept = np.flatnonzero(~(p[order] <= steps))
    stop = int(kept[0]) if len(kept) else len(p)
    rejected, levels = np.zeros(len(p), dtype=bool), np.empty(len(p))
    rejected[order[:stop]] = True
    levels[order] = steps[np.minimum(np.arange(len(p)), min(stop, len(p) - 1))]
    return rejected, levels
