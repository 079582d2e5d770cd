"""TFLite by ai-edge-quantizer: static suits CNNs, dynamic ViTs; its ranges are ours."""

from __future__ import annotations

import copy
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..core.kinds import ModelFacts
from .bias import Correction, Shifts, correct
from .flatbuffer import module_of
from .layers import Activations, Layer
from .ranges import Range, estimate, normalisation, observe
from .variant import Taken, Variant

BIASED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
# Where LayerNorm (the one thing that takes the root of a variance as it runs) stands in the branches nothing bounds the
# sums: with all of a ViT in 8 bits 18 dB were lost, and it ran four times slower than in float.
NORMALISING = "RSQRT"


class TfliteActivations:
    """A flatbuffer whose interpreter keeps every tensor; int8 ones are given as the floats they stand for."""

    channel_axis = -1

    def __init__(self, path: Path) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        self._interpreter = Interpreter(
            str(path),
            experimental_preserve_all_tensors=True,
            # XNNPACK would take the tensors between its operators for itself.
            experimental_op_resolver_type=OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
        )
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        # Two parts of a graph may give their tensors the same name: those are told apart by none of the tools.
        tensors = {tensor["index"]: tensor for tensor in self._interpreter.get_tensor_details()}
        made = {at for operation in self._interpreter._get_ops_details() for at in operation["outputs"]}
        self._tensors = {at: tensors[at] for at in {*made, self._input["index"]} if _holds_numbers(tensors[at])}
        taken: Counter[str] = Counter()
        layers = []
        self.operators: dict[str, int] = {}  # their positions in the file, by layer
        for at, operation in enumerate(self._interpreter._get_ops_details()):
            kind, outputs = operation["op_name"], operation["outputs"]
            if len(outputs) != 1 or outputs[0] not in self._tensors or kind in ("QUANTIZE", "DEQUANTIZE", "DELEGATE"):
                continue
            tensor: str = self._tensors[outputs[0]]["name"]
            name = f"{module_of(tensor)}:{kind}"
            taken[name] += 1
            inputs = (self._tensors[at]["name"] for at in operation["inputs"] if at in self._tensors)
            # A bias that is absent has the index -1; one that is computed has no values to move.
            third = operation["inputs"][2] if kind in BIASED and len(operation["inputs"]) > 2 else -1
            bias = tensors[third]["name"] if third in tensors and third not in self._tensors else None
            name = name if taken[name] == 1 else f"{name}~{taken[name]}"
            self.operators[name] = at
            layers.append(Layer(name, kind, tuple(inputs), tensor, bias))
        self.layers: tuple[Layer, ...] = tuple(layers)

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        self._interpreter.set_tensor(self._input["index"], _quantized(image, self._input))
        self._interpreter.invoke()
        return {
            tensor["name"]: _dequantized(self._interpreter.get_tensor(at), tensor)
            for at, tensor in self._tensors.items()
        }


def quantized_names(path: Path) -> set[str]:
    """Names of the tensors between layers that are on a grid in a file, without its input."""
    activations = TfliteActivations(path)
    tensors = activations._tensors.values()
    return {each["name"] for each in tensors if each["dtype"] == np.int8} - {activations._input["name"]}


def _holds_numbers(tensor: Mapping[str, Any]) -> bool:
    return bool(tensor["dtype"] == np.float32 or (tensor["dtype"] == np.int8 and tensor["quantization"][0] > 0))


