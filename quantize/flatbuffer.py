"""A TFLite file as objects that can be changed: tensors, operators, constants."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

SAME, VALID = 0, 1  # of a convolution's padding
OPTIONS = {"PADV2": "PadV2", "CONV_2D": "Conv2D"}  # names of their options that are no capitalised names


def module_of(tensor: str) -> str:
    """``blocks.0.conv`` from a tensor's name, which lists class and attribute of every module it came through."""
    pieces = tensor.split(";;")[-1].rpartition(";")[0].split("/")
    attributes = [piece.rpartition(".")[2].partition("_")[2] for piece in pieces]
    return ".".join(name for name in attributes if name and name != "network") or tensor.split("/")[-1]


class Flatbuffer:
    """A file of one graph: ``graph`` and ``model`` are the objects of TFLite's schema. Raises ValueError of several."""

    def __init__(self, path: Path) -> None:
        from ai_edge_litert import schema_py_generated as schema
        from ai_edge_litert.tools import flatbuffer_utils

        self.schema, self._utils = schema, flatbuffer_utils
        self.model = flatbuffer_utils.read_model(str(path))
        if len(self.model.subgraphs) != 1:
            raise ValueError(f"it has {len(self.model.subgraphs)} graphs: wanted one")
        [self.graph] = self.model.subgraphs
        self._names = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}

    def kind(self, operator: Any) -> str:
        """CONV_2D and the like."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        name: str = self._names[max(code.builtinCode, code.deprecatedBuiltinCode)]
        return name

    def users(self, tensor: int) -> list[Any]:
        return [operator for operator in self.graph.operators if tensor in operator.inputs]

    def constant(self, tensor: int) -> np.ndarray | None:
        """The float32 values of a tensor, None of one that is computed or of another type."""
        found = self.graph.tensors[tensor]
        data = self.model.buffers[found.buffer].data
        if found.type != self.schema.TensorType.FLOAT32 or data is None or len(data) == 0:
            return None
        shape = [] if found.shape is None else list(found.shape)
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.float32).reshape(shape)

    def pads(self, operator: Any) -> bool:
        """Whether a convolution pads by itself."""
        height, width = self.graph.tensors[int(operator.inputs[1])].shape[1:3]
        return bool(operator.builtinOptions.padding == SAME and max(height, width) > 1)

    def add_constant(self, values: np.ndarray, dtype: type[np.generic] = np.float32) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(values.astype(dtype).tobytes(), np.uint8)
        self.model.buffers.append(buffer)
        kind = getattr(self.schema.TensorType, np.dtype(dtype).name.upper())
        return self.add_tensor("", values.shape, kind, len(self.model.buffers) - 1)

    def add_tensor(self, name: str, shape: Iterable[int], kind: int, buffer: int = 0) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), np.array(shape, np.int32), kind, buffer
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def widen(self, tensor: int, channels: int) -> None:
        """Give a tensor another last dimension."""
        found = self.graph.tensors[tensor]
        found.shape = np.array([*found.shape[:-1], channels], np.int32)
        found.shapeSignature = None

    def add_quantized(self, like: int, scale: float, zero_point: int) -> int:
        """A tensor of uint8 that stands for another."""
        inner = self.graph.tensors[like]
        at = self.add_tensor(f"{inner.name.decode()}_uint8", inner.shape, self.schema.TensorType.UINT8)
        quantization = self.graph.tensors[at].quantization = self.schema.QuantizationParametersT()
        quantization.scale = np.array([scale], np.float32)
        quantization.zeroPoint = np.array([zero_point], np.int64)
        return at

    def operator(self, kind: str, inputs: list[int], output: int) -> Any:
        code = getattr(self.schema.BuiltinOperator, kind)
        codes = self.model.operatorCodes
        at = next((at for at, each in enumerate(codes) if each.builtinCode == code), len(codes))
        if at == len(codes):
            new = self.schema.OperatorCodeT()
            new.builtinCode, new.deprecatedBuiltinCode = code, min(code, 127)
            new.version = 1
            codes.append(new)
        made = self.schema.OperatorT()
        made.opcodeIndex, made.inputs, made.outputs = at, np.array(inputs, np.int32), np.array([output], np.int32)
        options = f"{OPTIONS.get(kind, kind.capitalize())}Options"
        if hasattr(self.schema.BuiltinOptions, options):
            made.builtinOptionsType = getattr(self.schema.BuiltinOptions, options)
            made.builtinOptions = getattr(self.schema, f"{options}T")()
        return made

    def name_by_layers(self, image: str) -> None:
        """Short names: of what is computed the layer's that computes it, of constants a number.

        Those of the converter list every class that a tensor came through: a tenth of a small file.
        """
        tensors, taken = self.graph.tensors, Counter[str]()
        for at, tensor in enumerate(tensors):
            tensor.name, old = f"constant{at}".encode(), tensor.name
            if at in self.graph.inputs:
                tensor.name = image.encode()
            elif any(at in operator.outputs for operator in self.graph.operators):
                name = module_of(old.decode())
                taken[name] += 1
                tensor.name = (name if taken[name] == 1 else f"{name}~{taken[name]}").encode()

    def write(self, path: Path) -> None:
        """Without the tensors and buffers that nothing uses."""
        graph, model = self.graph, self.model
        used = sorted({
            int(at)
            for ports in (graph, *graph.operators)
            for at in (*ports.inputs, *ports.outputs)
            if at >= 0
        })  # fmt: skip
        moved = {old: new for new, old in enumerate(used)} | {-1: -1}
        graph.tensors = [graph.tensors[at] for at in used]
        for ports in (graph, *graph.operators):
            ports.inputs, ports.outputs = (
                np.array([moved[int(at)] for at in each], np.int32) for each in (ports.inputs, ports.outputs)
            )
        for signature in model.signatureDefs or []:
            for each in (*signature.inputs, *signature.outputs):
                each.tensorIndex = moved[each.tensorIndex]
        holders = [*graph.tensors, *(model.metadata or [])]
        kept = sorted({0, *(each.buffer for each in holders)})
        model.buffers = [model.buffers[at] for at in kept]
        for each in holders:
            each.buffer = kept.index(each.buffer)
        self._utils.write_model(model, str(path))
