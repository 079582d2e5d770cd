"""Where noise enters: signal-to-quantisation-noise ratio of every layer's input and output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..core.kinds import LayerNoise

PADDING = 1e30  # max pooling is padded with the least float or minus infinity: no value, and no range may hold it


@dataclass(frozen=True)
class Layer:
    """One operation of a graph and the float tensors around it."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    output: str
    bias: str | None = None  # the constant that is added per channel, where there is one


class Activations(Protocol):
    """A graph that tells what passes between its layers."""

    layers: tuple[Layer, ...]  # in the order they run
    channel_axis: int  # of a tensor of two or four dimensions

    def __call__(self, image: np.ndarray) -> Mapping[str, np.ndarray]:
        """Float values of the tensors of ``layers`` (and the input) by name, for one input of the graph."""


def signal_to_noise_db(outputs: np.ndarray, noise: np.ndarray) -> float:
    """Signal to noise of a network's outputs [N, ...], in dB: the one definition that manifests hold.

    Both are variances over an image's own outputs, since what all of them share changes no answer; noise over signal is
    taken image by image and averaged, so that a few images with large outputs don't decide.
    """
    signal = outputs.reshape(len(outputs), -1).var(axis=1, dtype=np.float64)
    share = noise.reshape(len(noise), -1).var(axis=1, dtype=np.float64) / np.maximum(signal, 1e-30)
    return round(-10 * float(np.log10(max(float(share.mean()), 1e-30))), 2)


def own_noise(layer: LayerNoise) -> float:
    """Relative noise power that the layer adds to what it was given."""
    return max(0.0, _relative(layer.out_db) - _relative(layer.in_db))


def _relative(decibel: float | None) -> float:
    return 0.0 if decibel is None else 10 ** (-decibel / 10)


def noise_by_layer(float32: Activations, quantized: Activations, images: Iterable[np.ndarray]) -> list[LayerNoise]:
    """Compare two graphs tensor by tensor over ``images``, in the order of ``float32``'s layers.

    The ratio is 10 log10 of the signal's energy over the energy of the difference, over all images.
    """
    signal: dict[str, float] = {}
    noise: dict[str, float] = {}
    for image in images:
        expected, actual = float32(image), quantized(image)
        for name, values in expected.items():
            other = actual.get(name)
            if other is not None and other.shape == values.shape:
                real = np.abs(values) < PADDING
                signal[name] = signal.get(name, 0.0) + float(np.square(values[real], dtype=np.float64).sum())
                difference = np.subtract(other[real], values[real], dtype=np.float64)
                noise[name] = noise.get(name, 0.0) + float(np.square(difference).sum())

    def decibel(name: str) -> float | None:
        if not signal.get(name) or not noise.get(name) or not np.isfinite(noise[name]):
            return None
        return round(10 * float(np.log10(signal[name] / noise[name])), 2)

    found = []
    for layer in float32.layers:
        # An activation that was merged into its layer took the layer's output with it: it shows the noise of both.
        merged = (follower.output for follower in float32.layers if layer.output in follower.inputs)
        output = next((name for name in (layer.output, *merged) if name in signal), None)
        if output is not None:
            inputs = [ratio for ratio in map(decibel, layer.inputs) if ratio is not None]
            found.append(
                LayerNoise(name=layer.name, kind=layer.kind, in_db=min(inputs, default=None), out_db=decibel(output))
            )
    return found
