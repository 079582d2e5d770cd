"""Bias correction: rounding moves what a layer gives on average; its bias is moved back.

After Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019), with means measured
on images. Where an activation was merged into its layer, a mean behind it is divided by the share of values that the
activation lets through.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from .layers import Activations, Layer, signal_to_noise_db

IMAGES = 32  # half of them move biases, half judge
# Layers of one pass are moved together, each as if those before it were right: the fewer, the truer. A deep network
# can come out worse than it went in, which is why the outcome is judged.
PASSES = 4
LEAST_SHARE = 0.5  # a channel that seldom lets anything through would be moved too far
WORTH_DB = 1.0  # with less than that to gain, nothing is moved

Shifts = dict[str, np.ndarray]


@dataclass(frozen=True)
class Correction:
    """What to add to the biases of layers, by name; empty where it is not worth it or measured no better.

    Signal to noise of the logits in dB, on training images that moved no bias: as rounding left it, with the noise's
    own mean taken away (more cannot be gained by much), and with the biases moved (None where that was not tried).
    """

    shifts: Shifts = field(default_factory=dict)
    before_db: float | None = None
    without_mean_db: float | None = None
    after_db: float | None = None

    def as_dict(self) -> dict[str, float | int | None]:
        """The decibels and the number of moved layers, for the manifest."""
        return {
            "layers": len(self.shifts),
            "before_db": self.before_db,
            "without_mean_db": self.without_mean_db,
            "after_db": self.after_db,
        }


def correct(float32: Activations, make: Callable[[Shifts], Activations], images: Sequence[np.ndarray]) -> Correction:
    """Move biases, the first layers first, and keep the moves if the outputs come closer to float's on other images.

    Args:
        float32: the float graph.
        make: the quantized graph, with these shifts added to its biases.
        images: inputs; the first few of a long sequence are looked at.
    """
    layers = [layer for layer in float32.layers if layer.bias is not None]
    if not layers or len(images) < 4:
        return Correction()
    # Shuffled: classes take turns in what a stage calibrates on, so that every second image would be of every second.
    order = np.random.default_rng(0).permutation(min(IMAGES, len(images)))
    moving, judging = ([images[int(at)] for at in half] for half in np.array_split(order, 2))
    quantized = make({})
    before, without_mean = decibels(float32, quantized, judging)
    if without_mean - before < WORTH_DB:
        return Correction({}, before, without_mean)
    expected = _Means.of(float32, moving)
    shifts: Shifts = {}
    for block in np.array_split(np.arange(len(layers)), min(PASSES, len(layers))):
        found = _Means.of(quantized, moving)
        for layer in (layers[at] for at in block):
            shift = _shift(layer, float32, expected, found)
            if shift is not None:
                shifts[layer.name] = shift.astype(np.float32)
        quantized = make(shifts)
    after, _ = decibels(float32, quantized, judging)
    return Correction(shifts if after > before else {}, before, without_mean, after)


@dataclass(frozen=True)
class _Means:
    """By tensor and channel: the mean, and the share of values between the ends where an activation clips."""

    mean: Mapping[str, np.ndarray]
    share: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, activations: Activations, images: Sequence[np.ndarray]) -> _Means:
        mean: Shifts = {}
        share: Shifts = {}
        for image in images:
            for name, values in activations(image).items():
                if values.ndim in (2, 4):
                    rows = np.moveaxis(values, activations.channel_axis, -1).reshape(
                        -1, values.shape[activations.channel_axis]
                    )
                    mean[name] = mean.get(name, 0) + rows.mean(0, dtype=np.float64) / len(images)
                    inside = (rows > rows.min()) & (rows < rows.max())
                    share[name] = share.get(name, 0) + inside.mean(0) / len(images)
        return cls(mean, share)


def _shift(layer: Layer, float32: Activations, expected: _Means, found: _Means) -> np.ndarray | None:
    if layer.output in found.mean:
        return np.asarray(expected.mean[layer.output] - found.mean[layer.output])
    followers = (other.output for other in float32.layers if layer.output in other.inputs)
    merged = next((name for name in followers if name in found.mean), None)
    if merged is None:
        return None
    missing = expected.mean[merged] - found.mean[merged]
    return np.asarray(missing / np.maximum(expected.share[merged], LEAST_SHARE))


def decibels(float32: Activations, quantized: Activations, images: Sequence[np.ndarray]) -> tuple[float, float]:
    """Signal to noise of the logits [N, ...], as they are and without the mean of the noise.

    Those are the last numbers of a graph, whether it gives them or decides by them.
    """
    name = float32.layers[-1].output
    # What was written anew may call it otherwise.
    its = name if name in quantized(images[0]) else quantized.layers[-1].output
    expected = np.concatenate([float32(image)[name] for image in images])
    noise = np.concatenate([quantized(image)[its] for image in images]) - expected
    # Of N values a variance is N / (N - 1) times what their own mean leaves.
    centred = (noise - noise.mean(0)) * np.sqrt(len(noise) / (len(noise) - 1))
    return signal_to_noise_db(expected, noise), signal_to_noise_db(expected, centred)
