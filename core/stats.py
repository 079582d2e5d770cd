"""Intervals for the numbers that are shown, by scipy where it has them; nothing is trimmed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
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
        """The figures behind the answer, as in "lost 0.20 points by the point value, up to 1.90 possible"."""
        text = f"{lost_or_won(self.drop_points)} by the point value"
        if self.possible_points is not None:
            worst, won = plain(self.possible_points), plain(self.drop_points).startswith("-")
            if worst.startswith("-"):
                text += f", {worst.removeprefix('-')} or more surely"
            else:
                text += f", {'a loss of ' if won else ''}up to {worst} possible"
        if self.answer == "fails":
            return f"{text}, surely above {self.max_drop_points:g}"
        return text if self.images_needed is None else f"{text}, about {self.images_needed:,} images would tell"

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


def lost_or_won(drop_points: float) -> str:
    """A drop in words: what is lost is positive, and what is won is told as won."""
    amount = plain(drop_points)
    return f"won {amount.removeprefix('-')} points" if amount.startswith("-") else f"lost {amount} points"


def plain(points: float) -> str:
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
    return geometric_interval(top / bottom)


def geometric_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Geometric mean of positive numbers with Student's 95 % interval of their logarithms; a single one has none.

    Raises:
        ValueError: no values, or one that is not positive.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if not (numbers > 0).all():
        raise ValueError("wanted positive numbers")
    return _exponential(mean_interval(np.log(numbers)))


def matched_share(called: Mapping[tuple[int, int], int]) -> float:
    """The share that is right once each class that is said is called as the label that suits it best, one to one.

    Far above the share that is right as it is, the classes are the same ones in another order; of few images a class it
    is high by chance. The best assignment is Kuhn and Munkres's.

    Args:
        called: how often each class (first) was called each (second), by number.
    """
    from scipy.optimize import linear_sum_assignment

    count = 1 + max(map(max, called))
    together = np.zeros((count, count), np.int64)
    for pair, times in called.items():
        together[pair] = times
    return float(together[linear_sum_assignment(together, maximize=True)].sum() / together.sum())


def mean_of_shares(shares: Sequence[Interval]) -> Interval:
    """The mean of independent shares, each with its interval: the accuracy of a class, say, over the classes.

    Each arm is the root of the sum of the squares of the single arms, over their number (Zou, Huang and Zhang 2009, "A
    note on confidence interval estimation for a linear function of binomial proportions"): as good as the single
    intervals, also where a share is 0 or 1 and a variance would say that nothing is left open.

    Returns:
        ``n`` is of all together; no interval where one of the shares has none.

    Raises:
        ValueError: no shares.
    """
    if not shares:
        raise ValueError("wanted at least one share")
    mean, n = math.fsum(share.value for share in shares) / len(shares), sum(share.n for share in shares)
    lower = [share.value - share.low for share in shares if share.low is not None]
    upper = [share.high - share.value for share in shares if share.high is not None]
    if len(lower) < len(shares) or len(upper) < len(shares):
        return Interval(mean, None, None, n)
    low, high = mean - math.hypot(*lower) / len(shares), mean + math.hypot(*upper) / len(shares)
    return Interval(mean, max(0.0, low), min(1.0, high), n)


CALIBRATION_BINS = 15
CHANCE_DRAWS = 200


@dataclass(frozen=True)
class Calibration:
    """How far a network's confidence is from how often it is right, as a share.

    ``by_chance`` is what a network whose confidence is exactly right would show on so many images at most, in 95 of 100
    cases: an ``error`` below it says nothing against the network.
    """

    error: float
    by_chance: float
    bins: int
    images: int

    def as_dict(self) -> dict[str, float | int]:
        """The fields by name, for JSON."""
        return asdict(self)


def calibration_error(
    confidence: np.ndarray, right: np.ndarray, seed: int = 0, weight: np.ndarray | None = None
) -> Calibration:
    """The expected calibration error, over 15 bins of equal width (Guo et al. 2017, on modern neural networks).

    The images are binned by confidence; the error is the mean over the images of the distance between the share of
    their bin that is right and its mean confidence. Images that are right by chance, each with its own confidence, have
    one too, the larger the fewer they are: it is drawn 200 times (as Broecker and Smith 2007 do for diagrams). Many
    answers about one image go together: of those each draw turns the differences of whole images around (the wild
    bootstrap, Davison and Hinkley 1997, 6.2.6).

    Args:
        confidence: [N], 0 to 1, of the answer that was given; [N, B] where an image has several.
        right: of the same shape, whether it was right, or how right, 0 to 1.
        seed: of the draws.
        weight: how many answers each is of, where an image has several, of the same shape.

    Raises:
        ValueError: different lengths, none, or a confidence outside 0 to 1.
    """
    sure, scores = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    n, dimensions = len(sure), 1 if weight is None else 2
    if sure.shape != scores.shape or sure.ndim != dimensions or n == 0 or not ((sure >= 0) & (sure <= 1)).all():
        raise ValueError(f"wanted two equally long vectors of 0 to 1, found shapes {sure.shape} and {scores.shape}")
    draws = np.random.default_rng(seed)
    if weight is None:
        chance = [expected_calibration_error(sure, draws.random(n) < sure) for _ in range(CHANCE_DRAWS)]
    else:
        bins = _bins(sure)
        sums = [
            np.bincount(bins.ravel(), each.ravel(), CALIBRATION_BINS) for each in (weight * (scores - sure), weight)
        ]
        by_luck = scores - sure - (sums[0] / np.maximum(sums[1], 1e-12))[bins]  # beyond what its bin is off by
        turned = ((2 * draws.integers(0, 2, (n, 1)) - 1) * by_luck for _ in range(CHANCE_DRAWS))
        chance = [expected_calibration_error(sure, sure + each, weight) for each in turned]
    error = expected_calibration_error(sure, scores, weight)
    return Calibration(error, float(np.quantile(chance, CONFIDENCE)), CALIBRATION_BINS, n)


def _bins(sure: np.ndarray) -> np.ndarray:
    return np.asarray(np.clip(np.ceil(sure * CALIBRATION_BINS).astype(np.int64) - 1, 0, CALIBRATION_BINS - 1))


def expected_calibration_error(sure: np.ndarray, right: np.ndarray, weight: np.ndarray | None = None) -> float:
    """The error alone, for confidences of 0 to 1 and whether the answers were right; as in ``calibration_error``."""
    bins = _bins(sure)
    apart, answers = right - sure, float(len(sure))
    if weight is not None:
        apart, answers = apart * weight, float(weight.sum())
    # A bin's share of the answers times its distance is the sum of its differences over all of them.
    return float(np.abs(np.bincount(bins.ravel(), apart.ravel(), CALIBRATION_BINS)).sum() / max(1.0, answers))


LEAST_IMAGES = 30  # fewer say too little of the spread of what is drawn from them
CALIBRATION_DRAWS = 400


def calibration_interval(
    confidence: np.ndarray, right: np.ndarray, seed: int = 0, weight: np.ndarray | None = None
) -> Interval:
    """The expected calibration error with a 95 % interval, images drawn with replacement.

    Few images show an error by chance alone, and images that are drawn from them show one more. So the interval reaches
    down to what is left when what the draws add is taken off (the basic bootstrap: Davison and Hinkley 1997, 5.2), and
    to nothing where the error lies below what chance alone may show; and up by the longer of the basic bootstrap's arm
    and the normal one. Of 100 simulated cases each (100 to 2,000 images) it held the truth in 88 to 98, 94 on average.

    Args:
        confidence, right, seed, weight: as in ``calibration_error``; of fewer than 30 images there is no interval.

    Raises:
        ValueError: as ``calibration_error``.
    """
    found, images = calibration_error(confidence, right, seed, weight), len(confidence)
    if images < LEAST_IMAGES:
        return Interval(found.error, None, None, images)
    sure, scores = np.asarray(confidence, np.float64), np.asarray(right, np.float64)
    generator = np.random.default_rng(seed)
    places = (generator.integers(0, images, images) for _ in range(CALIBRATION_DRAWS))
    drawn = np.array(
        [expected_calibration_error(sure[at], scores[at], None if weight is None else weight[at]) for at in places]
    )
    below, above = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    low = 0.0 if found.error <= found.by_chance else max(0.0, 2 * found.error - above)
    normal = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * float(drawn.std(ddof=1))
    high = found.error + max(0.0, found.error - below, normal)
    return Interval(found.error, min(low, found.error), min(1.0, high), images)


def bootstrap_by_image(
    of_images: Callable[[np.ndarray], float], images: int, seed: int, draws: int, bounds: tuple[float, float]
) -> Interval:
    """A figure of images with its basic bootstrap 95 % interval, images drawn with replacement.

    What the draws are off from the figure is taken for what the figure is off from the truth (Davison and Hinkley 1997,
    5.2): an error that few images make too large is made larger by the draws too, and the interval reaches down for it.

    Args:
        of_images: the figure of the images at some positions, which may repeat themselves.
        images: how many there are, one or more; of fewer than 30 there is no interval.
        seed: of the draws.
        bounds: within which the figure lies by its nature.
    """
    value = of_images(np.arange(images))
    if images < LEAST_IMAGES:
        return Interval(value, None, None, images)
    generator = np.random.default_rng(seed)
    drawn = [of_images(generator.integers(0, images, images)) for _ in range(draws)]
    below, above = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    low, high = max(bounds[0], 2 * value - above), min(bounds[1], 2 * value - below)
    return Interval(value, min(low, value), max(high, value), images)


LEAST_BLOCKS = 5  # fewer draws than these repeat themselves so often that the bootstrap knows no tails


def bootstrap_ratio(block_logs: Sequence[float] | np.ndarray, seed: int, draws: int = 4000) -> Interval:
    """Geometric mean ratio with its bootstrap-t 95 % interval, blocks drawn with replacement.

    Each draw's mean is measured in its own standard errors (Efron and Tibshirani 1993, 12.5): an interval from the
    plain percentiles of ten draws' means is too narrow, it covers in 85 to 90 of 100.

    Args:
        block_logs: of each block the mean logarithm of the first's latencies less that of the second's.
        seed: of the draws.

    Raises:
        ValueError: no blocks.
    """
    logs = np.asarray(block_logs, dtype=np.float64)
    n = len(logs)
    if n == 0:
        raise ValueError("wanted at least one block")
    mean = float(logs.mean())
    if n < LEAST_BLOCKS:
        return Interval(math.exp(mean), None, None, n)
    drawn = logs[np.random.default_rng(seed).integers(0, n, (draws, n))]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    told = errors > 1e-9 * max(1.0, float(np.abs(logs).max()))  # a draw of one block over and over has no error
    error = float(logs.std(ddof=1)) / math.sqrt(n)
    if not told.any():
        return Interval(math.exp(mean), math.exp(mean), math.exp(mean), n)
    low, high = np.quantile(
        (drawn.mean(axis=1)[told] - mean) / errors[told], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    )
    return _exponential(Interval(mean, mean - float(high) * error, mean - float(low) * error, n))


WIDEST_LOG = 100.0  # an interval of a ratio that reaches beyond it bounds nothing, and soon is no number


def _exponential(logs: Interval) -> Interval:
    ends = [end for end in (logs.low, logs.high) if end is not None and abs(end) <= WIDEST_LOG]
    low, high = map(math.exp, ends) if len(ends) == 2 else (None, None)
    return Interval(math.exp(logs.value), low, high, logs.n)


def known_within(found: Interval) -> float | None:
    """The share within which a latency or a ratio is known: the longer arm of its interval."""
    if found.low is None or found.high is None:
        return None
    return max(found.high / found.value, found.value / found.low) - 1


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


def compare_logs(
    differences: Sequence[np.ndarray], margins: Sequence[float], level: float = 1 - CONFIDENCE
) -> list[tuple[Interval, bool]]:
    """Which of several ratios differ from 1 by more than their margins, none of the others with more than ``level``.

    The mean logarithm of each is held against its margin by Student's t, at Holm's level over all of them.

    Args:
        differences: of each pair the logarithms of its ratios, one a round (or a session), two or more.
        margins: what is left open about each, as a difference of logarithms; infinite where nothing bounds it.

    Returns:
        Of each the geometric mean ratio, with its interval at the level of its step, and whether it differs.
    """
    from scipy.special import stdtr, stdtrit  # Student's distribution and its inverse

    count = np.array([len(found) for found in differences])
    mean = np.array([found.mean() for found in differences])
    error = np.array([found.std(ddof=1) for found in differences]) / np.sqrt(count)
    beyond = np.abs(mean) - np.array(margins)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = np.where(beyond > 0, 2 * stdtr(count - 1, -beyond / error), 1.0)
    rejected, levels = holm_levels(p_values, level)
    arm = stdtrit(count - 1, 1 - levels / 2) * error
    logs = zip(mean.tolist(), (mean - arm).tolist(), (mean + arm).tolist(), count.tolist(), strict=True)
    ratios = [_exponential(Interval(*each)) for each in logs]
    return list(zip(ratios, map(bool, rejected), strict=True))
