"""What a study claims before it runs, and what its runs say of it: holds, does not hold, or not enough data.

A cell is a method on a share of the images; it has a run a seed, and every run's figure on the same test images. A
difference of two methods is taken in pairs, by seed. What it is off by has two parts: another seed (weights, order,
views, drawn images) and other test images.

- Few seeds say little of their own spread, so it is pooled over the cells, as far as those are seen to be alike: the
  prior of Smyth (2004, "Linear models and empirical Bayes methods"), whose weight comes from how much the spread of
  single methods differs by more than chance.
- The part of the test images is their jackknife in groups (Efron and Tibshirani 1993, 11.5).
- The degrees of freedom of the sum are Satterthwaite's (1946), and several claims are corrected by Holm (1979).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from .errors import UserError
from .stats import CONFIDENCE, Interval, holm_levels, rounded_up

# Of a run: its figure on all test images, then on those without each group of them, [1 + groups], in points.
Figures = np.ndarray
# By method and share of the images, then by seed.
Table = Mapping[tuple[str, float], Mapping[int, Figures]]

MOST_GROUPS = 40  # of test images
MOST_CLAIMS = 5
POWER = 0.8
MOST_SEEDS = 1000
Answer = Literal["holds", "does not hold", "not enough data", "one draw"]

METHOD = r"[A-Za-z][A-Za-z0-9_.-]{0,63}"
_CLAIM = re.compile(rf"({METHOD}) *> *({METHOD}) +at +([0-9.]+%?)(?: +by +([0-9.]+))?", re.ASCII)


class Claim(NamedTuple):
    """That the first method does better than the second on that share of the images, by more than so many points."""

    first: str
    second: str
    fraction: float
    by_points: float = 0.0

    def __str__(self) -> str:
        """As ``parse_claim`` reads it."""
        return f"{self.first} > {self.second} at {self.fraction:g}" + (f" by {self.by_points:g}" * bool(self.by_points))


def parse_claim(text: str) -> Claim:
    """A claim such as ``hint > kd-T4 at 0.1`` or ``kd-T4 > labels at 2% by 1``. Raises UserError."""
    found = _CLAIM.fullmatch(text.strip())
    try:
        if found is None:
            raise ValueError
        share = float(found[3].removesuffix("%")) / (100 if found[3].endswith("%") else 1)
        claim = Claim(found[1], found[2], share, float(found[4] or 0))
    except ValueError:
        raise UserError(
            f"claim '{text}': wanted METHOD > METHOD at SHARE, and perhaps by POINTS, such as 'kd-T4 > labels at 0.02'"
        ) from None
    if not 0 < claim.fraction <= 1 or claim.first == claim.second:
        raise UserError(f"claim '{text}': wanted two methods and a share of the images above 0, 1 at most")
    return claim


class Difference(NamedTuple):
    """Of two methods: the mean over the seeds that both have, in points, and the standard errors of its two parts.

    ``seed_error`` is None of a single seed: one draw has no spread.
    """

    points: float
    seed_error: float | None
    image_error: float
    seed_freedom: float
    groups: int
    seeds: int

    def error(self, seeds: int | None = None) -> float:
        """Standard error, with as many seeds as there are, or with so many."""
        assert self.seed_error is not None
        scale = 1 if seeds is None else self.seeds / seeds
        return math.sqrt(self.seed_error**2 * scale + self.image_error**2)

    def freedom(self, seeds: int | None = None) -> float:
        """Degrees of freedom of that error; more seeds bring as many more."""
        assert self.seed_error is not None
        count = self.seeds if seeds is None else seeds
        by_seed = self.seed_error**2 * self.seeds / count
        its = self.seed_freedom * (count - 1) / (self.seeds - 1)
        parts = by_seed**2 / its + self.image_error**4 / (self.groups - 1)
        return (by_seed + self.image_error**2) ** 2 / parts if parts else its

    def interval(self, level: float = 1 - CONFIDENCE) -> Interval:
        """Two-sided, missed with probability ``level``; no bounds of one draw."""
        from scipy.special import stdtrit

        if self.seed_error is None:
            return Interval(self.points, None, None, self.seeds)
        half = float(stdtrit(self.freedom(), 1 - level / 2)) * self.error()
        return Interval(self.points, self.points - half, self.points + half, self.seeds)


@dataclass(frozen=True)
class Judged:
    """A claim and what the runs say of it.

    ``interval`` is of the difference in points, at the level of the claim's step in Holm's correction. ``more_seeds``
    is about how many more would tell, if the difference is what it seems to be, in 80 of 100 studies; None where it
    is told, or where seeds alone cannot: then ``images_needed`` test images would, about.
    """

    claim: str
    answer: Answer
    interval: Interval
    p_value: float | None
    level: float
    more_seeds: int | None = None
    images_needed: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return asdict(self)


def groups_of(images: int) -> np.ndarray:
    """The group of each test image [N], drawn once and for all: as many groups as there are images, 40 at most."""
    return np.random.default_rng(0).permutation(np.arange(images) % min(images, MOST_GROUPS))


def judge(claims: Sequence[Claim], table: Table, worth_points: float, images: int) -> list[Judged]:
    """Each claim against the runs: it holds where the interval lies beyond what it says, Holm over all of them.

    It does not hold where even the upper end of its interval is less than ``worth_points`` above what it says.

    Args:
        worth_points: the smallest gain that would matter, above 0.
        images: the test images behind the figures.

    Of all studies in which no named claim is true, at most one in 20 says of any of them that it holds.
    """
    from scipy.special import stdtr

    found = [difference(table, *claim[:3]) for claim in claims]
    p_values = np.full(len(claims), np.nan)
    for at, (claim, told) in enumerate(zip(claims, found, strict=True)):
        if told is not None and told.seed_error is not None:
            beyond, error = told.points - claim.by_points, told.error()
            if beyond > 0:
                p_values[at] = 2 * stdtr(told.freedom(), -beyond / error) if error > 0 else 0.0
            else:
                p_values[at] = 1.0
    rejected, levels = holm_levels(p_values)
    judged = []
    for at, (claim, told) in enumerate(zip(claims, found, strict=True)):
        level = float(levels[at])
        if told is None:
            judged.append(Judged(str(claim), "not enough data", Interval(0.0, None, None, 0), None, level))
            continue
        interval, p_value = told.interval(level), None if math.isnan(p_values[at]) else float(p_values[at])
        if interval.high is None:
            judged.append(Judged(str(claim), "one draw", interval, p_value, level))
        elif rejected[at]:
            judged.append(Judged(str(claim), "holds", interval, p_value, level))
        elif interval.high < claim.by_points + worth_points:
            judged.append(Judged(str(claim), "does not hold", interval, p_value, level))
        else:
            more = _needed(told, claim.by_points, worth_points, level, images)
            judged.append(Judged(str(claim), "not enough data", interval, p_value, level, *more))
    return judged


def difference(table: Table, first: str, second: str, fraction: float) -> Difference | None:
    """The first method less the second on that share, over the seeds of both; None where they have none in common."""
    one, other = table.get((first, fraction), {}), table.get((second, fraction), {})
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return None
    apart = np.stack([one[seed] - other[seed] for seed in seeds])  # [S, 1 + G]
    mean = apart.mean(0)
    groups = len(mean) - 1
    image_error = math.sqrt((groups - 1) / groups * float(np.square(mean[1:] - mean[1:].mean()).sum()))
    if len(seeds) == 1:
        return Difference(float(mean[0]), None, image_error, 0.0, groups, 1)
    variance, freedom = _pooled(table, fraction, seeds, float(apart[:, 0].var(ddof=1)))
    return Difference(float(mean[0]), math.sqrt(variance / len(seeds)), image_error, freedom, groups, len(seeds))


def _pooled(table: Table, fraction: float, seeds: Sequence[int], own: float) -> tuple[float, float]:
    """The variance of a difference of two methods over seeds, and its degrees of freedom.

    ``own`` is what the seeds of these two say. The cells of the same share say another: twice the variance that is
    left when the means of methods and of seeds are taken away.
    """
    here = _spread(table, fraction, seeds)
    freedom = len(seeds) - 1
    if here is None:
        return own, freedom
    _, _, common = here
    spreads = [_spread(table, share, None) for share in sorted({share for _, share in table})]
    weight = _prior_weight([(each[0], each[1]) for each in spreads if each is not None])
    weight = min(weight, (len(here[0]) - 2) * freedom)  # no more than the other methods know
    # A pair that is less steady than the others is not made steadier by them.
    return max(own, (weight * 2 * common + freedom * own) / (weight + freedom)), weight + freedom


def _spread(table: Table, fraction: float, seeds: Sequence[int] | None) -> tuple[np.ndarray, int, float] | None:
    """Of the methods on a share: the variance of each over seeds beside the others [M], its freedom, and that of all.

    None of fewer than three methods or two seeds. ``seeds`` None: those that all of them have.
    """
    cells = {name: runs for (name, share), runs in table.items() if share == fraction and len(runs) > 1}
    if seeds is None:
        seeds = sorted(set.intersection(*(set(runs) for runs in cells.values()))) if cells else []
    figures = np.array([[runs[seed][0] for seed in seeds] for runs in cells.values() if set(seeds) <= runs.keys()])
    if len(figures) < 3 or len(seeds) < 2:
        return None
    left = figures - figures.mean(0) - figures.mean(1, keepdims=True) + figures.mean()
    methods, freedom = len(figures), len(seeds) - 1
    single = np.square(left).sum(1) * methods / ((methods - 1) * freedom)
    return single, freedom, float(np.square(left).sum() / ((methods - 1) * freedom))


def _prior_weight(spreads: Sequence[tuple[np.ndarray, int]]) -> float:
    """How many degrees of freedom the cells' common spread is worth: endless where they differ by chance alone.

    The excess of the variance of the logarithms of single variances over trigamma(freedom / 2) is trigamma(weight /
    2) (Smyth 2004, section 6.2), here within each share of the images: those may differ as they like.
    """
    from scipy.optimize import brentq
    from scipy.special import polygamma

    excess, count = 0.0, 0
    for single, freedom in spreads:
        known = single[single > 0]
        if len(known) > 2:
            logs = np.log(known)
            excess += (len(known) - 1) * (float(logs.var(ddof=1)) - float(polygamma(1, freedom / 2)))
            count += len(known) - 1
    if not count or excess <= 0:
        return math.inf if count else 0.0
    wanted = excess / count
    low, high = 1e-3, 1e6
    if wanted <= float(polygamma(1, high / 2)):
        return math.inf
    if wanted >= float(polygamma(1, low / 2)):
        return 0.0
    return float(brentq(lambda weight: float(polygamma(1, weight / 2)) - wanted, low, high))


def _needed(
    told: Difference, by_points: float, worth_points: float, level: float, images: int
) -> tuple[int | None, int | None]:
    """About how many seeds more would tell, or if none would, how many test images."""
    from scipy.special import ndtri, stdtrit

    beyond = told.points - by_points
    gap = max(beyond, worth_points - beyond)  # to what it says, or to what would not matter
    power = float(ndtri(POWER))

    def tells(seeds: int) -> bool:
        return (float(stdtrit(told.freedom(seeds), 1 - level / 2)) + power) * told.error(seeds) < gap

    least = (float(ndtri(1 - level / 2)) + power) * told.image_error
    if least >= gap:
        return None, rounded_up(images * (1.05 * least / gap) ** 2)
    low, high = told.seeds, told.seeds + 1
    while not tells(high):
        if high > MOST_SEEDS:
            return None, rounded_up(images * max(1.0, (1.05 * least / gap) ** 2) * 2)
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if tells(middle) else (middle, high)
    return high - told.seeds, None


def detectable_deviations(seeds: int, claims: int, methods: int) -> float | None:
    """The smallest difference that a study tells in 80 of 100 cases, in standard deviations of one run over seeds.

    Where the spread is alike in all cells, and the test images are many. None of one seed.
    """
    from scipy.special import ndtri, stdtrit

    if seeds < 2:
        return None
    freedom = (seeds - 1) * max(1, methods - 1)
    arms = float(stdtrit(freedom, 1 - (1 - CONFIDENCE) / 2 / max(1, claims))) + float(ndtri(POWER))
    return arms * math.sqrt(2 / seeds)
