"""TensorRT: an engine that was built on the device itself (``build_engine.sh`` in the bundle) and lies beside it.

Never exercised on hardware by this project's tests: no TensorRT can be had where they run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .layout import to_input


def engine_of(folder: Path) -> Path:
    """Where ``build_engine.sh`` puts the engine of the bundle in ``folder``: beside it, since a bundle is sealed."""
    folder = folder.resolve()
    return folder.with_name(folder.name + ".engine")


class TensorRtSession:
    needs: tuple[str, ...] = ("tensorrt", "cuda-python")
    modules: tuple[tuple[str, ...], ...] = (("tensorrt",), ("cuda.bindings.runtime",))
    batched: bool = False
    compile_ns: int | None = None  # the engine was built before

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        import tensorrt
        from cuda.bindings import runtime as cuda

        engine = engine_of(folder)
        if not engine.is_file():
            raise FileNotFoundError(f"no engine at {engine}: run {folder}/build_engine.sh on this device first")
        self._spec = facts["input"]
        self._cuda = cuda
        self._version = tensorrt.__version__
        runtime = tensorrt.Runtime(tensorrt.Logger(tensorrt.Logger.WARNING))
        self._engine = runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise RuntimeError(f"{engine} was built for another device or TensorRT version: build it here again")
        self._context = self._engine.create_execution_context()
        self._input, self._output = (self._engine.get_tensor_name(at) for at in range(2))
        self._stream = self._checked(cuda.cudaStreamCreate())
        size = self._spec["size"]
        self._context.set_input_shape(self._input, (1, 3, size, size))
        self._logits = np.empty(tuple(self._context.get_tensor_shape(self._output)), np.float32)
        self._device_image = self._checked(cuda.cudaMalloc(4 * 3 * size * size))
        self._device_logits = self._checked(cuda.cudaMalloc(self._logits.nbytes))
        self._context.set_tensor_address(self._input, self._device_image)
        self._context.set_tensor_address(self._output, self._device_logits)

    def _checked(self, answer: tuple[Any, ...]) -> Any:
        if answer[0] != self._cuda.cudaError_t.cudaSuccess:
            raise RuntimeError(f"CUDA answered {answer[0].name}")
        return answer[1] if len(answer) > 1 else None

    def random(self, generator: np.random.Generator) -> np.ndarray:
        return generator.random((1, 3, self._spec["size"], self._spec["size"]), dtype=np.float32)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return to_input(images, self._spec)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        kinds, copy = self._cuda.cudaMemcpyKind, self._cuda.cudaMemcpyAsync
        to_device = (prepared.ctypes.data, prepared.nbytes, kinds.cudaMemcpyHostToDevice)
        self._checked(copy(self._device_image, *to_device, self._stream))
        self._context.execute_async_v3(self._stream)
        to_host = (self._device_logits, self._logits.nbytes, kinds.cudaMemcpyDeviceToHost)
        self._checked(copy(self._logits.ctypes.data, *to_host, self._stream))
        self._checked(self._cuda.cudaStreamSynchronize(self._stream))
        return self._logits

    def executed(self, prepared: np.ndarray) -> dict[str, int] | None:
        return None  # an engine tells of its layers only where it was built to

    def describe(self) -> dict[str, Any]:
        inside = ["a copy of the input to the GPU", "a copy of the outputs from it"]
        return {"runtime": "tensorrt", "version": self._version, "threads": 1, "inside": inside}
