"""INT8 for TensorRT: explicit, symmetric Q/DQ, the one form that 10.x and 11.x both take.

Biases stay float: an INT32 bias behind a DequantizeLinear is what TensorRT's parser has refused.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .qdq import write_qdq

if TYPE_CHECKING:
    from ..core.artifact import Model
    from ..core.config import QuantizeConfig


class TensorRtQuantizer:
    needs: tuple[str, ...] = ("onnx", "onnxruntime")

    def write(self, model: Model, images: Sequence[np.ndarray], config: QuantizeConfig, folder: Path) -> dict[str, Any]:
        entry = model.facts["entry"]
        extra = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
        write_qdq(model.file(entry), images, folder / entry, "int8", extra)
        shutil.copy(model.file("build_engine.sh"), folder)
        return {
            "format": "explicit QDQ",
            "weights": "int8 per channel",
            "activations": "int8 symmetric",
            "ranges": "min-max",
        }
