"""Timing one opened model in one process. Raw nanoseconds; nothing is trimmed here or later."""

from __future__ import annotations

import contextlib
import importlib
import time
from pathlib import Path
from typing import Any

import numpy as np

from . import RUNTIMES, open_session

WARMUP_WINDOW = 10  # inferences
WARMUP_AGREEMENT = 0.03  # the last three windows' medians agree within this share of their median
WARMUP_LIMIT_SECONDS = 5.0


def peak_memory_bytes() -> int:
    """Largest resident set of this process so far.

    Read from the kernel's own high-water mark: getrusage's survives exec and would report the parent's.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def warm_up(run: Any) -> dict[str, Any]:
    """Call ``run(i)`` until three windows agree, or the limit is reached (then ``settled`` is false)."""
    medians: list[float] = []
    begun = time.monotonic()
    while time.monotonic() - begun < WARMUP_LIMIT_SECONDS or len(medians) < 3:
        window = []
        for turn in range(WARMUP_WINDOW):
            start = time.perf_counter_ns()
            run(len(medians) * WARMUP_WINDOW + turn)
            window.append(time.perf_counter_ns() - start)
        medians.append(float(np.median(window)))
        last = medians[-3:]
        if len(last) == 3 and max(last) - min(last) <= WARMUP_AGREEMENT * float(np.median(last)):
            return {"window_median_ns": medians, "settled": True}
    return {"window_median_ns": medians, "settled": False}


def measure(
    folder: Path, facts: dict[str, Any], images: np.ndarray, threads: int, seconds: float, min_samples: int
) -> dict[str, Any]:
    """Time loading, the first inference and steady single-image inference of one model.

    The timed call takes the runtime's own input (layout, dtype and scale already right) and returns
    float32 logits; making that input is timed apart, as ``prepare_ns``.

    Args:
        images: uint8 [N, H, W, 3], rotated through.
        seconds, min_samples: stop when both are reached.

    Returns:
        A mapping with durations in ns, memory in bytes and the runtime's description.
    """
    start = time.perf_counter_ns()
    for module in RUNTIMES[facts["target"]].modules:
        with contextlib.suppress(ImportError):  # opening says what is missing
            importlib.import_module(module)
    import_ns = time.perf_counter_ns() - start
    memory_before = peak_memory_bytes()

    start = time.perf_counter_ns()
    session = open_session(folder, facts, threads)
    load_ns = time.perf_counter_ns() - start

    prepared, prepare_ns = [], []
    for image in images:
        start = time.perf_counter_ns()
        prepared.append(session.prepare(image[None]))
        prepare_ns.append(time.perf_counter_ns() - start)

    start = time.perf_counter_ns()
    session.infer(prepared[0])
    first_ns = time.perf_counter_ns() - start

    warmth = warm_up(lambda turn: session.infer(prepared[turn % len(prepared)]))

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
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_before_open_bytes": memory_before,
        "session": session.describe(),
    }
