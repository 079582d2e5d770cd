"""The process on a device that looks at it while others are timed there, and holds its lock meanwhile."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import select
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import DeviceLost, UserError
from ..core.kinds import Conditions, Phase, Sight, Sights, Surroundings
from ..core.sealed import printable
from ..runtime.probe import UNAVAILABLE

if TYPE_CHECKING:
    from .runner import RunnerDevice

HERTZ = 10.0
START_SECONDS = 60.0  # until it answers at all
ANSWER_SECONDS = 30.0


class Watch:
    """``python -m runtime watch`` there; it ends with this object, or when the link is cut."""

    def __init__(self, device: RunnerDevice) -> None:
        """Start it and take the device's lock.

        Raises:
            UserError: somebody else measures there; who, and since when.
            DeviceLost: it ended without a word.
        """
        self._name = device.name
        holder = f"{getpass.getuser()}@{platform.node()}"
        arguments = ["watch", "--lock", f"{device.root}/lock", "--holder", holder, "--hertz", str(HERTZ)]
        self._process = device.start(arguments)
        try:
            self._ask(START_SECONDS)
        except BaseException:
            self.close()
            raise

    def seen(self) -> Sights:
        """What it saw since it was last asked. Raises DeviceLost."""
        return self._ask(ANSWER_SECONDS)

    def close(self) -> None:
        """End it, and with it the lock there."""
        process = self._process
        with contextlib.suppress(OSError):
            process.stdin.close()  # type: ignore[union-attr]
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for stream in (process.stdout, process.stderr):
            stream.close()  # type: ignore[union-attr]

    def _ask(self, timeout_seconds: float) -> Sights:
        from .runner import read_answer

        try:
            self._process.stdin.write(b"\n")  # type: ignore[union-attr]
            self._process.stdin.flush()  # type: ignore[union-attr]
            line = self._line(timeout_seconds)
        except OSError:
            line = b""
        if not line.endswith(b"\n"):
            raise self._ended()
        try:
            return read_answer(Sights, line)
        except ValueError as error:
            raise DeviceLost(f"what watches '{self._name}' answered with {error}") from None

    def _line(self, timeout_seconds: float) -> bytes:
        """One line of its answers, or less of it where it ended or took too long."""
        descriptor, found, end = self._process.stdout.fileno(), b"", time.monotonic() + timeout_seconds  # type: ignore[union-attr]
        while not found.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
                break
            more = os.read(descriptor, 2**20)
            if not more:
                break
            found += more
        return found

    def _ended(self) -> UserError | DeviceLost:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return DeviceLost(f"what watches '{self._name}' does not answer")
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()  # type: ignore[union-attr]
        reason = printable(said[-1].removeprefix("runtime: "), 500) if said else f"exit code {code}"
        if "measured by" in reason:
            return UserError(f"'{self._name}' is {reason}")
        return DeviceLost(f"what watches '{self._name}' ended: {reason}")


@contextmanager
def watching(device: RunnerDevice) -> Iterator[Watch]:
    """A ``Watch`` for the block."""
    watch = Watch(device)
    try:
        yield watch
    finally:
        watch.close()


def surroundings(seen: Sights, phase: Phase | None) -> Surroundings | None:
    """What the device did while a process was timed, besides that; None where nobody looked twice in that time.

    Only what lies between two looks inside the phase counts: before and after it the process works too.

    Args:
        phase: the timed inferences of that process, by the same clock.
    """
    inside = (
        [] if phase is None else [each for each in seen.sights if phase.begun_ns <= each.monotonic_ns <= phase.ended_ns]
    )
    if phase is None or len(inside) < 2:
        return None
    first, last = inside[0], inside[-1]
    taken_ns = last.monotonic_ns - first.monotonic_ns
    own_ns = phase.cpu_ns * taken_ns / max(1, phase.ended_ns - phase.begun_ns)

    def share(name: str, less_ns: float) -> float | Literal["unavailable"]:
        begun, ended = getattr(first, name), getattr(last, name)
        if begun == UNAVAILABLE or ended == UNAVAILABLE:
            return "unavailable"
        return float(max(0.0, (ended - begun - less_ns) / (taken_ns * seen.cpus)))

    clocks = [khz for each in seen.sights if isinstance(each.khz, dict) for khz in each.khz.values()]
    heat = [
        found for each in seen.sights if isinstance(each.millicelsius, dict) for found in each.millicelsius.values()
    ]
    return Surroundings(
        seconds=taken_ns / 1e9,
        others_share=share("busy_ns", own_ns),
        steal_share=share("steal_ns", 0),
        lowest_khz=min(clocks, default="unavailable"),
        highest_khz=max(clocks, default="unavailable"),
        highest_celsius=max(heat) / 1000 if heat else "unavailable",
        throttled=_throttled(seen.sights),
        watts="unavailable",
    )


def _throttled(sights: Sequence[Sight]) -> bool | Literal["unavailable"]:
    """Whether a counter of the CPU's rose, or one of a Raspberry Pi's bits of now (the lower four) stood."""
    events = [each.throttle_events for each in sights if isinstance(each.throttle_events, int)]
    bits = [each.throttle_bits for each in sights if isinstance(each.throttle_bits, int)]
    if not events and not bits:
        return "unavailable"
    return (bool(events) and events[-1] > events[0]) or any(each & 0xF for each in bits)


def conditions(around: Sequence[Surroundings | None], cpus: int | str) -> Conditions:
    """What went on around all processes of a bundle, each for as long as it was timed.

    Args:
        around: of each process; None where nothing watched.
        cpus: that the shares are of.
    """
    seen = [each for each in around if each is not None]

    def cores(name: str) -> Any:
        shares = [(getattr(each, name), each.seconds) for each in seen]
        if not shares or not isinstance(cpus, int) or any(share == UNAVAILABLE for share, _ in shares):
            return UNAVAILABLE
        total = sum(seconds for _, seconds in shares)
        return cpus * sum(share * seconds for share, seconds in shares) / total if total > 0 else UNAVAILABLE

    clocks = [each.highest_khz for each in seen]
    told = [int(each) for each in clocks if each != UNAVAILABLE]
    throttled = [each.throttled for each in seen]
    known = [each for each in throttled if each != UNAVAILABLE]
    return Conditions(
        others_cores=cores("others_share"),
        steal_cores=cores("steal_share"),
        frequency_drop=1 - min(told) / max(told) if told and len(told) == len(clocks) else UNAVAILABLE,
        throttled=True if True in known else False if known and len(known) == len(throttled) else UNAVAILABLE,
    )
