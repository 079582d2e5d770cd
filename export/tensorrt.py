"""A TensorRT package: the ONNX and the script that builds its engine on the device.

Engines are never shipped between devices, so nothing here needs TensorRT; the graph is checked with ONNX
Runtime, and the model says "not built here" until a device has built it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from .onnx import INPUT, NEEDS, write_onnx

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec

# --stronglyTyped is what TensorRT 11 always does and 10.x must be told: precision stands in the graph.
BUILD_SCRIPT = """\
#!/bin/sh
# Builds model.engine on this device with TensorRT's own trtexec (10.x or 11.x). An engine fits only the
# device and the version that built it. Environment: TRTEXEC, WORKSPACE_MIB.
set -eu
cd "$(dirname "$0")"
trtexec="${{TRTEXEC:-trtexec}}"
workspace_mib="${{WORKSPACE_MIB:-1024}}"
typed=""
if "$trtexec" --help 2>&1 | grep -q -- --stronglyTyped; then typed="--stronglyTyped"; fi
exec "$trtexec" --onnx=model.onnx --saveEngine=model.engine $typed \\
  --minShapes={name}:1x3x{size}x{size} --optShapes={name}:1x3x{size}x{size} --maxShapes={name}:1x3x{size}x{size} \\
  --memPoolSize=workspace:"$workspace_mib" --timingCacheFile=timing.cache --skipInference
"""


class TensorRtTarget:
    needs: tuple[str, ...] = (*NEEDS, "onnxruntime")
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    entry: str = "model.onnx"
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {}, "stand_in": "onnxruntime", "not_built_here": True})

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        write_onnx(network, spec, folder / self.entry)
        write_build_script(spec.size, folder)


def write_build_script(size: int, folder: Path) -> None:
    script = folder / "build_engine.sh"
    script.write_text(BUILD_SCRIPT.format(name=INPUT, size=size))
    script.chmod(0o755)
