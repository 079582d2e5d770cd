"""What a folder of images holds, as a hash that changes when any of them does."""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import os
import sqlite3
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.proc import in_order
from ..core.progress import progress
from .listing import list_images

SAMPLE = 64  # images of a folder that are looked at to know what the others are like
CHUNK = 500  # images that a thread takes at once
COMMITTED = 20_000  # images
PATIENCE_SECONDS = 30.0  # while another process writes


@dataclass(frozen=True)
class Fingerprint:
    """What a folder holds."""

    sha256: str  # over the names and contents of all images
    images: int
    sample: tuple[Path, ...]  # some of them, the same whenever the contents are
    # Of the images that are not empty, as ``digests`` has them.
    digests: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), repr=False, compare=False)


def fingerprint_folder(folder: Path, memory: Path | None = None, names: Iterable[bytes] | None = None) -> Fingerprint:
    """Hash every image below ``folder``; all cores read.

    What cannot be read is left out: it has no contents, and is named when images are decoded.

    Args:
        memory: a file that remembers each image's hash by size and modification time, so that an unchanged folder is
            not read again.
        names: of the images below the folder, where only some of them are wanted.
    """
    total, images, beginnings = hashlib.sha256(), 0, array("Q")
    smallest: list[tuple[int, bytes]] = []  # a heap of the SAMPLE smallest hashes, the largest of them on top
    for row in _rows(folder, list_images(folder) if names is None else names, memory, f"reading {folder}"):
        if row is None:
            continue
        total.update(len(row.name).to_bytes(4, "big") + row.name + row.sha256)
        beginning = int.from_bytes(row.sha256[:8], "big")
        place = (-beginning, row.name)
        if len(smallest) < SAMPLE:
            heapq.heappush(smallest, place)
        elif place > smallest[0]:
            heapq.heapreplace(smallest, place)
        if row.size_bytes:
            beginnings.append(beginning)
        images += 1
    sample = tuple(folder / os.fsdecode(name) for _, name in sorted(smallest, reverse=True))
    return Fingerprint(total.hexdigest(), images, sample, np.array(beginnings, np.uint64))


def digests(folder: Path, names: Iterable[bytes], memory: Path | None = None) -> np.ndarray:
    """The first 64 bits of the hash of each file's contents, uint64 [N]: equal where they are; 0 where there are none.

    Args:
        memory: as ``fingerprint_folder``.
    """
    rows = _rows(folder, names, memory, f"comparing images of {folder}")
    found = (int.from_bytes(row.sha256[:8], "big") if row is not None and row.size_bytes else 0 for row in rows)
    return np.fromiter(found, np.uint64)


def _rows(folder: Path, names: Iterable[bytes], memory: Path | None, what: str) -> Iterator[Row | None]:
    """Each image as it is now, in the order of ``names``; None where it cannot be read."""
    base = os.fsencode(folder) + b"/"

    def hashed(chunk: tuple[list[bytes], dict[bytes, Row]]) -> tuple[list[Row | None], list[Row]]:
        names, known = chunk
        rows = [_hashed(base, name, known.get(name)) for name in names]
        return rows, [row for row in rows if row is not None and known.get(row.name) is not row]

    with _Memory(memory) as seen, progress(what, None) as advance:
        chunks = ((names, seen.rows(names)) for names in _chunks(iter(names), CHUNK))
        for rows, new in in_order(hashed, chunks):
            seen.remember(new)
            yield from rows
            advance(len(rows), "images")


class Row(NamedTuple):
    """An image as it was when it was read."""

    name: bytes
    size_bytes: int
    modified_ns: int
    sha256: bytes


def _hashed(base: bytes, name: bytes, known: Row | None) -> Row | None:
    try:
        status = os.stat(base + name)  # noqa: PTH116 (bytes)
        if known is not None and (known.size_bytes, known.modified_ns) == (status.st_size, status.st_mtime_ns):
            return known
        with open(base + name, "rb") as stream:  # noqa: PTH123 (bytes)
            digest = hashlib.file_digest(stream, "sha256").digest()
    except OSError:
        return None
    return Row(name, status.st_size, status.st_mtime_ns, digest)


def _chunks(names: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    while chunk := list(itertools.islice(names, size)):
        yield chunk


class _Memory:
    """Rows of images that were read before, in a file that survives a kill; without a file nothing is remembered.

    It only saves time: what cannot be written down (a full disk, another process at it) is read again next time.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._rows: sqlite3.Connection | None = None
        self._uncommitted = 0

    def __enter__(self) -> _Memory:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(sqlite3.OperationalError):
                try:
                    self._rows = _opened(self._path)
                except sqlite3.OperationalError:
                    raise
                except sqlite3.DatabaseError:  # no such file of ours, or a torn one
                    self._path.unlink()
                    self._rows = _opened(self._path)
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows is not None:
            with contextlib.suppress(sqlite3.OperationalError):
                self._rows.commit()
            self._rows.close()

    def rows(self, names: Sequence[bytes]) -> dict[bytes, Row]:
        """What is remembered of ``names``."""
        if self._rows is None:
            return {}
        wanted = f"SELECT * FROM images WHERE name IN ({','.join('?' * len(names))})"
        return {row[0]: Row(*row) for row in self._rows.execute(wanted, names)}

    def remember(self, rows: Sequence[Row]) -> None:
        if self._rows is not None and rows:
            with contextlib.suppress(sqlite3.OperationalError):
                self._rows.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?)", rows)
                self._uncommitted += len(rows)
                if self._uncommitted >= COMMITTED:  # a kill loses no more, and another process waits no longer
                    self._rows.commit()
                    self._uncommitted = 0


def _opened(path: Path) -> sqlite3.Connection:
    rows = sqlite3.connect(path, timeout=PATIENCE_SECONDS)
    columns = "name BLOB PRIMARY KEY, size_bytes INTEGER, modified_ns INTEGER, sha256 BLOB"
    rows.execute(f"CREATE TABLE IF NOT EXISTS images ({columns}) WITHOUT ROWID")
    rows.execute("SELECT name, size_bytes, modified_ns, sha256 FROM images LIMIT 1").fetchall()
    return rows
