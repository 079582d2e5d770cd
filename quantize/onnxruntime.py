"""ONNX Runtime's own variant beside ``qdq``: dynamic INT8 for transformers."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from ..core.kinds import ModelFacts
from .variant import Taken, Variant


class DynamicMatMul(Variant):
    """INT8 weights of matrix products, activations quantised while it runs; convolutions stay float."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "int8"

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        """Transformers: a network without matrix products gains nothing."""
        return None if facts is None else facts.nodes_by_kind.get("MatMul", 0) > 4

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(self._work.entry),
            str(folder / self._work.model.facts.entry),
            op_types_to_quantize=["MatMul", "Gemm"],  # dynamic convolutions are ten times slower than float ones
            per_channel=True,
            reduce_range=bool(self._work.config.reduce_range),
            weight_type=QuantType.QInt8,
        )
        return Taken(
            {"format": "dynamic", "weights": "int8 per channel, of matrix products", "activations": "as they come"}
        )
