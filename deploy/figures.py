"""The numbers of a measured bundle that a rule may be about, each by its name: the one place that knows them.

A figure brings what a judgement needs: one score an image where images are behind it, so that two bundles are compared
image by image; one value a process where processes are, so that two bundles of a session are compared round by round;
its interval, and whether it is to be believed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import get_args

import numpy as np

from ..core.artifact import Provenance
from ..core.config import Corruption
from ..core.errors import UserError
from ..core.kinds import Bundle, FreshStart, Measurement, Result, Samples, Trust
from ..core.stats import (
    CALIBRATION_BINS,
    CONFIDENCE,
    Interval,
    calibration_interval,
    expected_calibration_error,
    median_interval,
    percentile_interval,
    percentile_within,
)
from ..report.answers import is_finite, scores, weight_of
from ..runtime.task import TASKS, Change, Task

ACCURACY, WORST_CLASS, CALIBRATION = "accuracy", "worst class", "calibration error"
SIZE, MEMORY, COLD_START, END_TO_END = "size", "memory", "cold start", "end to end"
LATENCIES = {f"latency p{percent}": percent for percent in (50, 90, 95, 99)}
CORRUPTIONS: tuple[Corruption, ...] = get_args(Corruption)
SHARE, MILLISECONDS, BYTES = "share", "ms", "bytes"
UNITS = {ACCURACY: SHARE, WORST_CLASS: SHARE, CALIBRATION: SHARE, SIZE: BYTES, MEMORY: BYTES}
HIGHER_IS_BETTER = (ACCURACY, WORST_CLASS)


def accuracy_of(corruption: str) -> str:
    """What the accuracy on the test images with this fault is called."""
    return f"{ACCURACY} of {corruption}"


# In the order in which they are listed.
NAMES = (
    ACCURACY, *map(accuracy_of, CORRUPTIONS), WORST_CLASS, CALIBRATION, *LATENCIES, END_TO_END, COLD_START, MEMORY, SIZE
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One number of one bundle in one session on one device.

    Shares are 0 to 1. What was not measured has neither ``values`` nor ``interval``, is not ``trusted``, and ``why``
    says what would give it.

    Attributes:
        unit: "share", "ms" or "bytes".
        scores: of a figure made of images, one an image [N], in the order of the test part.
        values: one a process, in the order of the rounds or of the starts; of figures of images and of the size one.
        interval: the figure, with its two-sided 95 % interval over images or processes; no ends where they are too few.
        trusted: whether it is to be believed as a number of this device.
        why: why it is not trusted; empty where it is.
        of_images: of a figure made of images, itself for those at some positions [M] of the test part, which may repeat
            themselves: what a bootstrap by image draws.
        change: of two networks' scores of the same images, how the figure changes from the first to the second, where
            its task knows that better than such a bootstrap.
        where: which class the figure is of, where it is of one.
    """

    unit: str
    scores: np.ndarray | None
    values: tuple[float, ...]
    interval: Interval | None
    lower_is_better: bool
    trusted: bool
    why: str
    of_images: Callable[[np.ndarray], float] | None = None
    change: Callable[[np.ndarray, np.ndarray], Change] | None = None
    where: str = ""


def figures(measurement: Measurement, name: str, classes: Sequence[str] = ()) -> dict[str, Figure]:
    """Every figure of ``NAMES`` for the bundle ``name`` of a measurement; what was not measured too.

    Args:
        classes: names of the outputs, to say which class did worst; its number is told without them.

    Raises:
        UserError: no such bundle in it, or labels and outputs that do not fit each other.
    """
    source, result = measurement.manifest.inputs.get(name), measurement.facts.results.get(name)
    if source is None or result is None:
        known = ", ".join(measurement.facts.results)
        raise UserError(f"{measurement.path} measured no '{name}': it has {known}")
    found = {figure: _lacking(figure, _why_lacking(figure, result)) for figure in NAMES}
    found |= _of_images(measurement, name, source, result, classes)
    found |= _of_processes(measurement, name, result)
    if source.kind == Bundle.kind:
        size = float(Bundle.facts_of(source).size_bytes)
        found[SIZE] = Figure(BYTES, None, (size,), Interval(size, size, size, 1), True, True, "")
    return found


