"""What is right of an image: one class a task, which says where labels lie and how they are read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..core.config import DataPlan
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


LABELS: dict[str, Labels] = {"classification": ClassNumbers()}
