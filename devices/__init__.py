"""Where a bundle runs and is measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from .local import LocalDevice


class Device(Protocol):
    """A machine that holds a working folder and runs the runner in it."""

    emulated: bool  # numbers of an emulated device are never ranked

    def open(self, scratch: Path) -> None:
        """Prepare a working folder on the device (``scratch`` is on this host)."""

    def push(self, source: Path, name: str) -> None:
        """Put a file or folder of this host into the working folder as ``name``."""

    def pull(self, name: str, target: Path) -> None:
        """Get the file ``name`` of the working folder."""

    def run(self, arguments: Sequence[str], timeout_seconds: float) -> dict[str, Any]:
        """Run ``python -m runtime *arguments`` in the working folder in a fresh process.

        Raises:
            KdpipeError: it failed, did not end in time, or answered no JSON.
        """

    def probe(self) -> dict[str, Any]:
        """What the device is; what could not be read is "unavailable"."""

    def close(self) -> None:
        """Remove the working folder."""


DEVICES: dict[str, type[Device]] = {
    "local": LocalDevice,
}
