"""What an answer is and when it is right: one class a task, asked wherever outputs are judged.

Needs numpy and the standard library alone, because a device judges too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A figure of ``n`` images with the two ends of its interval."""

    value: float
    low: float
    high: float
    n: int


class Change(NamedTuple):
    """Two networks on the same images: the second one's figure minus the first one's, with its interval."""

    difference: float
    low: float
    high: float
    lost: int  # images that the first did better on
    won: int  # images that the second did better on
    p_value: float  # of no difference
    n: int


class Task(Protocol):
    """What the outputs [N, ...] of a network mean."""

    name: str
    metric: str  # name of the figure that ``summary`` gives
    unit: str  # in which a person reads it; the figure itself is a share
    summary_note: str  # how its interval is made, for the foot of a table
    change_note: str  # what ``lost`` and ``won`` count, and how interval and p-value of a change are made

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs [N, ...] to what the network says of each image, as ``labels`` are written."""

    def likeliest(self, outputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """What the network says of each image, the likeliest first, for outputs [N, ...].

        Returns:
            At most ``count`` decisions [N, count, ...], the first being that of ``decide``; and how likely the network
            itself takes each to be, 0 to 1 [N, count].
        """

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """How right outputs [N, ...] are about images with these labels: one score an image [N, ...]."""

    def summary(self, scores: np.ndarray) -> Estimate:
        """The figure of all images. Raises ValueError for none."""

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Scores of the same images by two networks, compared in pairs.

        Raises:
            ValueError: of different shapes, or none.
        """

    def guessing(self, labels: np.ndarray) -> float:
        """The figure of the best answer that looks at no image, for images with these labels."""

    def agreement(self, first: np.ndarray, second: np.ndarray) -> float:
        """How far two outputs of the same images say the same, 0 to 1."""

    def differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Positions of the images about which two outputs say something else, the most different first."""

    def tell(self, decision: np.ndarray, classes: Sequence[str]) -> str:
        """What ``decide`` gave for one image, or its label, in a few words."""


class Classification:
    """One class of K an image: the largest of its logits [K] decides."""

    name: str = "classification"
    metric: str = "top-1"
    unit: str = "%"
    summary_note: str = "by Wilson over the test images"
    change_note: str = (
        "Lost: right before, wrong after. Intervals of the difference by Agresti and Min, p by McNemar's exact test."
    )

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Logits [N, K] to classes [N]."""
        return np.asarray(outputs.argmax(1))

    def likeliest(self, outputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes [N, count] with their probability by softmax, for finite logits [N, K]; of equal ones the first.

        Outputs that are probabilities already (none negative, every row with the sum 1) are taken as they are.
        """
        shares = outputs.astype(np.float64)
        if shares.min() < 0 or not np.allclose(shares.sum(1), 1, rtol=0, atol=1e-3):
            shares = np.exp(shares - shares.max(1, keepdims=True))
            shares /= shares.sum(1, keepdims=True)
        best = self.decide(outputs)[:, None]  # what takes no sorting
        classes = best if count == 1 else np.argsort(-outputs, axis=1, kind="stable")[:, :count]
        return classes, np.take_along_axis(shares, classes, 1)

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether the class is right, bool [N], for logits [N, K] and classes [N]."""
        return np.asarray(self.decide(outputs) == labels)

    def summary(self, scores: np.ndarray) -> Estimate:
        """The share that is right, with Wilson's score interval (Wilson 1927)."""
        n = len(scores)
        if n == 0:
            raise ValueError("wanted the score of at least one image")
        z, share = _normal_quantile(), float(scores.mean())
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        # The interval holds the share; rounding may leave an end of it beyond by the last digit where all are right.
        return Estimate(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)), n)

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Difference of two shares of the same images.

        The p-value is McNemar's exact test (two-sided binomial on the images that changed). The interval is
        Agresti and Min's (2005): Wald after adding one half to each cell of the 2x2 table.
        """
        if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
            raise ValueError(f"wanted two equally long vectors, found shapes {before.shape} and {after.shape}")
        n = len(before)
        lost, won = int((before & ~after).sum()), int((~before & after).sum())
        b, c, total = lost + 0.5, won + 0.5, n + 2
        centre = (c - b) / total
        half = _normal_quantile() * math.sqrt((b + c) - (c - b) ** 2 / total) / total
        p_value = min(1.0, 2 * _half_binomial_cdf(min(lost, won), lost + won))
        return Change((won - lost) / n, centre - half, centre + half, lost, won, p_value, n)

    def guessing(self, labels: np.ndarray) -> float:
        """The share of the commonest class."""
        return float(np.unique(labels, return_counts=True)[1].max() / len(labels))

    def agreement(self, first: np.ndarray, second: np.ndarray) -> float:
        """The share of images that both call the same, for logits [N, K]."""
        return float((self.decide(first) == self.decide(second)).mean())

    def differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Positions of the images that the two call something else, in order."""
        return np.flatnonzero(self.decide(first) != self.decide(second))

    def tell(self, decision: np.ndarray, classes: Sequence[str]) -> str:
        """The name of the class."""
        return classes[int(decision)]


def _normal_quantile() -> float:
    return NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def _half_binomial_cdf(successes: int, n: int) -> float:
    """P(X <= successes), X ~ Binomial(n, 1/2); summed in logs, so that a large n is safe."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(successes + 1)
    return float(np.exp(log_factorials[n] - log_factorials[k] - log_factorials[n - k] - n * math.log(2)).sum())


TASKS: dict[str, Task] = {task.name: task for task in (Classification(),)}
