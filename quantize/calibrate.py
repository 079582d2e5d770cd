"""Calibration inputs: real training images, read one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..core.data import Sample
from ..core.progress import progress
from ..runtime.layout import to_input
from ..runtime.preprocess import load_images


class CalibrationInputs(Sequence[np.ndarray]):
    """Inputs [1, ...] of a float graph, decoded when they are asked for: memory does not grow."""

    def __init__(self, samples: Sequence[Sample], spec: dict[str, Any], what: str) -> None:
        self._samples, self._spec, self._what = samples, spec, what

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, at: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(at, slice):
            return CalibrationInputs(self._samples[at], self._spec, self._what)
        return to_input(load_images([self._samples[at].path], self._spec), self._spec)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[np.ndarray]:
        with progress(self._what, len(self)) as advance:
            for at in range(len(self)):
                yield self[at]
                advance(1, "")
