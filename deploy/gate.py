"""Judging a candidate by rules: what each comes to, and what all of them come to together.

To pass, every rule must be shown to be kept; each is held to its own 97.5 %, and no correction is due, because one that
is not shown stops the candidate (an intersection-union test; Berger 1982). That some rule is broken is said at Holm's
level over all rules, targets and devices, so that a candidate that breaks none is refused in 2.5 of 100 at most. What
is neither is not told: then it says how many images or sessions would tell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..core.errors import UserError, choice
from ..core.kinds import Answer, Compared, Measurement, RuleVerdict
from ..core.margins import (
    Stand,
    difference,
    exactly_above,
    flipped,
    interval_above,
    mean_above,
    paired_shares,
)
from ..core.rules import Rule
from ..core.stats import CONFIDENCE, LEAST_IMAGES, Interval, bootstrap_by_image, holm_levels, mean_interval
from .figures import Figure, figures

FAMILY_LEVEL = (1 - CONFIDENCE) / 2
DRAWS = 1000
USUAL_SESSIONS = 4  # where one has been measured and nothing is known of how sessions differ


class Pair(NamedTuple):
    """A bundle of the candidate and that of the baseline which it replaces, as they are called in a measurement."""

    target: str  # the runtime's, such as onnxruntime
    row: str  # target and variant
    candidate: str
    baseline: str | None
    same: bool  # they are one bundle


@dataclass(frozen=True)
class Question:
    """One rule for one target on one device, with the figures that answer it, one a session.

    ``resolution`` is the share within which a session knows a latency; ``same`` that both are one bundle.
    """

    rule: Rule
    device: str
    target: str
    candidate: Sequence[Figure]
    baseline: Sequence[Figure] | None
    resolution: float = 0.1
    same: bool = False


def questions(
    rules: Sequence[Rule], sessions: Mapping[str, Sequence[Measurement]], pairs: Mapping[str, Sequence[Pair]]
) -> list[Question]:
    """Every rule for every pair and device that it concerns; an exact figure is asked once, wherever it was looked up.

    Args:
        sessions: of each device, in their order.
        pairs: of each device.

    Raises:
        UserError: a rule that concerns nothing, or a figure that nobody knows.
    """
    found: list[Question] = []
    known: dict[tuple[str, str], dict[str, Figure]] = {}  # what all rules share is worked out once

    def figure(measurement: Measurement, row: str, rule: Rule) -> Figure:
        if (measurement.key, row) not in known:
            known[measurement.key, row] = figures(measurement, row)
        return _figure(known[measurement.key, row], rule)

    for rule in rules:
        asked: set[tuple[str, str]] = set()
        before = len(found)
        for device, measured in sessions.items():
            for pair in pairs[device]:
                if not rule.concerns(device, pair.target, pair.row) or (rule.is_relative and pair.baseline is None):
                    continue
                if rule.kind.counted == "exact":
                    one = pair.row, measured[0].manifest.inputs[pair.candidate].key
                    if one in asked:
                        continue
                    asked.add(one)
                mine = [figure(each, pair.candidate, rule) for each in measured]
                theirs = None if pair.baseline is None else [figure(each, pair.baseline, rule) for each in measured]
                resolution = max(each.facts.resolution for each in measured)
                found.append(Question(rule, device, pair.row, mine, theirs, resolution, pair.same))
        if len(found) == before:
            raise UserError(f"rule '{rule}': it {_nothing(rule, sessions, pairs)}")
    return found


def _figure(known: Mapping[str, Figure], rule: Rule) -> Figure:
    if rule.name in known:
        return known[rule.name]
    if rule.part is not None:
        parts = [name.partition(" of ")[2] for name in known if name.startswith(f"{rule.figure} of ")]
        raise choice(f"part in '{rule.name}'", rule.part, parts)
    return Figure(rule.kind.unit, None, (), None, rule.kind.lower_is_better, False, "it was not measured")


def _nothing(rule: Rule, sessions: Mapping[str, Sequence[Measurement]], pairs: Mapping[str, Sequence[Pair]]) -> str:
    """Why a rule concerns nothing that was measured."""
    rows = sorted({pair.row for its in pairs.values() for pair in its if not rule.is_relative or pair.baseline})
    if not rows:
        return "asks for a baseline, which no bundle of the candidate has"
    return f"concerns none of {', '.join(rows)} on {', '.join(sessions)}"


def decide(asked: Sequence[Question]) -> list[RuleVerdict]:
    """The verdict of every question; a rule is broken at Holm's level over all of them."""
    # How many images would tell that a rule is broken depends on how many are asked.
    level = FAMILY_LEVEL / max(1, len(asked))
    answered = [_answer(question, level) for question in asked]
    if not answered:
        return []
    broken, _ = holm_levels([each.p_broken for each in answered], FAMILY_LEVEL)
    return [
        each.model_copy(update={"answer": "fail", "why": "", "needed": None}) if is_broken else each
        for each, is_broken in zip(answered, broken, strict=True)
    ]


