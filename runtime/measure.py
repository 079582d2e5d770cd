"""Timing one opened model in one process. Raw nanoseconds; nothing is trimmed here or later."""

from __future__ import annotations

import contextlib
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import RUNTIMES, open_session
from .installed import installed

WARM_UP_CALLS = 10  # at least, however slow the model
WARM_UP_PATIENCE = 5  # times the least warm-up, then it is given up as not settled
WINDOWS = 5  # of the least warm-up: the last three agree over 0.6 of it, a ramp of the clock shows in that
WINDOW_CALLS = 4  # at least in a window
AGREEMENT = 0.03  # the last three windows' medians agree within this share of their median
MEMORY_CALLS = 3  # inferences after which the peak is read: arenas are planned after the first


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


def warm_up(run: Any, seconds: float) -> dict[str, Any]:
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


def longest_seconds(
    open_seconds: float, image_seconds: float, images: int, seconds: float, min_samples: int, warm_up_seconds: float
) -> float:
    """How long ``measure`` takes at most, where opening and one image (prepared and inferred) take that long."""
    windows = WARM_UP_PATIENCE + 1 / WINDOWS
    calls = 1 + MEMORY_CALLS + max(WARM_UP_CALLS, 3 * WINDOW_CALLS) + WINDOW_CALLS + images + min_samples + 1
    return open_seconds + windows * warm_up_seconds + seconds + calls * image_seconds


def measure(
    folder: Path,
    facts: dict[str, Any],
    images: np.ndarray,
    threads: int,
    seconds: float,
    min_samples: int,
    warm_up_seconds: float,
) -> dict[str, Any]:
    """Time loading, the first inference and steady single-image inference of one model.

    The timed call takes the runtime's own input (layout, dtype and scale already right) and returns
    float32 logits; making that input is timed apart, as ``prepare_ns``.

    ``memory_before_open_bytes`` is what is resident once the runtime's modules are imported;
    ``peak_memory_bytes`` the largest resident set from there on, until a few inferences of one image are done.
    Their difference holds all that opening and running take: the file as it is read or mapped, weights as the
    runtime packs them, activations, libraries that it loads at opening, one prepared image. It does not hold
    the interpreter, numpy, the check of the hashes, and the other images.

    Args:
        images: uint8 [N, H, W, 3], rotated through.
        seconds, min_samples: stop when both are reached.
        warm_up_seconds: as ``warm_up`` takes it.

    Returns:
        A mapping with durations in ns, memory in bytes and the runtime's description.

    Raises:
        ValueError: no images.
    """
    if len(images) == 0:
        raise ValueError("no images to time with: wanted at least one")
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

    one = session.prepare(images[:1])
    start = time.perf_counter_ns()
    session.infer(one)
    first_ns = time.perf_counter_ns() - start
    for _ in range(MEMORY_CALLS):
        session.infer(one)
    peak_memory = peak_memory_bytes()

    prepared, prepare_ns = [], []
    for image in images:
        start = time.perf_counter_ns()
        prepared.append(session.prepare(image[None]))
        prepare_ns.append(time.perf_counter_ns() - start)

    warmth = warm_up(lambda turn: session.infer(prepared[turn % len(prepared)]), warm_up_seconds)

    latency_ns: list[int] = []
    begun = time.monotonic()
    while time.monotonic() - begun < seconds or len(latency_ns) < min_samples:
        image = prepared[len(latency_ns) % len(prepared)]
        start = time.perf_counter_ns()
        session.infer(image)
        latency_ns.append(time.perf_counter_ns() - start)

    return {
        "import_ns": import_ns,
        "load_ns": load_ns,
        "first_ns": first_ns,
        "prepare_ns": prepare_ns,
        "warm_up": warmth,
        "latency_ns": latency_ns,
        "peak_memory_bytes": peak_memory,
        "memory_before_open_bytes": memory_before,
        "session": session.describe(),
    }
