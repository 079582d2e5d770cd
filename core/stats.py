"""Intervals for the numbers that are shown, by scipy where it has them; nothing is trimmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

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