def overall(verdicts: Sequence[RuleVerdict]) -> Answer:
    """Fail where any rule is broken, pass where every one is kept (and there are any)."""
    answers = {each.answer for each in verdicts}
    return "fail" if "fail" in answers else "pass" if answers == {"pass"} else "cannot tell"


@dataclass(frozen=True)
class _Told:
    """How a question stands: in which scale it was compared, what was counted; a reason where nothing can be told."""

    stand: Stand | None
    compared: Compared
    count: int
    needed: int | None = None
    why: str = ""
    candidate: float | None = None
    baseline: float | None = None


def _answer(question: Question, level: float) -> RuleVerdict:
    rule, kind = question.rule, question.rule.kind
    told = _BY[kind.counted](question, level)
    stand, compared = told.stand, told.compared
    found = RuleVerdict(
        rule=str(rule),
        figure=rule.name,
        device=question.device,
        target=question.target,
        answer="cannot tell",
        why=told.why,
        unit=kind.unit,
        candidate=told.candidate,
        baseline=told.baseline,
        compared=compared,
        bound=_bound(rule, compared),
        counted=kind.counted,
        count=told.count,
        needed=told.needed,
    )
    if stand is None:
        return found
    estimate, detectable = stand.estimate, stand.detectable
    if compared == "ratio" or (compared == "value" and kind.unit != "share"):  # logarithms
        estimate = _exponential(estimate)
        detectable = None if detectable is None else math.expm1(min(detectable, 50.0))
    needed = told.needed if told.needed is not None else stand.needed
    return found.model_copy(
        update={
            "answer": "pass" if stand.keeps else "cannot tell",
            "estimate": estimate,
            "p_broken": stand.p_broken,
            "detectable": detectable,
            "needed": None if stand.keeps else needed,
            "why": "" if stand.keeps else told.why or _too_few(needed, kind.counted),
        }
    )


def _too_few(needed: int | None, counted: str) -> str:
    if counted == "exact":
        return "it is beyond the bound"
    if needed is None:
        return "it lies too near the bound for any number of them to tell"
    return f"about {needed:,} {counted} would tell"


def _bound(rule: Rule, compared: Compared) -> float:
    """What the estimate is held to, in its scale."""
    return float(rule.factor or 0) if compared == "ratio" else rule.offset


def _exponential(logs: Interval) -> Interval:
    value, low, high = (None if end is None else math.exp(max(-300.0, min(300.0, end))) for end in
                        (logs.value, logs.low, logs.high))  # fmt: skip
    assert value is not None
    return Interval(value, low, high, logs.n)


def _sound(figure: Figure) -> Interval | None:
    """The figure of a session, its ends only where both are numbers; None where there is none, or none that is one."""
    found = figure.interval
    if found is None or not math.isfinite(found.value):
        return None
    ends = [end for end in (found.low, found.high) if end is not None and math.isfinite(end)]
    return found if len(ends) == 2 else Interval(found.value, None, None, found.n)


def _value(figure: Figure) -> float | None:
    found = _sound(figure)
    return None if found is None else found.value


def _signed(rule: Rule, judge: Callable[[float], Stand]) -> Stand:
    """``judge`` of the sign by which what is better is larger, the result in the figure's own sign again."""
    return flipped(judge(-1.0)) if rule.kind.lower_is_better else judge(1.0)


def _interval(found: Interval, sign: float) -> Interval:
    if sign > 0:
        return found
    low, high = (None if end is None else -end for end in (found.high, found.low))
    return Interval(-found.value, low, high, found.n)


# ---- of images ---------------------------------------------------------------------------------------------------


