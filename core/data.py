"""What the rooms agree on about images: the sealed Dataset, its splits and fingerprints."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .artifact import Artifact, canonical, sha256_file
from .errors import UserError
from .inputs import InputSpec as InputSpec  # part of the same agreement

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
UNLABELED = -1  # label of an image that has none
Part = Literal["train", "val", "test", "unlabeled"]


@dataclass(frozen=True)
class Sample:
    path: Path
    label: int


class Dataset(Artifact):
    """Images by reference (a user's folder) or by value (everything else), split once and for all.

    ``index.json``: classes, per part a list of [file, label], and the folder below which its files lie (null:
    the artifact itself).
    """

    kind = "dataset"

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads(self.file("index.json").read_text())
        return index

    @property
    def classes(self) -> list[str]:
        return list(self._index()["classes"])

    def check_classes_of(self, artifact: Artifact, what: str) -> None:
        """Refuse a checkpoint, model or bundle whose outputs mean something else. Raises UserError."""
        labels = json.loads(artifact.file("labels.json").read_text())
        if labels != self.classes:
            how = (
                "the same classes in another order"
                if sorted(labels) == sorted(self.classes)
                else f"{len(labels)} other classes than the data ({len(self.classes)})"
            )
            raise UserError(f"{what} {artifact.path} knows {how}: classes and their order must be the same")

    def samples(self, part: Part) -> list[Sample]:
        """The images of one part, in the order of the index."""
        index = self._index()
        folder = index["roots"].get(part)
        root = self.path if folder is None else Path(folder)
        return [Sample(root / name, label) for name, label in index["parts"].get(part, [])]

    def balanced(self, part: Part, count: int, seed: int, skip: int = 0) -> list[Sample]:
        """``count`` seeded samples of one part (or all it has), classes taking turns, after ``skip`` others."""
        samples = self.samples(part)
        return [samples[at] for at in self.positions(part, skip + count, seed)[skip:]]

    def positions(self, part: Part, count: int, seed: int) -> np.ndarray:
        """Where in ``samples(part)`` the ``balanced`` ones are, as they are drawn."""
        return stratified_count([sample.label for sample in self.samples(part)], count, seed)


def stratified_order(labels: Sequence[int] | np.ndarray, seed: int) -> list[np.ndarray]:
    """Per class, its positions in ``labels`` in a seeded random order."""
    values = np.asarray(labels)
    generator = np.random.default_rng(seed)
    return [generator.permutation(np.flatnonzero(values == label)) for label in np.unique(values)]


def stratified_fraction(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted positions of ``fraction`` of each class (at least one, or none of 0), nested: 10 % lies inside 20 %."""
    if not fraction:
        return np.empty(0, np.int64)
    chosen = [order[: max(1, round(len(order) * fraction))] for order in stratified_order(labels, seed)]
    return np.sort(np.concatenate(chosen))


def stratified_count(labels: Sequence[int] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of ``count`` samples, as even over the classes as they allow, classes taking turns."""
    orders = stratified_order(labels, seed)
    turns = [order[turn] for turn in range(max(map(len, orders), default=0)) for order in orders if turn < len(order)]
    return np.asarray(turns[:count], dtype=np.int64)


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
