"""What else a device did while the processes of one row were timed, all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..core.kinds import Conditions, Phase, Sights, Surroundings
from ..runtime.probe import UNAVAILABLE
from .surroundings import surroundings, watch_share


def conditions(around: Sequence[Surroundings | None], cpus: int | str) -> Conditions:
    """What went on around all processes of a bundle, each for as long as it was timed.

    Args:
        around: of each process; None where nothing watched.
        cpus: that the shares are of.
    """
    seen = [each for each in around if each is not None]

    def cores(name: str) -> Any:
        shares = [(getattr(each, name), each.seconds) for each in seen]
        if not shares or not isinstance(cpus, int) or any(share == UNAVAILABLE for share, _ in shares):
            return UNAVAILABLE
        total = sum(seconds for _, seconds in shares)
        return cpus * sum(share * seconds for share, seconds in shares) / total if total > 0 else UNAVAILABLE

    clocks = [each.highest_khz for each in seen]
    told = [int(each) for each in clocks if each != UNAVAILABLE]
    throttled = [each.throttled for each in seen]
    known = [each for each in throttled if each != UNAVAILABLE]
    return Conditions(
        others_cores=cores("others_share"),
        steal_cores=cores("steal_share"),
        frequency_drop=1 - min(told) / max(told) if told and len(told) == len(clocks) else UNAVAILABLE,
        throttled=True if True in known else False if known and len(known) == len(throttled) else UNAVAILABLE,
    )


def seen_around(before: Sights, after: Sights, phase: Phase | None) -> Surroundings | None:
    """What a watch saw while a process was timed; None where it did not see the whole of it.

    Args:
        before, after: what it answered before the process was started and after it had ended.
        phase: the timed inferences of that process.
    """
    if phase is None:
        return None
    sights = [*before.sights[-1:], *after.sights]
    try:
        return surroundings(sights, phase, after.cpus, watch_share(before, after))
    except ValueError:
        return None
