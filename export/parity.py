"""Whether an exported file computes what torch computes, on real images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Parity:
    images: int
    max_difference: float  # largest absolute logit difference
    logit_spread: float  # standard deviation of torch's logits: the scale of the difference
    top1_agreement: float
    worst_image: int

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_spread

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "relative_difference": self.relative}


def compare(expected: np.ndarray, actual: np.ndarray) -> Parity:
    """Compare two float arrays of logits [N, K]; a value that is not finite differs infinitely.

    Raises:
        ValueError: different shapes, or constant expected logits (parity would say nothing).
    """
    if expected.shape != actual.shape:
        raise ValueError(f"wanted logits of shape {expected.shape}, found {actual.shape}")
    spread = float(expected.std())
    if not spread > 0:
        raise ValueError("the network's outputs do not depend on the image: parity would say nothing")
    difference = np.where(np.isfinite(actual), np.abs(expected - actual), np.finfo(np.float32).max).max(1)
    return Parity(
        images=len(expected),
        max_difference=float(difference.max()),
        logit_spread=spread,
        top1_agreement=float((expected.argmax(1) == actual.argmax(1)).mean()),
        worst_image=int(difference.argmax()),
    )
