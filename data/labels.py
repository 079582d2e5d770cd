"""What is right of an image: one class a task, which says where labels lie and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.config import DataPlan
from ..core.progress import note
from ..core.stats import matched_share
from ..runtime.task import Task
from .listing import Others
from .sources import Split, folder


class Labels(Protocol):
    """How the labels of a task are found and read."""

    def folder(self, config: DataPlan, others: Others) -> tuple[Path, list[str], dict[str, Split]]:
        """A user's folder: its root, the names of the outputs, and its splits by name. Raises UserError.

        Args:
            others: told what lies there and is not read.
        """

    def read(self, image: Path, number: int, spec: Mapping[str, Any]) -> np.ndarray | np.integer[Any]:
        """What is right of one image, as the task judges what a network of this InputSpec says of it.

        Args:
            image: the user's file.
            number: what the index says of it; UNLABELED where nobody knows.
        """


class ClassNumbers:
    """An image lies in the folder of its class."""

    def folder(self, config: DataPlan, others: Others) -> tuple[Path, list[str], dict[str, Split]]:
        """``source/<split>/<class>/*``."""
        return folder(config, others)

    def read(self, image: Path, number: int, spec: Mapping[str, Any]) -> np.integer[Any]:
        """The number of its class."""
        return np.int64(number)


IMAGES_A_CLASS = 5  # at least, for a matching of classes to say anything


def other_order(task: Task, outputs: np.ndarray, labels: np.ndarray) -> None:
    """Tell where the outputs [N, K] of somebody's network are right for classes in another order than the data's."""
    said = task.decide(outputs)
    right = task.summary(task.scores(outputs, labels))
    if said.ndim != 1 or len(labels) < IMAGES_A_CLASS * outputs.shape[1]:
        return
    matched = matched_share(said, labels)
    if matched > 0.5 and matched - right.value > 0.3:
        note(
            f"{matched:.0%} of the test images are right if its classes are matched with the data's one to one, and "
            f"{right.value:.0%} as they are: they stand in another order, list them in its own with data.classes"
        )


LABELS: dict[str, Labels] = {"classification": ClassNumbers()}
