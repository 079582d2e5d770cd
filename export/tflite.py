"""TFLite by litert-torch, from torch itself: channels last, batch of one, as its runtimes like it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ..core.artifact import AnyArtifact
from ..core.kinds import Checkpoint, Tuned
from .parity import float32_error, torch_outputs
from .written import Written

if TYPE_CHECKING:
    from ..core.config import Output
    from ..core.inputs import InputSpec


class TfliteTarget:
    needs: tuple[str, ...] = ("torch", "timm", "litert-torch", "ai-edge-litert")
    source: type[AnyArtifact] = Checkpoint
    layout: Literal["NCHW", "NHWC"] = "NHWC"
    entry: str = "model.tflite"
    runtime: Mapping[str, Any] = MappingProxyType({})
    stand_in: str | None = None
    not_built_here: bool = False

    def write(
        self, source: Checkpoint | Tuned, spec: InputSpec, images: np.ndarray, output: Output, folder: Path
    ) -> Written:
        import litert_torch
        import torch
        from ai_edge_litert.interpreter import Interpreter

        from ..networks import models
        from .rewrites import FOR_TFLITE, AsTorchComputes, for_tflite

        network, torch_spec = models.restore(source)

        class ChannelsLast(torch.nn.Module):
            def __init__(self, network: torch.nn.Module) -> None:
                super().__init__()
                self.network = models.Normalise(network, torch_spec, output)

            def forward(self, image: torch.Tensor) -> torch.Tensor:
                outputs: torch.Tensor = self.network(image.permute(0, 3, 1, 2))
                return outputs

        original = models.Normalise(network, torch_spec, output).eval()
        expected = torch_outputs(original, images, str(source.path))
        with torch.no_grad():
            whole = ChannelsLast(for_tflite(models.deployed(network))).eval()
            example = torch.zeros(1, *spec.shape)
            with AsTorchComputes(FOR_TFLITE):
                # Folded, or a resized position embedding would be resized anew for every image.
                converted = litert_torch.convert(whole, (example,), runtime_constant_folding=True)
            converted.export(str(folder / self.entry))
        interpreter = Interpreter(str(folder / self.entry), num_threads=1)
        kinds = Counter(operation["op_name"] for operation in interpreter._get_ops_details())
        return Written(expected, dict(kinds.most_common()), partial(float32_error, original, images, expected))

    @staticmethod
    def check(entry: Path) -> None:
        """Nothing: its runtime opens every file that is written here, or says at once what it lacks."""
