"""Torch to ONNX, as torch writes it and simplified: what three of the targets are made from."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UserError

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from ..core.inputs import InputSpec

NEEDS = ("torch", "timm", "onnx", "onnxscript", "onnxslim", "onnxruntime")
INPUT, OUTPUT = "image", "logits"
# One opset on which ONNX Runtime's static quantiser (below 21), OpenVINO and TensorRT 10 and 11 agree.
OPSET = 20


def write_onnx(network: nn.Module, spec: InputSpec, path: Path) -> None:
    """Export with the dynamo exporter: dynamic batch dimension, weights inside, nodes named by torch's modules.

    The example has two images: with one, the exporter takes the batch of 1 for a constant, which breaks
    ConvNeXt-like networks.

    Raises:
        UserError: a network that makes the number of its images a constant.
    """
    import onnx
    import torch

    program = torch.onnx.export(
        network,
        (torch.zeros(2, *spec.shape),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # dynamo=True always returns a program
    model = program.model_proto
    if not model.graph.input[0].type.tensor_type.shape.dim[0].dim_param:
        raise UserError(
            "its forward makes the number of images a constant, wanted any number: take image.shape[0] there, not "
            "len(image) or a number"
        )
    name_nodes(model.graph)
    onnx.save(model, path)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Call each node by the module it comes from (``blocks.0.conv``), so that every later table can be read."""
    taken: dict[str, int] = {}
    for node in graph.node:
        name = _module_of(node)
        again = taken[name] = taken.get(name, 0) + 1
        node.name = name if again == 1 else f"{name}~{again}"
        del node.metadata_props[:]  # stack traces name files of this machine


def _module_of(node: onnx.NodeProto) -> str:
    weight = next((name for name in node.input if name.endswith(".weight")), None)
    if weight is not None:
        return str(weight).removesuffix(".weight").removeprefix("network.")
    scopes = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "[]")
    modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope]  # the last one is the operator's own
    module = str(modules[-1]).removeprefix("network").lstrip(".") if modules else ""
    return f"{module}:{node.op_type}" if module else node.op_type


def simplify(source: Path, out: Path) -> None:
    """Fold constants and drop what does nothing, by onnxslim."""
    import onnx
    import onnxslim

    onnx.save(onnxslim.slim(onnx.load(source)), out)
