"""What a person sees while a stage works: a bar on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from .core.proc import terminal

if TYPE_CHECKING:
    from .pipeline import Step

PLAIN_INTERVAL_SECONDS = 10.0


class Lines:
    """For logs: a line when work begins, one every ten seconds, nothing that moves."""

    def __init__(self) -> None:
        self._what, self._total, self._done, self._told = "", 0, 0, 0.0

    def begin(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._told = what, total, 0, time.monotonic()

    def advance(self, steps: int, detail: str) -> None:
        self._done += steps
        if time.monotonic() - self._told >= PLAIN_INTERVAL_SECONDS:
            self._told = time.monotonic()
            self.note(f"  {self._what}: {self._done} of {self._total} {detail}".rstrip())

    def end(self) -> None:
        """Nothing to take away."""

    def note(self, text: str) -> None:
        print(text, file=terminal(), flush=True)


class Bars:
    """For people: one bar that names the work, its detail and the time left, and goes when it is done."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None

    def begin(self, what: str, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("  {task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True),
            TextColumn("[dim]{task.fields[detail]}"),
            console=Console(file=terminal(), force_terminal=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.start()
        self._task = self._bar.add_task(what, total=total, detail="")

    def advance(self, steps: int, detail: str) -> None:
        self._bar.update(self._task, advance=steps, detail=detail)

    def end(self) -> None:
        self._bar.stop()
        self._bar = None

    def note(self, text: str) -> None:
        print(text, file=terminal(), flush=True)


def listener() -> Lines | Bars:
    return Bars() if sys.stderr.isatty() else Lines()


def tell_step(step: Step) -> None:
    """One line a step: what it made, how long it took or that it was there already."""
    cost = "sealed" if step.sealed_before else f"{step.seconds:.1f} s"
    print(f"{step.name:<28} {cost:>8}  {step.path}", file=terminal(), flush=True)
