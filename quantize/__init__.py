"""Float32 models to INT8, by the quantiser of their target, from training images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .onnxruntime import OnnxRuntimeQuantizer
from .openvino import OpenVinoQuantizer
from .tensorrt import TensorRtQuantizer
from .tflite import TfliteQuantizer

if TYPE_CHECKING:
    from ..core.artifact import Model
    from ..core.config import QuantizeConfig


class Quantizer(Protocol):
    """How a target's float32 file becomes INT8."""

    needs: tuple[str, ...]  # distributions that do it

    def write(self, model: Model, images: Sequence[np.ndarray], config: QuantizeConfig, folder: Path) -> dict[str, Any]:
        """Write the INT8 model into ``folder`` under the float model's entry name.

        Args:
            images: calibration inputs, each [1, ...] as the float graph takes them (0..255).

        Returns:
            The settings that were taken, for the manifest.
        """


QUANTIZERS: dict[str, type[Quantizer]] = {
    "onnxruntime": OnnxRuntimeQuantizer,
    "openvino": OpenVinoQuantizer,
    "tensorrt": TensorRtQuantizer,
    "tflite": TfliteQuantizer,
}
