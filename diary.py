"""How far each run in a folder of artifacts is, on disk, so that another command can tell; and what failed last.

A run holds the lock of its page as long as it lives: the kernel releases it however the run ends. What is written here
is for people alone. No artifact depends on it, and where it cannot be written a run goes on without.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self, TypeVar

from pydantic import ValidationError

from .core.artifact import MANIFEST, RESUME, Record, is_held
from .core.sealed import Unsound, printable, read_json

DIARIES = ".runs"  # in a folder of artifacts
FAILURES = "failed"  # below that: a file a leg
LARGEST_PAGE_BYTES = 16 * 2**20
PART = ".part"

R = TypeVar("R", bound=Record)


class Page(Record):
    """How far a run is; ``waiting`` has the seconds that each leg will take, None where nobody knows."""

    command: tuple[str, ...]
    folder: str  # of its artifacts, below the one that the page lies in; empty for that itself
    process: int
    begun_unix: float
    done: int
    now: str | None
    now_unix: float
    waiting: dict[str, float | None]


class Failure(Record):
    """Why a leg could not be made when it was tried last."""

    leg: str
    message: str
    exit_code: int
    failed_unix: float


class Diary:
    """A run writes here how far it is; leaving the block closes it."""

    def __init__(self, folder: Path, command: Sequence[str], below: str = "") -> None:
        """Nothing is written before the first leg is begun.

        Args:
            command: that goes on with the run, as it was given.
            below: the folder of its artifacts, where they do not lie in ``folder`` itself.
        """
        self._folder, self._below = folder / DIARIES, below
        self._command = tuple(printable(word, 1000) for word in command)  # as it can be read back
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._begun = time.time()
        self._waiting: dict[str, float | None] = {}
        self._done = 0
        self._lock: int | None = None

    def begin(self, leg: str, waiting: Mapping[str, float | None], done: int) -> None:
        """``leg`` is being made now; of all that are not sealed, seconds as far as they are known."""
        self._waiting, self._done = dict(waiting), done
        self._write(leg)

    def end(self, leg: str) -> None:
        """``leg`` is there."""
        self._done += 1
        self._waiting.pop(leg, None)
        self.forgive(leg)
        if self._lock is not None:
            self._write(None)

    def fail(self, leg: str, message: str, exit_code: int) -> None:
        """``leg`` could not be made: kept until it can."""
        self._waiting.pop(leg, None)
        failure = Failure(leg=leg, message=printable(message, 2000), exit_code=exit_code, failed_unix=time.time())
        with contextlib.suppress(OSError):
            (self._folder / FAILURES).mkdir(parents=True, exist_ok=True)
            _replace(self._folder / FAILURES / f"{leg}.json", failure)
        if self._lock is not None:
            self._write(None)

    def forgive(self, leg: str) -> None:
        """Forget that ``leg`` failed."""
        with contextlib.suppress(OSError):
            (self._folder / FAILURES / f"{leg}.json").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the page away, and those of killed runs that this one has gone on with."""
        with contextlib.suppress(OSError):
            (self._folder / f"{self._name}.json").unlink(missing_ok=True)
            (self._folder / f"{self._name}.lock").unlink(missing_ok=True)
        self._take_over()
        if self._lock is not None:
            os.close(self._lock)
        for folder in (self._folder / FAILURES, self._folder):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _take_over(self) -> None:
        """Take the pages away that runs by the same command left when they were killed."""
        with contextlib.suppress(OSError):
            for path, page in _read_all(self._folder, Page):
                if page.command == self._command and not is_held(path.with_suffix(".lock")):
                    path.unlink(missing_ok=True)
                    path.with_suffix(".lock").unlink(missing_ok=True)

    def _write(self, now: str | None) -> None:
        page = Page(
            command=self._command,
            folder=self._below,
            process=os.getpid(),
            begun_unix=self._begun,
            done=self._done,
            now=now,
            now_unix=time.time(),
            waiting=self._waiting,
        )
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            if self._lock is None:
                self._lock = os.open(self._folder / f"{self._name}.lock", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._lock, fcntl.LOCK_EX)
                self._take_over()
            _replace(self._folder / f"{self._name}.json", page)


def _replace(path: Path, value: Record) -> None:
    """Write a file whole: who reads it meanwhile reads what was there before."""
    new = path.with_name(f"{path.name}.{os.getpid()}.new")
    try:
        new.write_text(value.model_dump_json())
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def _read_all(folder: Path, kind: type[R]) -> Iterator[tuple[Path, R]]:
    """What can be read of a folder's files; what was half written when the machine stopped is none."""
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, Unsound, ValidationError):
            yield path, kind.model_validate(read_json(path, LARGEST_PAGE_BYTES))


# ---- reading it ----------------------------------------------------------------------------------------------


class Run(Record):
    """A run as it is now; ``left_seconds`` counts those of ``waiting`` and ``now`` that are known."""

    command: tuple[str, ...]
    process: int
    lives: bool
    begun_unix: float
    done: int
    now: str | None
    now_seconds: float
    waiting: tuple[str, ...]
    left_seconds: float
    unknown: int  # legs of which nobody knows how long they take


class Status(Record):
    """What goes on in a folder of artifacts."""

    folder: str
    runs: tuple[Run, ...]
    failed: tuple[Failure, ...]
    being_made: tuple[str, ...]  # by a process that lives
    left_behind: dict[str, bool]  # what a process that is gone left, and whether the same command goes on with it


def status(folder: Path) -> Status:
    """Look at a folder of artifacts; nothing is changed."""
    runs = [run for path, page in _read_all(folder / DIARIES, Page) if (run := _run(folder, path, page)) is not None]
    failures = [failure for _, failure in _read_all(folder / DIARIES / FAILURES, Failure)]
    parts = [path for path in sorted(folder.glob(f"*{PART}")) if path.is_dir() and not path.is_symlink()]
    held = {path: is_held(path) for path in parts}
    return Status(
        folder=str(folder),
        runs=tuple(runs),
        failed=tuple(each for each in failures if not _is_sealed(folder, each.leg)),
        being_made=tuple(path.name.removesuffix(PART) for path in parts if held[path]),
        left_behind={
            path.name.removesuffix(PART): any(each.name != "key" for each in (path / RESUME).glob("*"))
            for path in parts
            if not held[path]
        },
    )


def _is_sealed(folder: Path, leg: str) -> bool:
    return Path(leg).name == leg and (folder / leg / MANIFEST).is_file()


def _run(folder: Path, path: Path, page: Page) -> Run | None:
    """The run of a page; None of one that is gone and left nothing to do."""
    lives = is_held(path.with_suffix(".lock"))
    below = folder / page.folder if Path(page.folder).parts[:1] != ("..",) else folder
    open_legs = {leg: seconds for leg, seconds in page.waiting.items() if not _is_sealed(below, leg)}
    if not lives and not open_legs:
        return None
    now = page.now if page.now in open_legs else None
    spent = max(0.0, time.time() - page.now_unix) if now and lives else 0.0
    left = [max(0.0, seconds - spent * (leg == now)) for leg, seconds in open_legs.items() if seconds is not None]
    return Run(
        command=tuple(printable(word, 300) for word in page.command),
        process=page.process,
        lives=lives,
        begun_unix=page.begun_unix,
        done=page.done,
        now=now,
        now_seconds=spent,
        waiting=tuple(leg for leg in open_legs if leg != now),
        left_seconds=sum(left),
        unknown=sum(seconds is None for seconds in open_legs.values()),
    )
