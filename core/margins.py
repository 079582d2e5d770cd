"""How a figure stands to the bound that a rule sets: kept, broken or untold, and what would tell.

The whole two-sided 95 % interval decides, never the point value: a rule is kept where the interval lies on the bound's
good side, so that what is truly at the bound is let through in 2.5 of 100 (the confidence interval approach to
non-inferiority, Blackwelder 1982). That it is broken is a p-value, because several rules are held against one level.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from statistics import NormalDist

import numpy as np

from .stats import CONFIDENCE, Interval, rounded_up

POWER = 0.9  # with which a detectable change is seen
PLANNED_POWER = 0.97  # of the number that is asked for: what it is reckoned from is an estimate itself
DRAWS = 4000
MOST_IMAGES, MOST_SESSIONS = 10**7, 200  # more would be no advice
_LEVEL = (1 - CONFIDENCE) / 2
_Z = NormalDist().inv_cdf(1 - _LEVEL)


@dataclass(frozen=True)
class Stand:
    """How an estimate with its two-sided 95 % interval stands to a bound.

    ``estimate`` and ``bound`` are in one scale: a value, a difference, or a ratio's logarithm. ``p_broken`` is small
    where the bound is surely broken, 1 where nothing can be told. ``detectable`` is the smallest change of the
    estimate, a positive number, that so much data shows nine times of ten. ``needed`` is about how many images or
    sessions would tell, None where it is told already or nothing is known of it.
    """

    estimate: Interval
    bound: float
    keeps: bool
    p_broken: float
    detectable: float | None
    needed: int | None


def flipped(stand: Stand) -> Stand:
    """The same of the negative quantity: what was a lower bound is an upper one."""
    found = stand.estimate
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return replace(stand, estimate=Interval(0.0 - found.value, low, high, found.n), bound=0.0 - stand.bound)


# ---- two shares of the same images -----------------------------------------------------------------------------


def paired_z(lost: np.ndarray | float, won: np.ndarray | float, n: int, difference: float) -> np.ndarray:
    """Tango's score statistic of a difference of two shares of the same n images (Tango 1998, Statistics in Medicine).

    With b images lost, c won and the hypothesis that the second share less the first is D:
    (c - b - n D) / sqrt(n (2 q + D (1 - D))), q being the most likely probability of a loss under it, the larger root
    of 2 n q^2 - (b + c - D (2 n - c + b)) q - b D (1 - D) = 0. At D = 0 it is McNemar's.

    Args:
        lost, won: counts [...].

    Returns:
        Of each [...]; 0 where nothing changed and nothing should have.
    """
    b, c = np.asarray(lost, np.float64), np.asarray(won, np.float64)
    linear = -(b + c) + difference * (2 * n - c + b)
    root = np.sqrt(np.maximum(linear**2 + 8 * n * b * difference * (1 - difference), 0))
    loss = (root - linear) / (4 * n)
    variance = np.maximum(n * (2 * loss + difference * (1 - difference)), 0)
    above = c - b - n * difference
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = np.where(above == 0, 0.0, np.copysign(np.inf, above))
        return np.asarray(np.where(variance > 0, above / np.sqrt(variance), certain))


def paired_interval(lost: int, won: int, n: int) -> Interval:
    """The second share less the first one, with the differences that ``paired_z`` does not reject at 95 %.

    Raises:
        ValueError: no images, or more changed than there are.
    """
    if n < 1 or min(lost, won) < 0 or lost + won > n:
        raise ValueError(f"wanted counts of {n} images, found {lost} lost and {won} won")
    value = (won - lost) / n
    ends = []
    for sign, end in ((1, -1.0), (-1, 1.0)):  # the statistic falls as the hypothesis rises
        inside, outside = value, end
        for _ in range(60):
            middle = (inside + outside) / 2
            if sign * float(paired_z(lost, won, n, middle)) <= _Z:
                inside = middle
            else:
                outside = middle
        ends.append(inside)
    return Interval(value, min(ends[0], value), max(ends[1], value), n)


def paired_shares(before: np.ndarray, after: np.ndarray, bound: float, level: float = _LEVEL) -> Stand:
    """Whether the second of two networks is right on the same images at least as often as the first, plus ``bound``.

    Args:
        before, after: whether each image is right, bool [N].
        bound: the least difference of the shares; negative where a loss is allowed.
        level: at which it would have to be broken, of which the number of images that is needed depends.

    Raises:
        ValueError: different shapes, or no images.
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
        raise ValueError(f"wanted two equally long vectors, found shapes {before.shape} and {after.shape}")
    n = len(before)
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    found = paired_interval(lost, won, n)
    assert found.low is not None and found.high is not None
    z = float(paired_z(lost, won, n, bound))
    keeps, p_broken = z >= _Z, NormalDist().cdf(z)
    changed = min(0.99, (lost + won + 1) / (n + 1))
    detectable = _detectable_share(n, changed)
    needed = None
    if not keeps and p_broken > level:
        needed = _images_needed(n, changed, found.value, bound, level)
    return Stand(found, bound, keeps, p_broken, detectable, needed)


