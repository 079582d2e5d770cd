"""OpenVINO on the CPU, in the precision that the bundle states.

The CPU plugin takes bf16 by itself where the CPU has it, which moves logits by 1e-2: the hint is always
set, and what the compiled model really took is read back.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .layout import to_input


class OpenVinoSession:
    needs: tuple[str, ...] = ("openvino",)
    modules: tuple[tuple[str, ...], ...] = (("openvino",),)
    batched: bool = True

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        import openvino

        self._spec = facts["input"]
        self._compiled = openvino.Core().compile_model(
            folder / facts["entry"],
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": facts["runtime"]["inference_precision"],
                "INFERENCE_NUM_THREADS": str(threads),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        self._request = self._compiled.create_infer_request()
        self._tensor = openvino.Tensor
        self._version = openvino.__version__

    def prepare(self, images: np.ndarray) -> Any:
        """A tensor over the array that it keeps alive: at each call it is set, never copied."""
        return self._tensor(to_input(images, self._spec), shared_memory=True)

    def infer(self, prepared: Any) -> np.ndarray:
        self._request.set_input_tensor(prepared)
        self._request.infer(share_outputs=True)  # else every output is copied into an array of its own
        return np.asarray(self._request.get_output_tensor(0).data, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        precision = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return {
            "runtime": "openvino",
            "version": self._version,
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "inference_precision": precision.get_type_name(),
        }
