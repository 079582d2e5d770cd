"""``int8-qad``: the INT8 files of every target, of weights and with ranges that were trained for them.

The writers are those of the untrained variants. They find the same integers, since the weights lie on their grids
already, and take the ranges as they are told; what has no trained range, such as what a converter made of an activation
in several steps, has one from images as ever.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.config import QuantizeConfig
from ..core.errors import UserError
from ..core.kinds import ModelFacts, Tuned
from .bias import Correction
from .openvino import PortableQdq
from .qdq import OnnxActivations, Qdq
from .ranges import Range
from .tensorrt import ExplicitQdq
from .tflite import StaticInt8, quantized_names
from .training import SEEN_IMAGES, held_by_file, quantized_tensors
from .variant import Taken, Variant
from .work import Work

if TYPE_CHECKING:
    from .layers import Activations

# What only moves, leaves out or pads with nothing: what comes out is on the grid of what goes in, in every runtime.
_MOVING = """
EXPANDDIMS FLATTEN GATHER MAXPOOL MAXPOOL2D PAD PADV2 RESHAPE SLICE SPLIT SQUEEZE STRIDEDSLICE TRANSPOSE UNSQUEEZE
"""
MOVING = frozenset(_MOVING.split())
TRAINED_NEEDS = ("torch", "torchvision", "timm", "safetensors", "onnx", "onnxscript", "onnxslim", "onnxruntime")


def is_symmetric(kind: type[Variant], config: QuantizeConfig) -> bool:
    """Whether a variant's ranges of activations lie around zero."""
    return kind.symmetric or (issubclass(kind, Qdq) and config.activations == "int8")


def weight_levels(kind: type[Variant], config: QuantizeConfig) -> int:
    """The largest integer of a weight of a variant."""
    return 64 if config.reduce_range and kind.narrow_able else 127


class Trained(Variant):
    """What the trained variants have in common; the class beside it writes."""

    def __init__(self, work: Work) -> None:
        """Raises UserError for what its target cannot hold."""
        super().__init__(work)
        if work.tuned is None:
            raise UserError(f"int8-qad of {work.model.path} wants what its student was trained to be, found nothing")
        check_held(type(self), work.config, work.tuned)
        self._tuned = work.tuned
        self._known: frozenset[str] = frozenset()
        self.placed = self.from_images = 0  # tensors of the last file on trained grids, and on those that images set

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        """It trains: whoever wants it names it."""
        return False

    @cached_property
    def correction(self) -> Correction:
        """None: its biases were trained."""
        return Correction()

    def _told(self, taken: Taken, on_grids: Collection[str]) -> Taken:
        """``on_grids``: the names of the file's tensors that are."""
        self.placed = len(self._known.intersection(on_grids))
        self.from_images = len(on_grids) - self.placed
        return Taken({**taken.settings, "trained": self._tuned.key[:12]}, taken.runtime)

    def _trained(self, activations: Activations, calibrated: Mapping[str, Range]) -> Mapping[str, Range]:
        """Ranges by tensor: as trained where the tensor is a place, else as ``calibrated``."""
        found = trained_ranges(self._tuned, activations, self._work)
        for layer in activations.layers:
            if layer.kind.replace("_", "").upper() in MOVING and layer.inputs and layer.inputs[0] in found:
                found.setdefault(layer.output, found[layer.inputs[0]])
        self._known = frozenset(found)
        return {**calibrated, **found}


def check_held(kind: type[Variant], config: QuantizeConfig, tuned: Tuned) -> None:
    """Refuse scales that a variant cannot hold. Raises UserError."""
    settings = tuned.settings
    if not settings["quantized"]:
        raise UserError(f"{tuned.path} was trained in float32, as a control: it has no scales for int8-qad")
    symmetric, levels = is_symmetric(kind, config), weight_levels(kind, config)
    if settings["symmetric"] != symmetric:
        words = {True: "symmetric ranges of activations", False: "asymmetric ones"}
        raise UserError(
            f"{tuned.path} has {words[not symmetric]}, which this file cannot hold: wanted {words[symmetric]}"
        )
    if settings["weight_levels"] != levels:
        raise UserError(
            f"{tuned.path} has weights up to {settings['weight_levels']}, wanted {levels}: say quantize.reduce_range "
            "as it was trained"
        )


def trained_ranges(tuned: Tuned, activations: Activations, work: Work) -> dict[str, Range]:
    """The trained range of every tensor of a file that is a place of the network, by its name."""
    import torch

    from ..networks import models
    from .fake import LARGEST_SYMMETRIC, LEVELS, matched, signatures

    network, spec = models.restore(tuned)
    shown = np.stack([work.inputs.image(at) for at in range(min(SEEN_IMAGES, len(work.inputs)))])
    with torch.no_grad():
        places = signatures(models.Normalise(network, spec).eval(), shown)
    ranges: dict[int, Range] = {}
    for each in tuned.ranges:
        below = LARGEST_SYMMETRIC if tuned.settings["symmetric"] else each.zero_point
        above = LARGEST_SYMMETRIC if tuned.settings["symmetric"] else LEVELS - each.zero_point
        ranges[each.place] = (-below * each.scale, above * each.scale)
    found = matched(places, held_by_file(activations, shown, work.inputs))
    return {name: ranges[place] for name, place in found.items() if place in ranges}


class TrainedQdq(Trained, Qdq):
    """Q/DQ for ONNX Runtime."""

    needs: tuple[str, ...] = TRAINED_NEEDS
    untrained = Qdq

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        """Of all activations, by tensor."""
        return self._trained(OnnxActivations(self.source), super().ranges)

    def quantize_as(self, out: Path, keep_float: Collection[str]) -> Taken:
        taken = super().quantize_as(out, keep_float)
        return self._told(taken, quantized_tensors(self.source, out))


class TrainedPortableQdq(TrainedQdq, PortableQdq):
    """The same file for OpenVINO: NNCF sets ranges of its own and cannot be told all of them."""

    needs: tuple[str, ...] = (*TRAINED_NEEDS, "openvino")
    untrained = PortableQdq


class TrainedExplicitQdq(TrainedQdq, ExplicitQdq):
    """Symmetric and explicit, for TensorRT: from a training of its own."""

    needs: tuple[str, ...] = TRAINED_NEEDS
    untrained = ExplicitQdq
    symmetric = True
    narrow_able = False


class TrainedStaticInt8(Trained, StaticInt8):
    """TFLite's static INT8."""

    needs: tuple[str, ...] = (*StaticInt8.needs, *TRAINED_NEEDS, "litert-torch")
    untrained = StaticInt8
    narrow_able = False

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        return self._trained(self.float32(), super().ranges)

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        taken = super().quantize(keep_float, folder)
        return self._told(taken, quantized_names(folder / self._work.model.facts.entry))
