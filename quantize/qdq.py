"""ONNX Runtime's static quantiser with Q/DQ nodes: three targets use its files, each with its own rules."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from .bias import Correction, Shifts, correct
from .calibrate import CalibrationInputs
from .layers import Activations, Layer
from .ranges import Histogram, Range, estimate, observe
from .variant import Taken, Variant
from .work import Work

INPUT = "image"
BIASED = ("Conv", "Gemm")
NORMALIZING = ("InstanceNormalization", "LayerNormalization")  # their third input is a bias too
# Where LayerNorm stands in the branches nothing bounds the sum that they are added to: its channels differ too much for
# one range, and a ViT lost 13 dB to it. Matrix products take 8 bits and give float; that is faster as well. A class
# token that joins the others late is small beside them: in a range for all it was zero, and XCiT lost 29 dB.
RESIDUAL = ("Add", "Mul", "Concat", "LayerNormalization", "Softmax")
QUANTIZED_INPUT = "_QuantizeLinear_Input"  # behind the name of a graph's output, where that is quantised
INPUT_RANGE = (0.0, 255.0)  # known: observing it would let 255 clip on a brighter image


class OnnxActivations:
    """An ONNX graph with every float tensor among its outputs; a quantised one as its consumers get it."""

    channel_axis = 1

    def __init__(self, path: Path) -> None:
        import onnx
        import onnxruntime

        model = onnx.shape_inference.infer_shapes(onnx.load(path))
        weights = {tensor.name for tensor in model.graph.initializer}
        outputs = {value.name for value in model.graph.output}
        floats = {
            value.name
            for value in (*model.graph.value_info, *model.graph.output)
            if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
        }
        made = {name: node for node in model.graph.node for name in node.output if name in floats}
        self.layers: tuple[Layer, ...] = tuple(
            Layer(
                node.name,
                node.op_type,
                tuple(i for i in node.input if i and i not in weights),
                name,
                next((i for i in node.input[2:] if i in weights and node.op_type in BIASED), None),
            )
            for name, node in made.items()
            if node.op_type not in ("QuantizeLinear", "DequantizeLinear", "Constant")
        )
        # What passes Q and DQ is known by its name before them.
        quantized = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "QuantizeLinear"}
        self._names = {
            node.output[0]: quantized[node.input[0]]
            for node in model.graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in quantized
        }
        wanted = {layer.output for layer in self.layers} | self._names.keys()
        model.graph.output.extend(
            value for value in model.graph.value_info if value.name in wanted and value.name not in outputs
        )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._outputs = [output.name for output in self._session.get_outputs()]

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        found = dict(zip(self._outputs, self._session.run(None, {INPUT: image}), strict=True))
        known = {name: found[output] for output, name in self._names.items() if output in found}
        return {INPUT: image, **found, **known}


@lru_cache(maxsize=1)
def observe_onnx(source: Path, images: CalibrationInputs) -> dict[str, Histogram]:
    """What was seen of every float tensor; kept for the next target that starts from the same graph and images."""
    return observe(OnnxActivations(source), images)


def write_qdq(
    source: Path,
    ranges: Mapping[str, Range],
    shifts: Mapping[str, np.ndarray],
    out: Path,
    activations: str,
    keep_float: Collection[str],
    reduce_range: bool,
    extra: dict[str, Any],
    left_float: Collection[str] = (),
) -> None:
    """Write ``source`` with INT8 Q/DQ; weights always int8 and per channel.

    Per-tensor weights (the library's default) took a real MobileNetV2 from 0.879 to 0.074 top-1.

    Args:
        ranges: of every float tensor.
        shifts: added to the biases of nodes, by name.
        activations: "uint8" or "int8".
        keep_float: names of nodes left as they are.
        extra: the library's ``extra_options``.
        left_float: kinds of nodes that are never quantised.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import TensorsData, save_tensors_data
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry
    from onnxruntime.quantization.shape_inference import quant_pre_process

    kinds = (QDQRegistry.keys() | QLinearOpsRegistry.keys()) - set(left_float)
    values = {name: (np.float32(low), np.float32(high)) for name, (low, high) in {**ranges, INPUT: INPUT_RANGE}.items()}
    with tempfile.TemporaryDirectory() as scratch:
        prepared, known = Path(scratch) / "prepared.onnx", Path(scratch) / "ranges.json"
        # The graph is simplified already; fusing it here would change the names that the ranges go by.
        quant_pre_process(str(source), str(prepared), skip_optimization=True, skip_symbolic_shape=True)
        _move_biases(prepared, {name: shift for name, shift in shifts.items() if name not in keep_float})
        save_tensors_data(TensorsData(CalibrationMethod.MinMax, values), known)
        quantize_static(
            str(prepared),
            str(out),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8 if activations == "uint8" else QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=sorted(kinds),
            nodes_to_exclude=sorted(keep_float),
            extra_options=extra,
            calibration_cache_path=known,
        )


def left_in_float(nodes_by_kind: Mapping[str, int]) -> tuple[str, ...]:
    """Kinds of nodes that are never quantised in a graph of these."""
    return RESIDUAL if nodes_by_kind.get("LayerNormalization", 0) else ()


def _move_biases(path: Path, shifts: Mapping[str, np.ndarray]) -> None:
    """Add the shifts, and give a bias that several nodes share to each as its own.

    The library would copy it too, as its name with a number behind it: of ``val_12``, as torch's exporter calls things,
    that is ``val_124``, which may be another tensor's name (seen in poolformer_s12).
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(path)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    biased = [node for node in model.graph.node if len(node.input) > 2 and node.op_type in (*BIASED, *NORMALIZING)]
    users = Counter(node.input[2] for node in biased)
    for node in biased:
        bias = weights.get(node.input[2])
        if bias is None or (node.name not in shifts and users[node.input[2]] == 1):
            continue
        name = f"{node.name}.bias_of_its_own"
        moved = numpy_helper.to_array(bias) + shifts.get(node.name, np.float32(0))
        model.graph.initializer.append(numpy_helper.from_array(moved.astype(np.float32), name))
        node.input[2] = name
    onnx.save(model, path)


class Qdq(Variant):
    """Static INT8: weights per channel; activations per tensor, uint8 on x86 (int8 is four times slower there)."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "int8"
    calibrated = True
    quick = True

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._activations: str = work.config.activations
        self._reduce_range = bool(work.config.reduce_range)
        self._extra: dict[str, Any] = {}

    @property
    def source(self) -> Path:
        """The float ONNX."""
        return self._work.entry if self._work.graph is None else self._work.graph.file(self._work.graph.ONNX)

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        """Ranges of all activations, by tensor."""
        rule = self._work.config.calibrate.ranges
        return estimate(observe_onnx(self.source, self._work.inputs), rule, self._activations == "int8")

    @cached_property
    def correction(self) -> Correction:
        """The shifts of biases; none where they are not wanted or not worth it."""
        if not self._work.config.correct_biases:
            return Correction()

        def make(shifts: Shifts) -> OnnxActivations:
            with tempfile.TemporaryDirectory() as scratch:
                self._write_onnx(Path(scratch) / "model.onnx", (), shifts)
                return OnnxActivations(Path(scratch) / "model.onnx")

        return correct(OnnxActivations(self.source), make, self._work.inputs)

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        return self.quantize_as(folder / self._work.model.facts.entry, keep_float)

    def quantize_as(self, out: Path, keep_float: Collection[str]) -> Taken:
        """Write the file ``out``, and tell what was taken."""
        self._write_onnx(out, keep_float, self.correction.shifts)
        return Taken(
            {
                "format": "QDQ",
                "weights": f"int{7 if self._reduce_range else 8} per channel",
                "activations": self._activations,
                "ranges": self._work.config.calibrate.ranges,
                "bias_correction": self.correction.as_dict(),
            }
        )

    def _write_onnx(self, out: Path, keep_float: Collection[str], shifts: Shifts) -> None:
        extra = {"ActivationSymmetric": self._activations == "int8", **self._extra}
        left_float = left_in_float(self._work.model.facts.nodes_by_kind)
        if left_float:
            extra |= {"OpTypesToExcludeOutputQuantization": ["MatMul", "Gemm"]}
        write_qdq(
            self.source, self.ranges, shifts, out, self._activations, keep_float, self._reduce_range, extra, left_float
        )

    def activations(self, entry: Path) -> Activations:
        return OnnxActivations(entry)
