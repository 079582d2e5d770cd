"""ONNX for ONNX Runtime, with a dynamic batch dimension."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .onnx import NEEDS, write_onnx

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec


class OnnxRuntimeTarget:
    needs = (*NEEDS, "onnxruntime")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry = "model.onnx"
    facts: dict[str, Any] = {"runtime": {}}

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        write_onnx(network, spec, folder / self.entry)
