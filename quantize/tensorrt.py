"""TensorRT: precision stands in the graph, as 11.x wants it and 10.x can take it.

INT8 is explicit and symmetric; biases stay float: an INT32 bias behind a DequantizeLinear is what TensorRT's
parser has refused.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from .qdq import Qdq
from .variant import Taken, Variant
from .work import Work


class ExplicitQdq(Qdq):
    """INT8 as TensorRT takes it: explicit and symmetric Q/DQ, float biases."""

    def __init__(self, work: Work) -> None:
        super().__init__(work)
        self._activations, self._reduce_range = "int8", False
        self._extra = {"WeightSymmetric": True, "QuantizeBias": False}

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        taken = super().quantize(keep_float, folder)
        return Taken({**taken.settings, "format": "explicit QDQ", "activations": "int8 symmetric"})


class TypedFloat16(Variant):
    """float16 weights and arithmetic; input and output stay float32."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "float16"

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        import onnx
        from onnxruntime.quantization.onnx_model import ONNXModel
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = onnx.shape_inference.infer_shapes(onnx.load(self._work.entry))
        # An empty block list: the default one keeps operators in float32 that ONNX Runtime lacks, not TensorRT.
        half = convert_float_to_float16(model, keep_io_types=True, op_block_list=[])
        ordered = ONNXModel(half)
        ordered.topological_sort()  # the conversion leaves its casts at the end, where no parser takes them
        onnx.save(ordered.model, folder / self._work.model.facts.entry)
        return Taken({"format": "typed float16 graph", "weights": "float16"})
