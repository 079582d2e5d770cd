"""OpenVINO IR, by way of ONNX."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.artifact import AnyArtifact
from ..core.kinds import Graph
from ..networks import ir
from .graph import of_graph
from .written import Written

if TYPE_CHECKING:
    from ..core.config import Output
    from ..core.inputs import InputSpec


class OpenVinoTarget:
    needs: tuple[str, ...] = ("openvino",)
    source: type[AnyArtifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.xml"
    # The CPU plugin takes bf16 by itself where it can; the bundle says what it is to take.
    runtime: Mapping[str, Any] = MappingProxyType({"inference_precision": "f32"})
    stand_in: str | None = None
    not_built_here: bool = False

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, output: Output, folder: Path) -> Written:
        import openvino

        ir.save(openvino.convert_model(source.file(source.ONNX)), folder / self.entry)
        return of_graph(source)

    @staticmethod
    def check(entry: Path) -> None:
        """Nothing: its runtime opens every file that is written here, or says at once what it lacks."""
