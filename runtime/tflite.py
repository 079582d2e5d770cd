"""LiteRT (once TensorFlow Lite) on the CPU: ai-edge-litert, or tflite-runtime on old boards."""

from __future__ import annotations

import importlib
import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np

from .installed import installed
from .layout import to_input


class TfliteSession:
    needs: tuple[str, ...] = ("ai-edge-litert",)
    modules: tuple[tuple[str, ...], ...] = (("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),)
    batched: bool = False

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        module = installed(self.modules[0])
        self._distribution = module.partition(".")[0].replace("_", "-")
        self._spec = facts["input"]
        self._threads = threads
        self._interpreter = importlib.import_module(module).Interpreter(
            str(folder / facts["entry"]), num_threads=threads
        )
        self._interpreter.allocate_tensors()
        self._input = self._interpreter.get_input_details()[0]
        self._output = self._interpreter.get_output_details()[0]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        values = to_input(images, self._spec)
        dtype = self._input["dtype"]
        if np.issubdtype(dtype, np.floating):
            return values
        scale, zero_point = self._input["quantization"]
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(np.round(values / scale) + zero_point, limits.min, limits.max), dtype=dtype)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        self._interpreter.set_tensor(self._input["index"], prepared)
        self._interpreter.invoke()
        values = np.asarray(self._interpreter.get_tensor(self._output["index"]))
        if np.issubdtype(values.dtype, np.floating):
            return values
        scale, zero_point = self._output["quantization"]
        return np.asarray((values.astype(np.float32) - zero_point) * scale, dtype=np.float32)

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": self._distribution,
            "version": importlib.metadata.version(self._distribution),
            "threads": self._threads,
            "input_dtype": np.dtype(self._input["dtype"]).name,
        }
