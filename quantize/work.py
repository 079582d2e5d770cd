"""What a quantiser works on: the float model, the images, the settings."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.artifact import Graph, Model
from ..core.config import QuantizeConfig
from ..core.errors import KdpipeError, UserError
from ..core.proc import first_line, quiet
from ..runtime import Session, open_session
from .calibrate import CalibrationInputs

if TYPE_CHECKING:
    from .variant import Variant

TRACED_IMAGES = 16  # on which the noise of every layer is measured


@dataclass(frozen=True)
class Work:
    model: Model  # float32, of the target
    graph: Graph | None  # the ONNX it was made from, where it was made from one
    inputs: CalibrationInputs  # calibration images as the float model takes them
    config: QuantizeConfig

    @property
    def entry(self) -> Path:
        """The file of the float model, checked."""
        entry: str = self.model.facts["entry"]
        return self.model.file(entry)


def write_variant(variant: Variant, model: Model, keep_float: Collection[str], folder: Path) -> dict[str, Any]:
    """Let the quantiser write; what it raises becomes one line. Raises UserError."""
    with quiet():
        try:
            return variant.write(keep_float, folder)
        except (KdpipeError, OSError):
            raise
        except Exception as error:  # every quantiser raises its own
            raise UserError(
                f"{model.facts['model']} cannot be made smaller for {model.facts['target']}: {first_line(error)}"
            ) from error


def open_checked(folder: Path, facts: dict[str, Any]) -> Session:
    """Open it, and see that it runs in the precision that was asked for. Raises UserError."""
    session = open_session(folder, facts, threads=len(os.sched_getaffinity(0)), stand_in="stand_in" in facts)
    asked, taken = facts["runtime"].get("inference_precision"), session.describe().get("inference_precision")
    if asked != taken:
        raise UserError(f"{facts['target']} was asked for {asked} and silently runs {taken} here: not sealed")
    return session
