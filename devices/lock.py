"""One session a device at a time: who measures holds a lock on this host, and one on the device (see ``Watch``)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ..core.config import DeviceSettings
from .talk import Talk

WAIT_SECONDS = 0.2  # between two looks whether it is free


def folder() -> Path:
    """Where locks lie: in the folder of the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "kdpipe" / "locks"


def _taken(stream: IO[str]) -> bool:
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def held(settings: DeviceSettings, talk: Talk) -> Iterator[None]:
    """Hold the lock of the machine behind ``settings``, whatever it is called here; wait for it, and say so.

    The kernel releases it however this process ends.

    Raises:
        KdpipeError: it was stopped while it waited.
    """
    machine = hashlib.sha256(f"{settings.kind} {settings.address}".encode()).hexdigest()[:16]
    path = folder() / machine
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        told = False
        while not _taken(stream):
            if not told:
                stream.seek(0)
                talk.note(f"'{settings.name}' is measured by {stream.readline().strip() or 'another process'}: waiting")
                told = True
            talk.check()
            time.sleep(WAIT_SECONDS)
        stream.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stream.write(f"process {os.getpid()} since {since}\n")
        stream.flush()
        yield