def _share_rejected(n: int, lost: float, won: float, difference: float, z: float) -> float:
    """With which probability ``paired_z`` is at most ``z`` (below 0) or at least (above), by drawing tables.

    Args:
        lost, won: probabilities of an image's change.
    """
    lost, won = max(0.0, lost), max(0.0, won)
    if lost + won > 1:
        lost, won = lost / (lost + won), won / (lost + won)
    draws = np.random.default_rng(0).multinomial(n, [lost, won, max(0.0, 1 - lost - won)], DRAWS)
    found = paired_z(draws[:, 0], draws[:, 1], n, difference)
    return float((found <= z).mean() if z < 0 else (found >= z).mean())


@cache
def _detectable_share(n: int, changed: float) -> float | None:
    """The smallest drop that is seen nine times of ten, beside as many images that change both ways as were found."""

    def seen(drop: float) -> bool:
        return _share_rejected(n, changed / 2 + drop, changed / 2, 0.0, -_Z) >= POWER

    low, high = 0.0, min(1.0, 1 - changed)
    if not seen(high):
        return None
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (low, middle) if seen(middle) else (middle, high)
    return high


def _images_needed(n: int, changed: float, value: float, bound: float, level: float) -> int | None:
    """About how many images tell: where a loss is allowed, none from the bound and twice the bound from it.

    Where the bound asks for more than the baseline has, and where so many were looked at already, what was found from
    the bound.
    """
    enough = _images_by_margin(changed, bound, level) if bound < 0 else None
    if (enough is None or enough <= n) and value != bound:
        is_broken = value < bound
        enough = _smallest(lambda count: _images_tell(count, changed, -value, bound, level if is_broken else None))
    return None if enough is None else rounded_up(max(enough, n + 1))


@cache
def _images_by_margin(changed: float, bound: float, level: float) -> int | None:
    return _smallest(
        lambda count: (
            _images_tell(count, changed, 0.0, bound, None) and _images_tell(count, changed, -2 * bound, bound, level)
        )
    )


def _images_tell(count: int, changed: float, drop: float, bound: float, level: float | None) -> bool:
    """Whether so many images show, of a network that loses so much, that the bound is broken, or kept (None)."""
    z = _Z if level is None else NormalDist().inv_cdf(level)
    lost, won = changed / 2 + max(drop, 0), changed / 2 + max(-drop, 0)
    return _share_rejected(count, lost, won, bound, z) >= PLANNED_POWER


def _smallest(holds: Callable[[int], bool]) -> int | None:
    """The smallest number of images for which it holds, to some per cent; None where millions do not do."""
    high = 16
    while not holds(high):
        high *= 2
        if high > MOST_IMAGES:
            return None
    low = high // 2
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


# ---- means: of sessions, and of images with scores between right and wrong -----------------------------------------


