"""Which network is measured next: the statistics alone, on latencies that are made here."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kdpipe.core import choosing
from kdpipe.core.choosing import ENOUGH, FIRST, expected_gains, forecast, front, read_together, spread_out


def test_sessions_are_read_against_what_they_share() -> None:
    """A machine that was a third slower all day long slows no network down: the anchors say so."""
    levels = {"small": 0.0, "large": 2.0, "first": 1.0, "second": 1.1}
    slower = math.log(4 / 3)
    known = read_together(
        [
            {name: levels[name] for name in ("small", "large", "first")},
            {name: levels[name] + slower for name in ("small", "large", "second")},
        ]
    )
    apart = known.levels["second"].value - known.levels["first"].value
    assert apart == pytest.approx(0.1, abs=0.01)
    assert {name: level.sessions for name, level in known.levels.items()} == {
        "small": 2, "large": 2, "first": 1, "second": 1
    }  # fmt: skip
    alone = read_together([{"first": 1.0}, {"second": 1.1 + slower}])  # nothing joins them
    assert alone.levels["second"].value - alone.levels["first"].value == pytest.approx(0.1 + slower, abs=0.02)


def test_another_session_is_as_far_as_sessions_were() -> None:
    """Anchors that wander make every network less sure; one of two sessions is surer than one of a single one."""
    steady = read_together([{"a": 0.0, "b": 1.0}, {"a": 0.001, "b": 1.001}, {"a": -0.001, "b": 1.0}])
    shaky = read_together([{"a": 0.0, "b": 1.0}, {"a": 0.3, "b": 1.3}, {"a": -0.3, "b": 0.7}])
    assert steady.again_sd < choosing.SESSION_SD < shaky.again_sd
    limit = math.log(1.1)
    assert shaky.chance("a", limit) < steady.chance("a", limit)
    mixed = read_together([{"a": 0.0, "b": 0.0}, {"a": 0.0}])
    assert mixed.scale("a") < mixed.scale("b")
    low, high = mixed.bounds("a", 0.95)
    assert low < 0 < high
    with pytest.raises(ValueError, match="at least one"):
        read_together([])


def test_the_chance_of_another_session_is_kept() -> None:
    """Networks that are said to be within a limit nine times of ten are so in another session, over drawn machines."""
    generator = np.random.default_rng(0)
    kept = []
    for _ in range(400):
        drift = generator.normal(0, 0.06, 5)
        sessions = [{"a": day + generator.normal(0, 0.01), f"n{at}": 1 + day} for at, day in enumerate(drift[:4])]
        known = read_together(sessions)
        limit = known.levels["n0"].value + 1.6 * known.scale("n0")
        assert 0.8 < known.chance("n0", limit) < 0.96
        kept.append(1 + drift[4] + generator.normal(0, 0.01) <= limit)
    assert np.mean(kept) > 0.85


def test_a_forecast_learns_from_the_graph_and_from_relatives() -> None:
    generator = np.random.default_rng(1)
    macs = np.exp(generator.uniform(15, 21, 60))
    proxies = np.column_stack([macs, macs**0.8])
    families = [f"family{at % 6}" for at in range(60)]
    own = np.tile(generator.normal(0, 0.3, 6), 10)
    truth = 0.7 * np.log(macs) - 12 + own
    few = forecast(proxies, families, list(map(str, range(60))), {at: truth[at] for at in range(0, 60, 13)})
    many = forecast(proxies, families, list(map(str, range(60))), {at: truth[at] for at in range(30)})
    rest = np.arange(30, 60)
    assert np.abs(many.value - truth)[rest].mean() < np.abs(few.value - truth)[rest].mean()
    assert many.scale[rest].mean() < few.scale[rest].mean()
    inside = np.abs(few.value - truth) < 2.3 * few.scale
    assert inside.mean() > 0.9
    # One of the family that was measured is better known than a stranger of the same cost.
    pair = forecast(np.full((3, 2), 1e6), ["a", "a", "b"], ["x", "y", "z"], {0: 1.0})
    assert pair.scale[0] < pair.scale[1] < pair.scale[2]
    with pytest.raises(ValueError, match="measured"):
        forecast(proxies, families, families, {})
    with pytest.raises(ValueError, match="positive"):
        forecast(np.zeros((1, 2)), ["a"], ["a"], {0: 0.0})


def test_gains_and_fronts() -> None:
    gains = expected_gains(np.array([70.0, 75, 80]), np.array([1.0, 0.5, 0.1]), 72.0)
    assert list(gains) == pytest.approx([0, 1.5, 0.8])
    assert (expected_gains(np.array([70.0, 75]), np.array([0.2, 0.2]), None) > 0).all()
    points = {"a": (1.0, 70.0), "b": (2.0, 69.0), "c": (3.0, 75.0), "d": (1.0, 60.0)}
    assert front(points) == ["a", "c"] and front(points, ["b", "d"]) == ["d", "b"]
    taken = spread_out(np.arange(50.0), np.arange(50) % 7, 5)
    assert taken == sorted(taken) and len(set(taken)) == 5 and taken[0] < 10 <= taken[1] and taken[-1] >= 40
    assert spread_out(np.arange(3.0), np.zeros(3), 5) == [0, 1, 2]


def _picked(generator: np.random.Generator, budget: int) -> tuple[float, int]:
    """Points lost against measuring all, and networks measured, on a pool and a device that are drawn."""
    count = 200
    macs = np.exp(generator.uniform(17, 22, count))
    acts = macs ** generator.normal(0.75, 0.02, count)
    families = generator.integers(0, 25, count)
    truth = 0.5 * np.log(macs) + 0.5 * np.log(acts) + generator.normal(0, 0.2, 25)[families]
    truth += generator.normal(0, 0.2, count)
    quality = 60 + 4 * (np.log(macs) - 17) + generator.normal(0, 2, count)
    limit = float(np.quantile(truth, generator.uniform(0.1, 0.8)))
    proxies = np.column_stack([macs, acts])
    names = list(map(str, range(count)))
    measured = {at: truth[at] for at in spread_out(acts, quality, FIRST)}
    while len(measured) < budget:
        within = [quality[at] for at in measured if truth[at] <= limit]
        found = forecast(proxies, list(map(str, families)), names, measured)
        chance = choosing.chances(found.value, found.scale, found.freedom, limit)
        gains = expected_gains(quality, chance, max(within) if within else None)
        gains[list(measured)] = 0
        if gains.max() < ENOUGH:
            break
        at = int(gains.argmax())
        measured[at] = truth[at]
    within = [quality[at] for at in measured if truth[at] <= limit]
    best = quality[truth <= limit].max()
    return float(best - max(within, default=quality.min())), len(measured)


def test_few_measurements_lose_little_against_measuring_all() -> None:
    """Over pools and devices that are drawn, 16 of 200 lose a fraction of a point, and more lose less."""
    lost = {}
    for budget in (8, 16, 24):
        found = [_picked(np.random.default_rng(seed), budget) for seed in range(30)]
        lost[budget] = float(np.mean([points for points, _ in found]))
        assert max(count for _, count in found) <= budget
    assert lost[24] <= lost[16] < lost[8] and lost[16] < 0.5, lost
