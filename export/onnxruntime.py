"""ONNX for ONNX Runtime, with a dynamic batch dimension."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .onnx import NEEDS, write_onnx

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec


class OnnxRuntimeTarget:
    needs: tuple[str, ...] = (*NEEDS, "onnxruntime")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {}})

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        write_onnx(network, spec, folder / self.entry)
