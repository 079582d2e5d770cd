"""What devices with a Python have in common: they run the shipped runner, ``python -m runtime``."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from .. import runtime
from ..core.artifact import Record
from ..core.config import DeviceSettings, MeasureSettings
from ..core.errors import UserError
from ..core.kinds import Prediction, Samples

R = TypeVar("R", bound=Record)
RUNNER = "runtime"
OUTPUTS = "outputs.npy"
PREDICT_SECONDS = 3600.0


class RunnerDevice(ABC):
    """A device on which the runner lies in the working folder."""

    emulated = False

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings

    @abstractmethod
    def run(self, arguments: Sequence[str], timeout_seconds: float) -> str:
        """What ``python -m runtime *arguments`` prints, in the working folder, in a fresh process.

        Raises:
            KdpipeError: it failed, or did not end in time.
        """

    @abstractmethod
    def push(self, source: Path, name: str) -> None:
        """Put a file or folder of this host into the working folder."""

    @abstractmethod
    def pull(self, name: str, target: Path) -> None:
        """Get the file ``name`` of the working folder."""

    def push_runner(self) -> None:
        self.push(Path(runtime.__file__).parent, RUNNER)

    def predict(self, bundle: str, images: str, outputs: Path, stand_in: bool = False) -> Prediction:
        arguments = ["predict", bundle, "--images", images, "--logits", OUTPUTS, *(["--stand-in"] if stand_in else [])]
        answer = self._ask(Prediction, arguments, PREDICT_SECONDS)
        self.pull(OUTPUTS, outputs)
        return answer

    def measure(self, bundle: str, images: str, settings: MeasureSettings) -> Samples:
        arguments = [
            *("measure", bundle, "--images", images, "--image-count", str(settings.images)),
            *("--threads", str(settings.threads), "--seconds", str(settings.seconds)),
            *("--min-samples", str(settings.min_samples)),
        ]
        return self._ask(Samples, arguments, timeout_seconds=60 + 20 * settings.seconds)

    def _ask(self, kind: type[R], arguments: Sequence[str], timeout_seconds: float) -> R:
        lines = self.run(arguments, timeout_seconds).splitlines() or [""]
        try:
            answer: dict[str, Any] = json.loads(lines[-1])
            return kind.model_validate({name: answer[name] for name in kind.model_fields if name in answer})
        except (ValueError, TypeError, AttributeError, ValidationError):
            raise UserError(
                f"the runner on '{self.settings.kind}' answered something else than wanted to "
                f"'{arguments[0]}': {lines[-1][:80]!r}"
            ) from None
