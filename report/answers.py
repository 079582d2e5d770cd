"""What the answers of the test images show beside their one figure: by class, for what they are taken, how sure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..core.config import Corruption
from ..core.errors import UserError
from ..core.kinds import Measurement
from ..core.sealed import printable
from ..core.stats import CALIBRATION_BINS, Calibration, Interval, calibration_error, mean_of_shares
from ..runtime.task import TASKS, Surety, Task
from .compression import Sources

Numbers = dict[str, Any]
MISTAKES = 16  # pictures
CONFUSIONS = 2000  # pairs of classes that are written down, the most frequent ones
PIECE = 64  # images that are looked at together


def scores(measurement: Measurement, bundle: str, corruption: Corruption | None = None) -> np.ndarray:
    """How right a bundle is about each test image [N, ...], as they are or with a fault, as its task scores them.

    Raises:
        UserError: outputs and labels that do not fit each other.
    """
    kept, name = measurement.worked_out, measurement.outputs_name(bundle, corruption)
    if name not in kept:
        outputs = measurement.outputs(bundle, corruption)
        check_labels(measurement, outputs)
        kept[name] = TASKS[measurement.facts.task].scores(outputs, measurement.labels)
        kept[name].flags.writeable = False  # whoever asks next is given the same
    return np.asarray(kept[name])


def check_labels(measurement: Measurement, outputs: np.ndarray) -> None:
    """Refuse outputs that are none of the measurement's task, or that its labels do not fit. Raises UserError."""
    if (wanted := TASKS[measurement.facts.task].mislabeled(measurement.labels, outputs)) is not None:
        raise UserError(f"{measurement.path} has labels beyond its outputs: wanted {wanted}; measure again")


def is_finite(outputs: np.ndarray) -> bool:
    """Whether all numbers of outputs [N, ...] are, however many they are."""
    return all(np.isfinite(outputs[at : at + PIECE]).all() for at in range(0, len(outputs), PIECE))


def judged(task: Task, outputs: np.ndarray, labels: np.ndarray, found: np.ndarray | None = None) -> Numbers:
    """The mean accuracy of the classes, and how far confidence is from being right; None where nothing can be said.

    Args:
        found: the scores of these outputs, where they are known already.
    """
    found = task.scores(outputs, labels) if found is None else found
    classes = task.of_classes(task.by_class(found, labels)).values()
    # Of a figure that is a mean over the classes itself, its own interval.
    balanced = Interval(*task.summary(found)) if task.dense else mean_of_shares([Interval(*each) for each in classes])
    surety = task.surety(outputs, labels, CALIBRATION_BINS) if is_finite(outputs) else None
    calibration = None if surety is None else calibration_of(surety).as_dict()
    return {"balanced": balanced.as_dict(), "calibration": calibration}


def calibration_of(surety: Surety) -> Calibration:
    """The calibration error of what a network says."""
    return calibration_error(surety.confidence, surety.right, weight=weight_of(surety))


def weight_of(surety: Surety) -> np.ndarray | None:
    """How many answers each confidence is of, where an image has several."""
    return surety.weight if surety.confidence.ndim > 1 else None


def answers(task: Task, measurement: Measurement, bundle: str, float32: str | None, sources: Sources) -> Numbers:
    """What ``bundle`` says of the test images: by class beside ``float32``, what it takes for what, the worst mistakes.

    Raises:
        UserError: images or classes other than those of the dataset that was found.
    """
    labels, outputs = measurement.labels, measurement.outputs(bundle)
    names = _names(measurement, labels, outputs, sources)
    before, mine = (
        {} if each is None else task.of_classes(task.by_class(scores(measurement, each), labels))
        for each in (float32, bundle)
    )
    # Of an image that shows several classes the index knows one.
    learned = None if task.dense else _counts(sources, len(names))
    called = task.confused(outputs, labels)
    totals = Counter[int]()
    for (label, _), count in called.items():
        totals[label] += count
    classes = [
        {
            "class": names[label],
            "training_images": None if learned is None else learned[label],
            "test_images": found.n if (found := mine.get(label)) else 0,
            "answers": totals[label],
            "accuracy": found._asdict() if found else None,
            "float32": before[label]._asdict() if label in before else None,
        }
        for label in range(len(names))
    ]
    wrong = {pair: count for pair, count in called.items() if pair[0] != pair[1]}
    confused = Counter(wrong).most_common()
    return {
        "device": measurement.facts.device,
        "bundle": bundle,
        "float32": float32,
        "classes": classes,
        "confusions": [
            {
                "classes": [label, other],
                "label": names[label],
                "said": names[other],
                task.counted: count,
                "share": count / totals[label],  # of all answers about that class
            }
            for (label, other), count in confused[:CONFUSIONS]
        ],
        "confusions_left_out": max(0, len(confused) - CONFUSIONS),
        "mistakes": _mistakes(task, outputs, scores(measurement, bundle), labels, names, sources),
    }


def _mistakes(
    task: Task,
    outputs: np.ndarray,
    found: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    sources: Sources,
) -> list[Numbers]:
    """Up to 16 test images that are called something else, the worst mistakes first, as the task sees them."""
    if sources.dataset is None or not is_finite(outputs):
        return []
    samples, rows = sources.dataset.samples("test"), list[Numbers]()
    for at in task.mistaken(outputs, found)[:MISTAKES].tolist():
        [[said]], [[sure]] = task.likeliest(np.asarray(outputs[at : at + 1]), 1)
        rows.append(
            {
                "image": printable(samples[at].path.name),
                "position": at,
                "label": task.tell(labels[at], names),
                "said": task.tell(said, names),
                # Class maps do not say how sure they are of themselves.
                "confidence": min(1.0, float(sure)) if np.isfinite(sure) else None,
                "score": task.summary(found[at : at + 1]).value,  # of this image alone
            }
        )
    return rows


def _names(measurement: Measurement, labels: np.ndarray, outputs: np.ndarray, sources: Sources) -> list[str]:
    """Of the classes; their numbers where the dataset is not at hand. Raises UserError."""
    check_labels(measurement, outputs)
    task = TASKS[measurement.facts.task]
    if sources.dataset is None:
        return [str(at) for at in range(max(task.class_count(outputs), 1 + int(labels.max())))]
    names = [printable(name) for name in sources.dataset.classes]
    wanted = task.misfit(outputs, len(sources.dataset.samples("test")), len(names))
    if wanted is not None or int(labels.max()) >= len(names):
        raise UserError(f"{measurement.path} measured other images or classes than those of {sources.dataset.path}")
    return names


def _counts(sources: Sources, classes: int) -> list[int] | None:
    """Training images of each class, where the dataset is at hand."""
    if sources.dataset is None:
        return None
    labels = sources.dataset.samples("train").labels
    found: list[int] = np.bincount(labels[labels >= 0], minlength=classes).tolist()
    return found
