"""Calibration inputs: real training images, chosen, and read one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, overload

import numpy as np

from ..core.config import CalibrateSettings
from ..core.errors import UserError
from ..core.progress import progress
from ..data.dataset import Dataset, Sample, load_images
from ..runtime.layout import to_input

# Outputs [N, K, ...] of samples: the float model's, or the teacher's for its own InputSpec.
Predict = Callable[[Sequence[Sample]], np.ndarray]
BATCH = 32  # images whose outputs are in memory together
CLASSES = 256  # that a byte tells apart


class CalibrationInputs(Sequence[np.ndarray]):
    """Inputs [1, ...] of a float graph, decoded when they are asked for: memory does not grow."""

    def __init__(self, samples: Sequence[Sample], spec: dict[str, Any], what: str) -> None:
        self._samples, self._spec, self._what = samples, spec, what

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CalibrationInputs) and self._samples == other._samples and self._spec == other._spec

    def __hash__(self) -> int:
        return hash(tuple(sample.path for sample in self._samples))

    @overload
    def __getitem__(self, at: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[np.ndarray]: ...
    def __getitem__(self, at: int | slice) -> np.ndarray | Sequence[np.ndarray]:
        if isinstance(at, slice):
            return CalibrationInputs(self._samples[at], self._spec, self._what)
        return self.as_input(self.image(at))

    def image(self, at: int) -> np.ndarray:
        """One of them as it is shown, uint8 [H, W, 3]."""
        return np.asarray(load_images([self._samples[at]], self._spec)[0])

    def as_input(self, image: np.ndarray) -> np.ndarray:
        """An image uint8 [H, W, 3] as the graph takes it."""
        return to_input(image[None], self._spec)

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[np.ndarray]:
        with progress(self._what, len(self)) as advance:
            for at in range(len(self)):
                yield self[at]
                advance(1, "")


def choose(config: CalibrateSettings, dataset: Dataset, model: Predict, teacher: Predict | None) -> list[Sample]:
    """``config.images`` training images, or all there are, by ``config.select``.

    Args:
        model: for ``coverage``: logits of the float model.
        teacher: for ``teacher``: logits of the teacher.

    Raises:
        UserError: fewer than two training images, or no teacher.
    """
    samples = dataset.samples("train")
    if len(samples) < 2:
        raise UserError(f"{dataset.path} has {len(samples)} training image(s): INT8 wants at least 2 to calibrate on")
    if config.select == "balanced":
        return dataset.balanced("train", config.images, config.seed)
    if config.select == "random":
        order = np.random.default_rng(config.seed).permutation(len(samples))
        return [samples[at] for at in order[: config.images]]
    pool = dataset.balanced("train", max(config.pool, config.images), config.seed)
    if config.select == "coverage":
        chosen = farthest(_by_image(model, pool, shown), config.images)
    else:
        if teacher is None:
            raise UserError(
                "calibrate.select teacher: the student's teacher is not beside it: put it there, or balanced"
            )
        chosen = spread(_by_image(teacher, pool, entropy), config.images)
    return [pool[at] for at in chosen]


def _by_image(predict: Predict, pool: Sequence[Sample], of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """What ``of`` makes of the outputs for ``pool`` [N, ...], which are in memory a batch at a time."""
    return np.concatenate([of(predict(pool[at : at + BATCH])) for at in range(0, len(pool), BATCH)])


def shown(outputs: np.ndarray) -> np.ndarray:
    """What an image shows by the outputs for it, [N, K]: logits as they are; of masks, how much there is of each class.

    Args:
        outputs: logits [N, K], logits of places [N, K, h, w] or classes of places, bytes [N, H, W].
    """
    if outputs.ndim == 2:
        return outputs
    if outputs.dtype.kind == "u":
        return np.stack([np.bincount(each.ravel(), minlength=CLASSES) / each.size for each in outputs])
    shifted = np.exp(outputs.astype(np.float64) - outputs.max(1, keepdims=True))
    shares = shifted / shifted.sum(1, keepdims=True)
    return np.asarray(shares.reshape(*shares.shape[:2], -1).mean(2))


def farthest(points: np.ndarray, count: int) -> np.ndarray:
    """Positions of ``count`` points [N, ...] that cover them all: each is the farthest from those before.

    Greedy k-centre (Gonzalez 1985), begun with the point nearest to the mean.
    """
    points = np.asarray(points, dtype=np.float64).reshape(len(points), -1)
    distances = np.full(len(points), np.inf)
    chosen = [int(np.square(points - points.mean(0)).sum(1).argmin())]
    while len(chosen) < min(count, len(points)):
        distances = np.minimum(distances, np.square(points - points[chosen[-1]]).sum(1))
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
    return np.asarray(chosen)


def entropy(logits: np.ndarray) -> np.ndarray:
    """Shannon entropy [N], in nats, of the softmax of logits [N, K, ...]; the mean over the places of an image."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    log_probabilities = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    by_place = -(np.exp(log_probabilities) * log_probabilities).sum(1)
    return np.asarray(by_place.reshape(len(logits), -1).mean(1))


def spread(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of ``count`` of ``values`` [N], at even steps of their ranks."""
    order = np.argsort(values, kind="stable")
    count = min(count, len(order))
    return np.asarray(order[np.round(np.linspace(0, len(order) - 1, count)).astype(int)])