def _lacking(name: str, why: str) -> Figure:
    """A figure that was not measured."""
    higher = name in HIGHER_IS_BETTER or name.startswith(ACCURACY)
    unit = SHARE if higher else UNITS.get(name, MILLISECONDS)
    return Figure(unit, None, (), None, not higher, False, why)


def _why_lacking(name: str, result: Result) -> str:
    """Why it was not measured, and what would give it."""
    if result.status != "measured":
        return result.status
    corruption = name.removeprefix(accuracy_of(""))
    if corruption in CORRUPTIONS:
        return f"not measured: bench with --corruptions {corruption}"
    if name == SIZE:
        return "a model by itself: only a bundle says its size"
    if name in (COLD_START, MEMORY):
        return "not measured: bench with --cold-starts 6 or more, on a device that tells it"
    return "not measured"


# ---- of images ---------------------------------------------------------------------------------------------------


def _of_images(
    measurement: Measurement, name: str, source: Provenance, result: Result, classes: Sequence[str]
) -> dict[str, Figure]:
    """What the outputs for the test images come to; nothing where there are none."""
    if measurement.outputs_name(name) not in measurement.manifest.files:
        return {}
    task, labels, outputs = TASKS[measurement.facts.task], measurement.labels, measurement.outputs(name)
    if len(labels) == 0:
        return {}
    trust, its = _trust_of_outputs(result, str(source.facts.get("target", ""))), scores(measurement, name)
    found = {ACCURACY: _accuracy(task, its, trust)}
    for corruption in CORRUPTIONS:
        if measurement.outputs_name(name, corruption) in measurement.manifest.files:
            found[accuracy_of(corruption)] = _accuracy(task, scores(measurement, name, corruption), trust)
    known = max(task.class_count(outputs), len(classes))
    found[WORST_CLASS] = _worst_class(task, task.by_class(its, labels), known, trust, classes)
    found[CALIBRATION] = _calibration(task, outputs, labels, trust)
    return found


def _trust_of_outputs(result: Result, target: str) -> Trust:
    """Whether the outputs are what this device says with the bundle's own runtime, as it is timed."""
    if result.status == "not built here":
        return Trust(word="invalid", reason=f"by {result.accuracy_by} in the place of {target}, which is not installed")
    if result.fell_back:
        return Trust(word="invalid", reason=result.fell_back)
    apart = result.batch_one
    if apart is not None and not apart.within_tolerance and apart.agreement < 1:
        share = 100 * (1 - apart.agreement)
        return Trust(
            word="invalid",
            reason=f"one image at a time, as it is timed, it says something else of {share:.3g} % of {apart.images} "
            "images than in batches",
        )
    return Trust(word="trusted")


def _share(
    scores: np.ndarray,
    interval: Interval,
    of_images: Callable[[np.ndarray], float],
    trust: Trust,
    *,
    lower_is_better: bool = False,
    change: Callable[[np.ndarray, np.ndarray], Change] | None = None,
) -> Figure:
    believed = trust.word == "trusted"
    return Figure(
        SHARE, scores, (interval.value,), interval, lower_is_better, believed, trust.reason, of_images, change
    )


def _accuracy(task: Task, scores: np.ndarray, trust: Trust) -> Figure:
    def of_images(positions: np.ndarray) -> float:
        return task.summary(scores[positions]).value

    return _share(scores, Interval(*task.summary(scores)), of_images, trust, change=task.change)


def _worst_class(task: Task, by_class: np.ndarray, count: int, trust: Trust, classes: Sequence[str]) -> Figure:
    """The figure of the class that did worst. One without test images may be worse still: then nothing is known."""
    worst, interval = worst_of(task, by_class)

    def of_images(positions: np.ndarray) -> float:
        return min(each.value for each in task.of_classes(by_class[positions]).values())

    absent = np.setdiff1d(np.arange(count), list(task.of_classes(by_class)))
    if len(absent) and trust.word == "trusted":
        told = ", ".join(_class_name(int(each), classes) for each in absent[:3])
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        trust = Trust(word="invalid", reason=f"no test image of {told}{more}: nothing is known of how that class does")
    return replace(_share(by_class, interval, of_images, trust), where=_class_name(worst, classes))


