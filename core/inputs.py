"""The InputSpec: how an image becomes a network's input, on every hop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
)

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


def _in_one_spelling(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    """Equal sides are a square, so that the same input has the same key however it was written."""
    try:
        size = read(value)
    except ValidationError:
        raise ValueError(f"wanted pixels from 1 to {LARGEST_SIDE}, of a square or as [height, width]") from None
    return size[0] if isinstance(size, tuple) and size[0] == size[1] else size


Side = Annotated[int, Field(ge=1, le=LARGEST_SIDE)]
# Side of a square, or height and width, in pixels.
Size = Annotated[Side | tuple[Side, Side], WrapValidator(_in_one_spelling)]


# How an image of other proportions becomes the input: it is covered and the rest of the image cut off, the image is
# stretched, or it is put into the input whole, with grey borders.
Resize = Literal["cover", "stretch", "letterbox"]


def sides(size: Size) -> tuple[int, int]:
    """Height and width of an input of this size, in pixels."""
    return (size, size) if isinstance(size, int) else size


def size_words(size: Size) -> str:
    """``96`` for a square, ``96x128`` for another height and width."""
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


class InputSpec(Record):
    """How an image file becomes the network's input; travels from the student to the device.

    ``mean`` and ``std`` (of RGB in 0..1) are folded into every exported graph: a device feeds 0..255.
    """

    size: Size
    mean: Mean
    std: Std
    crop_fraction: float = Field(gt=0, le=1)
    interpolation: Literal["bilinear", "bicubic", "lanczos", "nearest"]
    resize: Resize = "cover"
    antialias: Literal[True] = True
    colour_order: Literal["RGB"] = "RGB"
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    dtype: Literal["float32"] = "float32"

    @model_serializer(mode="wrap")
    def _without_the_usual(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """``resize`` came later: as long as it is the usual one it is in no key and no manifest."""
        values: dict[str, Any] = serialize(self)
        return {name: value for name, value in values.items() if name != "resize" or value != "cover"}

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width, in pixels."""
        return sides(self.size)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one input in this layout."""
        return (3, *self.sides) if self.layout == "NCHW" else (*self.sides, 3)
