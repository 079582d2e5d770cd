"""Whether an exported file computes what torch computes, on real images."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.config import ParitySettings
from ..core.errors import GateFailed, UserError
from ..core.kinds import ParityFacts, RuntimeSession
from ..runtime.task import Task

if TYPE_CHECKING:
    from torch import nn

LARGEST_BATCH_EFFECT = 1e-2  # over the outputs' spread: rounding makes a hundredth of that


@dataclass(frozen=True)
class Parity:
    images: int
    max_difference: float  # largest absolute logit difference
    logit_spread: float  # largest standard deviation of a torch logit over the images: the scale of the difference
    agreement: float  # of what they say, as the task counts it
    worst_image: Path

    @property
    def relative(self) -> float:
        return self.max_difference / self.logit_spread

    def facts(self, session: Mapping[str, Any] | None = None) -> ParityFacts:
        """The record of it; ``session`` is what the runtime said of itself."""
        return ParityFacts(
            images=self.images,
            max_difference=self.max_difference,
            logit_spread=self.logit_spread,
            relative_difference=self.relative,
            agreement=self.agreement,
            worst_image=self.worst_image.name,
            session=None if session is None else RuntimeSession(**session),
        )


def torch_outputs(network: nn.Module, images: np.ndarray, what: str) -> np.ndarray:
    """What ``network`` (NCHW, 0..255) says of images uint8 [N, H, W, 3], float32 [N, ...].

    Raises:
        UserError: outputs that are not finite, or that depend on which other images are in the batch.
    """
    import torch

    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        outputs: np.ndarray = network(batch).numpy()
        alone: np.ndarray = network(batch[:1]).numpy()
    if not np.isfinite(outputs).all():
        raise UserError(f"{what}: its outputs are not finite on real images: nothing to export")
    if len(outputs) > 1 and np.abs(alone[0] - outputs[0]).max() > LARGEST_BATCH_EFFECT * outputs.std(axis=0).max():
        raise UserError(f"{what}: what it says of an image depends on the other images of the batch: nothing to export")
    return outputs


def compare(task: Task, expected: np.ndarray, actual: np.ndarray, images: Sequence[Path]) -> Parity:
    """Compare two float arrays of outputs [N, ...] of N images; a value that is not finite differs infinitely.

    Raises:
        GateFailed: different shapes, or constant expected logits (parity would say nothing).
    """
    if expected.shape != actual.shape:
        raise GateFailed(f"wanted logits of shape {expected.shape}, the exported file gives {actual.shape}")
    spread = float(expected.std(axis=0).max())
    if not spread > 0:
        raise GateFailed("the network's outputs do not depend on the image: parity would say nothing, train it first")
    difference = np.where(np.isfinite(actual), np.abs(expected - actual), np.finfo(np.float32).max)
    difference = difference.reshape(len(difference), -1).max(1)
    return Parity(
        images=len(expected),
        max_difference=float(difference.max()),
        logit_spread=spread,
        agreement=task.agreement(expected, actual),
        worst_image=images[int(difference.argmax())],
    )


def check(parity: Parity, config: ParitySettings, what: str) -> Parity:
    """Refuse a file that differs. Raises GateFailed."""
    if parity.relative > config.parity_tolerance:
        raise GateFailed(
            f"the {what} differs from torch by {parity.relative:.1e} of the logits' spread "
            f"(allowed {config.parity_tolerance:.0e}), they agree by {parity.agreement:.1%} on {parity.images} "
            f"images; worst image {parity.worst_image}"
        )
    return parity


def keep_worst(parity: Parity, folder: Path) -> None:
    """Copy the image that differs most beside the model, as evidence: not part of what is shipped."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(parity.worst_image, folder / f"worst{parity.worst_image.suffix}")
