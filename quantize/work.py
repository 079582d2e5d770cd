"""What a quantiser works on: the float model, the images, the settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.config import QuantizeConfig
from ..core.errors import UserError
from ..core.kinds import Graph, Model, ModelFacts, Tuned
from ..core.proc import first_line
from ..runtime import Session, open_session
from .calibrate import CalibrationInputs

TRACED_IMAGES = 16  # on which the noise of every layer is measured


@dataclass(frozen=True)
class Retrained:
    """What a student became by more training, in the forms that its target is made from."""

    tuned: Tuned
    graph: Graph | None = None
    model: Model | None = None  # float32, of a target that is not made from the graph


@dataclass(frozen=True)
class Training:
    """What was trained for 8 bits, and its control: as many steps in float32."""

    own: Retrained
    float32_steps: Retrained


@dataclass(frozen=True)
class Work:
    """A float32 model that is to become smaller, and what there is to do it with."""

    model: Model  # float32, of the target
    graph: Graph | None  # the ONNX it was made from, where it was made from one
    inputs: CalibrationInputs  # calibration images as the float model takes them
    config: QuantizeConfig
    check: Callable[[Path], None]  # refuses a file that cannot be run where it is going
    tuned: Tuned | None = None  # what both were trained to be, where they were

    def of(self, retrained: Retrained) -> Work:
        """The same of what the student became."""
        model = retrained.model or self.model
        return replace(self, model=model, graph=retrained.graph, tuned=retrained.tuned)

    @property
    def entry(self) -> Path:
        """The file of the float32 model."""
        return self.model.entry


def open_checked(folder: Path, facts: ModelFacts) -> Session:
    """Open the model in ``folder``, and see that it runs in the precision that was asked for. Raises UserError."""
    threads = len(os.sched_getaffinity(0))
    try:
        session = open_session(folder, facts.for_runtime(), threads, stand_in=facts.stand_in is not None)
    except Exception as error:  # every runtime raises its own
        raise UserError(
            f"{facts.target} cannot open {facts.variant} of {facts.model} here: {first_line(error)}"
        ) from error
    asked, taken = facts.runtime.get("inference_precision"), session.describe().get("inference_precision")
    if asked != taken:
        raise UserError(f"{facts.target} was asked for {asked} and silently runs {taken} here: not sealed")
    return session
