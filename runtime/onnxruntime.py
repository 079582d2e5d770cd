"""ONNX Runtime on the CPU."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .layout import as_outputs, to_input
from .strange import random_values

# From 1.29 on its builds for Linux tell Microsoft of every model that is opened, and keep a file of their own for it in
# the home, unless the environment says no before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

PROVIDERS = ["CPUExecutionProvider"]
LAYERS = ("Conv", "Gemm", "MatMul")  # what the names of operators with weights hold, fused or quantised too
TYPES = {  # of inputs, as numpy has them
    "tensor(float)": "float32", "tensor(float16)": "float16", "tensor(double)": "float64", "tensor(bool)": "bool",
    **{f"tensor({name})": name for name in ("uint8", "int8", "uint16", "int16", "int32", "int64", "uint32", "uint64")},
}  # fmt: skip
PRECISIONS = {"float": "float32", "float16": "float16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}


class OnnxRuntimeSession:
    needs: tuple[str, ...] = ("onnxruntime",)
    modules: tuple[tuple[str, ...], ...] = (("onnxruntime",),)
    batched: bool = True
    compile_ns: int | None = None  # in one with reading the file

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        import onnxruntime

        self._file = str(folder / facts["entry"])
        self._spec = facts["input"]
        self._threads = threads
        self._session = self._open()
        first = self._session.get_inputs()[0]
        self._input = first.name
        self.batched = not first.shape or not isinstance(first.shape[0], int)  # else it is written for so many
        self._version = onnxruntime.__version__

    def _open(self, profile: str = "") -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        return onnxruntime.InferenceSession(self._file, options, providers=PROVIDERS)

    def prepare(self, images: np.ndarray) -> np.ndarray:
        return to_input(images, self._spec)

    def infer(self, prepared: Any) -> np.ndarray:
        return as_outputs(np.asarray(self._session.run(None, self._fed(prepared))[0]))

    def random(self, generator: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            each.name: random_values(generator, each.name, each.shape, TYPES.get(each.type, object))
            for each in self._session.get_inputs()
        }

    def _fed(self, prepared: Any) -> dict[str, np.ndarray]:
        return prepared if isinstance(prepared, dict) else {self._input: prepared}

    def executed(self, prepared: Any) -> dict[str, int] | None:
        """By the runtime's own profile of one inference, in a session of its own."""
        with tempfile.TemporaryDirectory() as folder:
            session = self._open(f"{folder}/profile")
            session.run(None, self._fed(prepared))
            events = json.loads(Path(session.end_profiling()).read_text())
        found: Counter[str] = Counter()
        for event in events:
            about = event.get("args", {})
            if not event["name"].endswith("kernel_time") or not any(name in about["op_name"] for name in LAYERS):
                continue
            types = [PRECISIONS.get(next(iter(each)), next(iter(each))) for each in about["input_type_shape"]]
            found["int8" if "int8" in types else types[0]] += 1
        return dict(found)

    def describe(self) -> dict[str, Any]:
        return {
            "runtime": "onnxruntime",
            "version": self._version,
            "threads": self._threads,
            "providers": self._session.get_providers(),
            "wanted_providers": PROVIDERS,
            "inside": ["a copy of the outputs"],
        }
