"""What a measuring session has so far, on disk process by process: stopped or killed, it goes on from there."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from ..core.artifact import Record
from ..core.kinds import Prediction, Samples, Surroundings

# A session that stood still for longer is not one: the machine is another by then (its load, clock, heat), and
# rounds of before and after must not be pooled. Outputs do not depend on when they were made.
PAUSE_LIMIT_SECONDS = 600.0

R = TypeVar("R", bound=Record)


class _Session(Record):
    """What all processes of a session share."""

    order_seed: int
    timed: list[str]
    pauses_seconds: list[float]


class _Process(Record):
    """One line of the journal: a process that was measured, or why one failed for good."""

    ended_unix: float
    round: int
    name: str
    samples: Samples | None = None
    around: Surroundings | None = None
    failure: str | None = None


class Journal:
    """The folder in which a session is kept until it is sealed.

    After ``begin``: ``order_seed`` draws who is measured when, ``runs`` holds what was measured by (round, name) and
    ``around`` what the device did meanwhile, ``failed`` why a bundle was given up, ``pauses_seconds`` how long the
    session stood still.
    """

    def __init__(self, folder: Path) -> None:
        self._session, self._processes = folder / "session.json", folder / "processes.jsonl"
        self._outputs = folder / "outputs"
        self.runs: dict[tuple[int, str], Samples] = {}
        self.around: dict[tuple[int, str], Surroundings | None] = {}
        self.failed: dict[str, str] = {}
        self.pauses_seconds: list[float] = []
        self.order_seed = secrets.randbits(32)

    def begin(self, timed: Sequence[str], longest_process_seconds: float) -> int:
        """Go on with the session of these rows if it is still one, else begin anew.

        After a pause of more than ten minutes times are taken anew, in another order. A process that was stopped
        left nothing: up to ``longest_process_seconds`` of what seems a pause it may have been at work.

        Returns:
            How many processes were measured in a session that is none any more.
        """
        session, kept = self._read()
        pause = max(0.0, time.time() - kept[-1].ended_unix) if kept else 0.0
        limit = PAUSE_LIMIT_SECONDS + longest_process_seconds
        if session is None or session.timed != list(timed) or pause > limit:
            self._processes.unlink(missing_ok=True)
            self._write_session(timed)
            return len(kept)
        self.order_seed, self.pauses_seconds = session.order_seed, session.pauses_seconds
        if kept:
            self.pauses_seconds = [*self.pauses_seconds, round(pause, 3)]
        self._write_session(timed)
        # A line that a kill cut short goes: the next one must begin on a line of its own.
        _replace(self._processes, "".join(map(_line, kept)))
        for process in kept:
            self._take(process)
        return 0

    def add(self, at: int, name: str, samples: Samples, around: Surroundings | None) -> None:
        """Keep what one process measured in round ``at``, and what the device did meanwhile."""
        self._append(_Process(ended_unix=time.time(), round=at, name=name, samples=samples, around=around))

    def give_up(self, at: int, name: str, failure: str) -> None:
        """Keep why a bundle failed for good in round ``at``."""
        self._append(_Process(ended_unix=time.time(), round=at, name=name, failure=failure))

    def outputs(self, bundle: str, part: str) -> Path:
        """Where a bundle's outputs for a part of the images are put; they count once ``add_answer`` was called."""
        (self._outputs / bundle).mkdir(parents=True, exist_ok=True)
        return self._outputs / bundle / f"{part}.npy"

    def add_answer(self, bundle: str, part: str, answer: Prediction) -> None:
        """Keep what came with a bundle's outputs, once these are safe."""
        path = self.outputs(bundle, part)
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        _replace(path.with_suffix(".json"), _line(answer))

    def answer(self, bundle: str, part: str) -> Prediction | None:
        """What came with a bundle's outputs for a part of the images, if they lie here."""
        path = self.outputs(bundle, part)
        return _load(Prediction, path.with_suffix(".json")) if path.is_file() else None

    def _take(self, process: _Process) -> None:
        if process.samples is not None:
            self.runs[process.round, process.name] = process.samples
            self.around[process.round, process.name] = process.around
        if process.failure is not None:
            self.failed[process.name] = process.failure

    def _append(self, process: _Process) -> None:
        with self._processes.open("a") as stream:
            stream.write(_line(process))
            stream.flush()
            os.fsync(stream.fileno())
        self._take(process)

    def _write_session(self, timed: Sequence[str]) -> None:
        session = _Session(order_seed=self.order_seed, timed=list(timed), pauses_seconds=self.pauses_seconds)
        _replace(self._session, _line(session))

    def _read(self) -> tuple[_Session | None, list[_Process]]:
        """The session, and every whole line up to the first that is not."""
        found: list[_Process] = []
        written = self._processes.read_bytes() if self._processes.is_file() else b""
        for line in written.split(b"\n"):
            try:
                found.append(_record(_Process, line))
            except ValueError:
                break
        return _load(_Session, self._session), found


def _line(record: Record) -> str:
    """A record after its hash: what a kill cut short or a disk changed is none."""
    text = record.model_dump_json()
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"


def _record(kind: type[R], line: bytes) -> R:
    """The record of a line. Raises ValueError where it is not as it was written."""
    digest, _, text = line.partition(b" ")
    if hashlib.sha256(text).hexdigest().encode() != digest:
        raise ValueError("not the line that was written")
    return kind.model_validate_json(text)


def _load(kind: type[R], path: Path) -> R | None:
    """A record that ``_replace`` wrote; None where there is none, or one of another version of kdpipe."""
    try:
        return _record(kind, path.read_bytes().rstrip(b"\n"))
    except (FileNotFoundError, ValueError):
        return None


def _replace(path: Path, text: str) -> None:
    """Write all of a file or nothing."""
    ready = path.with_name(path.name + ".new")
    with ready.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    ready.replace(path)
