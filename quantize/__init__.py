"""Float32 models to smaller variants (INT8, float16, bf16), by the quantiser of their target."""

from __future__ import annotations

from .micro import FullInt8
from .onnxruntime import DynamicMatMul
from .openvino import BFloat16, CompressedFloat16, Nncf, PortableQdq
from .qdq import Qdq
from .tensorrt import ExplicitQdq, TypedFloat16
from .tflite import DynamicInt8, Float16Weights, StaticInt8
from .trained import TrainedExplicitQdq, TrainedPortableQdq, TrainedQdq, TrainedStaticInt8
from .variant import Variant

VARIANTS: dict[str, dict[str, type[Variant]]] = {
    "onnxruntime": {"int8": Qdq, "int8-qad": TrainedQdq, "int8-dynamic": DynamicMatMul},
    "openvino": {
        "int8": Nncf,
        "int8-qdq": PortableQdq,
        "int8-qad": TrainedPortableQdq,
        "bf16": BFloat16,
        "float16": CompressedFloat16,
    },
    "tensorrt": {"int8": ExplicitQdq, "int8-qad": TrainedExplicitQdq, "float16": TypedFloat16},
    "tflite": {
        "int8": StaticInt8,
        "int8-qad": TrainedStaticInt8,
        "int8-full": FullInt8,
        "int8-dynamic": DynamicInt8,
        "float16": Float16Weights,
    },
}
