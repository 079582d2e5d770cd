"""OpenVINO IR, by way of ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .onnx import NEEDS, write_onnx

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec


class OpenVinoTarget:
    needs: tuple[str, ...] = (*NEEDS, "openvino")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.xml"
    # The CPU plugin takes bf16 by itself where it can; the bundle says what it is to take.
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {"inference_precision": "f32"}})

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        import openvino

        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "model.onnx"
            write_onnx(network, spec, source)
            openvino.save_model(openvino.convert_model(source), folder / self.entry, compress_to_fp16=False)
