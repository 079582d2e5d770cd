"""What else a device did while something was timed on it, from what ``watch`` saw outside the timed process."""

from __future__ import annotations

import contextlib
import selectors
import subprocess
from collections.abc import Callable, Sequence

import numpy as np

from ..core.errors import DeviceLost, KdpipeError, UserError
from ..core.kinds import UNAVAILABLE, Phase, RuntimeSession, Sight, Sights, Surroundings, Unavailable
from ..core.sealed import printable
from .runner import RunnerDevice, read_answer

ANSWER_SECONDS = 60.0
END_SECONDS = 10.0
THROTTLED_NOW = 0b1111  # a Raspberry Pi's bits: under-voltage, clock capped, throttled, soft limit of temperature


class Watch:
    """``python -m runtime watch`` on a device, from ``with`` to its end; it holds the device's lock meanwhile.

    Raises:
        UserError: somebody else measures there; the message says who and since when.
    """

    def __init__(self, device: RunnerDevice, lock: str | None, holder: str) -> None:
        arguments = ["watch", "--holder", holder, *(["--lock", lock] if lock is not None else [])]
        self._device = device  # what it runs from may go with it
        self._process = device.start(arguments)
        self._began = False

    def __enter__(self) -> Watch:
        try:
            self.look()  # it answers once it holds the lock
        except BaseException:
            self.__exit__()
            raise
        self._began = True
        return self

    def look(self) -> Sights:
        """What was seen since the last look, the last of it now.

        Raises:
            DeviceLost: the watch has ended, or the link.
            UserError: it could not begin.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            line = self._line()
            return read_answer(Sights, line)
        except (OSError, ValueError) as error:
            raise self._ended(error) from None

    def _line(self) -> bytes:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(ANSWER_SECONDS):
                raise ValueError(f"no answer in {ANSWER_SECONDS:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise ValueError("nothing")
        return bytes(line)

    def _ended(self, error: Exception) -> KdpipeError:
        self._stop()
        assert self._process.stderr is not None
        said = self._process.stderr.read().decode(errors="replace").strip().splitlines()
        reason = printable(said[-1].removeprefix("runtime: "), 500) if said else str(error)
        lost = self._device.lost(self._process.returncode, "\n".join(said).encode())
        if lost is not None:
            return DeviceLost(f"'{self._device.name}' cannot be reached: {printable(lost, 500)}")
        return (DeviceLost if self._began else UserError)(f"'{self._device.name}' cannot be watched: {reason}")

    def _stop(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # the end of its standard input ends it, over every link
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __exit__(self, *_: object) -> None:
        self._stop()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def surroundings(sights: Sequence[Sight], phase: Phase, cpus: int, watch_share: float = 0.0) -> Surroundings:
    """What the device did from the beginning of ``phase`` to its end, besides the process that was timed in it.

    The kernel tells of all CPUs together, in ticks of 10 ms mostly; between two looks its counts are taken to grow
    evenly. What is left after the timed process's own time and the watch's is everybody else's.

    Args:
        sights: of ``watch``, in their order, from before the phase to after it.
        cpus: of the device.
        watch_share: CPU time that the watch itself takes, of one CPU.

    Raises:
        ValueError: the sights do not reach over the phase.
    """
    times = np.array([sight.monotonic_ns for sight in sights], dtype=np.float64)
    if len(times) < 2 or times[0] > phase.begun_ns or times[-1] < phase.ended_ns:
        raise ValueError("the watch did not see the whole of it")
    elapsed = phase.ended_ns - phase.begun_ns

    def grown(of: Callable[[Sight], int | Unavailable]) -> float | None:
        counts = [of(sight) for sight in sights]
        known = [count for count in counts if not isinstance(count, str)]
        if len(known) < len(counts):
            return None
        return float(np.diff(np.interp([phase.begun_ns, phase.ended_ns], times, known))[0])

    busy, steal = grown(lambda sight: sight.busy_ns), grown(lambda sight: sight.steal_ns)
    # What is read less often: the last look before the phase, those inside it and the first one after it.
    whole = [sight for sight in sights if sight.khz is not None]
    before = sum(sight.monotonic_ns <= phase.begun_ns for sight in whole)
    inside = sum(sight.monotonic_ns < phase.ended_ns for sight in whole)
    whole = whole[max(0, before - 1) : inside + 1]
    clocks = [khz for sight in whole if isinstance(sight.khz, dict) for khz in sight.khz.values()]
    heats = [heat for sight in whole if isinstance(sight.millicelsius, dict) for heat in sight.millicelsius.values()]
    return Surroundings(
        seconds=elapsed / 1e9,
        others_share=UNAVAILABLE
        if busy is None
        else max(0.0, busy - phase.cpu_ns - watch_share * elapsed) / elapsed / cpus,
        steal_share=UNAVAILABLE if steal is None else steal / elapsed / cpus,
        lowest_khz=min(clocks, default=UNAVAILABLE),
        highest_khz=max(clocks, default=UNAVAILABLE),
        highest_celsius=max(heats) / 1000 if heats else UNAVAILABLE,
        throttled=_throttled(whole),
        watts=_watts(whole),
    )


def _throttled(whole: Sequence[Sight]) -> bool | Unavailable:
    events = [sight.throttle_events for sight in whole if isinstance(sight.throttle_events, int)]
    bits = [sight.throttle_bits for sight in whole if isinstance(sight.throttle_bits, int)]
    if not events and not bits:
        return UNAVAILABLE
    return bool(events and events[-1] > events[0]) or any(each & THROTTLED_NOW for each in bits)


def _watts(whole: Sequence[Sight]) -> float | Unavailable:
    """The mean power: by meters of energy where there are any, else by those of power."""
    metered = [sight for sight in whole if isinstance(sight.energy_uj, dict)]
    if len(metered) > 1:
        first, last = metered[0], metered[-1]
        assert isinstance(first.energy_uj, dict) and isinstance(last.energy_uj, dict)
        taken = [last.energy_uj.get(name, -1) - before for name, before in first.energy_uj.items()]
        if min(taken) < 0:
            return UNAVAILABLE  # a meter started again, at a number that only it knows
        return sum(taken) / 1e6 / ((last.monotonic_ns - first.monotonic_ns) / 1e9)
    powers = [sum(sight.power_mw.values()) for sight in whole if isinstance(sight.power_mw, dict)]
    return sum(powers) / len(powers) / 1000 if powers else UNAVAILABLE


def watch_share(before: Sights, after: Sights) -> float:
    """CPU time that the watch itself took between two looks, of one CPU."""
    elapsed = after.sights[-1].monotonic_ns - before.sights[-1].monotonic_ns
    return (after.own_cpu_ns - before.own_cpu_ns) / elapsed if elapsed > 0 else 0.0


def fell_back(precision: str, session: RuntimeSession, executed: dict[str, int] | None) -> str:
    """What the runtime did in silence in place of what was asked for, in words; empty if it did as it was told.

    Not slow but another model: on another processor, or in another precision. Weights of float16 are float32 to many
    CPUs, which the bundle does not promise otherwise.
    """
    told = session.model_dump()
    for how, wanted, got in (
        ("on", told.get("wanted_providers"), told.get("providers")),
        ("in", told.get("wanted_precision"), told.get("inference_precision")),
    ):
        if wanted is not None and got is not None and wanted != got:
            return f"it ran {how} {_plain(got)}, wanted {_plain(wanted)}"
    if precision in ("int8", "bf16") and executed and precision not in executed:
        ran = ", ".join(f"{count} in {name}" for name, count in executed.items())
        return f"none of its layers ran in {precision}: {ran}"
    return ""


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
