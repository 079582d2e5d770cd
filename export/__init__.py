"""Checkpoints to files of a target, in float32, with a parity check on real images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .onnxruntime import OnnxRuntimeTarget
from .openvino import OpenVinoTarget
from .tensorrt import TensorRtTarget
from .tflite import TfliteTarget
from .written import Written

if TYPE_CHECKING:
    import numpy as np

    from ..core.artifact import AnyArtifact
    from ..core.config import Output
    from ..core.inputs import InputSpec


class Target(Protocol):
    """How a network becomes a file that one runtime opens."""

    needs: tuple[str, ...]  # distributions that make the file
    source: type[AnyArtifact]  # what it is made from: the Graph (ONNX), or the Checkpoint itself
    layout: Literal["NCHW", "NHWC"]
    entry: str  # the file that the runtime opens
    runtime: Mapping[str, Any]  # settings that the runtime of the same name must take
    stand_in: str | None  # the runtime that reads the same file where the target's own cannot run
    not_built_here: bool  # whether the device itself makes what it runs

    def write(self, source: Any, spec: InputSpec, images: np.ndarray, output: Output, folder: Path) -> Written:
        """Write ``entry`` (and what belongs to it) into ``folder``.

        Args:
            source: an artifact of the type ``self.source``.
            spec: in the target's own layout.
            images: uint8 [N, H, W, 3], the parity images.
            output: what the file is to give, if the source is no graph, which says so itself.
        """

    @staticmethod
    def check(entry: Path) -> None:
        """Refuse a file, float32 or a smaller variant, that cannot be run where it is going.

        Raises:
            UserError: names what would be refused.
        """


TARGETS: dict[str, type[Target]] = {
    "onnxruntime": OnnxRuntimeTarget,
    "openvino": OpenVinoTarget,
    "tensorrt": TensorRtTarget,
    "tflite": TfliteTarget,
}
