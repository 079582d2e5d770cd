"""How sessions on several devices tell their progress through one listener, and hear that they are to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from ..core.errors import KdpipeError
from ..core.progress import note


@dataclass(frozen=True)
class Talk:
    """What one session tells: so many steps are done and what comes next, and lines that a person should read."""

    advance: Callable[[int, str], None]
    note: Callable[[str], None] = note
    stopped: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Go on only if nobody wants to stop. Raises KdpipeError."""
        if self.stopped.is_set():
            raise KdpipeError("stopped")


def together(advance: Callable[[int, str], None], devices: Iterable[str], stopped: threading.Event) -> dict[str, Talk]:
    """A ``Talk`` for each device: every step shows where all of them are, every line begins with the device."""
    details = dict.fromkeys(devices, "waits")
    lock = threading.Lock()

    def of(device: str) -> Talk:
        def advance_one(steps: int, detail: str) -> None:
            with lock:
                details[device] = detail or details[device]
                advance(steps, " | ".join(f"{name}: {what}" for name, what in details.items()))

        def note_one(text: str) -> None:
            with lock:
                note(f"{device}: {text}")

        return Talk(advance_one, note_one, stopped)

    return {device: of(device) for device in details}
