"""TFLite by litert-torch: channels last, batch of one, as its runtimes like it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import nn

    from ..core.data import InputSpec


class TfliteTarget:
    needs: tuple[str, ...] = ("torch", "timm", "litert-torch", "ai-edge-litert")
    layout: Literal["NCHW", "NHWC"] = "NHWC"
    entry: str = "model.tflite"
    facts: Mapping[str, Any] = MappingProxyType({"runtime": {}})

    def write(self, network: nn.Module, spec: InputSpec, folder: Path) -> None:
        import litert_torch
        import torch

        class ChannelsLast(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.network = network

            def forward(self, image: torch.Tensor) -> torch.Tensor:
                logits: torch.Tensor = self.network(image.permute(0, 3, 1, 2))
                return logits

        example = torch.zeros(1, *spec.shape)
        litert_torch.convert(ChannelsLast().eval(), (example,)).export(str(folder / self.entry))
