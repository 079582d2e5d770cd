"""INT8 for ONNX Runtime: uint8 activations on x86 (int8 ones are four times slower there), int8 on ARM."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .qdq import write_qdq

if TYPE_CHECKING:
    from ..core.artifact import Model
    from ..core.config import QuantizeConfig


class OnnxRuntimeQuantizer:
    needs: tuple[str, ...] = ("onnx", "onnxruntime")

    def write(self, model: Model, images: Sequence[np.ndarray], config: QuantizeConfig, folder: Path) -> dict[str, Any]:
        activations = config.activations
        if activations == "auto":
            activations = "int8" if platform.machine().lower() in ("aarch64", "arm64") else "uint8"
        extra = {"ActivationSymmetric": activations == "int8"}
        entry = model.facts["entry"]
        write_qdq(model.file(entry), images, folder / entry, activations, extra)
        return {"format": "QDQ", "weights": "int8 per channel", "activations": activations, "ranges": "min-max"}
