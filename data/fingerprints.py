"""What a folder of images holds, as a hash that changes when any of them does."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..core.artifact import canonical, sha256_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def list_images(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """(POSIX name, status) of every image below ``folder``, sorted by name."""
    for name in sorted(
        (Path(base) / file).relative_to(folder).as_posix()
        for base, _, files in os.walk(folder, followlinks=True)
        for file in files
        if file.lower().endswith(IMAGE_SUFFIXES)
    ):
        yield name, (folder / name).stat()


def fingerprint_folder(folder: Path, memory: Path | None = None) -> str:
    """sha256 over the names and contents of all images below ``folder``.

    ``memory`` is a file that remembers each image's hash by size and modification time, so that an
    unchanged folder is not read again.
    """
    known: Mapping[str, list[Any]] = {}
    if memory is not None and memory.is_file():
        try:
            known = json.loads(memory.read_text())
        except ValueError:
            known = {}  # a torn write: hash everything again
    hashes = {}
    for name, status in list_images(folder):
        stamp = [status.st_size, status.st_mtime_ns]
        seen = known.get(name)
        hashes[name] = [*stamp, seen[2] if seen and seen[:2] == stamp else sha256_file(folder / name)]
    if memory is not None and hashes != known:
        memory.parent.mkdir(parents=True, exist_ok=True)
        draft = memory.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(hashes))
        os.replace(draft, memory)
    return hashlib.sha256(canonical([[name, entry[2]] for name, entry in hashes.items()])).hexdigest()
