"""What to ship to one device: the one answer of a report, from the advice on each of its targets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..core.stats import Interval, no_worse

Numbers = dict[str, Any]
Shown = Callable[[str, str], bool]  # of the first of two bundles, over the second


def decision(
    advice: Sequence[Numbers],
    rows: Sequence[Numbers],
    max_drop: float,
    surely_faster: Shown,
    surely_better: Shown,
    emulated: bool,
) -> Numbers:
    """The bundle to take of all that were advised: the fastest, whatever its target.

    Of several students one that another is shown to be more accurate than takes no part.

    ``answer`` says how well it is founded:

    - "shown": it is faster than its float32 and shown to lose at most ``max_drop`` points;
    - "likely": nothing smaller is shown to keep that, and this one does by the point value;
    - "float32": nothing smaller is faster and keeps its accuracy;
    - "untrusted": no latency that would decide is trusted;
    - "guessing": what would be shipped is not shown to be better than guessing;
    - "emulated", "not timed": there is no latency of the device itself.

    ``bundle`` is None in the last four. ``ties`` cannot be told from it in latency, ``faster`` is shown to be faster
    and not shown to keep its accuracy. ``doubted`` holds what was left out since its latency is not trusted, ``worse``
    what another student's is more accurate than.

    Args:
        advice: of each student and target, as ``compression.advice`` gives it.
        rows: of the device, with name, target, variant and latency.
        surely_faster: whether the session shows the first of two bundles to be faster than the second.
        surely_better: whether the test images show it to be more accurate.
    """
    by_name = {row["name"]: row for row in rows}
    doubted = list(dict.fromkeys(each["name"] for advised in advice for each in advised["untrusted"]))
    nothing = {
        "max_drop_points": max_drop,
        "doubted": doubted,
        "ties": [],
        "worse": [],
        **dict.fromkeys(("bundle", "over_float32", "difference", "accuracy", "faster", "guessing")),
    }
    founded = [advised for advised in advice if not advised["untrusted"]]
    if emulated or not founded:
        return {"answer": "emulated" if emulated else "untrusted" if advice else "not timed", **nothing}

    guessing = [found for advised in founded if (found := advised.get("guessing")) is not None]
    founded = [advised for advised in founded if advised.get("guessing") is None]
    if not founded:
        return {"answer": "guessing", **nothing, "guessing": guessing[0]}

    def p50(advised: Mapping[str, Any]) -> float:
        return float(by_name[advised["bundle"]]["latency_p50_ms"]["value"])

    worse = [
        advised["bundle"]
        for advised in founded
        if any(
            other["student"] != advised["student"] and surely_better(other["bundle"], advised["bundle"])
            for other in founded
        )
    ]
    founded = [advised for advised in founded if advised["bundle"] not in worse]
    best = min(founded, key=p50)
    perhaps = [may_do for advised in founded if (may_do := advised["may_do"]) is not None]
    quicker = [may_do for may_do in perhaps if surely_faster(may_do["bundle"], best["bundle"])]
    faster = min(quicker, key=p50, default=None)
    answer, taken = "float32" if best["variant"] == "float32" else "shown", best
    if answer == "float32" and faster is not None:
        answer, taken, faster = "likely", faster, None
    accuracy = None
    if answer != "float32":
        accuracy = no_worse(Interval(**taken["difference"]), max_drop).as_dict()
    return {
        "answer": answer,
        **nothing,
        "bundle": taken["bundle"],
        "over_float32": taken["over_float32"],
        "difference": taken["difference"],
        "accuracy": accuracy,
        "worse": worse,
        "ties": _ties(taken, founded, by_name, surely_faster) if answer != "likely" else [],
        "faster": None if faster is None else faster["bundle"],
    }


def _ties(best: Numbers, founded: Sequence[Numbers], rows: Mapping[str, Numbers], surely_faster: Shown) -> list[str]:
    """Other bundles that are as well founded, and which the session cannot tell from the best one."""
    able = {advised["bundle"] for advised in founded}
    able |= {
        name
        for advised in founded
        for name, row in rows.items()
        if (row["target"], row["student"]) == (advised["target"], advised["student"])
        and row["variant"] in advised["ties"]
    }
    return [name for name in rows if name in able - {best["bundle"]} and not surely_faster(best["bundle"], name)]