def _of_images(question: Question, level: float) -> _Told:
    """The last session's: what a network says of an image does not change from one to the next."""
    rule, mine = question.rule, _last(question.candidate)
    value = _value(mine)
    if value is None or not mine.trusted:
        return _Told(None, _scale(rule), 0, why=mine.why or "it was not measured")
    within = _sound(mine)
    assert within is not None  # it has a value
    n = within.n
    if not rule.is_relative:
        stand = _signed(rule, lambda sign: interval_above(_interval(within, sign), sign * rule.offset, None, level))
        return _known(_Told(stand, "value", n, candidate=value))
    assert question.baseline is not None
    theirs = _last(question.baseline)
    before = _value(theirs)
    if before is None or not theirs.trusted:
        return _Told(None, "difference", n, why=f"the baseline: {theirs.why or 'it was not measured'}", candidate=value)
    told = _Told(None, "difference", n, candidate=value, baseline=before)
    if question.same:
        return replace(told, stand=_signed(rule, lambda sign: exactly_above(0.0, sign * rule.offset)))
    first, second = theirs.scores, mine.scores
    others = replace(told, why="the two were not measured on the same images")
    if first is None or second is None or len(first) != len(second) or len(first) == 0:
        return others
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return replace(told, why="some of its scores are no numbers")
    try:
        return _known(replace(told, stand=_paired(rule, theirs, mine, level), count=len(first)))
    except ValueError:  # scores that no pair can be made of
        return others


def _known(told: _Told) -> _Told:
    """Why nothing is told of a figure that has no interval."""
    assert told.stand is not None
    if None not in (told.stand.estimate.low, told.stand.estimate.high):
        return told
    if told.count >= LEAST_IMAGES:
        return replace(told, why="its interval is not known")
    why = f"{told.count} images are too few for an interval: {LEAST_IMAGES} are"
    return replace(told, why=why, needed=LEAST_IMAGES)


def _paired(rule: Rule, before: Figure, after: Figure, level: float) -> Stand:
    """Two networks on the same images: of right and wrong by Tango, else by the task, else by a bootstrap by image."""
    first, second = before.scores, after.scores
    assert first is not None and second is not None
    margin = rule.offset if rule.kind.lower_is_better else -rule.offset  # how much worse it may be
    allowed = margin if margin > 0 else None
    if rule.figure == "accuracy" and first.dtype == second.dtype == np.bool_ and first.ndim == 1:
        return paired_shares(first, second, rule.offset, level)
    one, other = before.of_images, after.of_images
    if after.change is not None:
        apart = Interval(*after.change(first, second)[:3], len(first))
    elif one is not None and other is not None:  # the same images are drawn for both
        apart = bootstrap_by_image(lambda at: other(at) - one(at), len(first), 0, DRAWS, (-1.0, 1.0))
    else:
        by_image = (second.astype(np.float64) - first.astype(np.float64)).reshape(len(first), -1).mean(axis=1)
        apart = mean_interval(by_image)
    return _signed(rule, lambda sign: interval_above(_interval(apart, sign), sign * rule.offset, allowed, level))


def _last(found: Sequence[Figure]) -> Figure:
    """That of the last session in which it is trusted, else of the last."""
    return next((each for each in reversed(found) if each.trusted), found[-1])


# ---- of sessions -------------------------------------------------------------------------------------------------


def _of_sessions(question: Question, level: float) -> _Told:
    """One value a session, of those in which it is trusted: two networks of a session are a pair."""
    rule = question.rule
    both = [question.candidate] + ([question.baseline] if rule.is_relative and question.baseline is not None else [])
    trusted = [each for each in zip(*both, strict=True) if all(it.trusted and _value(it) is not None for it in each)]
    scale = _scale(rule)
    if not trusted:
        whose = ["", "the baseline: "]
        doubts = [
            prefix + (figure.why or "it was not measured")
            for prefix, figure in zip(whose, (each[-1] for each in both), strict=False)
            if not figure.trusted or _value(figure) is None
        ]
        why = doubts[0] if doubts else "no session in which both are trusted"
        return _Told(None, scale, 0, needed=USUAL_SESSIONS, why=f"no trusted session: {why}")
    values = [[float(_value(figure) or 0.0) for figure in column] for column in zip(*trusted, strict=True)]
    means = [float(np.exp(np.log(column).mean())) if min(column) > 0 else 0.0 for column in values]
    told = _Told(None, scale, len(trusted), candidate=means[0], baseline=means[1] if len(means) > 1 else None)
    if scale != "difference" and min(map(min, values)) <= 0:
        return replace(told, why="it is no positive number")
    allowed = _allowed(rule)
    if len(trusted) == 1:
        return replace(
            told,
            stand=_of_one(question, trusted[0], level),
            needed=USUAL_SESSIONS,
            why=f"one session tells what lies beyond its resolution only: about {USUAL_SESSIONS} sessions would tell",
        )
    numbers = _in_scale(rule, *map(np.asarray, values))
    bound = _bound_in_scale(rule)
    return replace(told, stand=_signed(rule, lambda sign: mean_above(sign * numbers, sign * bound, allowed, level)))


