"""ONNX Runtime: uint8 activations on x86 (int8 ones are four times slower there), int8 on ARM."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bias import Correction, Shifts, correct
from .layers import Activations
from .qdq import OnnxActivations, observe_onnx, write_qdq
from .ranges import Range, estimate
from .variant import Variant

if TYPE_CHECKING:
    from .work import Work


class Qdq(Variant):
    """Static INT8: weights per channel, activations per tensor."""

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
        return self._work.entry if self._work.graph is None else self._work.graph.file("model.onnx")

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        rule = self._work.config.calibrate.ranges
        return estimate(observe_onnx(self.source, self._work.inputs), rule, self._activations == "int8")

    @cached_property
    def correction(self) -> Correction:
        if not self._work.config.correct_biases:
            return Correction()

        def make(shifts: Shifts) -> OnnxActivations:
            with tempfile.TemporaryDirectory() as scratch:
                self._write_onnx(Path(scratch) / "model.onnx", (), shifts)
                return OnnxActivations(Path(scratch) / "model.onnx")

        return correct(OnnxActivations(self.source), make, self._work.inputs)

    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        return self.write_as(folder / self._work.model.facts["entry"], keep_float)

    def write_as(self, out: Path, keep_float: Collection[str]) -> dict[str, Any]:
        self._write_onnx(out, keep_float, self.correction.shifts)
        return {
            "format": "QDQ",
            "weights": f"int{7 if self._reduce_range else 8} per channel",
            "activations": self._activations,
            "ranges": self._work.config.calibrate.ranges,
            "bias_correction": self.correction.as_dict(),
        }

    def _write_onnx(self, out: Path, keep_float: Collection[str], shifts: Shifts) -> None:
        extra = {"ActivationSymmetric": self._activations == "int8", **self._extra}
        write_qdq(self.source, self.ranges, shifts, out, self._activations, keep_float, self._reduce_range, extra)

    def activations(self, entry: Path) -> Activations:
        return OnnxActivations(entry)


class DynamicMatMul(Variant):
    """INT8 weights of matrix products, activations quantised while it runs; convolutions stay float."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    precision = "int8"

    @staticmethod
    def suits(facts: Mapping[str, Any], flags: Mapping[str, bool]) -> bool:
        """Transformers: a network without matrix products gains nothing."""
        return int(facts["nodes_by_kind"].get("MatMul", 0)) > 4

    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        quantize_dynamic(
            str(self._work.entry),
            str(folder / self._work.model.facts["entry"]),
            op_types_to_quantize=["MatMul", "Gemm"],  # dynamic convolutions are ten times slower than float ones
            per_channel=True,
            reduce_range=bool(self._work.config.reduce_range),
            weight_type=QuantType.QInt8,
        )
        return {"format": "dynamic", "weights": "int8 per channel, of matrix products", "activations": "as they come"}
