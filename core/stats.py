"""Intervals and tests for the numbers that are shown; formulas with their sources, nothing trimmed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided interval; ``low`` or ``high`` is None where n is too small for it."""

    value: float
    low: float | None
    high: float | None
    n: int

    def as_dict(self) -> dict[str, float | int | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def binomial_cdf(successes: int, n: int, probability: float) -> float:
    """P(X <= successes), X ~ Binomial(n, probability); summed in logs, so that large n is safe."""
    if successes < 0:
        return 0.0
    if successes >= n or probability <= 0:
        return 1.0
    if probability >= 1:
        return 0.0
    k = np.arange(successes + 1)
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    log_choose = log_factorials[n] - log_factorials[k] - log_factorials[n - k]
    return float(min(1.0, np.exp(log_choose + k * math.log(probability) + (n - k) * math.log1p(-probability)).sum()))


def percentile_interval(samples: Sequence[float] | np.ndarray, percent: float, confidence: float = 0.95) -> Interval:
    """A percentile with its distribution-free interval between order statistics.

    The interval [x(r), x(s)] covers the percentile p with probability P(r <= X < s), X ~ Binomial(n, p)
    (David and Nagaraja, Order Statistics, 7.1); each tail gets half of what is left. A bound that no
    order statistic reaches at this n is None ("n too small").

    Args:
        samples: any one-dimensional numbers, in any unit.
        percent: 0 < percent < 100.

    Raises:
        ValueError: no samples, or percent outside (0, 100).
    """
    ordered = np.sort(np.asarray(samples, dtype=np.float64))
    n = len(ordered)
    if n == 0 or not 0 < percent < 100:
        raise ValueError(f"wanted samples and 0 < percent < 100, found {n} samples and percent={percent}")
    p, tail = percent / 100, (1 - confidence) / 2
    value = float(ordered[max(0, math.ceil(p * n) - 1)])
    # Normal approximation as a starting point, then exact steps.
    low_rank = _largest(lambda r: binomial_cdf(r - 1, n, p) <= tail, n)
    high_rank = _smallest(lambda s: 1 - binomial_cdf(s - 1, n, p) <= tail, n)
    low = float(ordered[low_rank - 1]) if low_rank else None
    high = float(ordered[high_rank - 1]) if high_rank else None
    return Interval(value, low, high, n)


def _largest(holds, n: int) -> int | None:  # type: ignore[no-untyped-def]
    """Largest rank in 1..n for which the (falling) condition holds."""
    low, high = 0, n
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low or None


def _smallest(holds, n: int) -> int | None:  # type: ignore[no-untyped-def]
    """Smallest rank in 1..n for which the (rising) condition holds."""
    low, high = 1, n + 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low if low <= n else None


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927). Raises ValueError for n = 0."""
    if n <= 0:
        raise ValueError("wanted at least one trial")
    z = _normal_quantile(0.5 + confidence / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half), n)


def _normal_quantile(probability: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(probability)


@dataclass(frozen=True)
class Paired:
    """Two classifiers on the same images: accuracy of the second minus the first, and who flipped."""

    difference: float
    low: float
    high: float
    lost: int  # right before, wrong after
    won: int  # wrong before, right after
    p_value: float
    n: int


def mcnemar(
    before: Sequence[bool] | np.ndarray, after: Sequence[bool] | np.ndarray, confidence: float = 0.95
) -> Paired:
    """Paired difference of two accuracies on the same images.

    The p-value is McNemar's exact test (two-sided binomial on the discordant pairs). The interval of the
    difference is Agresti and Min's (2005): Wald after adding one half to each cell of the 2x2 table.

    Raises:
        ValueError: different lengths, or none.
    """
    first, second = np.asarray(before, dtype=bool), np.asarray(after, dtype=bool)
    if first.shape != second.shape or first.ndim != 1 or len(first) == 0:
        raise ValueError(f"wanted two equally long vectors, found shapes {first.shape} and {second.shape}")
    n = len(first)
    lost, won = int((first & ~second).sum()), int((~first & second).sum())
    discordant = lost + won
    p_value = min(1.0, 2 * binomial_cdf(min(lost, won), discordant, 0.5)) if discordant else 1.0
    b, c, total = lost + 0.5, won + 0.5, n + 2
    centre = (c - b) / total
    half = _normal_quantile(0.5 + confidence / 2) * math.sqrt((b + c) - (c - b) ** 2 / total) / total
    return Paired((won - lost) / n, centre - half, centre + half, lost, won, p_value, n)


# Two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """A mean with Student's 95 % interval; no interval for a single value. Raises ValueError for none."""
    numbers = np.asarray(values, dtype=np.float64)
    n = len(numbers)
    if n == 0:
        raise ValueError("wanted at least one value")
    mean = float(numbers.mean())
    if n == 1:
        return Interval(mean, None, None, n)
    quantile = _T_95[n - 2] if n - 2 < len(_T_95) else 1.96
    half = quantile * float(numbers.std(ddof=1)) / math.sqrt(n)
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
    bound = [None if end is None else math.exp(end) for end in (logs.low, logs.high)]
    return Interval(math.exp(logs.value), bound[0], bound[1], logs.n)
