"""Float32 models to smaller variants (INT8, float16, bf16), by the quantiser of their target."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from .layers import Activations
from .onnxruntime import DynamicMatMul, Qdq
from .openvino import BFloat16, CompressedFloat16, Nncf, PortableQdq
from .tensorrt import ExplicitQdq, TypedFloat16
from .tflite import DynamicInt8, Float16Weights, StaticInt8
from .work import Work


class Variant(Protocol):
    """One way to make a target's float32 model smaller or faster."""

    needs: tuple[str, ...]  # distributions that do it
    precision: str  # of most of its arithmetic or weights: int8, float16, bf16
    calibrated: bool  # whether training images set its ranges
    quick: bool  # whether writing it again, with other layers in float, takes a second or so

    def __init__(self, work: Work) -> None:
        """What is worked on; nothing is computed yet."""

    @staticmethod
    def suits(facts: Mapping[str, Any], flags: Mapping[str, bool]) -> bool:
        """Whether it could be the best one of a model with these facts, on a CPU with these flags."""

    def write(self, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
        """Write the variant into ``folder`` under the float model's entry name.

        Args:
            keep_float: names of layers (of ``activations``) that stay float.

        Returns:
            The settings that were taken; ``runtime`` among them overrides the model's.
        """

    def activations(self, entry: Path) -> Activations | None:
        """What passes between the layers of the float model or of this variant; None where none can stay float."""


VARIANTS: dict[str, dict[str, type[Variant]]] = {
    "onnxruntime": {"int8": Qdq, "int8-dynamic": DynamicMatMul},
    "openvino": {"int8": Nncf, "int8-qdq": PortableQdq, "bf16": BFloat16, "float16": CompressedFloat16},
    "tensorrt": {"int8": ExplicitQdq, "float16": TypedFloat16},
    "tflite": {"int8": StaticInt8, "int8-dynamic": DynamicInt8, "float16": Float16Weights},
}
