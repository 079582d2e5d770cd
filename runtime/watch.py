"""Watches the machine while another process is timed: what everybody takes of the CPUs, clocks, heat, power.

Clocks are read, never changed. Samples stay in memory until they are asked for: a line on standard input is answered
with one of JSON, the end of standard input ends the watch. It holds a lock meanwhile, so that nobody else measures.
"""

from __future__ import annotations

import collections
import fcntl
import json
import os
import select
import sys
import time
from pathlib import Path
from typing import IO, Any

from . import probe

UNAVAILABLE = probe.UNAVAILABLE
SLOW_SECONDS = 1.0  # between two looks at clocks, heat and meters: they cost more than the CPUs' times
KEPT = 100_000  # samples at most, the oldest go: hours


class Locked(Exception):
    """Somebody else holds the lock."""


def take_lock(path: Path, holder: str) -> IO[str]:
    """Hold ``path`` until the returned file is closed or this process ends, however it ends.

    Args:
        holder: who asks, told to whoever comes next.

    Raises:
        Locked: who holds it, and since when.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        stream.seek(0)
        by = stream.readline().strip() or "somebody"
        stream.close()
        raise Locked(f"measured by {by} now: wait until that ends") from None
    stream.truncate(0)
    stream.write(f"{holder} (process {os.getpid()}) since {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}\n")
    stream.flush()
    return stream


def cpu_times(text: str, ticks_a_second: int) -> dict[str, Any]:
    """Nanoseconds of all CPUs together since the start, from the text of /proc/stat.

    Time of guests is inside that of users. Steal is what the hypervisor gave to others while a CPU wanted to run.
    """
    fields = text.partition("\n")[0].split()
    if len(fields) < 9 or fields[0] != "cpu":
        return dict.fromkeys(("busy_ns", "idle_ns", "steal_ns"), UNAVAILABLE)
    user, nice, system, idle, iowait, irq, softirq, steal = (int(field) for field in fields[1:9])
    tick = 1_000_000_000 // ticks_a_second
    return {
        "busy_ns": (user + nice + system + irq + softirq) * tick,
        "idle_ns": (idle + iowait) * tick,
        "steal_ns": steal * tick,
    }


def look(slow: bool, root: Path = probe.ROOT) -> dict[str, Any]:
    """One sample; ``slow`` adds what is read less often."""
    sight: dict[str, Any] = {
        "monotonic_ns": time.monotonic_ns(),
        **cpu_times(probe.read(root / "proc/stat"), os.sysconf("SC_CLK_TCK")),
    }
    if slow:
        sight["khz"] = probe.clocks_khz(root)
        sight["millicelsius"] = probe.temperatures(root)
        sight["throttle_events"] = probe.throttle_events(root)
        sight["throttle_bits"] = probe.throttle_bits(root)
        sight["energy_uj"] = probe.energy_uj(root)
        sight["power_mw"] = probe.power_mw(root)
    return sight


def watch(lock: Path | None, holder: str, hertz: float, protocol_version: int) -> None:
    """Watch for whoever writes to standard input, holding ``lock`` if one is named. Raises Locked."""
    held = take_lock(lock, holder) if lock is not None else None
    try:
        _look_on(hertz, sys.stdin.fileno(), sys.stdout, protocol_version)
    finally:
        if held is not None:
            held.close()


def _look_on(hertz: float, questions: int, answers: IO[str], protocol_version: int) -> None:
    """Look ``hertz`` times a second until ``questions`` ends; answer each of its lines with what was seen since.

    Args:
        questions: the descriptor that is read from.
    """
    sights: collections.deque[dict[str, Any]] = collections.deque(maxlen=KEPT)
    cpus = os.cpu_count() or 1
    begun, slow_at = time.monotonic(), 0.0
    count = 0
    while True:
        now = time.monotonic()
        sights.append(look(now >= slow_at))
        if now >= slow_at:
            slow_at = now + SLOW_SECONDS
        count += 1
        # A long look or a stopped process makes no bunch of looks afterwards.
        count = max(count, int((time.monotonic() - begun) * hertz))
        while select.select([questions], [], [], max(0.0, begun + count / hertz - time.monotonic()))[0]:
            asked = os.read(questions, 4096)
            if not asked:
                return
            for _ in range(asked.count(b"\n")):
                sights.append(look(True))
                told = {"sights": list(sights), "own_cpu_ns": time.process_time_ns(), "cpus": cpus}
                print(json.dumps({"protocol_version": protocol_version, **told}), file=answers, flush=True)
                sights.clear()
