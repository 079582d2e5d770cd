"""ONNX for ONNX Runtime, with a dynamic batch dimension."""

from __future__ import annotations

import shutil
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


class OnnxRuntimeTarget:
    needs: tuple[str, ...] = ("onnxruntime",)
    source: type[Artifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {}})

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, folder: Path) -> Written:
        shutil.copyfile(source.file(GRAPH), folder / self.entry)
        return of_graph(source)
