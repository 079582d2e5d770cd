"""A choice of a student as a person reads it: the table, the sentence and the figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..core.kinds import Picked, PickFacts
from ..core.sealed import printable
from .plots import GREY, INK, LONGEST_NAME, PALETTE, STYLE, WIDTH, Figure, canvas, finished, plain_ticks, shortened
from .words import interval

if TYPE_CHECKING:
    from rich.console import Console

SHOWN, SHOWN_LEFT_OUT = 20, 8  # rows of the terminal's table, and lines of who is left out
LABELLED = 12  # points of the figure that are named


def sentence(facts: PickFacts, rows: Sequence[Picked], prior: str) -> str:
    """The answer in one sentence, or that there is none."""
    by_name = {row.name: row for row in rows}
    where = f"on '{facts.device}' ({facts.target}, {facts.variant})"
    counted = f"{facts.measured} of {facts.candidates} measured, {facts.left_out} left out"
    if facts.chosen is None:
        fastest = by_name[facts.fastest or rows[0].name]
        return (
            f"nothing is surely within {facts.limit_ms:g} ms {where}: the fastest found is {fastest.name}, p90 "
            f"{_latency(fastest)} ms; {counted}"
        )
    row = by_name[facts.chosen]
    good = f"{row.prior:.1f} points by the prior ({prior})"
    if row.validation is not None:
        good = f"{100 * row.validation:.1f} % of the validation images after a short training"
    return f"{row.name}: p90 {_latency(row)} ms {where}, limit {facts.limit_ms:g} ms; {good}; {counted}"


def latency_of(row: Picked) -> float:
    """The p90, ms; of what nothing is known, without end."""
    return math.inf if row.p90_ms is None else row.p90_ms.value


def _latency(row: Picked) -> str:
    return "unknown" if row.p90_ms is None else interval(row.p90_ms.as_dict())


def print_pick(console: Console, facts: PickFacts, rows: Sequence[Picked], left_out: Mapping[str, str]) -> None:
    """What was measured, the fastest first, then what was not and could have been chosen, and what could not."""
    from rich.table import Table

    measured = sorted((row for row in rows if row.sessions), key=latency_of)
    others = [row for row in rows if not row.sessions]
    table = Table("", "network", "p90, ms", "prior", "sessions", "what became of it", box=None, header_style="bold")
    for row in [*measured, *others[: max(0, SHOWN - len(measured))]]:
        mark = "*" if row.name == facts.chosen else "-" if row.on_front else ""
        latency = _latency(row) if row.sessions else f"about {_latency(row)}"
        table.add_row(mark, row.name, latency, f"{row.prior:.1f}", str(row.sessions or ""), printable(row.why))
    console.print(table)
    hidden = len(measured) + len(others) - table.row_count
    if hidden:
        console.print(f"{hidden} more were not measured (--json has all)")
    for name, why in list(left_out.items())[:SHOWN_LEFT_OUT]:
        console.print(printable(f"{name} is left out: {why}"))
    if len(left_out) > SHOWN_LEFT_OUT:
        console.print(f"{len(left_out) - SHOWN_LEFT_OUT} more are left out (--json has all)")
    console.print("* chosen, - on the front of those that were measured; intervals are of another session")


def drawn(rows: Sequence[Picked], facts: PickFacts, prior: str) -> Figure:
    """The prior against p90: what was measured with intervals, what was predicted pale, the limit and the front."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = canvas(WIDTH, 5.2, left=0.075, right=0.985, bottom=0.11, top=0.96)
        axes = figure.add_subplot()
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
        told = {}
        pale = [row for row in rows if not row.sessions and row.p90_ms is not None]
        axes.plot(
            [row.p90_ms.value for row in pale if row.p90_ms], [row.prior for row in pale], ".", color=GREY, alpha=0.4
        )
        measured = [row for row in rows if row.sessions and row.p90_ms is not None]
        for at, row in enumerate(measured):
            found = row.p90_ms
            assert found is not None and found.low is not None and found.high is not None
            colour = PALETTE[1] if row.name == facts.chosen else PALETTE[0]
            arms = [[found.value - found.low], [found.high - found.value]]
            hollow = {} if row.trust is not None and row.trust.word == "trusted" else {"markerfacecolor": "none"}
            mark = axes.errorbar(found.value, row.prior, xerr=arms, fmt="o", color=colour, elinewidth=1, **hollow)
            mark.lines[0].set_gid(f"pick-{at}")
            told[f"pick-{at}"] = f"{row.name}: p90 {_latency(row)} ms, prior {row.prior:.1f}: {row.why}"
        named = [row for row in measured if row.on_front or row.name == facts.chosen][:LABELLED]
        for row in named:
            place = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(shortened(row.name, LONGEST_NAME), (latency_of(row), row.prior), **place)
        fronted = sorted(
            (row for row in measured if row.on_front), key=lambda row: row.p90_ms.value if row.p90_ms else 0
        )
        if fronted:
            xs = [row.p90_ms.value for row in fronted if row.p90_ms]
            axes.plot(
                [*xs, axes.get_xlim()[1]], [*(row.prior for row in fronted), fronted[-1].prior],
                drawstyle="steps-post", color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.6, zorder=1,
            )  # fmt: skip
        axes.axvline(facts.limit_ms, color=PALETTE[1], linewidth=1)
        axes.margins(y=0.1)
        if measured and math.isfinite(facts.limit_ms):
            axes.set_xlabel(f"latency of one image on '{facts.device}', p90, ms; the line is the limit")
        axes.set_ylabel(f"prior ({shortened(prior, 20)}), points")
        return finished(figure, f"Networks within {facts.limit_ms:g} ms", "pick", told)
