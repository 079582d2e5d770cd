"""How a stage tells that it is alive, without knowing who listens.

Rooms call ``track`` and ``note``; the command line installs a listener that draws. Without one, nothing
is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Who hears that work begins, goes on and ends; work may begin inside other work."""

    def begin(self, what: str, total: int | None) -> None:
        """``total`` steps of ``what`` are begun; None where nobody knows how many."""

    def advance(self, steps: int, detail: str) -> None:
        """So many more steps are done; ``detail`` is a few words on how it goes, or nothing."""

    def end(self) -> None:
        """What was begun last is over."""

    def note(self, text: str) -> None:
        """A line that a person should read."""


class Silence:
    """Nobody listens."""

    def begin(self, what: str, total: int | None) -> None:
        """Ignore."""

    def advance(self, steps: int, detail: str) -> None:
        """Ignore."""

    def end(self) -> None:
        """Ignore."""

    def note(self, text: str) -> None:
        """Ignore."""


_listener: Listener = Silence()


def listen(listener: Listener) -> None:
    """Make ``listener`` hear every stage of this process from now on."""
    global _listener  # one terminal a process
    _listener = listener


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
    """Announce ``total`` steps of work (None: nobody knows how many); the block calls what it gets with (steps done,
    detail).
    """
    _listener.begin(what, total)
    try:
        yield _listener.advance
    finally:
        _listener.end()


def track(items: Iterable[T], what: str, total: int) -> Iterator[T]:
    """Iterate over ``items`` and advance by one for each."""
    with progress(what, total) as advance:
        for item in items:
            yield item
            advance(1, "")


def note(text: str) -> None:
    """Say one line that a person should read."""
    _listener.note(text)


@contextmanager
def muted() -> Iterator[None]:
    """Nobody hears what the block does."""
    heard = _listener
    listen(Silence())
    try:
        yield
    finally:
        listen(heard)
