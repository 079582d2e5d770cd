"""A float32 TFLite file whose image is bytes, and its INT8 file with bytes in and out, as microcontrollers take them.

Normalisation vanishes from the arithmetic: what stands before the first layer is n = slope x + offset of a pixel x, by
channel. One scale S and one zero point z of the image's own tensor make r = (x - z) / S of it without computing a
thing, and n = a r + b is left, with a = slope S near 1 and b = slope z + offset near 0, by channel. A convolution takes
both: weights times a, and the sum of its weights times b added to its bias. That is exact but for one thing: where it
pads, it pads with r = 0, which is n = b, and not n = 0. With one mean for all channels b is half a level at most, less
than the image's own rounding. With ImageNet's means it is ten levels, which cost 4 dB of a network of 32 pixels; there
the image gets one more channel of a constant, whose weights are the sums of weights times b: it is padded with 0 too,
and all is exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .flatbuffer import VALID, Flatbuffer

IMAGE, ONES, SCALED = "image", "image_and_ones", "image_scaled"  # names of tensors
AFFINE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ADD": np.add,
    "SUB": np.subtract,
    "MUL": np.multiply,
    "DIV": np.divide,
}
CONVOLUTIONS = ("CONV_2D", "DEPTHWISE_CONV_2D")
PADS = "PAD"
NO_ACTIVATION = 0
CHANNELS = 3
LEVELS = 255
# Without a convolution to take them, a and b are left out where they are less than rounding the image leaves.
LEAST_LEVELS = 0.5

Folded = Literal["convolution", "convolution with a channel of ones", "input", "kept"]


@dataclass(frozen=True)
class Normalisation:
    """Where normalisation went, and what the image's tensor stands for."""

    into: Folded
    scale: float  # of the image's tensor: r = scale (x - zero_point)
    zero_point: int
    # Largest normalised value that padding stands for in place of 0.
    padded_with: float

    @property
    def ends(self) -> tuple[float, float]:
        """What black and white are."""
        return -self.zero_point * self.scale, (LEVELS - self.zero_point) * self.scale

    def of(self, image: np.ndarray) -> np.ndarray:
        """Pixels in 0..255 as the image's tensor has them, float32."""
        return np.asarray((image - np.float32(self.zero_point)) * np.float32(self.scale), np.float32)

    @property
    def padded_with_levels(self) -> float:
        """``padded_with`` in levels of the image's tensor."""
        return self.padded_with / self.scale

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "folded_into": self.into,
            "input_scale": self.scale,
            "input_zero_point": self.zero_point,
            "padded_with_levels": round(self.padded_with_levels, 3),
        }


def fold_normalisation(path: Path, out: Path) -> Normalisation:
    """Write the float32 file with an image r = (x - z) / S in place of the pixels x.

    What cannot be folded is kept as one multiplication and one addition by channel, which INT8 rounds as any other.
    """
    file = Flatbuffer(path)
    graph = file.graph
    image = int(graph.inputs[0])
    slope, offset = np.ones(CHANNELS), np.zeros(CHANNELS)
    chain, normalised = [], image
    while (step := _affine(file, normalised)) is not None:
        operator, apply, values = step
        offset = apply(offset, values)
        slope = slope * values if file.kind(operator) == "MUL" else slope
        slope = slope / values if file.kind(operator) == "DIV" else slope
        chain.append(operator)
        normalised = int(operator.outputs[0])
    if not (np.isfinite(slope) & np.isfinite(offset) & (slope > 0)).all():
        # No normalisation that one could name: the pixels stay pixels, and every step is kept.
        chain, normalised, slope, offset = [], image, np.ones(CHANNELS), np.zeros(CHANNELS)
    size = float((1 / slope).mean())
    zero_point = int(np.clip(np.round((-offset / slope).mean()), 0, LEVELS))
    factors, shifts = slope * size, slope * zero_point + offset
    convolutions, padded = _convolutions(file, normalised)
    graph.operators = [operator for operator in graph.operators if operator not in chain]
    padded_with = 0.0
    into: Folded = "kept"
    far = float(np.abs(shifts).max() * size)
    padded = padded or any(map(file.pads, convolutions))
    # One more channel goes into a convolution that takes all of them.
    widens = all(file.kind(each) == "CONV_2D" for each in convolutions) and zero_point < LEVELS
    if convolutions and padded and widens and far > LEAST_LEVELS:
        into = "convolution with a channel of ones"
        # Such that its weights are no larger than the others, whose scale they share; and a level of the image.
        value = min(float(np.round(np.abs(shifts).sum() * size)), LEVELS - zero_point) / size
        height, width = (int(side) for side in graph.tensors[image].shape[1:3])
        wider = file.add_tensor(ONES, (1, height, width, CHANNELS + 1), file.schema.TensorType.FLOAT32)
        _rewire(graph, normalised, wider)
        for pad in (each for each in file.users(wider) if file.kind(each) == PADS):
            file.widen(int(pad.outputs[0]), CHANNELS + 1)
        for operator in convolutions:
            _into_convolution(file, operator, factors, shifts, value)
        ones = [
            image,
            file.add_constant(np.array([[0, 0]] * 3 + [[0, 1]]), np.int32),
            file.add_constant(np.array(value)),
        ]
        graph.operators.insert(0, file.operator("PADV2", ones, wider))
    elif convolutions:
        into, padded_with = "convolution", float(np.abs(shifts).max()) if padded else 0.0
        for operator in convolutions:
            _into_convolution(file, operator, factors, shifts)
        _rewire(graph, normalised, image)
    elif max(np.abs(factors - 1).max() * LEVELS, np.abs(shifts).max() * size) <= LEAST_LEVELS:
        into, padded_with = "input", float(np.abs(shifts).max())
        _rewire(graph, normalised, image)
    else:
        scaled = file.add_tensor(SCALED, graph.tensors[image].shape, file.schema.TensorType.FLOAT32)
        constants = [file.add_constant(each) for each in (factors, shifts)]
        graph.operators[:0] = [
            file.operator("MUL", [image, constants[0]], scaled),
            file.operator("ADD", [scaled, constants[1]], normalised),
        ]
    for operator in [each for each in graph.operators if file.kind(each) == "FULLY_CONNECTED"]:
        as_convolution(file, operator)
    file.name_by_layers(IMAGE)
    file.write(out)
    return Normalisation(into, 1 / size, zero_point, padded_with)


