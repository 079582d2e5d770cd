"""What a session's latencies are worth: the rules, from what every bundle took in each round.

*Trusted* is a latency that is known within the resolution that was asked for, on a machine that could tell a bundle
from itself within it and did nothing else meanwhile. *Noisy* is one that was measured and is not known so well:
measuring again may cure it. *Invalid* is none of this device, however often it is measured.

A bundle over itself shows what differs from one process to the next. It cannot show what stands from the first moment
to the last: a load slows all alike, float32 more than INT8, and every control is one. So what else the machine did is
sampled from outside the timed processes, and is a gate of its own.

Two bundles differ where their paired ratio lies beyond what the A/A controls leave open, corrected for all pairs of the
session (Holm): what is not resolved is a tie.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..core.kinds import Comparison, Result, Trust
from ..core.stats import Interval, compare_logs, known_within, ratio_interval
from ..runtime.probe import UNAVAILABLE

Rounds = Mapping[str, Sequence[float | None]]  # by bundle: one latency a round, in ms, None where it failed

PAUSE_SECONDS = 60.0  # a session that stood still for longer is told; from ten minutes on it begins anew


def control_name(bundle: str) -> str:
    """What the second measurement of ``bundle`` in a round is called."""
    return f"control-{bundle}"


def assess(
    rounds: Rounds,
    results: Mapping[str, Result],
    judged_by: Mapping[str, Sequence[str]],
    float32: Mapping[str, str],
    resolution: float,
    *,
    frames: Rounds | None = None,
    emulated: bool = False,
    cores: int | str = UNAVAILABLE,
    pauses_seconds: Sequence[float] = (),
) -> dict[str, Any]:
    """The fields of a ``MeasurementFacts`` that say what to believe.

    Args:
        rounds: of the timed bundles and of their controls, under ``control_name``; without those that failed.
        results: of every bundle, timed or not.
        judged_by: for each timed bundle those whose control it is judged by, as ``controlled`` finds them.
        float32: for each bundle the float32 one of its target and student, where there is one.
        resolution: share within which a latency must be known.
        frames: as ``rounds``, what whole frames took.
        cores: of the device that a process may use, where that is known.
        pauses_seconds: how long the session stood still, each time.
    """
    repeated = dict.fromkeys(itertools.chain.from_iterable(judged_by.values()))
    measured = {name: ratio(rounds, control_name(name), name) for name in repeated}
    known = {name: found for name, found in measured.items() if found is not None}
    judged = {}
    for name, result in results.items():
        if name in judged_by:
            base = float32.get(name, name)
            over = ratio(rounds, name, base) if base != name else None
            result = result.model_copy(update={"over_float32": over})
            word = judge(
                result,
                {other: known.get(other) for other in judged_by[name]},
                resolution,
                emulated=emulated,
                cores=cores,
                pauses_seconds=pauses_seconds,
                base=results.get(base) if over is not None else None,
            )
            result = result.model_copy(update={"trust": word})
            if result.whole_frame is not None:
                result = _judge_frames(
                    result, frames or {}, judged_by[name], resolution, emulated, cores, pauses_seconds
                )
        judged[name] = result
    return {
        "results": judged,
        "resolution": resolution,
        "controls": known,
        "judged_by": {name: list(others) for name, others in judged_by.items()},
        "comparisons": compare(rounds, known, judged_by),
    }


def _judge_frames(
    result: Result,
    frames: Rounds,
    controls: Sequence[str],
    resolution: float,
    emulated: bool,
    cores: int | str,
    pauses_seconds: Sequence[float],
) -> Result:
    """The same word on the whole frames of a bundle, by their own width and their own controls."""
    assert result.whole_frame is not None
    told = {"latency_p50_ms": result.whole_frame.latency_ms, "over_float32": None, "stable": None}
    word = judge(
        result.model_copy(update=told),
        {name: ratio(frames, control_name(name), name) for name in controls},
        resolution,
        emulated=emulated,
        cores=cores,
        pauses_seconds=pauses_seconds,
    )
    return result.model_copy(update={"whole_frame": result.whole_frame.model_copy(update={"trust": word})})


def controlled(
    targets: Mapping[str, str], float32: Mapping[str, str], image_seconds: Mapping[str, float]
) -> dict[str, list[str]]:
    """For every timed bundle those that are measured twice in a round and judge it.

    Of each target its float32 one, where there is one; and the fastest of all judges itself too: what disturbs a
    process for so many microseconds shows in it first.

    Args:
        targets: of the timed bundles, by name.
        float32: the float32 bundle of each, as ``float32_by_bundle`` finds it.
        image_seconds: about how long each takes for an image, from before the session.
    """
    by_target: dict[str, str] = {}
    for name in sorted(targets, key=lambda name: float32.get(name) != name):
        by_target.setdefault(targets[name], name)
    fastest = min(targets, key=image_seconds.__getitem__, default=None)
    return {
        name: list(dict.fromkeys([by_target[target], *([name] if name == fastest else [])]))
        for name, target in targets.items()
    }


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


def compare(
    rounds: Rounds, controls: Mapping[str, Interval], judged_by: Mapping[str, Sequence[str]]
) -> list[Comparison]:
    """Every pair of bundles that share two rounds or more.

    The hypothesis that is tested says: they differ by no more than the controls of the two leave open (the widest one).

    Args:
        judged_by: for each bundle to compare, those whose control it is judged by.
    """
    logs = {name: np.log(np.array(rounds[name], dtype=np.float64)) for name in judged_by if name in rounds}
    differences = {pair: logs[pair[0]] - logs[pair[1]] for pair in itertools.combinations(logs, 2)}  # None became NaN
    shared = {pair: found[~np.isnan(found)] for pair, found in differences.items()}
    shared = {pair: found for pair, found in shared.items() if len(found) > 1}
    open_by_pair = {pair: left_open(pair, controls, judged_by) for pair in shared}
    margins = [math.inf if left is None else math.log1p(left) for left in open_by_pair.values()]
    return [
        Comparison(first=pair[0], second=pair[1], ratio=found, differ=differ, left_open=open_by_pair[pair])
        for pair, (found, differ) in zip(shared, compare_logs(list(shared.values()), margins), strict=True)
    ]


def left_open(
    names: Sequence[str], controls: Mapping[str, Interval], judged_by: Mapping[str, Sequence[str]]
) -> float | None:
    """By which share the controls that judge ``names`` may be off, the widest; None where one bounds nothing."""
    judges = [controls.get(control) for name in names for control in judged_by[name]]
    found = [None if control is None else from_one(control) for control in judges]
    return None if None in found else max(off[1] for off in found if off is not None)


def judge(
    result: Result,
    controls: Mapping[str, Interval | None],
    resolution: float,
    *,
    emulated: bool = False,
    cores: int | str = UNAVAILABLE,
    pauses_seconds: Sequence[float] = (),
    base: Result | None = None,
) -> Trust:
    """The word on one bundle's latency, and the reason where it is not "trusted".

    Args:
        controls: those that judge it, by bundle; None where a control's processes failed.
        resolution: share within which the latency, its ratio to float32 and the controls must be known.
        cores, pauses_seconds: as ``assess`` takes them.
        base: the result of its float32 bundle: what disturbed that one disturbs the ratio.
    """
    if emulated:
        return Trust(word="invalid", reason="an emulated device says nothing about the hardware")
    if result.latency_p50_ms is None or any(control is None for control in controls.values()):
        return Trust(word="invalid", reason="not every process that it needs could be measured")
    if result.fell_back:
        return Trust(word="invalid", reason=result.fell_back)
    if result.batch_one is not None and not result.batch_one.within_tolerance:
        apart = result.batch_one
        reason = f"alone its outputs are off by {apart.max_difference:.3g} from those in batches"
        return Trust(
            word="invalid", reason=f"{reason}, allowed {apart.tolerance:.3g}: what is timed is not what is judged"
        )
    for name, control in controls.items():
        off = None if control is None else from_one(control)
        within = None if control is None else known_within(control)
        narrow = within is not None and within <= resolution
        if off is not None and narrow and off[0] > resolution:  # what is left of it is no noise
            return Trust(word="invalid", reason=f"the A/A control of {name} is off by {_percent(off[0])} or more")
    doubts = itertools.chain(  # what disturbs first: the others may come of it
        _disturbed(result, resolution, cores, ""),
        () if base is None else _disturbed(base, resolution, cores, "its float32 bundle: "),
        _unsteady(result, pauses_seconds),
        _too_wide(result, controls, resolution),
    )
    doubt = next(doubts, None)
    return Trust(word="trusted") if doubt is None else Trust(word="noisy", reason=doubt)


def _unsteady(result: Result, pauses_seconds: Sequence[float]) -> Iterator[str]:
    """Why the bundle's own times are none of one steady state."""
    if result.warm_up_settled is False:
        yield "warm-up did not settle"
    if result.stable is False:
        yield "UNSTABLE: in most processes the median was not known well enough at the end"
    stood_still = sum(pause for pause in pauses_seconds if pause > PAUSE_SECONDS)
    if stood_still:
        yield f"the session stood still for {stood_still:.0f} s, and its rounds are of before and after"


