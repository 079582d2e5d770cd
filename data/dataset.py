"""The sealed Dataset: images and labels by part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..core.artifact import Artifact, Record
from ..core.errors import UserError
from ..core.kinds import Labelled
from .splits import stratified_count

UNLABELED = -1  # label of an image that has none
Part = Literal["train", "val", "test", "unlabeled"]


@dataclass(frozen=True)
class Sample:
    path: Path
    label: int


class DatasetFacts(Record):
    """Where the images came from, what is asked of them, and how many there are by part."""

    task: str
    source: str
    classes: int
    images: dict[str, int]


class Dataset(Artifact[DatasetFacts]):
    """Images by reference (a user's folder) or by value (everything else), split once and for all.

    ``index.json``: classes, per part a list of [file, label], and the folder below which its files lie (null:
    the artifact itself).
    """

    kind = "dataset"
    Facts = DatasetFacts
    INDEX = "index.json"

    def _index(self) -> dict[str, Any]:
        index: dict[str, Any] = json.loads(self.file(self.INDEX).read_text())
        return index

    @property
    def classes(self) -> list[str]:
        return list(self._index()["classes"])

    def check_classes_of(self, artifact: Labelled[Any], what: str) -> None:
        """Refuse a checkpoint, model or bundle whose outputs mean something else. Raises UserError."""
        labels = artifact.labels
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