def _affine(file: Flatbuffer, tensor: int) -> tuple[Any, Callable[..., np.ndarray], np.ndarray] | None:
    """The one operator that takes a tensor, if it adds, subtracts, multiplies or divides by a constant a channel."""
    users = file.users(tensor)
    if len(users) != 1 or tensor in file.graph.outputs or file.kind(users[0]) not in AFFINE:
        return None
    [operator] = users
    kind, inputs = file.kind(operator), [int(at) for at in operator.inputs]
    if operator.builtinOptions is not None and operator.builtinOptions.fusedActivationFunction != NO_ACTIVATION:
        return None
    if inputs[0] != tensor and kind in ("SUB", "DIV"):
        return None
    values = file.constant(inputs[1] if inputs[0] == tensor else inputs[0])
    if values is None or values.size not in (1, CHANNELS) or (values.size > 1 and values.shape[-1] != CHANNELS):
        return None
    return operator, AFFINE[kind], np.broadcast_to(values.ravel().astype(np.float64), CHANNELS)


def _convolutions(file: Flatbuffer, tensor: int) -> tuple[list[Any], bool]:
    """The convolutions that take a tensor, and whether it is padded for any; none where anything else takes it too."""
    convolutions, padded = [], False
    for user in file.users(tensor):
        followers = [user]
        if file.kind(user) == PADS and int(user.inputs[0]) == tensor:
            padded = True
            followers = file.users(int(user.outputs[0]))
        for each in followers:
            weights = file.constant(int(each.inputs[1])) if file.kind(each) in CONVOLUTIONS else None
            if weights is None:
                return [], False
            takes = weights.shape[3] if file.kind(each) == "CONV_2D" else CHANNELS
            bias = int(each.inputs[2]) if len(each.inputs) > 2 else -1
            if takes != CHANNELS or (bias >= 0 and file.constant(bias) is None):
                return [], False
            convolutions.append(each)
    return convolutions, padded


def _into_convolution(
    file: Flatbuffer, operator: Any, factors: np.ndarray, shifts: np.ndarray, ones: float | None = None
) -> None:
    """Weights [O, H, W, C] of a convolution, [1, H, W, C M] of a depthwise one.

    Args:
        ones: the value of one more channel that takes the shifts in place of the bias.
    """
    weights = file.constant(int(operator.inputs[1]))
    assert weights is not None  # as ``_convolutions`` saw
    whole = weights.astype(np.float64)
    many = weights.shape[3] // CHANNELS  # 1 of a convolution
    shifted, folded = whole * np.repeat(shifts, many), whole * np.repeat(factors, many)
    more = shifted.sum((1, 2, 3) if file.kind(operator) == "CONV_2D" else (0, 1, 2))
    if ones is not None:
        folded = np.concatenate([folded, shifted.sum(3, keepdims=True) / ones], axis=3)
        more = np.zeros_like(more)
    at = int(operator.inputs[2]) if len(operator.inputs) > 2 else -1
    bias = file.constant(at) if at >= 0 else None
    # Constants of its own: others may share the old ones.
    constants = [file.add_constant(folded), file.add_constant(more if bias is None else bias + more)]
    operator.inputs = np.array([int(operator.inputs[0]), *constants], np.int32)


