"""TensorRT: an engine that was built on the device itself (``build_engine.sh`` in the bundle).

Never exercised on hardware by this project's tests: no TensorRT can be had where they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .layout import to_input

ENGINE = "model.engine"


class TensorRtSession:
    needs = ("tensorrt", "torch")
    batched = False

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        import tensorrt
        import torch  # for device memory: present on every Jetson image that runs kdpipe's teacher

        engine = folder / ENGINE
        if not engine.is_file():
            raise FileNotFoundError(f"no {ENGINE} in {folder}: run build_engine.sh on this device first")
        self._spec = facts["input"]
        self._torch = torch
        self._version = tensorrt.__version__
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = runtime.deserialize_cuda_engine(engine.read_bytes())
        self._context = self._engine.create_execution_context()
        self._input, self._output = (self._engine.get_tensor_name(at) for at in range(2))
        self._stream = torch.cuda.Stream()

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return to_input(images, self._spec)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        torch = self._torch
        with torch.cuda.stream(self._stream):
            image = torch.from_numpy(prepared).cuda()
            self._context.set_input_shape(self._input, tuple(image.shape))
            logits = torch.empty(tuple(self._context.get_tensor_shape(self._output)), device="cuda")
            self._context.set_tensor_address(self._input, image.data_ptr())
            self._context.set_tensor_address(self._output, logits.data_ptr())
            self._context.execute_async_v3(self._stream.cuda_stream)
            self._stream.synchronize()
            return np.asarray(logits.cpu().numpy())

    def describe(self) -> dict[str, Any]:
        return {"runtime": "tensorrt", "version": self._version, "threads": 1}
