"""What the answers of the test images show beside their one figure: by class, for what they are taken, how sure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import Measurement
from ..core.sealed import printable
from ..core.stats import Interval, calibration_error, mean_of_shares
from ..runtime.task import Task
from .compression import Sources

Numbers = dict[str, Any]
MISTAKES = 16  # pictures
BATCH = 4096  # images whose probabilities are in memory
CONFUSIONS = 2000  # pairs of classes that are written down, the most frequent ones


def judged(task: Task, outputs: np.ndarray, labels: np.ndarray) -> Numbers:
    """The mean accuracy of the classes, and how far confidence is from being right; None where nothing can be said."""
    scores = task.scores(outputs, labels)
    classes = list(of_classes(task, scores, labels).values())
    calibration = None
    if np.isfinite(outputs).all():
        calibration = calibration_error(confidence(task, outputs).ravel(), scores.ravel()).as_dict()
    return {"balanced": mean_of_shares(classes).as_dict(), "calibration": calibration}


def confidence(task: Task, outputs: np.ndarray) -> np.ndarray:
    """How likely a network takes what it says of each image to be, 0 to 1 [N, ...], for finite outputs [N, ...]."""
    parts = [task.likeliest(outputs[at : at + BATCH], 1)[1][:, 0] for at in range(0, len(outputs), BATCH)]
    return np.asarray(np.minimum(np.concatenate(parts), 1.0))


def of_classes(task: Task, scores: np.ndarray, labels: np.ndarray) -> dict[int, Interval]:
    """The task's figure of the images of each class that has any, by class."""
    order = np.argsort(labels, kind="stable")
    known, starts = np.unique(labels[order], return_index=True)
    parts = np.split(scores[order], starts[1:])
    return {int(label): Interval(*task.summary(part)) for label, part in zip(known, parts, strict=True)}


def answers(task: Task, measurement: Measurement, bundle: str, float32: str | None, sources: Sources) -> Numbers:
    """What ``bundle`` says of the test images: by class beside ``float32``, what it takes for what, the worst mistakes.

    Raises:
        UserError: images or classes other than those of the dataset that was found.
    """
    labels, outputs = measurement.labels, measurement.outputs(bundle)
    names = _names(measurement, labels, outputs, sources)
    said, scores = task.decide(outputs), task.scores(outputs, labels)
    mine = of_classes(task, scores, labels)
    before = {} if float32 is None else of_classes(task, task.scores(measurement.outputs(float32), labels), labels)
    learned = _counts(sources, len(names))
    classes = [
        {
            "class": names[label],
            "training_images": None if learned is None else learned[label],
            "test_images": found.n if (found := mine.get(label)) else 0,
            "accuracy": found.as_dict() if found else None,
            "float32": before[label].as_dict() if label in before else None,
        }
        for label in range(len(names))
    ]
    wrong = np.flatnonzero(said != labels)
    confused = Counter(zip(labels[wrong].tolist(), said[wrong].tolist(), strict=True)).most_common()
    return {
        "device": measurement.facts.device,
        "bundle": bundle,
        "float32": float32,
        "classes": classes,
        "confusions": [
            {"classes": [label, other], "label": names[label], "said": names[other], "images": count}
            for (label, other), count in confused[:CONFUSIONS]
        ],
        "confusions_left_out": max(0, len(confused) - CONFUSIONS),
        "mistakes": _mistakes(task, outputs, labels, names, sources),
    }


def _mistakes(
    task: Task, outputs: np.ndarray, labels: np.ndarray, names: Sequence[str], sources: Sources
) -> list[Numbers]:
    """Up to 16 test images that are called something else, those first of which that is surest."""
    if sources.dataset is None or not np.isfinite(outputs).all():
        return []
    said, sure, samples = task.decide(outputs), confidence(task, outputs), sources.dataset.samples("test")
    wrong = np.flatnonzero(said != labels)
    worst = wrong[np.argsort(-sure[wrong], kind="stable")][:MISTAKES]
    return [
        {
            "image": printable(samples[at].path.name),
            "position": int(at),
            "label": task.tell(labels[at], names),
            "said": task.tell(said[at], names),
            "confidence": float(sure[at]),
        }
        for at in worst
    ]


def _names(measurement: Measurement, labels: np.ndarray, outputs: np.ndarray, sources: Sources) -> list[str]:
    """Of the classes; their numbers where the dataset is not at hand. Raises UserError."""
    count = outputs.shape[1]
    if labels.min() < 0 or labels.max() >= count:
        raise UserError(f"{measurement.path} has labels beyond its {count} outputs: measure again")
    if sources.dataset is None:
        return [str(at) for at in range(count)]
    names = [printable(name) for name in sources.dataset.classes]
    if len(names) != count or len(sources.dataset.samples("test")) != len(labels):
        raise UserError(f"{measurement.path} measured other images or classes than those of {sources.dataset.path}")
    return names


def _counts(sources: Sources, classes: int) -> list[int] | None:
    """Training images of each class, where the dataset is at hand."""
    if sources.dataset is None:
        return None
    labels = sources.dataset.samples("train").labels
    found: list[int] = np.bincount(labels[labels >= 0], minlength=classes).tolist()
    return found
