"""What a session's latencies are worth: the rules, from what every bundle took in each round.

*Trusted* is a latency that is known within the resolution that was asked for, on a machine that could tell a bundle
from itself within it. *Noisy* is one that was measured and is not known so well: measuring again may cure it. *Invalid*
is none of this device, however often it is measured.

Two bundles differ where their paired ratio lies beyond what the A/A controls leave open, corrected for all pairs of the
session (Holm): what is not resolved is a tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..core.kinds import Comparison, Result, Trust
from ..core.stats import Interval, holm_levels, ratio_interval

Rounds = Mapping[str, Sequence[float | None]]  # by bundle: one latency a round, in ms, None where it failed


def control_name(bundle: str) -> str:
    """What the second measurement of ``bundle`` in a round is called."""
    return f"control-{bundle}"


def assess(
    rounds: Rounds,
    results: Mapping[str, Result],
    controls: Mapping[str, str],
    float32: Mapping[str, str],
    resolution: float,
    *,
    emulated: bool = False,
) -> dict[str, Any]:
    """The fields of a ``MeasurementFacts`` that say what to believe.

    Args:
        rounds: of the timed bundles and of their controls, under ``control_name``; without those that failed.
        results: of every bundle, timed or not.
        controls: for each timed bundle the one whose control it is judged by, as ``controlled`` finds it.
        float32: for each bundle the float32 one of its target and student, where there is one.
        resolution: share within which a latency must be known.
    """
    measured = {name: ratio(rounds, control_name(name), name) for name in dict.fromkeys(controls.values())}
    known = {name: found for name, found in measured.items() if found is not None}
    judged = {}
    for name, result in results.items():
        if name in controls:
            base = float32.get(name, name)
            over = ratio(rounds, name, base) if base != name else None
            result = result.model_copy(update={"over_float32": over})
            word = judge(result, known.get(controls[name]), resolution, emulated=emulated)
            result = result.model_copy(update={"trust": word})
        judged[name] = result
    return {
        "results": judged,
        "resolution": resolution,
        "controls": known,
        "comparisons": compare(rounds, known, controls),
    }


def controlled(targets: Mapping[str, str], float32: Mapping[str, str]) -> dict[str, str]:
    """For every timed bundle the one of its target that is measured twice: float32, where there is one.

    Args:
        targets: of the timed bundles, by name.
        float32: the float32 bundle of each, as ``float32_by_bundle`` finds it.
    """
    by_target: dict[str, str] = {}
    for name in sorted(targets, key=lambda name: float32.get(name) != name):
        by_target.setdefault(targets[name], name)
    return {name: by_target[target] for name, target in targets.items()}


def ratio(rounds: Rounds, first: str, second: str) -> Interval | None:
    """Latency of ``first`` over that of ``second``, paired by round; None where no round has both."""
    pairs = zip(rounds.get(first, ()), rounds.get(second, ()), strict=first in rounds and second in rounds)
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return ratio_interval(*zip(*both, strict=True)) if both else None


def from_one(control: Interval) -> tuple[float, float] | None:
    """By which share a control differs from itself: at least and at most."""
    if control.low is None or control.high is None:
        return None
    return max(control.low, 1 / control.high, 1) - 1, max(control.high, 1 / control.low) - 1


def known_within(found: Interval) -> float | None:
    """The share within which a latency or a ratio is known: the longer arm of its interval."""
    if found.low is None or found.high is None:
        return None
    return max(found.high / found.value, found.value / found.low) - 1


def compare(rounds: Rounds, controls: Mapping[str, Interval], control_of: Mapping[str, str]) -> list[Comparison]:
    """Every pair of bundles that share two rounds or more.

    The hypothesis that is tested says: they differ by no more than the controls of the two leave open (the wider one).
    The mean logarithm of the paired ratios is held against it by Student's t, at Holm's level over all pairs.

    Args:
        control_of: for each bundle to compare, the one whose control it is judged by.
    """
    from scipy.special import stdtr, stdtrit  # Student's distribution and its inverse

    logs = {name: np.log(np.array(rounds[name], dtype=np.float64)) for name in control_of if name in rounds}
    differences = {pair: logs[pair[0]] - logs[pair[1]] for pair in itertools.combinations(logs, 2)}  # None became NaN
    shared = {pair: found[~np.isnan(found)] for pair, found in differences.items()}
    shared = {pair: found for pair, found in shared.items() if len(found) > 1}
    count = np.array([len(found) for found in shared.values()])
    mean = np.array([found.mean() for found in shared.values()])
    error = np.array([found.std(ddof=1) for found in shared.values()]) / np.sqrt(count)
    margin = np.array([max(_margin(controls.get(control_of[name])) for name in pair) for pair in shared])
    beyond = np.abs(mean) - margin
    with np.errstate(divide="ignore", invalid="ignore"):
        p_values = np.where(beyond > 0, 2 * stdtr(count - 1, -beyond / error), 1.0)
    rejected, levels = holm_levels(p_values)
    arm = stdtrit(count - 1, 1 - levels / 2) * error
    values, lows, highs = np.exp([mean, mean - arm, mean + arm]).tolist()
    return [
        Comparison(
            first=pair[0],
            second=pair[1],
            ratio=Interval(values[at], lows[at], highs[at], len(shared[pair])),
            differ=bool(rejected[at]),
        )
        for at, pair in enumerate(shared)
    ]


def _margin(control: Interval | None) -> float:
    """What a control leaves open, as a difference of logarithms; infinite where it bounds nothing."""
    off = None if control is None else from_one(control)
    return math.inf if off is None else math.log1p(off[1])


def judge(result: Result, control: Interval | None, resolution: float, *, emulated: bool) -> Trust:
    """The word on one bundle's latency, and the reason where it is not "trusted".

    Args:
        control: of the bundle's target; None where its processes failed.
        resolution: share within which the latency, its ratio to float32 and the control must be known.
    """

    def too_wide(what: str, found: Interval, within: float | None) -> Trust | None:
        if within is None:
            return Trust(word="noisy", reason=f"{what} has no interval: {found.n} rounds are too few")
        if within > resolution:
            reason = f"{what} is known within {_percent(within)}, wanted {_percent(resolution)}"
            return Trust(word="noisy", reason=reason)
        return None

    if emulated:
        return Trust(word="invalid", reason="an emulated device says nothing about the hardware")
    if result.latency_p50_ms is None or control is None:
        return Trust(word="invalid", reason="not every process that it needs could be measured")
    if result.fell_back:
        return Trust(word="invalid", reason=result.fell_back)
    if result.warm_up_settled is False:
        return Trust(word="noisy", reason="warm-up did not settle")
    if result.stable is False:
        return Trust(word="noisy", reason="UNSTABLE: in most processes the median was not known well enough at the end")
    told = {"p50": result.latency_p50_ms, "the ratio to float32": result.over_float32}
    doubts = [too_wide(what, found, known_within(found)) for what, found in told.items() if found is not None]
    doubts.append(too_wide("the A/A control of its target", control, known_within(control)))
    doubt = next((doubt for doubt in doubts if doubt is not None), None)
    if doubt is not None:
        return doubt
    off = from_one(control)  # narrow, so what is left is no noise
    if off is not None and off[0] > resolution:
        return Trust(word="invalid", reason=f"the A/A control of its target is off by {_percent(off[0])} or more")
    if off is not None and off[1] > resolution:
        return Trust(word="noisy", reason=f"the A/A control of its target may be off by {_percent(off[1])}")
    return Trust(word="trusted")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 10 else f"a factor of {1 + share:.3g}"
