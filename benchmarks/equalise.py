"""Whether cross-layer equalisation helps INT8 with a scale for every channel: not enough that kdpipe does it.

    python benchmarks/equalise.py MODEL --data DATA        MODEL: an onnxruntime float32 model

Two ways to choose the scale between a convolution and the next, of each channel: from the largest weights of both
(Nagel et al. 2019), and from the largest activation and the next weights (as SmoothQuant does). Only pairs with nothing
or a ReLU between them and a single consumer can be scaled; ReLU6 and smooth activations cannot.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import onnx
import typer
from onnx import numpy_helper

from kdpipe.core.kinds import Model
from kdpipe.core.proc import quiet
from kdpipe.data.dataset import Dataset, predict_samples
from kdpipe.quantize.calibrate import CalibrationInputs
from kdpipe.quantize.qdq import OnnxActivations, write_qdq
from kdpipe.quantize.ranges import estimate, observe
from kdpipe.runtime import open_session

IMAGES = 128
LIMIT = 100.0  # of a scale


def pairs(graph: onnx.GraphProto) -> list[tuple[onnx.NodeProto, str, onnx.NodeProto]]:
    """Convolutions that follow each other, and the tensor that the second one takes."""
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    found = []
    for node in graph.node:
        if node.op_type != "Conv" or len(node.input) < 3:
            continue
        output, after = node.output[0], consumers.get(node.output[0], [])
        if len(after) == 1 and after[0].op_type == "Relu":
            output = after[0].output[0]
            after = consumers.get(output, [])
        if len(after) == 1 and after[0].op_type == "Conv":
            found.append((node, output, after[0]))
    return found


def equalised(source: Path, largest: dict[str, np.ndarray] | None) -> tuple[onnx.ModelProto, int]:
    """The graph with scaled channels and how many pairs were scaled; by weights alone without ``largest``."""
    model = onnx.load(source)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    scaled = 0
    for first, between, second in pairs(model.graph):
        weight, bias, after = (
            numpy_helper.to_array(tensors[name]).copy() for name in (*first.input[1:3], second.input[1])
        )
        channels = len(weight)
        depthwise = after.shape[1] == 1 and len(after) == channels
        if not depthwise and after.shape[1] != channels:
            continue  # grouped
        before = np.abs(weight).max((1, 2, 3)) if largest is None else largest[between]
        behind = np.abs(after).max((1, 2, 3) if depthwise else (0, 2, 3))
        live = (before > 1e-6) & (behind > 1e-6)
        scale = np.ones(channels, np.float32)
        scale[live] = np.sqrt(before[live] / behind[live])
        scale = np.clip(scale / np.exp(np.log(scale[live]).mean()), 1 / LIMIT, LIMIT)
        column = scale[:, None, None, None]
        changed = (weight / column, bias / scale, after * (column if depthwise else scale[None, :, None, None]))
        for name, values in zip((*first.input[1:3], second.input[1]), changed, strict=True):
            tensors[name].CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))
        scaled += 1
    return model, scaled


def main(
    model: Annotated[Path, typer.Argument(help="folder of an onnxruntime float32 model")],
    data: Annotated[Path, typer.Option(help="folder of its dataset")],
) -> None:
    """Print the signal to noise of INT8 as it is and equalised, on training images that set no range."""
    float32, dataset = Model.open(model), Dataset.open(data)
    spec = float32.facts.input.model_dump()
    samples = dataset.balanced("train", 2 * IMAGES, 0)
    images = CalibrationInputs(samples[:IMAGES], spec, "calibrating")
    source = float32.entry

    def logits(folder: Path) -> np.ndarray:
        with quiet():
            return predict_samples(open_session(folder, float32.facts.for_runtime()), samples[IMAGES:], spec)

    expected = logits(float32.path)

    def decibel(noise: np.ndarray) -> float:
        return -10 * float(np.log10((noise.var(1) / expected.var(1)).mean()))

    def tell(name: str, graph: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            ranges = estimate(observe(OnnxActivations(graph), images), "mse", symmetric=False)
            with quiet():
                write_qdq(graph, ranges, {}, Path(scratch) / "model.onnx", "uint8", (), False, {})
            print(f"{name}: {decibel(logits(Path(scratch)) - expected):.2f} dB")

    largest: dict[str, np.ndarray] = {}
    activations = OnnxActivations(source)
    for image in images[: IMAGES // 4]:
        for name, values in activations(image).items():
            if values.ndim == 4:
                largest[name] = np.maximum(largest.get(name, 0), np.abs(values[0]).max((1, 2)))
    print(float32.facts.model)
    tell("INT8", source)
    for name, by in (("by weights", None), ("by activations", largest)):
        graph, scaled = equalised(source, by)
        with tempfile.TemporaryDirectory() as scratch:
            onnx.save(graph, Path(scratch) / "model.onnx")
            changed = np.abs(logits(Path(scratch)) - expected).max() / expected.std()
            tell(f"equalised {name}, {scaled} pairs, float32 changed by {changed:.0e}", Path(scratch) / "model.onnx")


if __name__ == "__main__":
    typer.run(main)