def _of_one(question: Question, figures_of_it: Sequence[Figure], level: float) -> Stand | None:
    """By one session, which knows a latency, or the ratio of two, within its resolution and no better."""
    rule, by = question.rule, math.log1p(question.resolution)
    if _scale(rule) == "difference":
        return None
    logs = [_logs(within) for each in figures_of_it if (within := _sound(each)) is not None]
    found = logs[0] if len(logs) == 1 else difference(*logs)
    if found.low is not None and found.high is not None:
        found = Interval(found.value, found.low - by, found.high + by, found.n)
    bound = _bound_in_scale(rule)
    return _signed(rule, lambda sign: interval_above(_interval(found, sign), sign * bound, None, level))


def _logs(found: Interval) -> Interval:
    if found.low is None or found.high is None or found.low <= 0:
        return Interval(math.log(found.value), None, None, found.n)
    return Interval(math.log(found.value), math.log(found.low), math.log(found.high), found.n)


def _scale(rule: Rule) -> Compared:
    if not rule.is_relative:
        return "value"
    return "ratio" if rule.offset == 0 else "difference"


def _in_scale(rule: Rule, mine: np.ndarray, theirs: np.ndarray | None = None) -> np.ndarray:
    """What is held to the bound, one a session: logarithms of values or of ratios, or differences."""
    if theirs is None:
        return np.asarray(np.log(mine))
    if rule.offset == 0:
        return np.asarray(np.log(mine) - np.log(theirs))
    return np.asarray(mine - float(rule.factor or 1.0) * theirs)


def _bound_in_scale(rule: Rule) -> float:
    if _scale(rule) == "difference":
        return rule.offset
    return math.log(rule.offset if rule.factor is None else rule.factor)


def _allowed(rule: Rule) -> float | None:
    """How far the bound lies from no change, where a rule lets a candidate be worse; else None."""
    if not rule.is_relative or (rule.offset != 0 and rule.factor != 1):
        return None
    margin = _bound_in_scale(rule) * (1 if rule.kind.lower_is_better else -1)
    return margin if margin > 0 else None


# ---- of processes, and what is exact -----------------------------------------------------------------------------


def _of_processes(question: Question, level: float) -> _Told:
    """One value a process of the last trusted session: what it takes does not depend on what else the machine does."""
    rule, mine = question.rule, _last(question.candidate)
    scale = _scale(rule)
    if not mine.trusted or _value(mine) is None:
        return _Told(None, scale, 0, why=mine.why or "it was not measured")
    columns, before = [mine.values], None
    if rule.is_relative:
        assert question.baseline is not None
        theirs = _last(question.baseline)
        if not theirs.trusted or _value(theirs) is None:
            why = f"the baseline: {theirs.why or 'it was not measured'}"
            return _Told(None, scale, 0, why=why, candidate=_value(mine))
        columns.append(theirs.values)
        before = _value(theirs)
    count = min(map(len, columns))
    told = _Told(None, scale, count, candidate=_value(mine), baseline=before)
    if count < 2 or not all(0 < value < math.inf for column in columns for value in column):
        return replace(told, why="it was measured in fewer than two processes", needed=10)
    numbers, bound = _in_scale(rule, *(np.asarray(column[:count]) for column in columns)), _bound_in_scale(rule)
    allowed = _allowed(rule)
    return replace(told, stand=_signed(rule, lambda sign: mean_above(sign * numbers, sign * bound, allowed, level)))


def _exact(question: Question, _: float) -> _Told:
    rule, mine = question.rule, question.candidate[-1]
    value, scale = _value(mine), _scale(rule)
    before = None
    if rule.is_relative:
        assert question.baseline is not None
        before = _value(question.baseline[-1])
        if before is None:
            return _Told(None, scale, 0, why="the baseline: it is not known", candidate=value)
    if value is None or value <= 0 or (before is not None and before <= 0):
        return _Told(None, scale, 0, why=mine.why or "it is not known", candidate=value, baseline=before)
    columns = [np.array([each]) for each in (value, before) if each is not None]
    number, bound = float(_in_scale(rule, *columns)[0]), _bound_in_scale(rule)
    near = 1e-12 * max(1.0, abs(bound))  # the last digit of a logarithm decides nothing
    stand = _signed(rule, lambda sign: exactly_above(sign * number, sign * bound - near))
    return _Told(replace(stand, bound=bound), scale, 1, candidate=value, baseline=before)


_BY: dict[str, Callable[[Question, float], _Told]] = {
    "images": _of_images,
    "sessions": _of_sessions,
    "processes": _of_processes,
    "exact": _exact,
}
