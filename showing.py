"""Plans, lists, trees and differences as a person reads them on a terminal."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.sealed import printable
from .forecast import Cost, duration, total
from .inventory import Cleaning, Compared, Entry, Shown, as_text, findings, flat, results, size_of
from .report.settings import own_settings
from .report.words import some

if TYPE_CHECKING:
    from rich.console import Console

    from .core.artifact import Provenance
    from .diary import Run, Status
    from .pipeline import Leg

MOST_ROWS = 40  # of settings or findings; --json has all of them
KEY_DIGITS = 12


def mebibytes(size_bytes: float | None) -> str:
    """A size in MiB, without the unit."""
    if size_bytes is None:
        return "unknown"
    mib = size_bytes / 2**20
    return f"{mib:,.0f}" if mib >= 100 else f"{mib:.3g}"


def _table(*columns: str, right: Sequence[str] = ()) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


# ---- a plan ----------------------------------------------------------------------------------------------


def described(leg: Leg, cost: Cost) -> dict[str, Any]:
    """A leg for machines."""
    return {
        "id": leg.id,
        "stage": leg.stage,
        "name": leg.name,
        "key": leg.key,
        "path": None if leg.path is None else str(leg.path),
        "sealed": leg.sealed,
        "perhaps": leg.perhaps,
        "refused": leg.refused,
        "after": list(leg.after),
        "command": None if leg.command is None else list(leg.command),
        "seconds": cost.seconds,
        "bytes": cost.bytes,
        "known": cost.basis,
    }


def print_plan(console: Console, legs: Sequence[Leg], costs: Sequence[Cost]) -> None:
    """A line a leg, and what is left to do in all."""
    table = _table("stage", "artifact", "state", "time", "MiB", "known", right=("time", "MiB"))
    for leg, cost in zip(legs, costs, strict=True):
        state = "sealed" if leg.sealed else "perhaps" if leg.perhaps else "to make"
        state = state if leg.refused is None else "refused"
        seconds = "" if leg.sealed else "unknown" if cost.seconds is None else duration(cost.seconds)
        size = "" if leg.sealed else mebibytes(cost.bytes)
        known = printable(leg.refused or "") if leg.sealed else "" if cost.seconds is None else cost.basis
        table.add_row(leg.stage, printable(leg.id), state, seconds, size, known)
    console.print(table)
    console.print(printable(summary(legs, costs)))


def summary(legs: Sequence[Leg], costs: Sequence[Cost]) -> str:
    """What is left to do, in a sentence."""
    to_make = [(leg, cost) for leg, cost in zip(legs, costs, strict=True) if not leg.sealed]
    perhaps = sum(leg.perhaps for leg, _ in to_make)
    words = f"{len(legs)} artifacts: {len(legs) - len(to_make)} sealed, {len(to_make) - perhaps} to make"
    if perhaps:
        words += f", {perhaps} perhaps (the exported model tells)"
    if not to_make:
        return words
    whole = total(cost for leg, cost in to_make if not leg.perhaps)
    known = len(to_make) - perhaps - whole.unknown
    if known > 0:
        how = "about" if whole.exact else "at least"
        words += f"; {how} {duration(whole.seconds)} and {mebibytes(whole.bytes)} MiB"
        words += f" for {known} of them" if whole.unknown else ""
    if whole.unknown:
        words += f"; nothing of the same kind was made here yet for {whole.unknown}: their time is unknown"
    return words


# ---- what runs -------------------------------------------------------------------------------------------


def status_lines(found: Status) -> Iterator[str]:
    """What runs, what is left of runs that are gone, and what failed; that nothing runs where that is so."""
    for run in found.runs:
        yield from _run_lines(run)
    if found.being_made:
        yield f"being made now: {', '.join(found.being_made)}"
    for failure in found.failed:
        yield f"failed {_ago(failure.failed_unix)}: {failure.leg}: {failure.message}"
    for name, resumable in found.left_behind.items():
        what = "the same command goes on with it" if resumable else "the same command begins it anew"
        yield f"left behind by a process that is gone: {name}; {what}"
    if not any(run.lives for run in found.runs) and not found.being_made:
        yield f"nothing runs in {found.folder}"


def _run_lines(run: Run) -> Iterator[str]:
    command, total = shlex.join(run.command), run.done + len(run.waiting) + (run.now is not None)
    if not run.lives:
        at = f" while it made {run.now}" if run.now else ""
        yield (
            f"gone: process {run.process} was ended{at}, {run.done} of {total} were done; the same command goes on: "
            f"{command}"
        )
        return
    doing = f"{run.now} for {duration(run.now_seconds)}" if run.now else "between two steps"
    yield f"running: {command} (process {run.process}, begun {_ago(run.begun_unix)})"
    how = "at least" if run.unknown else "about"
    if run.unknown == len(run.waiting) + (run.now is not None):
        left = "time left unknown: nothing of the same kind was made here yet"
    else:
        left = f"{how} {duration(run.left_seconds)} left"
    yield f"  {run.done} of {total} done; now {doing}; {left}"
    if run.waiting:
        yield f"  waiting: {some(list(run.waiting))}"


def _ago(unix: float) -> str:
    return f"{duration(max(0.0, time.time() - unix))} ago"


# ---- a folder --------------------------------------------------------------------------------------------


def described_entry(entry: Entry) -> dict[str, Any]:
    """A folder's entry for machines."""
    manifest = entry.manifest
    if manifest is None:
        return {"artifact": str(entry.path), "fault": entry.fault}
    return {
        "artifact": str(entry.path),
        "kind": manifest.kind,
        "stage": manifest.stage,
        "key": manifest.key,
        "created_utc": manifest.created_utc,
        "seconds": manifest.seconds,
        "bytes": entry.size_bytes,
        "found": findings(manifest),
    }


