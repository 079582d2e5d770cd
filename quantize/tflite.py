"""INT8 for TFLite by ai-edge-quantizer: static for CNNs, dynamic for ViTs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..core.artifact import Model
    from ..core.config import QuantizeConfig


class TfliteQuantizer:
    needs: tuple[str, ...] = ("ai-edge-quantizer", "ai-edge-litert")

    def write(self, model: Model, images: Sequence[np.ndarray], config: QuantizeConfig, folder: Path) -> dict[str, Any]:
        from ai_edge_litert.interpreter import Interpreter
        from ai_edge_quantizer import quantizer, recipe

        entry = model.facts["entry"]
        source = str(model.file(entry))
        work = quantizer.Quantizer(source)
        if config.scheme == "dynamic":
            work.load_quantization_recipe(recipe.dynamic_wi8_afp32())
            ranges = None
        else:
            work.load_quantization_recipe(recipe.static_wi8_ai8())
            interpreter = Interpreter(source)
            [(signature, names)] = interpreter.get_signature_list().items()
            [argument] = names["inputs"]
            ranges = work.calibrate({signature: [{argument: image} for image in images]})
            # The input's range is known: observing it would let 255 clip on a brighter image.
            tensor = interpreter.get_input_details()[0]["name"]
            for end, value in (("min", 0.0), ("max", 255.0)):
                ranges[tensor][end] = np.full_like(ranges[tensor][end], value)
        work.quantize(ranges).export_model(str(folder / entry), overwrite=True)
        return {"format": config.scheme, "weights": "int8 per channel", "input_range": [0, 255]}
