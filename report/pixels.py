"""What answers that have a place for every pixel show beside their one figure, the image staying the unit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.sealed import printable
from ..runtime.task import Task
from .compression import Sources

Numbers = dict[str, Any]
WORST = 8  # images


def confusion(task: Task, outputs: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Labelled pixels by class (a row) and by what they are called (a column), int64 [count, count]."""
    table = np.zeros(count * count, np.int64)
    height, width = labels.shape[1:]
    for at in range(len(labels)):
        said = task.decide_at(outputs[at : at + 1], (height, width))[0]
        known = labels[at] >= 0
        cells = labels[at][known].astype(np.intp) * count + said[known]
        table += np.bincount(cells, minlength=count * count)
    return table.reshape(count, count)


def worst_images(
    task: Task,
    outputs: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    sources: Sources,
) -> list[Numbers]:
    """Some test images with the lowest figure of their own, the lowest first; none of those that are wholly right."""
    if sources.dataset is None:
        return []
    samples, labelled = sources.dataset.samples("test"), np.flatnonzero((labels >= 0).any((1, 2)))
    figures = {int(at): task.summary(scores[at : at + 1]).value for at in labelled}
    order = sorted((at for at, figure in figures.items() if figure < 1), key=figures.__getitem__)
    height, width = labels.shape[1:]
    return [
        {
            "image": printable(samples[at].path.name),
            "position": at,
            "label": task.tell(labels[at], names),
            "said": task.tell(task.decide_at(outputs[at : at + 1], (height, width))[0], names),
            "score": figures[at],
        }
        for at in order[:WORST]
    ]
