"""TensorRT: precision stands in the graph, as 11.x wants it and 10.x can take it.

INT8 is explicit and symmetric; biases stay float: an INT32 bias behind a DequantizeLinear is what TensorRT's
parser has refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..networks.lint import check_for_tensorrt
from .layers import Activations
from .qdq import OnnxActivations, write_qdq
from .ranges import Range, estimate
from .variant import Variant

if TYPE_CHECKING:
    pass

SCRIPT = "build_engine.sh"


class ExplicitQdq(Variant):
    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "int8"
    calibrated = True
    quick = True

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        rule = self._work.config.calibrate.ranges
        return estimate(OnnxActivations(self._work.entry), self._work.inputs, rule, symmetric=True)

    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        out = folder / self._work.model.facts["entry"]
        write_qdq(self._work.entry, self.ranges, out, "int8", keep_float, False, extra)
        check_for_tensorrt(folder / self._work.model.facts["entry"])
        shutil.copy(self._work.model.file(SCRIPT), folder)
        return {
            "format": "explicit QDQ",
            "weights": "int8 per channel",
            "activations": "int8 symmetric",
            "ranges": self._work.config.calibrate.ranges,
        }

    def activations(self, entry: Path) -> Activations:
        return OnnxActivations(entry)


class TypedFloat16(Variant):
    """float16 weights and arithmetic; input and output stay float32."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "float16"

    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        import onnx
        from onnxruntime.quantization.onnx_model import ONNXModel
        from onnxruntime.transformers.float16 import convert_float_to_float16

        model = onnx.shape_inference.infer_shapes(onnx.load(self._work.entry))
        # An empty block list: the default one keeps operators in float32 that ONNX Runtime lacks, not TensorRT.
        half = convert_float_to_float16(model, keep_io_types=True, op_block_list=[])
        ordered = ONNXModel(half)
        ordered.topological_sort()  # the conversion leaves its casts at the end, where no parser takes them
        onnx.save(ordered.model, folder / self._work.model.facts["entry"])
        check_for_tensorrt(folder / self._work.model.facts["entry"])
        shutil.copy(self._work.model.file(SCRIPT), folder)
        return {"format": "typed float16 graph", "weights": "float16"}
