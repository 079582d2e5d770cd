"""Several sessions of one device as one: the session is the unit of a claim.

What a single session finds holds for it: from one to the next a machine differs by more than an interval within one
shows. So a latency, and the ratio of two, is taken from every session in which it is trusted, and their spread gives
the interval. Which sessions count is a rule, not a choice: all that are trusted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..core.kinds import Comparison, Measurement, MeasurementFacts, Result, Trust, WholeFrame
from ..core.stats import compare_logs, geometric_interval, known_within


@dataclass(frozen=True)
class Pooled:
    """The attempts at a session as one.

    ``shown`` is the last that is trusted, else the last: what is told of one session alone is told of it. ``facts`` are
    its own, but for what is pooled. ``sessions`` says of each bundle how many sessions stand behind its latency.
    """

    shown: Measurement
    facts: MeasurementFacts
    sessions: Mapping[str, int]
    attempts: Sequence[Measurement]


def pool(attempts: Sequence[Measurement]) -> Pooled:
    """What all attempts at one session come to.

    Args:
        attempts: in their order, one or more.
    """
    believed = [each for each in attempts if each.facts.trust == "trusted"]
    shown = (believed or list(attempts))[-1]
    every = [each.facts for each in attempts]
    behind = {name: [facts for facts in every if _trusted(facts, name)] for name in shown.facts.results}
    results = {
        name: pooled_result(result, [facts.results[name] for facts in behind[name]], shown.facts.resolution)
        for name, result in shown.facts.results.items()
    }
    results = {
        name: result.model_copy(
            update={
                "whole_frame": pooled_frame(result, [each.results.get(name) for each in every], shown.facts.resolution)
            }
        )
        for name, result in results.items()
    }
    comparisons = pooled_comparisons(shown.facts, every)
    facts = shown.facts.model_copy(update={"results": results, "comparisons": comparisons})
    return Pooled(shown, facts, {name: len(found) for name, found in behind.items()}, attempts)


def _trusted(facts: MeasurementFacts, name: str) -> bool:
    result = facts.results.get(name)
    return result is not None and result.trust is not None and result.trust.word == "trusted"


def pooled_result(shown: Result, trusted: Sequence[Result], resolution: float) -> Result:
    """The numbers of one bundle over the sessions in which they are trusted; ``shown`` where there are none.

    Geometric means, with Student's interval of their logarithms from two sessions on; what is then not known within the
    ``resolution`` is noisy, however narrow each session's own interval was.
    """
    if not trusted:
        return shown
    if len(trusted) == 1:
        return trusted[0]
    pooled = {
        name: geometric_interval([found.value for found in values])
        for name in ("latency_p50_ms", "latency_p90_ms", "over_float32")
        if None not in (values := [getattr(result, name) for result in trusted])
    }
    trust = Trust(word="trusted")
    for name, what in (("latency_p50_ms", "p50"), ("over_float32", "the ratio to float32")):
        within = known_within(pooled[name]) if name in pooled else None
        if within is not None and within > resolution:
            reason = f"over {len(trusted)} sessions {what} is known within {100 * within:.3g} %"
            trust = Trust(word="noisy", reason=f"{reason}, wanted {100 * resolution:.3g} %: more sessions would tell")
            break
    return trusted[-1].model_copy(update={**pooled, "trust": trust})


def pooled_frame(shown: Result, every: Sequence[Result | None], resolution: float) -> WholeFrame | None:
    """What whole frames of one bundle took over the sessions in which they are trusted, which may be others."""
    frames = [each.whole_frame for each in every if each is not None and each.whole_frame is not None]
    trusted = [frame for frame in frames if frame.trust is not None and frame.trust.word == "trusted"]
    if len(trusted) < 2:
        return trusted[0] if trusted else shown.whole_frame
    pooled = {
        name: geometric_interval([getattr(frame, name).value for frame in trusted])
        for name in ("latency_ms", "network_ms", "over_network")
    }
    trust, within = Trust(word="trusted"), known_within(pooled["latency_ms"])
    if within is not None and within > resolution:
        reason = f"over {len(trusted)} sessions p50 is known within {100 * within:.3g} %"
        trust = Trust(word="noisy", reason=f"{reason}, wanted {100 * resolution:.3g} %: more sessions would tell")
    return trusted[-1].model_copy(update={**pooled, "trust": trust})


def pooled_comparisons(shown: MeasurementFacts, every: Sequence[MeasurementFacts]) -> list[Comparison]:
    """Every pair over the sessions in which both are trusted; a session's own where there is one, or none."""
    by_session = [({(each.first, each.second): each for each in facts.comparisons}, facts) for facts in every]
    own = {(each.first, each.second): each for each in shown.comparisons}
    pairs: dict[tuple[str, str], list[Comparison]] = {}
    for pair in own:
        found = [of[pair] for of, facts in by_session if pair in of and all(_trusted(facts, name) for name in pair)]
        pairs[pair] = found
    several = {pair: found for pair, found in pairs.items() if len(found) > 1}
    logs = [np.log([each.ratio.value for each in found]) for found in several.values()]
    margins = [max(_margin(each) for each in found) for found in several.values()]
    pooled = {
        pair: Comparison(first=pair[0], second=pair[1], ratio=ratio, differ=differ, left_open=_share(margin))
        for pair, (ratio, differ), margin in zip(several, compare_logs(logs, margins), margins, strict=True)
    }
    return [pooled.get(pair) or (pairs[pair][0] if pairs[pair] else own[pair]) for pair in own]


def _margin(comparison: Comparison) -> float:
    return math.inf if comparison.left_open is None else math.log1p(comparison.left_open)


def _share(margin: float) -> float | None:
    return None if math.isinf(margin) else math.expm1(margin)
