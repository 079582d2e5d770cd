"""ONNX for ONNX Runtime, with a dynamic batch dimension."""

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
from .written import Written

if TYPE_CHECKING:
    from ..core.config import Output
    from ..core.inputs import InputSpec


class OnnxRuntimeTarget:
    needs: tuple[str, ...] = ("onnxruntime",)
    source: type[AnyArtifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    runtime: Mapping[str, Any] = MappingProxyType({})
    stand_in: str | None = None
    not_built_here: bool = False

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, output: Output, folder: Path) -> Written:
        shutil.copyfile(source.file(source.ONNX), folder / self.entry)
        return of_graph(source)

    @staticmethod
    def check(entry: Path) -> None:
        """Nothing: its runtime opens every file that is written here, or says at once what it lacks."""
