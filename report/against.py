"""One bundle against another: their paired ratio over blocks of a session, or over sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import MeasurementFacts
from ..core.stats import Interval, bootstrap_ratio, geometric_interval
from . import words
from .pooled import Pooled


@dataclass(frozen=True)
class Against:
    """How long ``first`` takes over how long ``second`` takes, on one device.

    ``ratio`` is of one session, its interval from drawing its blocks again (each bundle forth and back, ABBA); or of
    several trusted ones, its interval Student's over them. It is ``resolved`` where it lies beyond ``left_open``, the
    share by which a bundle was found to differ from itself at most. ``doubt`` says why it is not to be trusted, or
    nothing.
    """

    device: str
    first: str
    second: str
    ratio: Interval
    sessions: int  # 0: one that is not trusted
    left_open: float | None
    resolved: bool
    doubt: str

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON, and the sentence."""
        return {**asdict(self), "sentence": self.sentence()}

    def sentence(self) -> str:
        """Ratio, interval, what they are of, and whether they tell the two apart."""
        of = (
            f"{self.ratio.n} block{'s' * (self.ratio.n > 1)} of this session only"
            if self.sessions < 2
            else f"{self.sessions} sessions"
        )
        ratio = words.interval(self.ratio.as_dict())
        text = f"{self.first} takes {ratio} of the time of {self.second} on {self.device} ({of}): "
        if not self.resolved:
            text += "not resolved, a tie"
            if self.left_open is not None:
                text += f" (the A/A controls leave {100 * self.left_open:.2g} % open)"
        else:
            text += f"resolved, it is {'faster' if self.ratio.value < 1 else 'slower'}"
        return f"{text}; not to be trusted: {self.doubt}" if self.doubt else text


def against(pooled: Pooled, first: str, second: str) -> Against:
    """Compare two bundles that were measured together.

    Raises:
        UserError: one of the two was not timed.
    """
    sessions = [each.facts for each in pooled.attempts]
    trusted = [facts for facts in sessions if not _doubt(facts, (first, second))]
    counted = trusted or [pooled.shown.facts]
    ratios = [_of_session(facts, first, second) for facts in counted]
    ratio = ratios[0] if len(ratios) == 1 else geometric_interval([found.value for found in ratios])
    opens = [_left_open(facts, first, second) for facts in counted]
    left = None if None in opens else max(share for share in opens if share is not None)
    resolved = (
        left is not None
        and ratio.low is not None
        and ratio.high is not None
        and (ratio.low > 1 + left or ratio.high < 1 / (1 + left))
    )
    doubt = "" if trusted else _doubt(counted[0], (first, second))
    return Against(pooled.facts.device, first, second, ratio, len(trusted), left, resolved, doubt)


def _doubt(facts: MeasurementFacts, names: Sequence[str]) -> str:
    """Why a session's latencies of these bundles are not trusted; empty if they are."""
    trusts = [(name, facts.results[name].trust if name in facts.results else None) for name in names]
    return "; ".join(
        f"{name} is {trust.word}: {trust.reason}" if trust is not None else f"{name} was not timed"
        for name, trust in trusts
        if trust is None or trust.word != "trusted"
    )


def _of_session(facts: MeasurementFacts, first: str, second: str) -> Interval:
    """The ratio over the blocks of a session: every second round runs backwards, so two rounds are a block."""
    logs = []
    for name in (first, second):
        by_process = facts.results[name].latency_p50_by_process_ms
        if by_process is None or len(by_process) < 2:
            raise UserError(f"'{name}' was not timed on '{facts.device}': {facts.results[name].status}")
        whole = len(by_process) // 2 * 2
        logs.append(np.log(by_process[:whole]).reshape(-1, 2).mean(axis=1))
    if len(logs[0]) != len(logs[1]):
        raise UserError(f"'{first}' and '{second}' were timed in different numbers of rounds: measure again")
    return bootstrap_ratio(logs[0] - logs[1], seed=facts.order_seed)


def _left_open(facts: MeasurementFacts, first: str, second: str) -> float | None:
    pair = {first, second}
    return next((each.left_open for each in facts.comparisons if {each.first, each.second} == pair), None)
