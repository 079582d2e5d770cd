"""Torch to ONNX: the file that three of the targets start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec

NEEDS = ("torch", "timm", "onnx", "onnxscript")
INPUT, OUTPUT = "image", "logits"
# One opset on which ONNX Runtime's static quantiser (below 21), OpenVINO and TensorRT 10 and 11 agree.
OPSET = 20


def write_onnx(network: nn.Module, spec: InputSpec, path: Path, dynamic_batch: bool = True) -> None:
    """Export with the dynamo exporter, weights inside the file.

    The example has two images: with one, the exporter takes the batch of 1 for a constant, which breaks
    ConvNeXt-like networks.
    """
    import torch

    example = torch.zeros(2 if dynamic_batch else 1, *spec.shape)
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=({0: batch},) if dynamic_batch else None,
        input_names=[INPUT],
        output_names=[OUTPUT],
        opset_version=OPSET,
        verbose=False,
    )
    assert program is not None  # dynamo=True always returns a program
    program.save(str(path), external_data=False)
