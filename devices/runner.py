"""What devices with a Python have in common: they run the shipped runner, ``python -m runtime``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from .. import runtime
from ..core.artifact import Record
from ..core.config import DeviceSettings, MeasureSettings
from ..core.errors import UserError
from ..core.kinds import Prediction, Samples
from ..core.sealed import parse_json

R = TypeVar("R", bound=Record)
RUNNER = "runtime"
OUTPUTS = "outputs.npy"


class RunnerDevice(ABC):
    """A device on which the runner lies in the working folder."""

    emulated = False

    def __init__(self, settings: DeviceSettings) -> None:
        self.settings = settings

    @abstractmethod
    def run(self, arguments: Sequence[str], timeout_seconds: float) -> bytes:
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

    def predict(
        self,
        bundle: str,
        images: str,
        outputs: Path,
        timeout_seconds: float,
        *,
        stand_in: bool = False,
        batch: int = 64,
        threads: int = 0,
    ) -> Prediction:
        arguments = [
            *("predict", bundle, "--images", images, "--logits", OUTPUTS),
            *("--batch", str(batch), "--threads", str(threads)),
            *(["--stand-in"] if stand_in else []),
        ]
        answer = self._ask(Prediction, arguments, timeout_seconds)
        self.pull(OUTPUTS, outputs)
        return answer

    def measure(self, bundle: str, images: str, settings: MeasureSettings, timeout_seconds: float) -> Samples:
        arguments = [
            *("measure", bundle, "--images", images, "--image-count", str(settings.images)),
            *("--threads", str(settings.threads), "--seconds", str(settings.seconds)),
            *("--min-samples", str(settings.min_samples), "--warm-up-seconds", str(settings.warm_up_seconds)),
        ]
        return self._ask(Samples, arguments, timeout_seconds)

    def _ask(self, kind: type[R], arguments: Sequence[str], timeout_seconds: float) -> R:
        try:
            return read_answer(kind, self.run(arguments, timeout_seconds))
        except ValueError as error:
            raise UserError(
                f"the runner on '{self.settings.kind}' answered '{arguments[0]}' with {error}, wanted one JSON object "
                f"of protocol version {runtime.PROTOCOL_VERSION}: is it this version of kdpipe's?"
            ) from None


def read_answer(kind: type[R], printed: bytes) -> R:
    """What a runner said in its last line. Raises ValueError, which says what it said instead."""
    try:
        lines = printed.decode().splitlines()
    except UnicodeDecodeError:
        raise ValueError("bytes that are no UTF-8") from None
    if not lines:
        raise ValueError("nothing")
    try:
        answer = parse_json(lines[-1].encode())
    except ValueError:
        raise ValueError(f"no JSON ({lines[-1][:80]!r})") from None
    if not isinstance(answer, dict):
        raise ValueError(f"JSON that is no object ({lines[-1][:80]!r})")
    if answer.get("protocol_version") != runtime.PROTOCOL_VERSION:
        raise ValueError(f"protocol version {str(answer.get('protocol_version'))[:80]!r}")
    try:
        return kind.model_validate({name: answer[name] for name in kind.model_fields if name in answer})
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ValueError(f"a wrong '{where}' ({fault['msg'].lower()})") from None
