"""The InputSpec: how an image becomes a network's input, on every hop."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .artifact import Record

LARGEST_SIDE = 8192  # pixels

Colours = tuple[float, float, float]


def _within_one(values: Colours) -> Colours:
    if max(values) > 1:
        raise ValueError("wanted numbers of RGB in 0..1: divide by 255")
    return values


def _positive_within_one(values: Colours) -> Colours:
    if min(values) <= 0:
        raise ValueError("wanted numbers above 0")
    return _within_one(values)


# Of a network that takes 0..255 as they are.
RAW: dict[str, Colours] = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
Mean = Annotated[Colours, AfterValidator(_within_one)]
Std = Annotated[Colours, AfterValidator(_positive_within_one)]


class InputSpec(Record):
    """How an image file becomes the network's input; travels from the student to the device.

    ``mean`` and ``std`` (of RGB in 0..1) are folded into every exported graph: a device feeds 0..255.
    """

    size: int = Field(ge=1, le=LARGEST_SIDE)
    mean: Mean
    std: Std
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
