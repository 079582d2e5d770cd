"""The numbers of a measured bundle that a rule may be about, each by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ..core.errors import UserError
from ..core.kinds import Bundle, Measurement, Result
from ..core.stats import Interval, median_interval
from ..runtime.task import TASKS


@dataclass(frozen=True)
class Figure:
    """One number of one bundle in one session on one device; what was not measured has no ``interval``.

    Attributes:
        unit: "share", "ms" or "bytes".
        scores: of a figure made of images, one an image [N], in the order of the test part.
        values: one a process, in the order of the rounds or of the starts.
        interval: the figure, with its two-sided 95 % interval over images or processes; no ends where they are too few.
        trusted: whether it is to be believed as a number of this device.
        why: why it is not trusted; empty where it is.
        of_images: of a figure made of images, itself for those at some positions [M] of the test part.
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
    where: str = ""


def figures(measurement: Measurement, name: str) -> dict[str, Figure]:
    """Every figure for the bundle ``name`` of a measurement.

    Raises:
        UserError: no such bundle in it.
    """
    source, result = measurement.manifest.inputs.get(name), measurement.facts.results.get(name)
    if source is None or result is None:
        raise UserError(f"{measurement.path} measured no '{name}': it has {', '.join(measurement.facts.results)}")
    found = {}
    if measurement.outputs_name(name) in measurement.manifest.files:
        task = TASKS[measurement.facts.task]
        scores = task.scores(measurement.outputs(name), measurement.labels)
        share = Interval(*task.summary(scores))
        found["accuracy"] = Figure("share", scores, (share.value,), share, False, True, "")
    for percent in (50, 90):
        found |= _latency(result, percent)
    if source.kind == Bundle.kind:
        size = float(Bundle.facts_of(source).size_bytes)
        found["size"] = Figure("bytes", None, (size,), Interval(size, size, size, 1), True, True, "")
    return found


def _latency(result: Result, percent: int) -> dict[str, Figure]:
    values = getattr(result, f"latency_p{percent}_by_process_ms")
    if values is None or result.trust is None:
        return {}
    trusted, why = result.trust.word == "trusted", result.trust.reason
    return {f"latency p{percent}": Figure("ms", None, tuple(values), median_interval(values), True, trusted, why)}
