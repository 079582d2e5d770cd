"""LiteRT (once TensorFlow Lite) on the CPU: ai-edge-litert, or tflite-runtime on old boards."""

from __future__ import annotations

import importlib
import importlib.metadata
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .installed import installed
from .layout import as_outputs, to_input
from .strange import random_values

LAYERS = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "TRANSPOSE_CONV", "BATCH_MATMUL")


class TfliteSession:
    needs: tuple[str, ...] = ("ai-edge-litert",)
    modules: tuple[tuple[str, ...], ...] = (("ai_edge_litert.interpreter", "tflite_runtime.interpreter"),)
    batched: bool = False

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        module = installed(self.modules[0])
        self._distribution = module.partition(".")[0].replace("_", "-")
        self._spec = facts["input"]
        # The file's input is the image's bytes as they are, whatever its scale and zero point say that they stand for.
        self._bytes = bool(facts.get("runtime", {}).get("bytes_input"))
        self._threads = threads
        self._interpreter = importlib.import_module(module).Interpreter(
            str(folder / facts["entry"]), num_threads=threads
        )
        start = time.perf_counter_ns()
        self._interpreter.allocate_tensors()
        self.compile_ns: int | None = time.perf_counter_ns() - start
        self._inputs = self._interpreter.get_input_details()
        self._input = self._inputs[0]
        self._output = self._interpreter.get_output_details()[0]

    def prepare(self, images: np.ndarray) -> np.ndarray:
        values = to_input(images, self._spec)
        dtype = self._input["dtype"]
        if np.issubdtype(dtype, np.floating):
            return values
        if self._bytes and dtype == np.uint8:
            return values.astype(dtype)
        scale, zero_point = self._input["quantization"]
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(np.round(values / scale) + zero_point, limits.min, limits.max), dtype=dtype)

    def random(self, generator: np.random.Generator) -> list[np.ndarray]:
        return [
            random_values(generator, str(each["name"]), list(map(int, each["shape"])), each["dtype"])
            for each in self._interpreter.get_input_details()
        ]

    def infer(self, prepared: Any) -> np.ndarray:
        given = prepared if isinstance(prepared, list) else [prepared]
        for each, values in zip(self._inputs, given):
            self._interpreter.set_tensor(each["index"], values)
        self._interpreter.invoke()
        values = np.asarray(self._interpreter.get_tensor(self._output["index"]))
        scale, zero_point = self._output["quantization"]
        if np.issubdtype(values.dtype, np.floating) or scale == 0:  # logits, or classes that stand for themselves
            return as_outputs(values)
        return np.asarray((values.astype(np.float32) - zero_point) * scale, dtype=np.float32)

    def executed(self, prepared: Any) -> dict[str, int] | None:
        """By the types of the tensors: int8 where the weights are, whatever comes in."""
        types = {each["index"]: np.dtype(each["dtype"]).name for each in self._interpreter.get_tensor_details()}
        found: Counter[str] = Counter()
        for node in self._nodes():
            if node["op_name"] in LAYERS:
                found[types.get(int(node["inputs"][1]), "unknown")] += 1
        return dict(found) or None

    def _nodes(self) -> list[dict[str, Any]]:
        """Every operator of the file, and one DELEGATE for each part that XNNPACK has taken over; none if not told."""
        listed = getattr(self._interpreter, "_get_ops_details", None)
        return list(listed()) if listed is not None else []

    def describe(self) -> dict[str, Any]:
        quantised = not np.issubdtype(self._output["dtype"], np.floating) and self._output["quantization"][0] != 0
        return {
            "runtime": self._distribution,
            "version": importlib.metadata.version(self._distribution),
            "threads": self._threads,
            "delegated_parts": sum(
                node["op_name"] == "DELEGATE" for node in self._nodes()
            ),  # XNNPACK's; none is the reference kernels'
            "input_dtype": np.dtype(self._input["dtype"]).name,
            "inside": ["a copy of the input", "a copy of the outputs", *(["dequantising the outputs"] * quantised)],
        }
