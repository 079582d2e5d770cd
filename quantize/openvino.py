"""OpenVINO: INT8 by NNCF or by ONNX Runtime's portable Q/DQ, bf16 where the CPU has it, float16 weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import ModelFacts
from ..networks import ir
from ..runtime.openvino import import_openvino
from .layers import Activations, Layer
from .qdq import Qdq
from .variant import Taken, Variant
from .work import Work


class OpenVinoActivations:
    """An IR with the output of every float operation among its results."""

    channel_axis = 1

    def __init__(self, path: Path) -> None:
        openvino = import_openvino()
        core = openvino.Core()
        model = core.read_model(path)
        skipped = ("Constant", "Convert", "Parameter", "Result", "FakeQuantize", "FakeConvert", "ShapeOf")
        found: list[Layer] = []
        for node in model.get_ordered_ops():
            if node.get_type_name() in skipped or node.get_output_size() != 1:
                continue
            output = node.output(0)
            if output.get_element_type() != openvino.Type.f32 or not output.get_partial_shape().rank.get_length():
                continue
            inputs = (_before_fake_quantize(node.input_value(at)) for at in range(node.get_input_size()))
            found.append(Layer(node.get_friendly_name(), node.get_type_name(), tuple(inputs), node.get_friendly_name()))
        self.layers: tuple[Layer, ...] = tuple(found)
        by_name = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
        nodes = [by_name[layer.name] for layer in found]
        model.add_outputs([node.output(0) for node in nodes if not _is_reshaped(node)])  # none twice
        self._names = [result.get_node().input_value(0).get_node().get_friendly_name() for result in model.outputs]
        self._compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        results = self._compiled([image])
        return {name: np.array(results[at]) for at, name in enumerate(self._names)}


def _is_reshaped(node: Any) -> bool:
    """Whether it is a convolution whose output is quantised and reshaped, as in front of a GroupNorm.

    Were that among the results too, the CPU plugin of 2026.4 would compute zeros from there on.
    """
    if node.get_type_name() != "Convolution":
        return False
    takers = [taker.get_node() for taker in node.output(0).get_target_inputs()]
    behind = [each.get_node() for taker in takers if taker.get_type_name() == "FakeQuantize"
              for each in taker.output(0).get_target_inputs()]  # fmt: skip
    return any(each.get_type_name() == "Reshape" for each in [*takers, *behind])


def _before_fake_quantize(output: Any) -> str:
    """The name of what makes ``output``, before it was quantised."""
    node = output.get_node()
    while node.get_type_name() == "FakeQuantize":
        node = node.input_value(0).get_node()
    name: str = node.get_friendly_name()
    return name


class Nncf(Variant):
    """OpenVINO's own INT8, by NNCF."""

    needs: tuple[str, ...] = ("openvino", "nncf")
    precision = "int8"
    calibrated = True

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
        from nncf.quantization.range_estimator import RangeEstimatorParametersSet

        self._work.model.file(self._work.entry.with_suffix(".bin").name)
        transformer = _is_transformer(self._work)
        openvino = import_openvino()  # NNCF compiles too
        whole = openvino.Core().read_model(self._work.entry)
        known = ir.names(whole)
        quantized = nncf.quantize(
            whole,
            nncf.Dataset(self._work.inputs),
            preset=nncf.QuantizationPreset.MIXED,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(names=list(keep_float)) if keep_float else None,
            subset_size=len(self._work.inputs),
            # The fast one moves biases by what it sees of one layer alone: on the demo's student it costs 5 dB
            # against no correction at all, where this one gains 1.
            fast_bias_correction=False,
            advanced_parameters=AdvancedQuantizationParameters(
                # Its default averages the ends over images, and clips whatever exceeds the average: 10 to 16 dB less
                # on networks trained on small images, level on an ImageNet one.
                activations_range_estimator_params=RangeEstimatorParametersSet.MINMAX,
                overflow_fix=OverflowFix.FIRST_LAYER if self._work.config.reduce_range else OverflowFix.DISABLE,
            ),
        )
        ir.save(quantized, folder / self._work.model.facts.entry, known)
        return Taken(
            {
                "format": "NNCF",
                "preset": "mixed" + (", transformer" if transformer else ""),
                "ranges": "minmax",
                "bias_correction": "accurate",
            }
        )

    def activations(self, entry: Path) -> Activations:
        return OpenVinoActivations(entry)


def _is_transformer(work: Work) -> bool:
    kinds = work.model.facts.nodes_by_kind
    return bool(kinds.get("Softmax", 0) and kinds.get("LayerNormalization", 0))


class PortableQdq(Qdq):
    """ONNX Runtime's own INT8 file, opened by OpenVINO: on some CPUs and networks the faster of the two."""

    needs: tuple[str, ...] = ("onnx", "onnxruntime", "openvino")

    @property
    def source(self) -> Path:
        if self._work.graph is None:
            raise UserError(f"{self._work.model.path} has no ONNX graph beside it: export it again, here")
        return super().source

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        import openvino

        with tempfile.TemporaryDirectory() as scratch:
            portable = Path(scratch) / "model.onnx"
            taken = self.quantize_as(portable, keep_float)
            out = folder / self._work.model.facts.entry
            float32 = ir.names(openvino.Core().read_model(self._work.entry))
            ir.save(openvino.convert_model(portable), out, others=float32)
        return taken

    def activations(self, entry: Path) -> Activations:
        return OpenVinoActivations(entry)


class BFloat16(Variant):
    """The float32 file, run in bf16."""

    needs: tuple[str, ...] = ("openvino",)
    precision = "bf16"

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        return bool(flags.get("amx_bf16") or flags.get("avx512_bf16"))

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        for name in (self._work.entry.name, self._work.entry.with_suffix(".bin").name):
            shutil.copyfile(self._work.model.file(name), folder / name)
        return Taken({"format": "float32 file"}, {"inference_precision": "bf16"})


class CompressedFloat16(Variant):
    """Weights stored in float16: half the size; a CPU computes in float32 all the same."""

    needs: tuple[str, ...] = ("openvino",)
    precision = "float16"

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        return False  # on a CPU it can only be smaller

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        import openvino

        model = openvino.Core().read_model(self._work.entry)
        ir.save(model, folder / self._work.model.facts.entry, ir.names(model), half=True)
        return Taken({"format": "float16 weights", "weights": "float16"})
