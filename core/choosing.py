"""Which of many networks to measure next, so that few measurements find the best one within a latency.

All latencies are logarithms here. Chances are of another session: a network that was measured once is known as well as
networks are that were measured in several. Of those that were not, a regression on what a graph tells says where they
lie, and how surely; to measure is worth what is to be expected of it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

FIRST = 5  # networks that are spread over all, to learn of the others
ENOUGH = 0.02  # points: less than that is not worth a measurement
SURE = 0.9  # chance of being within the limit in another session that a network must have to be chosen
# Of a network's latency in two sessions, until that is known: a standard deviation of its logarithm, and how many
# sessions it counts for.
SESSION_SD, SESSION_WEIGHT = 0.05, 4.0
# The latency of a network by its graph, until that is known: a standard deviation of what is left, as 437 public
# networks on two processors have it, and how many networks it counts for.
GRAPH_SD, GRAPH_WEIGHT = 0.3, 4.0
SLOPE, SLOPE_SD = 0.45, 0.4  # of the logarithm by that of each of two proxies, until it is known
LEVEL_SD = 3.0  # of the intercept: hardly anything
# Shares of the variance that is left: what networks of a family, and the sizes of one network, have in common.
OF_FAMILY, OF_NETWORK, OWN = 0.4, 0.3, 0.3
DRIFT_SD, NOISE_SD = 0.2, 0.03  # of whole sessions, and of a network in one: only to read sessions against each other


@dataclass(frozen=True)
class Level:
    """The log latency of a network over ``sessions``, read against what was measured along with it."""

    value: float
    sessions: int


@dataclass(frozen=True)
class Known:
    """What sessions told: a level each, and how far another session lies from one (standard deviation, freedom)."""

    levels: dict[str, Level]
    again_sd: float
    freedom: float

    def scale(self, name: str) -> float:
        """Standard deviation of the log latency of ``name`` in another session."""
        return self.again_sd * math.sqrt(1 + 1 / self.levels[name].sessions)

    def chance(self, name: str, limit: float) -> float:
        """That ``name`` is within the log ``limit`` in another session."""
        scale = np.array([self.scale(name)])
        return float(chances(np.array([self.levels[name].value]), scale, self.freedom, limit)[0])

    def bounds(self, name: str, confidence: float) -> tuple[float, float]:
        """Two-sided bounds of the log latency of ``name`` in another session."""
        from scipy.stats import t

        half = float(t.ppf((1 + confidence) / 2, self.freedom)) * self.scale(name)
        return self.levels[name].value - half, self.levels[name].value + half


def read_together(sessions: Sequence[Mapping[str, float]]) -> Known:
    """Levels of networks that were measured in several sessions, each with some of them.

    The log latency is a network's level and what its session had of its own (a machine that was slower that day), by
    least squares, sessions shrunk to nothing where no network joins them. How far another session lies is told by
    the networks that were in several, as they were measured; networks of one session share what that had.

    Args:
        sessions: log latencies by network.

    Raises:
        ValueError: nothing was measured.
    """
    names = list(dict.fromkeys(name for session in sessions for name in session))
    if not names:
        raise ValueError("wanted at least one measured network")
    column = {name: at for at, name in enumerate(names)}
    found = [(at, name, value) for at, session in enumerate(sessions) for name, value in session.items()]
    design = np.zeros((len(found) + len(sessions), len(names) + len(sessions)))
    wanted = np.zeros(len(design))
    for row, (at, name, value) in enumerate(found):
        design[row, column[name]] = design[row, len(names) + at] = 1 / NOISE_SD
        wanted[row] = value / NOISE_SD
    for at in range(len(sessions)):
        design[len(found) + at, len(names) + at] = 1 / DRIFT_SD
    levels = np.linalg.lstsq(design, wanted, rcond=None)[0]
    by_network: dict[str, list[float]] = defaultdict(list)
    for _, name, value in found:
        by_network[name].append(value)
    squares = sum(float(np.square(np.array(values) - np.mean(values)).sum()) for values in by_network.values())
    raw = sum(len(values) - 1 for values in by_network.values())
    repeated = [session for session in sessions if any(len(by_network[name]) > 1 for name in session)]
    freedom = float(max(0, len(repeated) - 1))
    variance = SESSION_WEIGHT * SESSION_SD**2 + (freedom * squares / raw if raw else 0.0)
    return Known(
        {name: Level(float(levels[at]), len(by_network[name])) for name, at in column.items()},
        math.sqrt(variance / (SESSION_WEIGHT + freedom)),
        SESSION_WEIGHT + freedom,
    )


@dataclass(frozen=True)
class Forecast:
    """Log latencies that are to be expected: a Student distribution each, of as much ``freedom``."""

    value: np.ndarray  # [N]
    scale: np.ndarray  # [N]
    freedom: float


def forecast(
    proxies: np.ndarray, families: Sequence[str], networks: Sequence[str], measured: Mapping[int, float]
) -> Forecast:
    """What the log latencies of all are by those of some.

    A Bayesian linear regression on log proxies with a normal-inverse-gamma prior; what is left is shared in part by
    networks of a family and by the sizes of one network (Rasmussen and Williams 2006, 2.7, with Student's distribution
    for a variance that is not known).

    Args:
        proxies: positive [N, P], such as multiply-accumulates and activations.
        families: of each.
        networks: its name, whatever its size.
        measured: log latency by position.

    Raises:
        ValueError: nothing is measured, or a proxy that is not positive.
    """
    if not measured or not (np.asarray(proxies) > 0).all():
        raise ValueError("wanted something measured, and positive proxies")
    at = np.array(list(measured))
    y = np.array(list(measured.values()))
    logs = np.log(np.asarray(proxies, np.float64))
    logs = logs - logs[at].mean(0)
    design = np.column_stack([np.ones(len(logs)), logs])
    before = np.array([y.mean(), *[SLOPE] * logs.shape[1]])
    spread = np.square(np.array([LEVEL_SD, *[SLOPE_SD] * logs.shape[1]]) / GRAPH_SD)
    of_family, of_network = np.asarray(families), np.asarray(networks)
    alike = OF_FAMILY * (of_family[:, None] == of_family[at]) + OF_NETWORK * (of_network[:, None] == of_network[at])
    across = (design * spread) @ design[at].T + alike
    among = across[at] + OWN * np.eye(len(at))
    own = (np.square(design) * spread).sum(1) + OF_FAMILY + OF_NETWORK + OWN
    rest = y - design[at] @ before
    solved = np.linalg.solve(among, np.column_stack([rest, across.T]))
    freedom = GRAPH_WEIGHT + len(at)
    variance = (GRAPH_WEIGHT * GRAPH_SD**2 + float(rest @ solved[:, 0])) / freedom
    left = np.maximum(own - (across * solved[:, 1:].T).sum(1), 1e-12)
    return Forecast(design @ before + across @ solved[:, 0], np.sqrt(variance * left), freedom)


def chances(value: np.ndarray, scale: np.ndarray, freedom: float, limit: float) -> np.ndarray:
    """The chance of each of being at most ``limit``, by Student's distribution."""
    from scipy.stats import t

    return np.asarray(t.cdf((limit - value) / scale, freedom))


