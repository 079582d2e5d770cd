"""From raw uint8 images to the array a graph takes, and from the array it gives to outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def sides(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width of an InputSpec's input, in pixels: ``size`` is the side of a square, or both."""
    size = spec["size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def to_input(images: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """uint8 [N, H, W, 3] to the InputSpec's dtype and layout, contiguous.

    Values are still 0..255, since a bundle's graph normalises; of a model of somebody else's they are ``normalised``.
    """
    values = images.astype(spec["dtype"])
    if spec.get("normalised"):
        values = (values / np.float32(255) - np.float32(spec["mean"])) / np.float32(spec["std"])
    return np.ascontiguousarray(values.transpose(0, 3, 1, 2)) if spec["layout"] == "NCHW" else values


def as_outputs(values: np.ndarray) -> np.ndarray:
    """What a graph gives as float32; of every pixel a class, integers [N, H, W], as unsigned ones where they can be."""
    if values.ndim != 3 or values.dtype.kind not in "iu":
        return np.asarray(values, dtype=np.float32)
    if values.dtype.kind == "u" or values.min(initial=0) < 0:
        return values
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))