def print_entries(console: Console, entries: Sequence[Entry]) -> None:
    """A line an artifact, in the order of making."""
    table = _table("kind", "artifact", "made (UTC)", "took", "MiB", "found", right=("took", "MiB"))
    for entry in entries:
        manifest = entry.manifest
        if manifest is None:
            table.add_row("?", printable(entry.path.name), "", "", "", entry.fault)
            continue
        made = printable(manifest.created_utc[:16].replace("T", " "))
        took, size = duration(manifest.seconds), mebibytes(entry.size_bytes)
        table.add_row(manifest.kind, printable(entry.path.name), made, took, size, printable(findings(manifest), 200))
    console.print(table)
    whole = sum(entry.size_bytes for entry in entries)
    console.print(f"{len(entries)} artifacts, {mebibytes(whole)} MiB")


# ---- one of them -----------------------------------------------------------------------------------------


def print_shown(console: Console, shown: Shown) -> None:
    """What it is, its settings that are no defaults, what was found, its lineage, and what was made from it."""
    manifest = shown.manifest
    console.print(printable(f"{manifest.kind} {shown.path.name}: {findings(manifest)}", 400))
    host = manifest.host.get("cpu", "unavailable")
    console.print(printable(f"key {manifest.key}"))
    console.print(
        printable(
            f"made {manifest.created_utc} in {duration(manifest.seconds)} on {host}; {len(manifest.files)} files, "
            f"{mebibytes(size_of(manifest))} MiB, none missing"
        )
    )
    _print_rows(console, "settings that are no defaults", own_settings(manifest.stage, manifest.config))
    _print_rows(console, "found", {name: value for name, value in flat(results(manifest)).items() if value is not None})
    if manifest.inputs:
        console.print("made from")
        console.print(_tree(manifest, shown.places))
    if shown.used_by:
        console.print("made from it: " + ", ".join(printable(path.name) for path in shown.used_by))


def _print_rows(console: Console, title: str, rows: Mapping[str, Any]) -> None:
    if not rows:
        return
    console.print(title)
    table = _table("", "")
    table.show_header = False
    for name, value in list(rows.items())[:MOST_ROWS]:
        table.add_row(f"  {printable(name, 80)}", as_text(value))
    console.print(table)
    if len(rows) > MOST_ROWS:
        console.print(f"  and {len(rows) - MOST_ROWS} more: --json has all")


def _tree(source: Provenance, places: Mapping[str, Path]) -> Any:
    """Lineage as a tree; what came into it twice is written out once."""
    from rich.text import Text
    from rich.tree import Tree

    told: set[str] = set()

    def grow(branch: Any, current: Provenance) -> None:
        for role, each in current.inputs.items():
            place = places.get(each.key)
            name = f"{each.kind} {each.key[:KEY_DIGITS]}, not here" if place is None else place.name
            again = each.key in told
            words = f"{role}: {name}" + ("" if again else f"  {findings(each)}")
            twig = branch.add(Text(printable(words, 300)))
            if again and each.inputs:
                twig.add(Text("(as above)"))
            elif not again:
                told.add(each.key)
                grow(twig, each)

    tree = Tree("", hide_root=True)
    grow(tree, source)
    return tree


# ---- two of them -----------------------------------------------------------------------------------------


def print_compared(console: Console, found: Compared, first: Path, second: Path) -> None:
    """What was told and found differently; a line each."""
    same = first.name == second.name
    names = tuple(printable(str(path) if same else path.name, 60) for path in (first, second))
    if not (found.settings or found.results):
        console.print("nothing differs")
        return
    for title, rows in (("settings that differ", found.settings), ("results that differ", found.results)):
        if not rows:
            console.print(f"no {title}")
            continue
        table = _table(title, *names)
        for row in rows[:MOST_ROWS]:
            table.add_row(printable(row.name, 80), as_text(row.first), as_text(row.second))
        console.print(table)
        if len(rows) > MOST_ROWS:
            console.print(f"and {len(rows) - MOST_ROWS} more: --json has all")
    if found.paired is not None:
        change = found.paired
        won = f"lost {change.lost}, won {change.won} of {change.n} images, p {change.p_value:.3f}"
        console.print(
            f"{names[1]} against {names[0]}: {100 * change.difference:+.2f} points "
            f"[{100 * change.low:+.2f}, {100 * change.high:+.2f}] on the same test images ({won})"
        )


# ---- what can go -----------------------------------------------------------------------------------------


def print_cleaning(console: Console, found: Cleaning) -> None:
    """What would go, and what stays though nothing needs it."""
    if found.go:
        table = _table("would go", "MiB", "took", "why", right=("MiB", "took"))
        for thing in found.go:
            took = duration(thing.seconds) if thing.seconds else ""
            table.add_row(printable(thing.path.name), mebibytes(thing.size_bytes), took, thing.why)
        console.print(table)
    for why, count in found.stay.items():
        console.print(f"{count} stay: {why}")