def expected_gains(quality: np.ndarray, chance: np.ndarray, best: float | None) -> np.ndarray:
    """What measuring each is to bring over the ``best`` that is within the limit; where none is, over less than all.

    Args:
        quality: points [N], whatever they are of.
        chance: that it is within the limit [N].
    """
    floor = float(quality.min()) - 1 if best is None else best
    return np.asarray(chance * np.maximum(0.0, quality - floor))


def spread_out(proxy: np.ndarray, quality: np.ndarray, count: int) -> list[int]:
    """Positions of ``count`` networks spread over a proxy, from the smallest on.

    They are cut into as many groups of equal size; of each the best of its middle third is taken, so that what is
    measured to learn of the others may also be the answer.
    """
    order = np.argsort(proxy, kind="stable")
    taken = []
    for group in np.array_split(order, min(count, len(order))):
        third = len(group) // 3
        middle = group[third : len(group) - third]
        taken.append(int(middle[np.argmax(quality[middle])]))
    return taken


def front(points: Mapping[str, tuple[float, float]], among: Collection[str] | None = None) -> list[str]:
    """Names that no other is faster than at the same quality or better, the fastest first.

    Args:
        points: latency and quality by name.
        among: those that count; None: all.
    """
    found: list[str] = []
    best = -math.inf
    for name in sorted(points if among is None else among, key=lambda name: (points[name][0], -points[name][1])):
        if points[name][1] > best:
            found.append(name)
            best = points[name][1]
    return found
