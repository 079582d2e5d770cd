"""Checkpoints to files of a target, in float32, with a parity check on real images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from .onnxruntime import OnnxRuntimeTarget
from .openvino import OpenVinoTarget
from .tensorrt import TensorRtTarget
from .tflite import TfliteTarget

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec


class Target(Protocol):
    """How a network becomes a file that one runtime opens."""

    needs: tuple[str, ...]  # distributions that make the file
    layout: Literal["NCHW", "NHWC"]
    entry: str  # the file that the runtime opens
    facts: Mapping[str, Any]  # settings that the runtime must take, by RUNTIMES of the same name

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        """Write ``entry`` (and what belongs to it) into ``folder``.

        Args:
            network: float32 [N, 3, H, W] in 0..255 to logits [N, K], in eval mode.
        """


TARGETS: dict[str, type[Target]] = {
    "onnxruntime": OnnxRuntimeTarget,
    "openvino": OpenVinoTarget,
    "tensorrt": TensorRtTarget,
    "tflite": TfliteTarget,
}
