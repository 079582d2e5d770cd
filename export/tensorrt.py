"""A TensorRT package: the ONNX and the script that builds its engine on the device.

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
from ..core.kinds import Graph, Model
from .graph import of_graph
from .lint import check_for_tensorrt
from .written import Written

if TYPE_CHECKING:
    from ..core.inputs import InputSpec

# 11.x has no --stronglyTyped (it always is), and its timing defaults are others; both only matter to who times.
BUILD_SCRIPT = """\
#!/bin/sh
# Builds FOLDER.engine beside this folder, which is sealed, with TensorRT's own trtexec (10.x or 11.x). An engine
# fits only the device and the version that built it. Environment:
#   TRTEXEC           trtexec, where it is not on the PATH
#   WORKSPACE_MIB     scratch memory that the builder may take (default 1024; 256 for small boards)
#   MAX_BATCH         largest batch of the engine (default 1)
#   TIMING_CACHE      file that remembers which kernels were fast (default FOLDER.timing)
#   OPTIMIZATION      builder effort 0..5 (default 3)
set -eu
folder="$(CDPATH= cd "$(dirname "$0")" && pwd -P)"
trtexec="${{TRTEXEC:-trtexec}}"
batch="${{MAX_BATCH:-1}}"
options="$("$trtexec" --help 2>&1 || true)"
typed=""
# Precision stands in the graph: 11.x knows nothing else, 10.x must be told.
case "$options" in *--stronglyTyped*) typed="--stronglyTyped" ;; esac
exec "$trtexec" --onnx="$folder/model.onnx" --saveEngine="$folder.engine" $typed \\
  --minShapes={name}:1x3x{size}x{size} --optShapes={name}:1x3x{size}x{size} \\
  --maxShapes={name}:"$batch"x3x{size}x{size} \\
  --memPoolSize=workspace:"${{WORKSPACE_MIB:-1024}}" --timingCacheFile="${{TIMING_CACHE:-$folder.timing}}" \\
  --builderOptimizationLevel="${{OPTIMIZATION:-3}}" --skipInference
"""


class TensorRtTarget:
    needs: tuple[str, ...] = ("onnx", "onnxruntime")
    source: type[AnyArtifact] = Graph
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    runtime: Mapping[str, Any] = MappingProxyType({})
    stand_in: str | None = "onnxruntime"
    not_built_here: bool = True

    def write(self, source: Graph, spec: InputSpec, images: np.ndarray, folder: Path) -> Written:
        shutil.copyfile(source.file(source.ONNX), folder / self.entry)
        script = folder / Model.BUILD_SCRIPT
        script.write_text(BUILD_SCRIPT.format(name="image", size=spec.size))
        script.chmod(0o755)
        return of_graph(source)

    @staticmethod
    def check(entry: Path) -> None:
        check_for_tensorrt(entry)
