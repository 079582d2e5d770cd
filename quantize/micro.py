"""TFLite all in integers, with bytes in and out: what microcontrollers and their accelerators take."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np

from ..core.errors import GateFailed
from ..core.kinds import ModelFacts
from .bias import Shifts
from .integers import ONES, Normalisation, bytes_in_and_out, float_operators, fold_normalisation
from .layers import Activations
from .ranges import Range
from .tflite import StaticInt8, TfliteActivations
from .variant import Taken


class FoldedActivations(TfliteActivations):
    """The float32 file without normalisation: it is given the pixels as its image's tensor stands for them."""

    def __init__(self, path: Path, normalisation: Normalisation) -> None:
        super().__init__(path)
        self._normalisation = normalisation

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        return super().__call__(self._normalisation.of(image))


class FullInt8(StaticInt8):
    """No operator computes in float, but for layers that the guard keeps so; the image's bytes are the pixels."""

    normalises_in_float = False

    @staticmethod
    def suits(facts: ModelFacts | None, flags: Mapping[str, bool]) -> bool | None:
        return False  # a CPU gains nothing by it over "int8"

    @cached_property
    def _folded(self) -> tuple[tempfile.TemporaryDirectory[str], Path, Normalisation]:
        scratch = tempfile.TemporaryDirectory()  # as long as this object
        path = Path(scratch.name) / "folded.tflite"
        return scratch, path, fold_normalisation(self._work.entry, path)

    @property
    def normalisation(self) -> Normalisation:
        """Where it went."""
        return self._folded[2]

    @property
    def whole(self) -> Path:
        return self._folded[1]

    @property
    def input_range(self) -> Range:
        return self.normalisation.ends

    def given(self, image: np.ndarray) -> np.ndarray:
        return self.normalisation.of(image)

    @cached_property
    def ranges(self) -> Mapping[str, Range]:
        return {**super().ranges, ONES: self.input_range}  # by one scale the image is copied and not rounded

    def float32(self) -> TfliteActivations:
        return FoldedActivations(self.whole, self.normalisation)

    def quantize(self, keep_float: Collection[str], folder: Path) -> Taken:
        settings = super().quantize(keep_float, folder).settings
        left = float_operators(folder / self._work.model.facts.entry)
        if left and not keep_float:
            raise GateFailed(
                f"int8-full of {self._work.model.facts.model} would compute {', '.join(left)} in float: wanted "
                "integers only; take int8, or a network without"
            )
        more = {"format": "static, integers only", "normalisation": self.normalisation.as_dict()}
        return Taken({**settings, **more}, {"bytes_input": True})

    def _write(self, out: Path, keep_float: Collection[str], shifts: Shifts) -> None:
        super()._write(out, keep_float, shifts)
        bytes_in_and_out(out, self.normalisation, self.ranges.get(self.float32().layers[-1].output))

    def activations(self, entry: Path) -> Activations:
        # What the float32 model computes is compared where normalisation is out of the way there too.
        return self.float32() if entry == self._work.entry else TfliteActivations(entry)
