"""Where bundles run and are measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..core.config import DeviceSettings, MeasureSettings
from ..core.errors import UserError, choice
from ..core.kinds import FreshStart, Prediction, Probe, Samples
from . import book
from .adb import AdbDevice
from .local import LocalDevice
from .lock import held
from .null import NullDevice
from .runner import RunnerDevice
from .ssh import SshDevice
from .surroundings import Watch
from .talk import Talk

if TYPE_CHECKING:
    from .bootstrap import Kept


class Device(Protocol):
    """A machine that bundles are pushed to, asked and measured on, in whatever way it can."""

    name: str  # in devices.yaml
    settings: DeviceSettings
    emulated: bool  # numbers of an emulated device are never ranked

    def __init__(self, settings: DeviceSettings) -> None:
        """Take the settings; nothing is reached yet."""

    def probe(self) -> Probe:
        """What the device is; what could not be read is "unavailable"."""

    def runs(self, target: str) -> bool:
        """Whether it can run a bundle of ``target`` with the target's own runtime."""

    def open(self, scratch: Path) -> None:
        """Prepare a working folder on the device (``scratch`` is on this host)."""

    def push(self, source: Path, name: str) -> None:
        """Put a file or folder of this host into the working folder as ``name``."""

    def drop(self, name: str) -> None:
        """Remove what was pushed as ``name``, unless it lies on this host."""

    def watching(self) -> AbstractContextManager[Watch | None]:
        """A process that looks at the device from outside of what is timed, and holds its lock, for a block.

        None where there is nothing to look at.

        Raises:
            UserError: somebody else measures there.
        """

    def predict(
        self,
        bundle: str,
        images: str,
        outputs: Path,
        timeout_seconds: float,
        *,
        stand_in: bool = False,
        batch: int = 64,
        threads: int = 0,
    ) -> Prediction:
        """Run the pushed ``bundle`` on the pushed images and write its outputs [N, ...] to ``outputs`` (.npy), here.

        Args:
            stand_in: open it with the runtime that reads the same file: right for accuracy, not for latency.
            batch: images of one call, where the model takes several.
            threads: of the runtime; 0 takes every core of the device.

        Raises:
            KdpipeError: it failed, did not end in time, or answered something else.
        """

    def measure(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, frames: str | None = None
    ) -> Samples:
        """Time single-image inference of the pushed ``bundle`` in a fresh process. Raises as ``predict`` does.

        Args:
            frames: pushed pictures at their own size (.npz), to time whole frames with.
        """

    def start_fresh(
        self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float, *, examine: bool = False
    ) -> FreshStart:
        """Open the pushed ``bundle`` and run one image in a fresh process that does nothing else.

        Args:
            examine: afterwards, ask the runtime in which precision it ran the layers.

        Raises:
            KdpipeError: as ``predict`` does.
        """

    def close(self) -> None:
        """Remove the working folder."""


DEVICES: dict[str, type[Device]] = {
    "adb": AdbDevice,
    "local": LocalDevice,
    "null": NullDevice,
    "ssh": SshDevice,
}


def find_device(name: str) -> Device:
    """The device of that name (see ``book``), not reached yet. Raises UserError for an unknown one."""
    settings = book.known(DEVICES)
    if name not in settings:
        raise choice("device", name, settings)
    return DEVICES[settings[name].kind](settings[name])


def bring_python(name: str, targets: Sequence[str]) -> tuple[Kept, str | None]:
    """Bring a device numpy and the runtimes of ``targets``; returns what was brought, and what starts it there.

    ``phone``, where no device is called so, is the folder for a phone that is not there yet.

    Raises:
        UserError: an unknown device, one that nothing can be brought to, or as ``bootstrap.bring`` does.
        DeviceLost: the link is gone.
    """
    from . import bootstrap, phone

    if name == "phone" and name not in book.known(DEVICES):
        return phone.folder(targets), None
    device = find_device(name)
    if not isinstance(device, RunnerDevice) or isinstance(device, LocalDevice):
        raise UserError(f"'{name}' runs with the Python of this kdpipe: pip install what it lacks")
    with held(device.settings, Talk(lambda *_: None)):  # a Python is not exchanged under what is measured
        return bootstrap.bring(device, targets), device.python


@contextmanager
def opened(device: Device, scratch: Path) -> Iterator[Device]:
    """``device`` with a working folder, which is removed at the end of the block."""
    device.open(scratch)
    try:
        yield device
    finally:
        device.close()