def mean_above(values: np.ndarray, bound: float, allowed: float | None, level: float = _LEVEL) -> Stand:
    """Whether the mean of independent values lies above ``bound``, by Student's t.

    Args:
        values: [N], one a session or a process.
        bound: the least mean.
        allowed: how far the bound lies from no change, where the values are differences and a loss is allowed.
        level: as in ``paired_shares``.

    Raises:
        ValueError: fewer than two values.
    """
    from scipy.special import gammaincinv, stdtr, stdtrit

    n = len(values)
    if n < 2:
        raise ValueError("wanted at least two values")
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    error = spread / math.sqrt(n)
    quantile = float(stdtrit(n - 1, 1 - _LEVEL))
    found = Interval(mean, mean - quantile * error, mean + quantile * error, n)
    above = mean - bound
    if error > 0:
        keeps, p_broken = above >= quantile * error, float(stdtr(n - 1, above / error))
    else:
        keeps, p_broken = above >= 0, float(above >= 0)
    detectable = (quantile + float(stdtrit(n - 1, POWER))) * error
    needed = None
    if not keeps and p_broken > level:
        # The spread of few values is known badly: four times of five the true one is no larger than this.
        largest = spread * math.sqrt((n - 1) / (2 * float(gammaincinv((n - 1) / 2, 0.2))))

        counts = np.arange(2, MOST_SESSIONS + 1)
        arms = stdtrit(counts - 1, 1 - min(_LEVEL, level)) + stdtrit(counts - 1, PLANNED_POWER)
        for apart in (allowed or 0.0, abs(above)):  # where so many are there already, what was found decides
            enough = counts[arms * largest / np.sqrt(counts) <= apart]
            if len(enough) and enough[0] > n:
                needed = int(enough[0])
                break
    return Stand(found, bound, keeps, p_broken, detectable, needed)


# ---- what comes with an interval of its own ------------------------------------------------------------------------


def interval_above(found: Interval, bound: float, allowed: float | None, level: float = _LEVEL) -> Stand:
    """Whether a figure lies above ``bound`` by the 95 % interval that it came with, its arms as those of a normal.

    Args:
        found: with ``n`` images (or sessions); without an interval nothing can be told.
        bound, allowed, level: as in ``mean_above``.
    """
    if found.low is None or found.high is None:
        return Stand(found, bound, False, 1.0, None, None)
    above, arm = found.value - bound, found.high - found.value
    keeps = found.low >= bound
    p_broken = 1.0 if above >= 0 else NormalDist().cdf(above / arm * _Z) if arm > 0 else 0.0
    half = (found.high - found.low) / 2
    detectable = half * (1 + NormalDist().inv_cdf(POWER) / _Z)
    needed = None
    if not keeps and p_broken > level:
        for apart in (allowed or 0.0, abs(above)):
            arms = (NormalDist().inv_cdf(1 - level) + NormalDist().inv_cdf(PLANNED_POWER)) / _Z
            count = found.n * (half * arms / apart) ** 2 if apart > 0 else math.inf
            if found.n < count <= MOST_IMAGES:
                needed = rounded_up(count)
                break
    return Stand(found, bound, keeps, p_broken, detectable, needed)


def difference(after: Interval, before: Interval) -> Interval:
    """One estimate less another, each with its interval, as if they were independent: too wide where they go together.

    Each arm is the root of the sum of squares of the two that it comes from (MOVER; Zou and Donner 2008).
    """
    value, n = after.value - before.value, min(after.n, before.n)
    if after.low is None or after.high is None or before.low is None or before.high is None:
        return Interval(value, None, None, n)
    low = value - math.hypot(after.value - after.low, before.high - before.value)
    high = value + math.hypot(after.high - after.value, before.value - before.low)
    return Interval(value, low, high, n)


def exactly_above(value: float, bound: float) -> Stand:
    """Whether a number that is known exactly lies above ``bound``."""
    keeps = value >= bound
    return Stand(Interval(value, value, value, 1), bound, keeps, float(keeps), 0.0, None)
