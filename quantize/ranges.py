"""Ranges of activations from a stream of images: memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Literal

import numpy as np

from .layers import PADDING, Activations, Layer

BINS = 4096
SAMPLED = 16384  # values of one tensor of one image that enter its histogram; smallest and largest enter always
SHRINKS = np.linspace(0.2, 1, 25)  # candidates for a range's ends, as shares of what was seen
LEVELS = 255  # steps of 8 bits

Range = tuple[float, float]


class Histogram:
    """Of one tensor's values, over [-limit, limit]; doubles its limit, two bins becoming one, when need be."""

    def __init__(self) -> None:
        self._counts = np.zeros(BINS)
        self._limit = 2.0**-10
        self.low, self.high = float("inf"), float("-inf")
        self._pinned = False

    def pin(self, low: float, high: float) -> None:
        """Make this the range, whatever was seen or will be."""
        self.low, self.high, self._pinned = low, high, True

    def add(self, values: np.ndarray) -> None:
        flat = values.ravel()
        low, high = float(flat.min()), float(flat.max())
        if max(-low, high) >= PADDING:
            flat = flat[np.abs(flat) < PADDING]
            if not flat.size:
                return
            low, high = float(flat.min()), float(flat.max())
        self.low, self.high = min(self.low, low), max(self.high, high)
        while max(-low, high) > self._limit:
            folded = self._counts.reshape(-1, 2).sum(1)
            self._counts = np.pad(folded, BINS // 4)
            self._limit *= 2
        step = -(-flat.size // SAMPLED) | 1  # odd, so that it meets every channel
        bins = ((flat[::step] + self._limit) * (BINS / 2 / self._limit)).astype(np.int64)
        self._counts += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)

    def least_error(self, symmetric: bool) -> Range:
        """The range whose 8-bit grid has the least squared error over what was seen; it holds zero.

        Candidates shrink both ends independently (together if ``symmetric``).
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        if high <= low or self._pinned:
            return low, high
        seen = self._counts > 0
        values = ((np.arange(BINS) + 0.5) * (2 / BINS) - 1)[seen] * self._limit
        weights = self._counts[seen]
        if symmetric:
            ends = max(-low, high) * SHRINKS
            candidates = np.stack([-ends, ends], 1)
        else:
            lows = low * SHRINKS if low < 0 else np.zeros(1)
            highs = high * SHRINKS if high > 0 else np.zeros(1)
            candidates = np.stack(np.meshgrid(lows, highs, indexing="ij"), -1).reshape(-1, 2)
        errors = []
        for start, end in candidates:
            scale = (end - start) / LEVELS
            grid = np.round((np.clip(values, start, end) - start) / scale) * scale + start
            errors.append(float((weights * (grid - values) ** 2).sum()))
        start, end = candidates[int(np.argmin(errors))]
        return float(start), float(end)


Rule = Literal["mse", "minmax"]


def observe(activations: Activations, images: Iterable[np.ndarray]) -> dict[str, Histogram]:
    """What was seen of every float tensor of a graph, by tensor name.

    What normalisation makes of the input is known and not estimated, since pixels are 0 to 255: a range of what was
    seen, or of least error, would clip a brighter image, which has cost up to 5 dB.
    """
    histograms: dict[str, Histogram] = {}
    darkest = brightest = None
    for image in images:
        darkest, brightest = np.zeros_like(image), np.full_like(image, 255)
        for name, values in activations(image).items():
            histograms.setdefault(name, Histogram()).add(values)
    if darkest is not None and brightest is not None:
        ends = [activations(image) for image in (darkest, brightest)]
        for layer in normalisation(activations):
            values = np.concatenate([end[layer.output].ravel() for end in ends])
            histograms[layer.output].pin(float(values.min()), float(values.max()))
    return {name: found for name, found in histograms.items() if found.low <= found.high}


def normalisation(activations: Activations) -> list[Layer]:
    """The arithmetic on the image before anything else."""
    return list(takewhile(lambda layer: layer.kind.upper() in ("SUB", "MUL", "ADD", "DIV"), activations.layers))


def estimate(histograms: Mapping[str, Histogram], rule: Rule, symmetric: bool) -> dict[str, Range]:
    """The range of every tensor that was observed, by tensor name."""
    if rule == "minmax":
        return {name: (found.low, found.high) for name, found in histograms.items()}
    return {name: found.least_error(symmetric) for name, found in histograms.items()}
