"""Onto a device and off it: push a bundle, make it live there, go back, say what is live, clean up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import Field

from .. import runtime
from ..core.artifact import Record
from ..core.errors import DeviceLost, GateFailed, UserError
from ..core.kinds import Bundle, RuntimeSession
from ..devices import DEVICES, Device, book
from ..devices.runner import PROBE_SECONDS, RunnerDevice
from .bundle import check_known
from .release import chosen
from .signature import Signer

INSTALL_SECONDS = 600.0  # to hash, open and replay a bundle on a slow board
BUILD_SECONDS = 3600.0  # to build an engine there before that


class Entry(Record):
    """Something in the store of a device: a bundle says what it is."""

    kind: str
    bytes: int
    key: str | None = None
    target: str | None = None
    variant: str | None = None
    model: str | None = None

    @property
    def title(self) -> str:
        """What a person calls it."""
        return " ".join(filter(None, (self.target, self.variant, self.model))) or self.kind


class Live(Entry):
    """The bundle that is live: since when, and what is wrong with it."""

    digest: str
    since_utc: str
    fault: str | None

    @property
    def words(self) -> str:
        """It in half a line."""
        return f"{self.title}, live since {self.since_utc}, {self.fault or 'intact'}"


class Installed(Record):
    """What is live on a device, what was before, and what replaying its golden inputs there found."""

    live: Live
    previous: str | None
    removed: list[str]
    golden_images: int = Field(ge=1)
    max_difference: float = Field(ge=0, allow_inf_nan=False)
    tolerance: float = Field(gt=0, allow_inf_nan=False)
    session: RuntimeSession


class DeviceStatus(Record):
    """What lies on a device: in the store by digest, and how many bytes in which folder."""

    root: str
    live: Live | None
    previous: str | None
    versions: list[str]
    entries: dict[str, Entry]
    bytes: dict[str, int]
    free_bytes: int

    def lines(self) -> Iterator[str]:
        """It for a person."""
        yield "nothing is live" if self.live is None else self.live.words
        total = sum(self.bytes.values())
        yield f"{self.root}: {total / 1e6:.1f} MB in it, {self.free_bytes / 1e6:.0f} MB free"
        for digest, entry in self.entries.items():
            marks = {self.previous: "before: ", self.live and self.live.digest: "live: "}
            yield f"  {digest[:12]}  {entry.bytes / 1e6:7.1f} MB  {marks.get(digest, '')}{entry.title}"
        for name, size in self.bytes.items():
            if size and name != "store":
                yield f"  {name:<12}  {size / 1e6:7.1f} MB"


class Cleaned(Record):
    """What was removed, what was kept, and the bytes that are free again."""

    removed: list[str]
    kept: list[str]
    freed_bytes: int


def deploy(path: Path, device: Device, by: Signer | None = None) -> Installed:
    """Make a bundle live on ``device``, where every hash is checked and the golden inputs replayed first.

    Whatever happens, the device serves what it served before, or the new bundle. An upload that was cut is gone on
    with by the next call. A device has no library for signatures: this host checks whose the release is, and the
    device is told the digest that its manifest has of the bundle, without which it does not switch.

    Args:
        path: of a bundle, of a release of one bundle, or of a bundle in a release.
        by: who must have signed the release.

    Raises:
        UserError: an altered bundle, a device without its runtime, no space there; nothing was changed on it.
        GateFailed: not signed by ``by``, or the bundle does not compute there what it promises; what was live stays.
        DeviceLost: the link is gone.
    """
    path, pinned = chosen(path, by)
    bundle, there = Bundle.open(path), with_runner(device)
    check_known(bundle)
    check_runs(there, bundle.facts.target)
    name = Path(there.store(bundle.path)).name
    if pinned not in (None, name):
        raise GateFailed(f"{path} was changed after its release was checked: '{device.name}' serves what it did before")
    kept = there.settings
    more = ["--keep-versions", str(kept.keep_versions), "--keep-bytes", str(kept.keep_bytes)]
    seconds = INSTALL_SECONDS + (BUILD_SECONDS if bundle.facts.not_built_here else 0)
    return _switched(there, ["install", there.root, name, *more], seconds)


def rollback(device: Device) -> Installed:
    """Make the bundle live that was live before, after the same checks there. Raises as ``deploy``."""
    there = with_runner(device)
    return _switched(there, ["rollback", there.root], INSTALL_SECONDS)


def _switched(device: RunnerDevice, arguments: Sequence[str], seconds: float) -> Installed:
    try:
        return device.ask(Installed, [*arguments, "--threads", "1"], seconds)
    except DeviceLost as error:
        raise DeviceLost(f"{error}; what is live there: kdpipe devices status {device.name}") from None
    except UserError as error:
        raise GateFailed(f"{error}; '{device.name}' serves what it did before") from None


def status(device: Device) -> DeviceStatus:
    """What is live on ``device`` and whether it is intact, what else lies there and how much space it takes."""
    there = with_runner(device)
    return there.ask(DeviceStatus, ["status", there.root], PROBE_SECONDS)


def clean(device: Device, everything: bool = False) -> Cleaned:
    """Remove what is neither live nor the one before: uploads, pushed images, outputs, the runner.

    Args:
        everything: the deployed bundles too.

    Raises:
        UserError: it is being measured.
    """
    there = with_runner(device)
    return there.ask(Cleaned, ["clean", there.root, *(["--everything"] if everything else [])], PROBE_SECONDS)


def described() -> list[str]:
    """The names of all devices that bundles can lie on. Raises UserError."""
    return [name for name, each in book.known(DEVICES).items() if issubclass(DEVICES[each.kind], RunnerDevice)]


def check_runs(device: RunnerDevice, target: str) -> None:
    """Refuse a device that has no runtime of ``target``, with the cure. Raises UserError."""
    if not device.runs(target):
        line = device.pip_line(*runtime.RUNTIMES[target].needs)
        raise UserError(f"'{device.name}' cannot open a bundle of {target}: run there {line}")


def with_runner(device: Device) -> RunnerDevice:
    """``device``, if bundles can lie on it. Raises UserError."""
    if not isinstance(device, RunnerDevice):
        raise UserError(f"nothing lies on '{device.name}': wanted a device that runs the runner, such as local")
    return device
