"""Opens a packaged model and runs it: the same code on this host and on a device.

Imports nothing of kdpipe: this folder is copied into every bundle and runs there as ``python -m runtime``
with the standard library, numpy and the one runtime of the bundle (Pillow only to read image files).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from .installed import installed
from .onnxruntime import OnnxRuntimeSession
from .openvino import OpenVinoSession
from .strange import RandomInput
from .tensorrt import TensorRtSession, build_engine
from .tflite import TfliteSession

PROTOCOL_VERSION = 3  # of what ``python -m runtime`` takes and answers


class Session(Protocol):
    """An opened model."""

    needs: tuple[str, ...]  # distributions that open it
    modules: tuple[tuple[str, ...], ...]  # what importing them means: one of each of these
    batched: bool  # whether one call takes any number of images
    compile_ns: int | None  # of opening, what compiling took where the runtime does it apart

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int) -> None:
        """Open the model in ``folder`` as its ``facts`` (of the manifest) say."""

    def prepare(self, images: np.ndarray) -> Any:
        """uint8 [N, H, W, 3] in RGB to the model's own input (layout, dtype, scale) as the runtime holds it."""

    def infer(self, prepared: Any) -> np.ndarray:
        """The model's own input to its outputs, which stand until the next call.

        Float32 logits [N, K, ...], or where the graph decides of every pixel its class, uint8 [N, H, W].
        """

    def random(self, generator: np.random.Generator) -> Any:
        """What ``infer`` takes, of every input's own shape and type, at random. Raises ValueError for open ones."""

    def executed(self, prepared: Any) -> dict[str, int] | None:
        """How many layers with weights run in which precision; None where the runtime does not say. May run it."""

    def describe(self) -> dict[str, Any]:
        """Runtime, version, settings that were really taken, and what ``infer`` does besides running the graph."""


RUNTIMES: dict[str, type[Session]] = {
    "onnxruntime": OnnxRuntimeSession,
    "openvino": OpenVinoSession,
    "tensorrt": TensorRtSession,
    "tflite": TfliteSession,
}


# What has to be made of a model on the device itself before it can be opened there.
BUILDERS: dict[str, Callable[[Path, dict[str, Any]], object]] = {"tensorrt": build_engine}


def build(folder: Path, facts: dict[str, Any]) -> None:
    """Make what the runtime of the model in ``folder`` needs on this device, unless it is there; beside the folder."""
    if facts["target"] in BUILDERS:
        BUILDERS[facts["target"]](folder, facts)


def is_available(target: str) -> bool:
    """Whether the runtime of ``target`` is installed on this machine; imports nothing. Raises KeyError."""
    with contextlib.suppress(ImportError):
        return bool([installed(alternatives) for alternatives in RUNTIMES[target].modules])
    return False


def open_session(folder: Path, facts: dict[str, Any], threads: int = 1, stand_in: bool = False) -> Session:
    """Open the model in ``folder``.

    Args:
        facts: of the model or bundle: target, entry, input and runtime settings.
        threads: of the runtime.
        stand_in: open it with the runtime that reads the same file where the real one can't run here
            (a TensorRT graph in ONNX Runtime): right for accuracy, meaningless for latency.

    Raises:
        KeyError: no runtime of that name, or no stand-in for it.
        ImportError: the runtime is not installed.
    """
    name = facts["stand_in"] if stand_in else facts["target"]
    settings = facts.get("runtime", {})
    if settings.get("random_input"):
        return RandomInput(RUNTIMES[name](folder, facts, threads))
    if settings.get("normalised_input"):
        facts = {**facts, "input": {**facts["input"], "normalised": True}}
    return RUNTIMES[name](folder, facts, threads)


def predict(session: Session, images: np.ndarray, batch: int = 64) -> np.ndarray:
    """Outputs [N, ...], as ``infer`` has them, for uint8 images [N, H, W, 3], in batches where the model takes them."""
    step = batch if session.batched else 1
    return np.concatenate(
        [np.array(session.infer(session.prepare(images[at : at + step]))) for at in range(0, len(images), step)]
    )
