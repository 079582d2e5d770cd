"""Legs of a run side by side: each in a process of its own, by the command that the plan has for it.

What is made so is what the run would have made by itself. A leg that fails is left to the run, which tries it once more
and says why. No leg is made while this host is measured (see ``devices.lock``), however many may be.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import pipeline
from .chain import Chain
from .core.config import Recipe
from .core.errors import UserError
from .core.progress import note, progress
from .core.remote import STORE, Store

SIDE_BY_SIDE = ("export", "quantize", "package")  # training uses every core by itself, and a host is measured alone
LOOK_SECONDS = 0.1
PATIENCE_SECONDS = 10.0  # for a leg that is to stop
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def read_bytes(text: str, option: str) -> int:
    """A size such as 8GB or 500MiB. Raises UserError."""
    found = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?([A-Za-z]+)", text.strip())
    if found is None or found[2].upper() not in UNITS or not float(found[1]):
        raise UserError(f"{option}: wanted a size such as 8GB or 500MiB, found '{text}'")
    return round(float(found[1]) * UNITS[found[2].upper()])


@dataclass
class Ahead:
    """Makes the legs of a stage side by side before a run comes to it.

    Args:
        jobs: processes at most.
        memory_bytes: that all of them may take together. Past it the youngest is stopped, to be made again once there
            is room; one alone is never stopped. None: any.
    """

    recipe: Recipe
    chain: Chain
    jobs: int = 1
    memory_bytes: int | None = None
    _running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def __call__(self, stage: str) -> None:
        """Make what can be made of ``stage`` now."""
        if self.jobs < 2 or stage not in SIDE_BY_SIDE:
            return
        legs = {leg.id: leg for leg in pipeline.plan(self.recipe, self.chain, until=stage)}
        ready = [
            leg
            for leg in legs.values()
            if leg.stage == stage
            and leg.command is not None
            and not (leg.sealed or leg.perhaps)
            and all(legs[other].sealed or legs[other].command is None for other in leg.after)
        ]
        if len(ready) > 1:
            self._make(ready)

    def _make(self, legs: Sequence[pipeline.Leg]) -> None:
        waiting, jobs = deque(legs), self.jobs
        with progress(f"{legs[0].stage}, {jobs} side by side", len(legs)) as advance:
            try:
                while waiting or self._running:
                    while waiting and len(self._running) < jobs:
                        leg = waiting.popleft()
                        assert leg.command is not None
                        self._running[leg.id] = _start(leg.command, self.chain.store)
                    time.sleep(LOOK_SECONDS)
                    for id in [id for id, process in self._running.items() if process.poll() is not None]:
                        del self._running[id]
                        advance(1, id)
                    if len(self._running) > 1 and self._takes_too_much():
                        youngest = list(self._running)[-1]
                        _stop([self._running.pop(youngest)])
                        waiting.append(next(leg for leg in legs if leg.id == youngest))
                        jobs = len(self._running)
                        note(f"{youngest} waits: all together took more memory than --memory-limit allows")
            finally:
                _stop(self._running.values())
                self._running.clear()

    def _takes_too_much(self) -> bool:
        if self.memory_bytes is None:
            return False
        return memory_of({process.pid for process in self._running.values()}) > self.memory_bytes


def _start(command: Sequence[str], store: Store | None) -> subprocess.Popen[bytes]:
    own = {} if store is None else {STORE: store.url}
    return subprocess.Popen(
        [sys.executable, "-m", __name__.partition(".")[0], *command[1:]],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: value for name, value in os.environ.items() if name != STORE} | own,
        start_new_session=True,  # Ctrl-C comes to the run, which stops them in order
    )


def _stop(processes: Iterable[subprocess.Popen[bytes]]) -> None:
    """Interrupt what still runs, so that it cleans up; what does not end by itself is ended with all it started."""
    running = [process for process in list(processes) if process.poll() is None]
    for process in running:
        process.send_signal(signal.SIGINT)
    end = time.monotonic() + PATIENCE_SECONDS
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, end - time.monotonic()))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def memory_of(sessions: set[int]) -> int:
    """Resident bytes of all processes of these sessions; what they share counts for each."""
    pages = 0
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            fields = status.read_text().rpartition(")")[2].split()  # the name before may hold anything
            if int(fields[3]) in sessions:
                pages += int(fields[21])
    return pages * os.sysconf("SC_PAGE_SIZE")
