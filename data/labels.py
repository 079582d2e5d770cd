"""What is right of an image: one class a task, which says where labels lie and how they are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..core.config import DataPlan
from ..core.errors import UserError, choice
from ..core.progress import note
from ..core.stats import matched_share
from ..runtime.task import Task
from .listing import Others
from .masks import IMAGES, MASKS, Masks
from .sources import AUTO, Split, digits, folder, is_of_timm, names_of, usual_splits

if TYPE_CHECKING:
    from .dataset import Sample


class Labels(Protocol):
    """How the labels of a task are found and read."""

    demo: str  # name of the source that is made here
    inside: str  # what lies in the folder of a part, for a person
    known_by: str  # what stands in a key for the contents of a source that is known by its name
    by_timm: bool  # whether timm's dataset factory reads such labels

    def completed(self, config: DataPlan) -> tuple[DataPlan, list[str]]:
        """``config`` with what is usual for such labels, and lines that say so. Raises UserError."""

    def flat(self, folders: Collection[str]) -> str | None:
        """In words what the folders of a source without parts are; None where they are none of a source."""

    def may_lack_classes(self, config: DataPlan) -> bool:
        """Whether a class without a training image is meant."""

    def names(self, config: DataPlan) -> Iterator[bytes]:
        """The name below the source of every file of its parts: what is read of it. Raises UserError."""

    def make(self, out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
        """Write the demo's images into ``out``; the names of the outputs, and its splits by name."""

    def folder(self, config: DataPlan, others: Others, out: Path) -> tuple[Path, list[str], dict[str, Split]]:
        """A user's folder: its root, the names of the outputs, and its splits by name. Raises UserError.

        Args:
            others: told what lies there and is not read.
            out: the folder of the artifact, for what is kept of the labels.
        """

    def read(self, sample: Sample, spec: Mapping[str, Any]) -> np.ndarray | np.integer[Any]:
        """What is right of one image, as the task judges what a network of this InputSpec says of it.

        Raises:
            UserError: a label that cannot be read.
        """


class ClassNumbers:
    """An image lies in the folder of its class."""

    demo = "digits"
    inside = "<class>/*"
    known_by = "by name"
    by_timm = True

    def completed(self, config: DataPlan) -> tuple[DataPlan, list[str]]:
        """As it is; the demo has no parts to be named."""
        if config.source == self.demo and config.test_split is not None:
            raise UserError(
                "data.test_split: the digits have no test split, wanted null (it is cut from the training part)"
            )
        if config.source == self.demo and config.val_split not in (None, AUTO):
            raise UserError(
                "data.val_split: the digits have no such part, wanted null (it is cut from the training part)"
            )
        if config.palette is not None or config.ignore_index is not None:
            raise UserError("data.palette and data.ignore_index are of masks: wanted data.task segmentation with them")
        return config, []

    def flat(self, folders: Collection[str]) -> str | None:
        """Its classes."""
        return f"its {len(folders)} folders are the classes"

    def may_lack_classes(self, config: DataPlan) -> bool:
        """Where they are listed, as a network knows them."""
        return config.classes is not None

    def names(self, config: DataPlan) -> Iterator[bytes]:
        """Part by part and class by class."""
        return names_of(config)

    def make(self, out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
        """The digits."""
        return digits(out, config)

    def folder(self, config: DataPlan, others: Others, out: Path) -> tuple[Path, list[str], dict[str, Split]]:
        """``source/<split>/<class>/*``."""
        root, classes, splits = folder(config, others)
        if config.classes is None and set(classes) == {IMAGES, MASKS}:
            raise UserError(f"{root} has images and their masks, not classes: say data.task segmentation")
        return root, classes, splits

    def read(self, sample: Sample, spec: Mapping[str, Any]) -> np.integer[Any]:
        """The number of its class."""
        return np.int64(sample.label)


LABELS: dict[str, Labels] = {"classification": ClassNumbers(), "segmentation": Masks()}


def labels_of(config: DataPlan) -> Labels:
    """How the labels of a source are read. Raises UserError for an unknown task."""
    if config.task not in LABELS:
        raise choice("task", config.task, LABELS)
    return LABELS[config.task]


def check_source(config: DataPlan) -> None:
    """Refuse a source that is none, before anything is loaded to read it. Raises UserError."""
    labels = labels_of(config)
    other = next((name for name, each in LABELS.items() if each.demo == config.source and each is not labels), None)
    if other is not None and not Path(config.source).is_dir():
        raise UserError(f"data.source '{config.source}' is made for data.task {other}: found {config.task}")
    known = config.source == labels.demo or Path(config.source).is_dir()
    if not known and not (labels.by_timm and is_of_timm(config.source)):
        by_timm = ", or a name of timm such as hfds/NAME, wds/PATTERN, tfds/NAME" if labels.by_timm else ""
        wanted = f"'{labels.demo}'" + (", " if labels.by_timm else " or ")
        raise UserError(
            f"no data at '{config.source}': wanted {wanted}a folder with {config.train_split}/{labels.inside}{by_timm}"
        )
    labels.completed(config)


def completed(config: DataPlan) -> tuple[DataPlan, list[str]]:
    """``config`` with its parts by name and what else is usual, and lines that say so. Raises UserError."""
    labels = labels_of(config)
    config, lines = labels.completed(config)
    config, more = usual_splits(config, labels.flat)
    return config, [*lines, *more]


IMAGES_A_CLASS = 5  # at least, for a matching of classes to say anything


def other_order(task: Task, outputs: np.ndarray, labels: np.ndarray) -> None:
    """Tell where outputs [N, ...] of somebody's network are right for classes in another order than the data's."""
    if len(labels) < IMAGES_A_CLASS * (1 if task.dense else task.class_count(outputs)):
        return
    called = task.confused(outputs, labels)
    if not called:
        return
    right = sum(count for (label, said), count in called.items() if label == said) / sum(called.values())
    matched = matched_share(called)
    if matched > 0.5 and matched - right > 0.3:
        note(
            f"{matched:.0%} of the test {task.counted} are right if its classes are matched with the data's one to "
            f"one, and {right:.0%} as they are: they stand in another order, list them in its own with data.classes"
        )
