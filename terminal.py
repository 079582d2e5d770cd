"""What a person sees while a stage works: a bar on a terminal, plain lines elsewhere; all on stderr."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Any, TextIO

from .core.proc import process_count
from .core.progress import Listener, Silence
from .core.sealed import printable
from .core.streams import talk

if TYPE_CHECKING:
    from rich.console import Console

    from .chain import Step
    from .distill.cache import Forecast

PLAIN_INTERVAL_SECONDS = 10.0


def console(stream: TextIO | None = None, **settings: Any) -> Console:
    """A console that shows texts as they are: brackets are no markup, and words no emoji."""
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False, highlight=False, **settings)


class Lines:
    """For logs: a line every ten seconds of work, nothing that moves. Work may begin inside other work."""

    def __init__(self) -> None:
        self._open: list[tuple[str, int, int | None]] = []  # what, steps done, of how many
        self._told = time.monotonic()
        self._stream = _own_stream()

    def begin(self, what: str, total: int | None) -> None:
        self._open.append((what, 0, total))

    def advance(self, steps: int, detail: str) -> None:
        what, done, total = self._open.pop()
        self._open.append((what, done + steps, total))
        if time.monotonic() - self._told >= PLAIN_INTERVAL_SECONDS:
            self._told = time.monotonic()
            whole = "" if total is None else f" of {total}"
            inside = f"; {self._open[0][0]}" if len(self._open) > 1 else ""  # which step of a run, and what is left
            self.note(f"  {what}: {done + steps}{whole} {detail}".rstrip() + inside)

    def end(self) -> None:
        self._open.pop()

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


class Bars:
    """For people: a bar for the step and one for the work inside it, gone when they are done."""

    def __init__(self) -> None:
        self._bars: Any = None
        self._open: list[Any] = []
        self._stream = _own_stream()

    def begin(self, what: str, total: int | None) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        if not self._open:
            self._bars = Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TimeRemainingColumn(compact=True, elapsed_when_finished=True),
                TextColumn("{task.fields[detail]}", style="dim", markup=False),
                console=console(self._stream, force_terminal=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._bars.start()
        self._open.append(self._bars.add_task(printable(what), total=total, detail=""))

    def advance(self, steps: int, detail: str) -> None:
        self._bars.update(self._open[-1], advance=steps, detail=printable(detail))

    def end(self) -> None:
        self._bars.remove_task(self._open.pop())
        if not self._open:
            self._bars.stop()

    def note(self, text: str) -> None:
        print(printable(text), file=self._stream, flush=True)


def _own_stream() -> TextIO:
    """Standard error for us alone: it still reaches the person while libraries are silenced."""
    try:
        return talk(os.dup(sys.stderr.fileno()), sys.stderr, own=True)
    except (OSError, ValueError):  # a stream without a descriptor
        return sys.stderr


def process_number() -> int:
    """This process's number among those of torchrun; the first speaks for all."""
    return int(os.environ.get("RANK", 0)) if process_count() > 1 else 0


def listener() -> Listener:
    """What shows progress here: bars on a terminal, else lines; nothing in the further processes of torchrun."""
    if process_number():
        return Silence()
    return Bars() if sys.stderr.isatty() else Lines()


def tell_step(step: Step) -> None:
    """One line a step: what it made, how long it took or that it was there already; below it what was found."""
    if process_number():
        return
    for line in str(step).splitlines():
        sys.stderr.write(printable(line) + "\n")


def tell_forecast(forecast: Forecast) -> None:
    """What a cache would take, before it is built."""
    if process_number():
        return
    room = f"{forecast.bytes / 2**20:.1f} MiB of {forecast.free_bytes / 2**30:.1f} GiB free"
    sys.stderr.write(
        f"{forecast.views} views of {forecast.images} images: {room}, about {forecast.build_seconds:.0f} s "
        f"({1e3 * forecast.view_seconds:.2g} ms to make a view, {1e3 * forecast.teacher_seconds:.2g} ms to ask about "
        f"it); pays from {forecast.break_even_epochs:.0f} epochs on, all students together\n"
    )
