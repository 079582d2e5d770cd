"""A TensorRT package: the ONNX, of which each device builds its engine.

Engines are never shipped between devices, so nothing here needs TensorRT; the graph is checked with ONNX
Runtime and by ``lint``, and the model says "not built here" until a device has built it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.artifact import AnyArtifact
from ..core.kinds import Graph
from .graph import of_graph
from .lint import check_for_tensorrt
from .written import Written

if TYPE_CHECKING:
    from ..core.config import Output
    from ..core.inputs import InputSpec


class TensorRtTarget:
    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    source: type[AnyArtifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    runtime: Mapping[str, Any] = MappingProxyType({})
    stand_in: str | None = "onnxruntime"
    not_built_here: bool = True

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, output: Output, folder: Path) -> Written:
        shutil.copyfile(source.file(source.ONNX), folder / self.entry)
        return of_graph(source)

    @staticmethod
    def check(entry: Path) -> None:
        check_for_tensorrt(entry)