def worst_of(task: Task, by_class: np.ndarray) -> tuple[int, Interval]:
    """The class that does worst; of equal ones that with the most images.

    Which class did worst was chosen by what it showed, so its own interval would be too narrow for the figure of the
    class that truly does worst. That lies below the upper bounds of all classes, each at Bonferroni's level over them;
    and above the lowest of their lower bounds, each at its own level, since the class that truly does worst has one of
    them.

    Returns:
        The class, and its figure with that interval; ``n`` counts the images that show it.
    """
    own = task.of_classes(by_class)
    together = task.of_classes(by_class, 1 - (1 - CONFIDENCE) / len(own))
    worst = min(own, key=lambda each: (own[each].value, -own[each].n, each))
    value = own[worst].value
    low, high = min(each.low for each in own.values()), min(each.high for each in together.values())
    return worst, Interval(value, min(value, low), max(value, high), own[worst].n)


def _class_name(at: int, classes: Sequence[str]) -> str:
    return classes[at] if at < len(classes) else f"class {at}"


def _calibration(task: Task, outputs: np.ndarray, labels: np.ndarray, trust: Trust) -> Figure:
    surety = task.surety(outputs, labels, CALIBRATION_BINS) if is_finite(outputs) else None
    if surety is None:
        why = "its outputs are not all finite" if outputs.dtype.kind == "f" else "it says classes, not how sure it is"
        return _lacking(CALIBRATION, why)
    (sure, right, _), weight = surety, weight_of(surety)

    def of_images(positions: np.ndarray) -> float:
        drawn = None if weight is None else weight[positions]
        return expected_calibration_error(sure[positions], right[positions], drawn)

    interval = calibration_interval(sure, right, weight=weight)
    return _share(np.abs(right - sure), interval, of_images, trust, lower_is_better=True)


# ---- of processes ------------------------------------------------------------------------------------------------


def _of_processes(measurement: Measurement, name: str, result: Result) -> dict[str, Figure]:
    """What its timed processes, and those that only started, come to; nothing where there are none."""
    files, trust = measurement.manifest.files, result.trust
    if result.failed or trust is None or measurement.samples_name(name) not in files:
        return {}
    processes = measurement.rows(measurement.samples_name(name), Samples)
    milliseconds = [np.asarray(process.latency_ns) / 1e6 for process in processes]
    figure = partial(_of_values, trust=trust)
    found = {
        latency: figure(MILLISECONDS, [_percentile(values, percent) for values in milliseconds], few=f"for p{percent}")
        for latency, percent in LATENCIES.items()
    }
    if result.end_to_end_ms is not None:
        whole = [float(np.median(each.end_to_end_ns)) / 1e6 if each.end_to_end_ns else None for each in processes]
        found[END_TO_END] = figure(MILLISECONDS, whole)
    if measurement.starts_name(name) in files:
        starts = measurement.rows(measurement.starts_name(name), FreshStart)
        since = [None if start.process_ns is None else start.process_ns / 1e6 for start in starts]
        found[COLD_START] = figure(MILLISECONDS, since)
        # How much memory a process takes does not depend on what else the machine does.
        emulated = measurement.facts.emulated
        why = "on an emulated device" if emulated else ""
        alone = Trust(word="invalid" if emulated else "trusted", reason=why)
        found[MEMORY] = _of_values(BYTES, [float(start.memory_growth_bytes) for start in starts], alone)
    return {figure_name: each for figure_name, each in found.items() if each is not None}


def _percentile(values: np.ndarray, percent: int) -> float | None:
    """Of one process; None where it has too few inferences to tell it."""
    return percentile_interval(values, 50).value if percent == 50 else percentile_within(values, percent)


def _of_values(unit: str, values: Sequence[float | None], trust: Trust, few: str = "") -> Figure | None:
    """A figure of one value a process; None where there was no process, or none that tells it.

    Where some process does not tell, no figure is made of the others: rounds would be paired wrongly.
    """
    known = tuple(value for value in values if value is not None)
    if not values or (len(known) < len(values) and not few):
        return None
    if len(known) < len(values):
        return Figure(unit, None, (), None, True, False, f"too few inferences in a process {few}: bench longer")
    return Figure(unit, None, known, median_interval(known), True, trust.word == "trusted", trust.reason)
