"""What the answers of the test images show beside their one figure: by class, for what they are taken, how sure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import Measurement
from ..core.sealed import printable
from ..core.stats import Interval, calibration_error, mean_of_shares
from ..runtime.task import Task
from .compression import Sources
from .pixels import confusion as confusion_of_pixels
from .pixels import worst_images

Numbers = dict[str, Any]
MISTAKES = 16  # pictures
BATCH = 4096  # images whose probabilities are in memory
CONFUSIONS = 2000  # pairs of classes that are written down, the most frequent ones


def judged(task: Task, outputs: np.ndarray, labels: np.ndarray) -> Numbers:
    """The mean of the classes' figures, and how far confidence is from being right; None where nothing can be said.

    Where the figure is a mean over the classes by itself, nothing is said of a mean besides.
    """
    scores = task.scores(outputs, labels)
    classes = list(of_classes(task, scores, labels).values())
    calibration = None
    if not task.dense and np.isfinite(outputs).all():
        calibration = calibration_error(confidence(task, outputs).ravel(), scores.ravel()).as_dict()
    return {"balanced": None if task.dense else mean_of_shares(classes).as_dict(), "calibration": calibration}


def confidence(task: Task, outputs: np.ndarray) -> np.ndarray:
    """How likely a network takes what it says of each image to be, 0 to 1 [N, ...], for finite outputs [N, ...]."""
    parts = [task.likeliest(outputs[at : at + BATCH], 1)[1][:, 0] for at in range(0, len(outputs), BATCH)]
    return np.asarray(np.minimum(np.concatenate(parts), 1.0))


def of_classes(task: Task, scores: np.ndarray, labels: np.ndarray) -> dict[int, Interval]:
    """The task's figure of the images of each class that has any, by class."""
    return {label: Interval(*found) for label, found in task.of_classes(task.by_class(scores, labels)).items()}


def answers(task: Task, measurement: Measurement, bundle: str, float32: str | None, sources: Sources) -> Numbers:
    """What ``bundle`` says of the test images: by class beside ``float32``, what it takes for what, the worst mistakes.

    Raises:
        UserError: images or classes other than those of the dataset that was found.
    """
    labels, outputs = measurement.labels, measurement.outputs(bundle)
    names = _names(task, measurement, labels, outputs, sources)
    scores = task.scores(outputs, labels)
    mine = of_classes(task, scores, labels)
    before = {} if float32 is None else of_classes(task, task.scores(measurement.outputs(float32), labels), labels)
    learned = None if task.dense else _counts(sources, len(names))
    table = (confusion_of_pixels if task.dense else _confusion)(task, outputs, labels, len(names))
    classes = [
        {
            "class": names[label],
            "training_images": None if learned is None else learned[label],
            "test_images": found.n if (found := mine.get(label)) else 0,
            "counted": int(table[label].sum()),
            "accuracy": found.as_dict() if found else None,
            "float32": before[label].as_dict() if label in before else None,
        }
        for label in range(len(names))
    ]
    confused = sorted(
        ((int(table[pair]), pair) for pair in zip(*np.nonzero(table), strict=True) if pair[0] != pair[1]),
        key=lambda found: -found[0],
    )
    mistakes = worst_images(task, outputs, scores, labels, names, sources) if task.dense else None
    return {
        "device": measurement.facts.device,
        "bundle": bundle,
        "float32": float32,
        "classes": classes,
        "counted": "pixels" if task.dense else "images",
        "confusions": [
            {
                "classes": [int(label), int(other)],
                "label": names[label],
                "said": names[other],
                "images": count,  # or pixels, as ``counted`` says
                "share": count / int(table[label].sum()),
            }
            for count, (label, other) in confused[:CONFUSIONS]
        ],
        "confusions_left_out": max(0, len(confused) - CONFUSIONS),
        "mistakes": _mistakes(task, outputs, labels, names, sources) if mistakes is None else mistakes,
    }


def _confusion(task: Task, outputs: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Images by class (a row) and by what they are called (a column), int64 [count, count]."""
    cells = labels.astype(np.intp) * count + task.decide(outputs)
    return np.bincount(cells, minlength=count * count).reshape(count, count)


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


def _names(
    task: Task, measurement: Measurement, labels: np.ndarray, outputs: np.ndarray, sources: Sources
) -> list[str]:
    """Of the classes; their numbers where the dataset is not at hand. Raises UserError."""
    if (wanted := task.mislabeled(labels, outputs)) is not None:
        beyond = f"labels beyond its {task.class_count(outputs)} outputs, wanted {wanted}"
        raise UserError(f"{measurement.path} has {beyond}: measure again")
    if sources.dataset is None:
        return [str(at) for at in range(max(task.class_count(outputs), int(labels.max()) + 1))]
    names = [printable(name) for name in sources.dataset.classes]
    fits = task.misfit(outputs, len(labels), len(names)) is None and labels.max() < len(names)
    if not fits or len(sources.dataset.samples("test")) != len(labels):
        raise UserError(f"{measurement.path} measured other images or classes than those of {sources.dataset.path}")
    return names


def _counts(sources: Sources, classes: int) -> list[int] | None:
    """Training images of each class, where the dataset is at hand."""
    if sources.dataset is None:
        return None
    labels = sources.dataset.samples("train").labels
    found: list[int] = np.bincount(labels[labels >= 0], minlength=classes).tolist()
    return found