def as_convolution(file: Flatbuffer, operator: Any) -> None:
    """Make a fully connected layer of N rows of C values a convolution of pixels [1, N, 1, C].

    LiteRT rounds what a fully connected layer sums up once, TFLM twice: of some hundred images one would have another
    integer. Of convolutions both round twice.
    """
    graph, types = file.graph, file.schema.TensorType
    row, weights, *more = (int(at) for at in operator.inputs)
    output = int(operator.outputs[0])
    known, options = file.constant(weights), operator.builtinOptions
    if known is None or options.weightsFormat != 0:  # computed weights, or those of a layout of their own
        return
    gives, takes = known.shape
    bias = more[0] if more and more[0] >= 0 else file.add_constant(np.zeros(gives))
    before, after = ([int(side) for side in graph.tensors[at].shape] for at in (row, output))
    places = [*before[:3]] if len(before) == 4 and before[0] == 1 else [1, int(np.prod(after)) // gives, 1]
    name = graph.tensors[output].name.decode()
    made = []
    if before != [*places, takes]:
        wanted, row = row, file.add_tensor(name, (*places, takes), types.FLOAT32)
        made.append(file.operator("RESHAPE", [wanted, file.add_constant(np.array([*places, takes]), np.int32)], row))
    answer = output if after == [*places, gives] else file.add_tensor(name, (*places, gives), types.FLOAT32)
    kernel = file.add_constant(known.reshape(gives, 1, 1, takes))
    convolution = file.operator("CONV_2D", [row, kernel, bias], answer)
    convolution.builtinOptions.padding = VALID
    convolution.builtinOptions.strideW = convolution.builtinOptions.strideH = 1
    convolution.builtinOptions.fusedActivationFunction = options.fusedActivationFunction
    made.append(convolution)
    if answer != output:
        made.append(file.operator("RESHAPE", [answer, file.add_constant(np.array(after), np.int32)], output))
    at = graph.operators.index(operator)
    graph.operators[at : at + 1] = made


def _rewire(graph: Any, old: int, new: int) -> None:
    for operator in graph.operators:
        operator.inputs = np.array([new if at == old else at for at in operator.inputs], np.int32)


def bytes_in_and_out(path: Path, normalisation: Normalisation, output: tuple[float, float] | None) -> None:
    """Give an INT8 file an input and an output of uint8, two operators that shift by 128: the bytes are the pixels.

    Where the first or the last layer is kept in float they dequantise and quantise.

    Args:
        output: the range of a float output; None: it has none, and stays what it is.
    """
    file = Flatbuffer(path)
    graph, types = file.graph, file.schema.TensorType
    [image], [last] = ([int(at) for at in side] for side in (graph.inputs, graph.outputs))
    bytes_of = file.add_quantized(image, normalisation.scale, normalisation.zero_point)
    takes = "QUANTIZE" if graph.tensors[image].type == types.INT8 else "DEQUANTIZE"
    graph.operators.insert(0, file.operator(takes, [bytes_of], image))
    graph.inputs = np.array([bytes_of], np.int32)
    moved = {image: bytes_of}
    inner = graph.tensors[last]
    if inner.type == types.INT8:
        scale, zero_point = float(inner.quantization.scale[0]), int(inner.quantization.zeroPoint[0]) + 128
    elif inner.type == types.FLOAT32 and output is not None:
        low, high = min(output[0], 0.0), max(output[1], 0.0)
        scale = (high - low) / LEVELS or 1.0
        zero_point = int(np.clip(np.round(-low / scale), 0, LEVELS))
    else:
        scale, zero_point = 0.0, 0  # classes, which stand for themselves
    if scale:
        moved[last] = file.add_quantized(last, scale, zero_point)
        graph.operators.append(file.operator("QUANTIZE", [last], moved[last]))
        graph.outputs = np.array([moved[last]], np.int32)
    _decide_by_integers(file)
    for signature in file.model.signatureDefs or []:
        for each in (*signature.inputs, *signature.outputs):
            each.tensorIndex = moved.get(each.tensorIndex, each.tensorIndex)
    file.write(path)


def _decide_by_integers(file: Flatbuffer) -> None:
    """The largest of logits is the largest of their integers, which the quantiser turns into floats before."""
    made = {int(each.outputs[0]): each for each in file.graph.operators if file.kind(each) == "DEQUANTIZE"}
    for operator in file.graph.operators:
        if file.kind(operator) == "ARG_MAX" and int(operator.inputs[0]) in made:
            before = made[int(operator.inputs[0])]
            operator.inputs = np.array([before.inputs[0], *operator.inputs[1:]], np.int32)
            if not file.users(int(before.outputs[0])):
                file.graph.operators.remove(before)


def float_operators(path: Path) -> list[str]:
    """Kinds of the operators that compute in float, in their order, each once."""
    file = Flatbuffer(path)
    floats = {at for at, tensor in enumerate(file.graph.tensors) if tensor.type == file.schema.TensorType.FLOAT32}
    found = [
        file.kind(each) for each in file.graph.operators if floats & {*map(int, each.inputs), *map(int, each.outputs)}
    ]
    return list(dict.fromkeys(kind for kind in found if kind not in ("QUANTIZE", "DEQUANTIZE")))
