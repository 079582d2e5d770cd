"""OpenVINO IR, by way of ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.artifact import Artifact, Graph
from .graph import GRAPH, of_graph
from .written import Written

if TYPE_CHECKING:
    from ..core.inputs import InputSpec


class OpenVinoTarget:
    needs: tuple[str, ...] = ("openvino",)
    source: type[Artifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.xml"
    # The CPU plugin takes bf16 by itself where it can; the bundle says what it is to take.
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {"inference_precision": "f32"}})

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, folder: Path) -> Written:
        import openvino

        openvino.save_model(openvino.convert_model(source.file(GRAPH)), folder / self.entry, compress_to_fp16=False)
        return of_graph(source)
