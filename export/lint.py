"""What TensorRT's ONNX parser would refuse, told before anyone carries the file to a device.

From the support matrices of onnx-tensorrt 10.x: written down, never run against TensorRT here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.errors import UserError
from ..core.proc import first_line

if TYPE_CHECKING:
    import onnx

# Operators of the default domain without an importer.
_REFUSED = """
Adagrad Adam AffineGrid BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow CenterCropPad Col2Im
Compress ConcatFromSequence ConvInteger DeformConv Det DFT DynamicQuantizeLinear Gradient HammingWindow HannWindow
ImageDecoder MatMulInteger MaxRoiPool MaxUnpool MelWeightMatrix Momentum Multinomial NegativeLogLikelihoodLoss
Optional OptionalGetElement OptionalHasElement QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct
SequenceEmpty SequenceErase SequenceInsert SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence
StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
"""
REFUSED = frozenset(_REFUSED.split())
# Tensor types with no counterpart; double is cast, uint8 is taken at the network's ends only.
REFUSED_TYPES = ("INT16", "UINT16", "UINT32", "UINT64", "STRING", "COMPLEX64", "COMPLEX128", "UINT8")
CONV_DIMENSIONS = (2, 3)


def tensorrt_lint(path: Path) -> list[str]:
    """Every node that TensorRT 10 and 11 would refuse, as "'name' (Operator): why"; empty where there is none."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    constants |= {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }
    found: list[str] = []
    try:  # order, and types that do not match: strong typing inserts no casts
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        found.append(f"the graph: {first_line(error)}")

    def refuse(node: onnx.NodeProto, why: str) -> None:
        found.append(f"'{node.name}' ({node.op_type}): {why}")

    for node in graph.node:
        if node.domain not in ("", "ai.onnx"):
            refuse(node, f"operator of {node.domain}, which has no importer")
        elif node.op_type in REFUSED:
            refuse(node, "operator without an importer")
        quantizing = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        for name in node.input:
            if name in constants:
                kind = onnx.TensorProto.DataType.Name(constants[name].data_type)
                if kind in REFUSED_TYPES and not (quantizing and kind == "UINT8"):
                    refuse(node, f"constant of {kind.lower()}")
        if quantizing:
            for why in _quantization_faults(node, constants):
                refuse(node, why)
        if node.op_type in ("Conv", "ConvTranspose") and node.input[1] in constants:
            dimensions = len(constants[node.input[1]].dims) - 2
            if dimensions not in CONV_DIMENSIONS:
                refuse(node, f"convolution over {dimensions} dimension(s), wanted 2 or 3")
    return found


def check_for_tensorrt(path: Path) -> None:
    """Refuse a graph that TensorRT would refuse; names the nodes. Raises UserError."""
    if refused := tensorrt_lint(path):
        raise UserError(f"TensorRT would refuse {len(refused)} node(s): {'; '.join(refused)}")


def _quantization_faults(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> list[str]:
    from onnx import TensorProto, numpy_helper

    faults = []
    source = constants.get(node.input[0])
    if node.op_type == "DequantizeLinear" and source is not None and source.data_type == TensorProto.INT32:
        faults.append("an INT32 bias: biases stay float")
    if node.input[1] not in constants:
        faults.append("a scale that is not constant")
    if len(node.input) > 2 and node.input[2]:
        zero_point = constants.get(node.input[2])
        if zero_point is None:
            faults.append("a zero point that is not constant")
        elif np.any(numpy_helper.to_array(zero_point)):
            faults.append("a zero point that is not 0: symmetric ranges only")
        elif zero_point.data_type == TensorProto.UINT8:
            faults.append("uint8: int8 only")
    elif node.op_type == "QuantizeLinear":
        faults.append("no zero point, which means uint8: int8 only")
    return faults
