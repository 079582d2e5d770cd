"""One session a device at a time: who measures holds a lock on this host, and one on the device (see ``watching``)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.config import DeviceSettings


def folder() -> Path:
    """Where locks lie: in the folder of the user's state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "kdpipe" / "locks"


@contextmanager
def held(settings: DeviceSettings, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of the machine behind ``settings``, whatever it is called here; wait for it, and say so.

    The kernel releases it however this process ends.
    """
    machine = hashlib.sha256(f"{settings.kind} {settings.address}".encode()).hexdigest()[:16]
    path = folder() / machine
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            note(f"'{settings.name}' is measured by {stream.readline().strip() or 'another process'}: waiting")
            fcntl.flock(stream, fcntl.LOCK_EX)
        stream.truncate(0)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        stream.write(f"process {os.getpid()} since {since}\n")
        stream.flush()
        yield
