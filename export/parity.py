"""Whether an exported file computes what torch computes, on real images."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.config import ParitySettings
from ..core.errors import GateFailed, UserError
from ..core.kinds import ParityFacts, RuntimeSession
from ..core.progress import note
from ..runtime.bundle import apart
from ..runtime.task import Task

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

LARGEST_BATCH_EFFECT = 1e-2  # over the outputs' spread: rounding makes a hundredth of that
# A file and torch round apart. Where a network magnifies rounding, both may be as far off as torch's float32 is from
# its double precision; up to a limit, beyond which nothing could be told from a fault.
ROUNDINGS, LARGEST_ROUNDING = 2, 2e-2
MOST_OUTPUT_BYTES = 2**26  # that a graph keeps of torch's outputs
MOST_PIXELS = 2**22  # of the images that run together
IN_QUESTION = 0.1  # of the tolerance: closer outputs say that torch's rounding need not be known


@dataclass(frozen=True)
class Parity:
    images: int
    max_difference: float  # largest absolute logit difference; of classes, the share of an image's pixels that change
    logit_spread: float  # largest standard deviation of a torch logit over the images; of classes 1
    relative: float  # the difference over that spread; of classes, the share of all pixels that change
    agreement: float  # of what they say, as the task counts it
    worst_image: Path
    unit: str = "the logits' spread"  # what ``relative`` is a share of, in words
    float32_error: float | None = None  # as ``float32_error`` has it; None where it was in no question

    def facts(self, session: Mapping[str, Any] | None = None) -> ParityFacts:
        """The record of it; ``session`` is what the runtime said of itself."""
        return ParityFacts(
            images=self.images,
            max_difference=self.max_difference,
            logit_spread=self.logit_spread,
            relative_difference=self.relative,
            agreement=self.agreement,
            worst_image=self.worst_image.name,
            float32_error=self.float32_error,
            session=None if session is None else RuntimeSession(**session),
        )


def torch_outputs(network: nn.Module, images: np.ndarray, what: str) -> np.ndarray:
    """What ``network`` (NCHW, 0..255) says of images uint8 [N, H, W, 3], [N, ...].

    Of the first of them where the outputs of all would be too much to be kept.

    Raises:
        UserError: outputs that are not finite, or that depend on which other images are in the batch.
    """
    import torch

    batch = torch.from_numpy(images).permute(0, 3, 1, 2)
    with torch.inference_mode():
        alone: np.ndarray = network(batch[:1].float()).numpy()
        outputs = _in_steps(network, batch[: max(2, MOST_OUTPUT_BYTES // alone.nbytes)], torch.float32)
    if not np.isfinite(outputs).all():
        raise UserError(f"{what}: its outputs are not finite on real images: nothing to export")
    if len(outputs) > 1 and apart(outputs[:1], alone)[0] > LARGEST_BATCH_EFFECT * _spread(outputs):
        raise UserError(f"{what}: what it says of an image depends on the other images of the batch: nothing to export")
    return outputs


def compare(task: Task, expected: np.ndarray, actual: np.ndarray, images: Sequence[Path]) -> Parity:
    """Compare two arrays of outputs [N, ...] of N images; a value that is not finite differs infinitely.

    Raises:
        GateFailed: different shapes or types, or constant expected outputs (parity would say nothing).
    """
    if expected.shape != actual.shape or expected.dtype.kind != actual.dtype.kind:
        raise GateFailed(
            f"wanted outputs of shape {expected.shape}, {expected.dtype}, the exported file gives {actual.shape}, "
            f"{actual.dtype}"
        )
    if (expected == expected[0]).all():
        raise GateFailed("the network's outputs do not depend on the image: parity would say nothing, train it first")
    spread, difference = _spread(expected), apart(expected, actual)
    largest, of_classes = float(difference.max()), _are_classes(expected)
    return Parity(
        images=len(expected),
        max_difference=largest,
        logit_spread=spread,
        relative=float(difference.mean()) if of_classes else largest / spread,
        unit="the pixels" if of_classes else "the logits' spread",
        agreement=task.agreement(expected, actual),
        worst_image=images[int(difference.argmax())],
    )


def float32_error(network: nn.Module, images: np.ndarray, outputs: np.ndarray) -> float | None:
    """How far torch's own float32 ``outputs`` are from what it says in double precision, over their spread.

    None where nobody knows: it casts to float32 by itself, or is somebody's own and fails in another precision.

    Args:
        network: NCHW, 0..255; it is left as it is.
        images: uint8 [N, H, W, 3].
        outputs: what ``torch_outputs`` gave of them, float32 [N, ...].
    """
    import torch

    with torch.inference_mode():
        try:
            batch = torch.from_numpy(images[: len(outputs)]).permute(0, 3, 1, 2)
            precise = _in_steps(deepcopy(network).double(), batch, torch.float64)
        except Exception:  # a network of somebody's own raises anything; then nothing is allowed for
            return None
    if _are_classes(outputs):
        return float(apart(outputs, precise).mean())
    return float(np.abs(precise - outputs).max() / _spread(outputs))


def _are_classes(outputs: np.ndarray) -> bool:
    """Whether they are decided already: no number of theirs is more than another."""
    return outputs.dtype.kind == "u"


def _spread(outputs: np.ndarray) -> float:
    """The scale of their differences; shares of pixels are what they are."""
    return 1.0 if _are_classes(outputs) else float(outputs.std(axis=0).max())


def _in_steps(network: nn.Module, batch: Tensor, dtype: torch.dtype) -> np.ndarray:
    """Outputs [N, ...] of uint8 [N, 3, H, W], as many images together as have a bounded number of pixels."""
    step = max(1, MOST_PIXELS // (batch.shape[2] * batch.shape[3]))
    parts = [network(batch[at : at + step].to(dtype)).numpy() for at in range(0, len(batch), step)]
    return np.concatenate(parts)


def check(parity: Parity, config: ParitySettings, what: str, error_of_torch: Callable[[], float | None]) -> Parity:
    """Refuse a file that differs.

    Args:
        error_of_torch: ``float32_error`` on the same images; asked for where it could matter.

    Returns:
        ``parity`` with that error, where it was asked for and is known.

    Raises:
        GateFailed: it differs by more than the tolerance, and by more than torch's own rounding explains.
    """
    if parity.relative <= IN_QUESTION * config.parity_tolerance:
        return parity
    error = error_of_torch()
    parity = replace(parity, float32_error=error)
    explained = 0.0 if error is None else min(ROUNDINGS * error, LARGEST_ROUNDING)
    own = (
        "nobody knows how far torch's own float32 is off"
        if error is None
        else f"torch's own float32 is off by {error:.1e}"
    )
    if parity.relative > max(config.parity_tolerance, explained):
        raise GateFailed(
            f"the {what} differs from torch by {parity.relative:.1e} of {parity.unit} "
            f"(allowed {config.parity_tolerance:.0e}; {own}), they "
            f"agree by {parity.agreement:.1%} on {parity.images} images; worst image {parity.worst_image}"
        )
    if parity.relative > config.parity_tolerance:
        note(
            f"the {what} differs from torch by {parity.relative:.1e} of {parity.unit}: this network magnifies "
            f"rounding, {own}"
        )
    return parity


def keep_worst(parity: Parity, folder: Path) -> None:
    """Copy the image that differs most beside the model, as evidence: not part of what is shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(parity.worst_image, folder / f"worst{parity.worst_image.suffix}")
