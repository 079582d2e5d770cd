"""One session a device at a time: who measures holds a lock on this host, and one on the device (see ``Watch``).

Whoever makes something on this host shares the lock of it with all others who do, so that nothing is made while it is
measured, and nothing is measured while something is made.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from ..core.config import DeviceSettings
from ..core.progress import note
from .talk import Talk

WAIT_SECONDS = 0.2  # between two looks whether it is free
_making: list[IO[str]] = []  # what this process holds while it makes something


def folder() -> Path:
    """Where locks lie: in the folder of the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "kdpipe" / "locks"


def _taken(stream: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(stream, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _place(settings: DeviceSettings) -> Path:
    """The lock of the machine behind ``settings``, whatever it is called here."""
    return folder() / hashlib.sha256(f"{settings.kind} {settings.address}".encode()).hexdigest()[:16]


@contextmanager
def _in_turn(
    path: Path, kind: int, tell: Callable[[IO[str]], object], check: Callable[[], object]
) -> Iterator[IO[str]]:
    """Hold a lock. One who waits stands at the door, and the next ones behind: nobody waits for ever."""
    with path.open("a+") as stream, path.with_name(f"{path.name}.door").open("a+") as door:
        told = False
        for lock, wanted in ((door, fcntl.LOCK_EX), (stream, kind)):
            while not _taken(lock, wanted):
                if not told:
                    tell(stream)
                    told = True
                check()
                time.sleep(WAIT_SECONDS)
        fcntl.flock(door, fcntl.LOCK_UN)
        yield stream


def _measured_by(stream: IO[str]) -> str | None:
    """Who measures, in words; None where those who hold the lock make something."""
    if _taken(stream, fcntl.LOCK_SH):
        fcntl.flock(stream, fcntl.LOCK_UN)
        return None
    stream.seek(0)
    return stream.readline().strip() or "another process"


@contextmanager
def making() -> Iterator[None]:
    """Make something on this host for the length of the block; waits while this host is measured, and says so."""
    path = _place(DeviceSettings())
    with ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _making:
                stream = stack.enter_context(_in_turn(path, fcntl.LOCK_SH, _tell_maker, lambda: None))
                _making.append(stream)
                stack.callback(_making.remove, stream)
        except OSError:
            pass  # where no lock can be, nobody measures either
        yield


def _tell_maker(stream: IO[str]) -> None:
    who = _measured_by(stream)
    note(f"this host is measured by {who}: waiting" if who else "this host is about to be measured: waiting")


@contextmanager
def held(settings: DeviceSettings, talk: Talk) -> Iterator[None]:
    """Hold the lock of the machine behind ``settings``, whatever it is called here; wait for it, and say so.

    The kernel releases it however this process ends.

    Raises:
        KdpipeError: it was stopped while it waited.
    """
    path = _place(settings)
    path.parent.mkdir(parents=True, exist_ok=True)

    def tell(stream: IO[str]) -> None:
        who = _measured_by(stream)
        busy = f"is measured by {who}" if who else "is at work, which would be measured too"
        talk.note(f"'{settings.name}' {busy}: waiting")

    with ExitStack() as stack:
        if _making and path == _place(DeviceSettings()):  # by this process itself: what measures is part of a step
            fcntl.flock(_making[0], fcntl.LOCK_UN)
            stack.callback(fcntl.flock, _making[0], fcntl.LOCK_SH)
        stream = stack.enter_context(_in_turn(path, fcntl.LOCK_EX, tell, talk.check))
        stream.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stream.write(f"process {os.getpid()} since {since}\n")
        stream.flush()
        yield
