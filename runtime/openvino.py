"""OpenVINO on the CPU, in the precision that the bundle states.

The CPU plugin takes bf16 by itself where the CPU has it, which moves logits by 1e-2: the hint is always
set, and what the compiled model really took is read back.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from .layout import as_outputs, to_input
from .strange import random_values

LAYERS = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")
PRECISIONS = {"f32": "float32", "f16": "float16", "bf16": "bf16", "i8": "int8", "u8": "int8"}


def import_openvino() -> Any:
    """The package, whose ``compile_model`` then leaves the thread's signal stack as it found it.

    OpenVINO's CPU plugin (2026.4) gives the thread a stack of its own for signals, and when it goes puts the one before
    back. Where several plugins live at a time and the older goes first, or in another thread, that is memory which
    is no longer there, and the next signal that Python has a handler for, as of Ctrl-C or of a child that ends,
    ends the process without a word.
    """
    import openvino

    compile_model = openvino.Core.compile_model
    if sys.platform != "linux" or compile_model.__module__ == __name__:  # ours already
        return openvino

    import ctypes

    class Stack(ctypes.Structure):  # Linux's stack_t
        _fields_ = (("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))

    use_stack = ctypes.CDLL(None).sigaltstack

    def keeping_signal_stack(*arguments: Any, **settings: Any) -> Any:
        before = Stack()
        use_stack(None, ctypes.byref(before))
        try:
            return compile_model(*arguments, **settings)
        finally:
            use_stack(ctypes.byref(before), None)

    openvino.Core.compile_model = keeping_signal_stack
    return openvino


class OpenVinoSession:
    needs: tuple[str, ...] = ("openvino",)
    modules: tuple[tuple[str, ...], ...] = (("openvino",),)
    batched: bool = True

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        openvino = import_openvino()
        self._spec = facts["input"]
        self._core, self._file = openvino.Core(), folder / facts["entry"]
        self._settings = {
            "INFERENCE_PRECISION_HINT": facts["runtime"]["inference_precision"],
            "INFERENCE_NUM_THREADS": str(threads),
            "PERFORMANCE_HINT": "LATENCY",
        }
        self._tensor = openvino.Tensor
        self._version = openvino.__version__
        # One image at a time is what a device does: known to be one, it costs less than a batch that may change.
        model = self._core.read_model(self._file)
        shapes = {each: each.partial_shape for each in model.inputs}
        first = model.inputs[0].partial_shape
        # Else it is written for so many.
        self.batched = not (first.rank.is_static and len(first) and first[0].is_static)
        for shape in shapes.values():
            if shape.rank.is_static and len(shape) and shape[0].is_dynamic:
                shape[0] = 1
        model.reshape(shapes)
        start = time.perf_counter_ns()
        self._compiled = self._core.compile_model(model, "CPU", self._settings)
        self.compile_ns: int | None = time.perf_counter_ns() - start
        self._one = self._compiled.create_infer_request()
        self._size_of_one = self._one.get_input_tensor(0).size
        self._several: Any = None

    def prepare(self, images: np.ndarray) -> Any:
        """A tensor over the array that it keeps alive: at each call it is set, never copied."""
        return self._tensor(to_input(images, self._spec), shared_memory=True)

    def infer(self, prepared: Any) -> np.ndarray:
        if isinstance(prepared, list):
            for at, tensor in enumerate(prepared):
                self._one.set_input_tensor(at, tensor)
            return as_outputs(self._one.infer(share_outputs=True).to_tuple()[0])
        request = self._one if prepared.size == self._size_of_one else self._any_batch()
        request.set_input_tensor(prepared)
        # Shared: else every output is copied into an array of its own.
        return as_outputs(request.infer(share_outputs=True).to_tuple()[0])

    def random(self, generator: np.random.Generator) -> list[Any]:
        found = []
        for each in self._compiled.inputs:
            sizes = [size.get_length() if size.is_static else None for size in each.partial_shape]
            values = random_values(generator, each.any_name, sizes, each.element_type.to_dtype())
            found.append(self._tensor(np.ascontiguousarray(values), shared_memory=True))
        return found

    def _any_batch(self) -> Any:
        """Compiled when first wanted: a process that times never does."""
        if self._several is None:
            self._several = self._core.compile_model(self._file, "CPU", self._settings).create_infer_request()
        return self._several

    def executed(self, prepared: Any) -> dict[str, int] | None:
        """As the plugin tells of the graph that it compiled."""
        found: Counter[str] = Counter()
        for node in self._compiled.get_runtime_model().get_ops():
            told = node.get_rt_info()
            if told["layerType"].astype(str) in LAYERS:
                precision = told["runtimePrecision"].astype(str)
                found[PRECISIONS.get(precision, precision)] += 1
        return dict(found)

    def describe(self) -> dict[str, Any]:
        precision = self._compiled.get_property("INFERENCE_PRECISION_HINT")
        return {
            "runtime": "openvino",
            "version": self._version,
            "threads": int(self._compiled.get_property("INFERENCE_NUM_THREADS")),
            "inference_precision": precision.get_type_name(),
            "wanted_precision": self._settings["INFERENCE_PRECISION_HINT"],
            "devices": list(self._compiled.get_property("EXECUTION_DEVICES")),
            "inside": [],
        }
