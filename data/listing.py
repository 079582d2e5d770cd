"""The images of a folder, and what else lies in it: counted and named, never silent."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..core.sealed import printable
from .formats import has_suffix, is_marked

MOST_KINDS = 50  # that are told apart; what comes later is counted together
MOST_NAMED = 1000  # of what is told by name
NO_FOLDERS_OF_IMAGES = (b"__MACOSX", b"@eaDir")  # what macOS and Synology put beside images, about them
REMEMBERED = ".fingerprints"  # lies in a folder of artifacts


@dataclass
class Others:
    """What was found in a folder and is not read."""

    counts: dict[str, int] = field(default_factory=dict)  # by kind
    examples: dict[str, str] = field(default_factory=dict)  # the first of each kind
    # Names of images that are none, such as links to nowhere, and why; the first of them, and how many there are.
    missing: list[tuple[bytes, str]] = field(default_factory=list)
    missing_count: int = 0
    folder: bytes = b""  # that names are told with

    def add(self, kind: str, name: bytes) -> None:
        """Count something of this kind."""
        if kind not in self.counts and len(self.counts) >= MOST_KINDS:
            kind = "others"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.examples.setdefault(kind, printable(os.fsdecode(self.folder + name), 300))

    def words(self) -> str:
        """What was found, in a few words; empty where nothing was."""
        return "; ".join(f"{kind}: {count} (such as {self.examples[kind]})" for kind, count in self.counts.items())

    def add_missing(self, name: bytes, reason: str) -> None:
        """Count what has the name of an image and is no file."""
        self.missing_count += 1
        if len(self.missing) < MOST_NAMED:
            self.missing.append((self.folder + name, reason))


def list_images(folder: Path, others: Others | None = None, below: bytes = b"") -> Iterator[bytes]:
    """The name of every image below ``folder``, as bytes; folder by folder, and in each by name.

    Links are followed, but not back to a folder that they lie in. Hidden folders are left out.

    Args:
        others: told what is not read.
        below: put before every name.
    """
    others = Others() if others is None else others
    base = os.fsencode(folder)
    around = frozenset(_identity(os.fsencode(parent)) for parent in folder.absolute().parents)
    pending: list[tuple[bytes, frozenset[tuple[int, int]]]] = [(b"", around)]
    while pending:
        place, above = pending.pop()
        identity = _identity(os.path.join(base, place))  # noqa: PTH118 (bytes)
        if identity in above:
            others.add("links back to a folder that they lie in", below + place)
            continue
        with os.scandir(os.path.join(base, place)) as entries:  # noqa: PTH118 (bytes)
            here = sorted((entry.name, kind_of(entry)) for entry in entries)
        prefix = place + b"/" if place else b""
        for name, kind in here:
            if kind == "folder":
                if is_hidden(name):
                    others.add("hidden folders", below + prefix + name)
            elif _is_image(base + b"/" + prefix + name, name, kind, below + prefix + name, others):
                yield below + prefix + name
        inside = [prefix + name for name, kind in reversed(here) if kind == "folder" and not is_hidden(name)]
        pending.extend((name, above | {identity}) for name in inside)


def _identity(folder: bytes) -> tuple[int, int]:
    status = os.stat(folder)  # noqa: PTH116 (bytes)
    return status.st_dev, status.st_ino


def is_hidden(name: bytes) -> bool:
    """Whether a folder of this name is for programs, not for people: ``.ipynb_checkpoints``, ``__MACOSX``."""
    return name.startswith(b".") or name in NO_FOLDERS_OF_IMAGES


def kind_of(entry: os.DirEntry[bytes]) -> str:
    """folder, file, or what else it is in a few words; links are followed."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        return "a link to nowhere" if entry.is_symlink() else "neither a file nor a folder"
    except OSError as error:
        return f"a link to nowhere ({error.strerror})"


def _is_image(path: bytes, name: bytes, kind: str, shown: bytes, others: Others) -> bool:
    suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 (bytes)
    if kind != "file":
        if has_suffix(name):
            others.add_missing(shown, kind)
        else:
            others.add("links to nowhere, pipes and the like", shown)
        return False
    if has_suffix(name) or (not suffix and is_marked(path)):
        return True
    others.add(f"{printable(os.fsdecode(suffix), 20)} files" if suffix else "files without suffix", shown)
    return False
