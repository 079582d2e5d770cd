"""The InputSpec: how an image becomes a network's input, on every hop."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .artifact import Record

LARGEST_SIDE = 8192  # pixels


class InputSpec(Record):
    """How an image file becomes the network's input; travels from the student to the device.

    ``mean`` and ``std`` (of RGB in 0..1) are folded into every exported graph: a device feeds 0..255.
    """

    size: int = Field(ge=1, le=LARGEST_SIDE)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_fraction: float = Field(gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"]
    antialias: Literal[True] = True
    colour_order: Literal["RGB"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32"] = "float32"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input in this layout."""
        return (3, self.size, self.size) if self.layout == "NCHW" else (self.size, self.size, 3)