def _disturbed(result: Result, resolution: float, cores: int | str, whose: str) -> Iterator[str]:
    """What else went on while a bundle was timed, beyond what the resolution bears.

    A load that takes a share of the time from a process that uses every core slows it by about that share: so many
    cores' time of others as the resolution is a share are borne, and of half the cores that it leaves free.
    """
    found = result.conditions
    if found is None:
        return
    limit = limit_cores(resolution, cores, result.session.threads if result.session else UNAVAILABLE)
    if found.others_cores == UNAVAILABLE:
        yield f"{whose}what else ran on the device could not be read"
    elif float(found.others_cores) > limit:
        yield f"{whose}others took {_plain(found.others_cores)} of a core meanwhile, allowed {_plain(limit)}"
    if found.steal_cores != UNAVAILABLE and float(found.steal_cores) > limit:
        yield f"{whose}its host took {_plain(found.steal_cores)} of a core away, allowed {_plain(limit)}"
    if found.throttled is True:
        yield f"{whose}the device throttled its clock meanwhile"
    if found.frequency_drop != UNAVAILABLE and float(found.frequency_drop) > resolution:
        yield f"{whose}its clock fell by {_percent(float(found.frequency_drop))} within the session"


def limit_cores(resolution: float, cores: int | str, threads: int | str) -> float:
    """How many cores' time others may take: of one core, or of half of those that the process leaves free."""
    free = int(cores) - int(threads) if isinstance(cores, int) and isinstance(threads, int) else 0
    return resolution * max(1.0, free / 2)


def _too_wide(result: Result, controls: Mapping[str, Interval | None], resolution: float) -> Iterator[str]:
    """What is not known within the resolution: the latency, its ratio to float32, a bundle over itself."""
    told = {"p50": result.latency_p50_ms, "the ratio to float32": result.over_float32}
    told |= {f"the A/A control of {name}": control for name, control in controls.items()}
    for what, found in told.items():
        within = None if found is None else known_within(found)
        if found is not None and within is None:
            yield f"{what} has no interval: {found.n} rounds are too few"
        elif within is not None and within > resolution:
            yield f"{what} is known within {_percent(within)}, wanted {_percent(resolution)}"
    for name, control in controls.items():
        off = None if control is None else from_one(control)
        if off is not None and off[1] > resolution:
            yield f"the A/A control of {name} may be off by {_percent(off[1])}"


def _plain(cores: float | str) -> str:
    return f"{float(cores):.2g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %" if share < 10 else f"a factor of {1 + share:.3g}"
