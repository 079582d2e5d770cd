"""ONNX Runtime on the CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from .layout import to_input

# From 1.29 on its builds for Linux tell Microsoft of every model that is opened, and keep a file of their own for it in
# the home, unless the environment says no before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


class OnnxRuntimeSession:
    needs: tuple[str, ...] = ("onnxruntime",)
    modules: tuple[tuple[str, ...], ...] = (("onnxruntime",),)
    batched: bool = True

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._spec = facts["input"]
        self._session = onnxruntime.InferenceSession(
            str(folder / facts["entry"]), options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._version = onnxruntime.__version__
        self._threads = threads

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return to_input(images, self._spec)

    def infer(self, prepared: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(None, {self._input: prepared})[0])

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "version": self._version,
            "threads": self._threads,
            "providers": self._session.get_providers(),
        }
