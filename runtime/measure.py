"""Timing one opened model in one process. Raw nanoseconds; nothing is trimmed here or later."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import RUNTIMES, Session, open_session
from .frame import MOST_FRAMES, WARM_FRAMES, time_frames
from .installed import installed
from .probe import UNAVAILABLE, place, read

WARM_UP_CALLS = 10  # at least, however slow the model
WARM_UP_PATIENCE = 5  # times the least warm-up, then it is given up as not settled
WINDOWS = 5  # of the least warm-up: the last three agree over 0.6 of it, a ramp of the clock shows in that
WINDOW_CALLS = 4  # at least in a window
AGREEMENT = 0.03  # the last three windows' medians agree within this share of their median
MEMORY_CALLS = 3  # inferences after which the peak is read: arenas are planned after the first
BLOCKS = 10  # of a process's inferences, in their order: what their medians leave open is what is not known
LOOKS = 1.25  # the factor by which a measurement grows from one look at what is known to the next
END_TO_END_CALLS = 64  # at most
SUSTAINED_WINDOW_SECONDS = 5.0
SLOWED = 0.05  # share by which windows are slower than the steady phase once a machine has throttled
# How libraries of threads are told to wait and where to run.
THREAD_SETTINGS = ("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "TBB_", "ORT_", "OV_")


class Timing(Protocol):
    """How one process times: fields of a ``Plan``, which settings of the host have too."""

    @property
    def images(self) -> int: ...
    @property
    def seconds(self) -> float: ...
    @property
    def min_samples(self) -> int: ...
    @property
    def max_seconds(self) -> float: ...
    @property
    def warm_up_seconds(self) -> float: ...
    @property
    def rate(self) -> float: ...
    @property
    def sustained(self) -> float: ...


@dataclass(frozen=True)
class Plan:
    """How one process times: until ``seconds``, ``min_samples`` and ``p50_within`` are all reached.

    After ``max_seconds`` it stops although the median is not known within the share ``p50_within``. At ``rate`` images
    come in each second, with 0 the next one at once. Then it may go on for ``sustained`` seconds. ``images`` are
    rotated through.
    """

    images: int = 64
    seconds: float = 1.0
    min_samples: int = 64
    p50_within: float = 0.01
    max_seconds: float = 10.0
    warm_up_seconds: float = 1.0
    rate: float = 0.0
    sustained: float = 0.0


# ---- the process -------------------------------------------------------------------------------------------


def process_age_ns() -> int | None:
    """Nanoseconds since this process was started, known to the kernel's tick (10 ms mostly); None if unreadable."""
    fields = read("/proc/self/stat").rpartition(")")[2].split()
    with contextlib.suppress(ValueError, IndexError):
        started = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - started
        if started > 0 and age > 0:
            return int(age * 1e9)
    return None


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far (or since ``forget_peak``).

    Read from the kernel's own high-water mark: getrusage's survives exec and would report the parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def forget_peak() -> None:
    """Lower the kernel's mark to what is resident now, where it lets us; else the mark stays, and may hide growth."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def keep_to_cores(threads: int) -> dict[str, Any]:
    """Keep this process, and what threads it starts, to one CPU a core, as ``place`` chooses: the ``Placement``.

    Before a runtime is imported: pools of threads take the CPUs that they find.
    """
    threads, cpus, beside, slower = place(threads, sorted(os.sched_getaffinity(0)))
    kept: list[int] | str = cpus
    try:
        os.sched_setaffinity(0, cpus)
    except OSError:  # a sandbox may forbid it
        kept = UNAVAILABLE
    told = {name: value for name, value in sorted(os.environ.items()) if name.startswith(THREAD_SETTINGS)}
    return {
        "threads": threads,
        "cpus": kept,
        "siblings_left_out": beside,
        "slower_left_out": slower,
        "environment": told,
    }


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of ``folder``: reading them again goes to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def start_up(
    folder: Path, facts: dict[str, Any], image: np.ndarray, threads: int
) -> tuple[Session, dict[str, Any], int]:
    """Import the runtime, open the model and run one image uint8 [1, H, W, 3].

    Returns:
        The session, the fields of a ``StartUp``, and the bytes that were resident at most before the model was opened.
    """
    start = time.perf_counter_ns()
    for alternatives in RUNTIMES[facts["target"]].modules:
        with contextlib.suppress(ImportError):  # opening says what is missing
            importlib.import_module(installed(alternatives))
    import_ns = time.perf_counter_ns() - start
    forget_peak()
    memory_before = peak_memory_bytes()

    start = time.perf_counter_ns()
    session = open_session(folder, facts, threads)
    load_ns = time.perf_counter_ns() - start

    one = session.prepare(image)
    start = time.perf_counter_ns()
    session.infer(one)
    first_ns = time.perf_counter_ns() - start
    took = {"process_ns": process_age_ns(), "import_ns": import_ns, "load_ns": load_ns, "first_ns": first_ns}
    return session, {**took, "compile_ns": session.compile_ns, "session": session.describe()}, memory_before


def start_fresh(
    folder: Path, facts: dict[str, Any], images: np.ndarray, threads: int, *, page_cache: str, examine: bool
) -> dict[str, Any]:
    """What a process takes that opens the model, runs one image and does nothing else: the fields of a ``FreshStart``.

    ``memory_before_open_bytes`` is what is resident once the runtime's modules are imported, the empty runtime;
    ``peak_memory_bytes`` the largest resident set from there on, until a few inferences of one image are done.
    Their difference holds all that opening and running take: the file as it is read or mapped, weights as the
    runtime packs them, activations, libraries that it loads at opening, one prepared image.

    Args:
        images: uint8 [N, H, W, 3]; the first one is run.
        page_cache: "dropped" makes the kernel forget the bundle's files first.
        examine: afterwards, ask the runtime in which precision it ran the layers.

    Raises:
        ValueError: no images.
    """
    image = _first(images)
    if page_cache == "dropped":
        drop_from_page_cache(folder)
    session, took, memory_before = start_up(folder, facts, image, threads)
    one = session.prepare(image)
    for _ in range(MEMORY_CALLS):
        session.infer(one)
    return {
        **took,
        "page_cache": page_cache,
        "memory_before_open_bytes": memory_before,
        "peak_memory_bytes": peak_memory_bytes(),
        "executed": session.executed(one) if examine else None,
    }


def _first(images: np.ndarray) -> np.ndarray:
    if len(images) == 0:
        raise ValueError("no images to time with: wanted at least one")
    return np.array(images[:1])


# ---- timing ------------------------------------------------------------------------------------------------


def warm_up(run: Callable[[int], Any], seconds: float) -> dict[str, Any]:
    """Call ``run(i)`` for at least ``seconds`` and ten calls, until three windows agree; or give up.

    A window lasts a fifth of ``seconds`` (and four calls), whatever the model takes: three windows of some
    calls each would agree within milliseconds for a fast one, while the clock is still rising.

    Returns:
        Each window's median, how many calls and seconds it took, and whether it settled.
    """
    medians: list[float] = []
    calls, settled, spent = 0, False, 0.0
    begun = time.monotonic()
    while not (
        calls >= WARM_UP_CALLS
        and spent >= seconds
        and (settled or (len(medians) >= 3 and spent >= WARM_UP_PATIENCE * seconds))
    ):
        window: list[int] = []
        opened = time.monotonic()
        while len(window) < WINDOW_CALLS or time.monotonic() - opened < seconds / WINDOWS:
            start = time.perf_counter_ns()
            run(calls)
            window.append(time.perf_counter_ns() - start)
            calls += 1
        medians.append(float(np.median(window)))
        last = medians[-3:]
        settled = len(last) == 3 and max(last) - min(last) <= AGREEMENT * float(np.median(last))
        spent = time.monotonic() - begun
    return {"window_median_ns": medians, "calls": calls, "seconds": spent, "settled": settled}


def p50_known_within(latency_ns: list[int]) -> float | None:
    """The share within which the median of inferences in their order is known; None for fewer than twenty.

    Inferences next to each other resemble each other, so they are cut into ten blocks. The second smallest and the
    second largest of the blocks' medians hold the true median in 97.9 % of all cases where blocks do not resemble each
    other (David and Nagaraja, Order Statistics, 7.1); the longer arm of that interval is the share.
    """
    length = len(latency_ns) // BLOCKS
    if length < 2:
        return None
    late = np.asarray(latency_ns[len(latency_ns) - BLOCKS * length :])
    medians = np.sort(np.median(late.reshape(BLOCKS, length), axis=1))
    middle = float(np.median(late))
    return max(float(medians[-2]) / middle, middle / float(medians[1])) - 1


def time_calls(run: Callable[[int], Any], plan: Plan) -> dict[str, Any]:
    """Call ``run(i)`` as the plan says; it is known well enough when two looks in a row say so.

    Returns:
        ``latency_ns``, ``p50_known_within``, ``stable``, and the ``steady`` phase.
    """
    latency_ns: list[int] = []
    within, stable, known_before = None, False, False
    look_after = plan.seconds / LOOKS
    due = _Due(plan.rate)
    cpu_begun, begun = time.process_time_ns(), time.monotonic_ns()
    while True:
        due.wait()
        start = time.perf_counter_ns()
        run(len(latency_ns))
        latency_ns.append(time.perf_counter_ns() - start)
        spent = (time.monotonic_ns() - begun) / 1e9
        if spent < look_after or len(latency_ns) < plan.min_samples / LOOKS:
            continue
        within = p50_known_within(latency_ns)
        known = within is not None and within <= plan.p50_within
        enough = spent >= plan.seconds and len(latency_ns) >= plan.min_samples
        stable = known and known_before
        if enough and (stable or spent >= plan.max_seconds):
            break
        known_before = known
        look_after = spent * LOOKS if spent >= plan.max_seconds else min(spent * LOOKS, plan.max_seconds)
    ended, cpu_ended = time.monotonic_ns(), time.process_time_ns()
    return {
        "latency_ns": latency_ns,
        "p50_known_within": within,
        "stable": stable,
        "steady": {"begun_ns": begun, "ended_ns": ended, "cpu_ns": cpu_ended - cpu_begun},
    }


class _Due:
    """Waits until the next image comes in; at once where no rate is given, or where it is late already."""

    def __init__(self, rate: float) -> None:
        self._between = 1 / rate if rate else 0.0
        self._next = time.monotonic()

    def wait(self) -> None:
        if self._between:
            time.sleep(max(0.0, self._next - time.monotonic()))
            self._next = max(self._next, time.monotonic() - self._between) + self._between


def sustain(run: Callable[[int], Any], plan: Plan, steady_ns: float) -> dict[str, Any]:
    """Go on for ``plan.sustained`` seconds: the median of every window, and when they became slower for good.

    Args:
        steady_ns: the median of the steady phase, which windows are held against.

    Returns:
        The fields of a ``Sustained``.
    """
    length = min(SUSTAINED_WINDOW_SECONDS, plan.sustained / 10)
    medians: list[float] = []
    due, calls = _Due(plan.rate), 0
    begun = time.monotonic()
    while time.monotonic() - begun < plan.sustained:
        window: list[int] = []
        while not window or time.monotonic() - begun < (len(medians) + 1) * length:
            due.wait()
            start = time.perf_counter_ns()
            run(calls)
            window.append(time.perf_counter_ns() - start)
            calls += 1
        medians.append(float(np.median(window)))
    slow = [median > (1 + SLOWED) * steady_ns for median in medians]
    onset = next((at for at in range(len(slow) - 2) if all(slow[at : at + 3])), None)
    return {
        "window_seconds": length,
        "window_median_ns": medians,
        "slowed_after_seconds": None if onset is None else onset * length,
    }


def longest_seconds(open_seconds: float, image_seconds: float, timing: Timing) -> float:
    """How long ``measure`` takes at most, where opening and one image (prepared and inferred) take that long."""
    windows = WARM_UP_PATIENCE + 1 / WINDOWS
    calls = 1 + max(WARM_UP_CALLS, 3 * WINDOW_CALLS) + WINDOW_CALLS + timing.images + END_TO_END_CALLS + 2
    calls += 2 * (WARM_FRAMES + MOST_FRAMES)
    each = max(image_seconds, 1 / timing.rate if timing.rate else 0.0)
    steady = max(timing.max_seconds, LOOKS * timing.min_samples * each)
    return open_seconds + windows * timing.warm_up_seconds + steady + timing.sustained + calls * image_seconds


def measure(
    folder: Path,
    facts: dict[str, Any],
    images: np.ndarray,
    placement: dict[str, Any],
    plan: Plan,
    frames: Callable[[], Sequence[np.ndarray]] = tuple,
) -> dict[str, Any]:
    """Time loading, the first inference and steady single-image inference of one model.

    The timed call takes the runtime's own input (layout, dtype and scale already right) and returns float32 outputs;
    making that input of a decoded image is timed apart, as ``prepare_ns``, and the two in one as ``end_to_end_ns``.
    Whole frames, with what is before and after the network, come after it: see ``time_frames``.

    Args:
        images: uint8 [N, H, W, 3], rotated through.
        placement: as ``keep_to_cores`` gave it.
        frames: gives pictures at their own size; asked once the steady phase is over, which they would disturb.

    Returns:
        The fields of ``Samples``.

    Raises:
        ValueError: no images.
    """
    session, took, _ = start_up(folder, facts, _first(images), placement["threads"])
    images = np.array(images)  # in memory, as a camera gives them: reading a file is not preparing
    prepared, prepare_ns = [], []
    for image in images:
        start = time.perf_counter_ns()
        prepared.append(session.prepare(image[None]))
        prepare_ns.append(time.perf_counter_ns() - start)

    def run(turn: int) -> None:
        session.infer(prepared[turn % len(prepared)])

    warmth = warm_up(run, plan.warm_up_seconds)
    timed = time_calls(run, plan)
    end_to_end_ns = []
    for image in images[:END_TO_END_CALLS]:
        start = time.perf_counter_ns()
        session.infer(session.prepare(image[None]))
        end_to_end_ns.append(time.perf_counter_ns() - start)
    of_frames = time_frames(session, frames(), facts, plan.seconds)
    sustained = sustain(run, plan, float(np.median(timed["latency_ns"]))) if plan.sustained else None
    return {
        **took,
        "prepare_ns": prepare_ns,
        "warm_up": warmth,
        **timed,
        "end_to_end_ns": end_to_end_ns,
        "frames": of_frames,
        "sustained": sustained,
        "placement": placement,
    }