def _quantized(image: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    if tensor["dtype"] == np.float32:
        return image
    if tensor["dtype"] == np.uint8:  # the bytes of an image stand for themselves
        return image.astype(np.uint8)
    scale, zero_point = tensor["quantization"]
    return np.asarray(np.clip(np.round(image / scale) + zero_point, -128, 127), dtype=tensor["dtype"])


def _dequantized(values: np.ndarray, tensor: Mapping[str, Any]) -> np.ndarray:
    if tensor["dtype"] == np.float32:
        return values
    scale, zero_point = tensor["quantization"]
    return np.asarray((values.astype(np.float32) - zero_point) * scale, dtype=np.float32)


def _move_biases(path: Path, shifts: Mapping[int, np.ndarray], out: Path) -> None:
    """Write the file with ``shifts`` added to the biases of operators, by their positions."""
    from ai_edge_litert.tools import flatbuffer_utils

    file = flatbuffer_utils.read_model(str(path))
    graph = file.subgraphs[0]
    for at, shift in shifts.items():
        inputs = graph.operators[at].inputs
        # One of its own: two operators may share a bias.
        tensor = copy.copy(graph.tensors[inputs[2]])
        buffer = copy.copy(file.buffers[tensor.buffer])
        moved = np.frombuffer(buffer.data.tobytes(), np.float32) + shift
        buffer.data = np.frombuffer(moved.astype(np.float32).tobytes(), np.uint8)
        tensor.name, tensor.buffer = f"moved_bias_{at}".encode(), len(file.buffers)
        inputs[2] = len(graph.tensors)
        file.buffers.append(buffer)
        graph.tensors.append(tensor)
    flatbuffer_utils.write_model(file, str(out))


class StaticInt8(Variant):
    needs: tuple[str, ...] = ("ai-edge-quantizer", "ai-edge-litert")
    precision = "int8"
    calibrated = True
    quick = True
    normalises_in_float = True  # rounding the image once more for each step costs a decibel or two, floats no time

    @property
    def whole(self) -> Path:
        """The float32 file that is quantised."""
        return self._work.entry

    @property
    def input_range(self) -> Range:
        """Of its image: known, as observing it would let 255 clip on a brighter one."""
        return 0.0, 255.0

    def given(self, image: np.ndarray) -> np.ndarray:
        """What the float32 file takes for an image [1, H, W, 3] of 0..255."""
        return image

    def float32(self) -> TfliteActivations:
        """What passes between the layers of the float32 file, given images of 0..255."""
        return TfliteActivations(self.whole)

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        rule = self._work.config.calibrate.ranges
        return estimate(observe(self.float32(), self._work.inputs), rule, symmetric=False)

    @cached_property
    def correction(self) -> Correction:
        if not self._work.config.correct_biases:
            return Correction()

        def make(shifts: Shifts) -> TfliteActivations:
            with tempfile.TemporaryDirectory() as scratch:
                self._write(Path(scratch) / "model.tflite", (), shifts)
                return TfliteActivations(Path(scratch) / "model.tflite")

        return correct(self.float32(), make, self._work.inputs)

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        self._write(folder / self._work.model.facts.entry, keep_float, self.correction.shifts)
        return Taken(
            {
                "format": "static",
                "weights": "int8 per channel",
                "activations": "int8",
                "ranges": self._work.config.calibrate.ranges,
                "bias_correction": self.correction.as_dict(),
            }
        )

    def _write(self, out: Path, keep_float: Collection[str], shifts: Shifts) -> None:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import TFLOperationName

        whole = self.float32()
        _move_biases(
            self.whole,
            {whole.operators[name]: shift for name, shift in shifts.items() if name not in keep_float},
            out,
        )
        source = str(out)
        work = quantizer.Quantizer(source)
        work.load_quantization_recipe(recipe.static_wi8_ai8())
        outputs = {layer.name: layer.output for layer in whole.layers}
        first = [layer.name for layer in normalisation(whole)] if self.normalises_in_float else []
        for name in (outputs[layer] for layer in (*first, *keep_float)):
            work.update_quantization_recipe(
                f"^{re.escape(name)};?$", TFLOperationName.ALL_SUPPORTED, algorithm_key=AlgorithmName.NO_QUANTIZE
            )
        kinds = {layer.kind for layer in whole.layers}
        if NORMALISING in kinds:
            for name in kinds & {each.value for each in TFLOperationName} - set(BIASED):
                work.update_quantization_recipe(".*", TFLOperationName(name), algorithm_key=AlgorithmName.NO_QUANTIZE)
        interpreter = Interpreter(source)
        [(signature, names)] = interpreter.get_signature_list().items()
        [argument] = names["inputs"]
        # Two images make the quantiser list what it wants to know; what it wants to know is answered by our ranges,
        # since its own are moving averages that lose a decibel.
        wanted = work.calibrate({signature: [{argument: self.given(self._work.inputs[at])} for at in range(2)]})
        known = {**self.ranges, interpreter.get_input_details()[0]["name"]: self.input_range}
        for name in wanted.keys() & known.keys():
            for end, value in zip(("min", "max"), known[name], strict=True):
                if end in wanted[name]:
                    wanted[name][end] = np.full_like(wanted[name][end], value)
        work.quantize(wanted).export_model(source, overwrite=True)

    def activations(self, entry: Path) -> Activations:
        return TfliteActivations(entry)


class DynamicInt8(Variant):
    """INT8 weights, activations quantised while it runs."""

    needs: tuple[str, ...] = ("ai-edge-quantizer", "ai-edge-litert")
    precision = "int8"

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        """Transformers: static INT8 loses their accuracy and their speed; CNNs lose their speed by this one."""
        return None if facts is None else facts.nodes_by_kind.get("SOFTMAX", 0) > 0

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        from ai_edge_quantizer import quantizer, recipe

        work = quantizer.Quantizer(str(self._work.entry))
        work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
        work.quantize(None).export_model(str(folder / self._work.model.facts.entry), overwrite=True)
        return Taken({"format": "dynamic", "weights": "int8 per channel", "activations": "as they come"})


class Float16Weights(Variant):
    """Weights stored in float16: half the size; a CPU computes in float32 all the same."""

    needs: tuple[str, ...] = ("ai-edge-quantizer", "ai-edge-litert")
    precision = "float16"

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        return False  # on a CPU it can only be smaller

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        from ai_edge_quantizer import quantizer
        from ai_edge_quantizer.algorithm_manager import AlgorithmName
        from ai_edge_quantizer.qtyping import (
            ComputePrecision,
            OpQuantizationConfig,
            TensorDataType,
            TensorQuantizationConfig,
            TFLOperationName,
        )

        work = quantizer.Quantizer(str(self._work.entry))
        work.update_quantization_recipe(
            ".*",
            TFLOperationName.ALL_SUPPORTED,
            OpQuantizationConfig(
                weight_tensor_config=TensorQuantizationConfig(num_bits=16, dtype=TensorDataType.FLOAT),
                compute_precision=ComputePrecision.FLOAT,
                explicit_dequantize=True,
            ),
            AlgorithmName.FLOAT_CASTING,
        )
        work.quantize(None).export_model(str(folder / self._work.model.facts.entry), overwrite=True)
        return Taken({"format": "float16 weights", "weights": "float16"})
