"""What a bundle says of image files, here or on a device: a look for a person, no measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import Bundle
from ..core.proc import in_order
from ..core.progress import progress
from ..data.copies import read
from ..data.listing import list_images
from ..devices import Device, opened
from ..devices.accuracy import block_images, read_outputs
from ..devices.runner import RunnerDevice
from ..runtime.preprocess import fit
from ..runtime.task import TASKS
from .bundle import check_known
from .install import check_runs, with_runner

BLOCK_SECONDS = 3600.0  # in which a device must answer a block of images
PUSHED = "bundle"  # what it is called on the device meanwhile


@dataclass(frozen=True)
class Said:
    """What a bundle says of one image, the likeliest first; or why the image cannot be read."""

    image: Path
    labels: tuple[str, ...] = ()
    probabilities: tuple[float, ...] = ()  # by the network's own account, 0 to 1
    fault: str | None = None


def find(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and every image below the folders that are named, by name.

    Raises:
        UserError: nothing there, or a folder without images.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            below = [path / os.fsdecode(name) for name in list_images(path)]
            if not below:
                raise UserError(f"no images below {path}: wanted a folder with some, or files")
            found += below
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"no image at {path}: wanted an image file, or a folder of them")
    return found


def predict(bundle: Bundle, images: Sequence[Path], device: Device, top: int = 1) -> Generator[Said, None, None]:
    """Ask ``bundle`` on ``device`` about image files, in their order; some are under way, however many there are.

    Args:
        top: how many labels of each image, if there are so many.

    Raises:
        UserError: the device cannot open such a bundle, or answered something that is no output of it.
        DeviceLost: the link is gone.
    """
    check_known(bundle)
    there = with_runner(device)
    stand_in = None if there.runs(bundle.facts.target) else bundle.facts.stand_in
    if stand_in is None or not there.runs(stand_in):
        check_runs(there, bundle.facts.target)
    task, classes, spec = TASKS[bundle.facts.task], bundle.labels, bundle.facts.input.model_dump()
    with (
        tempfile.TemporaryDirectory() as scratch,
        opened(there, Path(scratch)),
        progress(f"asking {bundle.facts.target} on {there.name}", len(images)) as advance,
    ):
        there.push(bundle.path, PUSHED)
        step = block_images(bundle)
        for at in range(0, len(images), step):
            block = images[at : at + step]
            shown = list(in_order(lambda path: _shown(path, spec), block))
            pixels = [each for each in shown if isinstance(each, np.ndarray)]
            answers: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())
            if pixels:
                outputs = _outputs(there, bundle, pixels, Path(scratch), stand_in is not None)
                answers = zip(*task.likeliest(outputs, top), strict=True)
            for path, each in zip(block, shown, strict=True):
                if isinstance(each, str):
                    yield Said(path, fault=each)
                else:
                    decisions, shares = next(answers)
                    labels = tuple(task.tell(decision, classes) for decision in decisions)
                    yield Said(path, labels, tuple(map(float, shares)))
            advance(len(block), "")


def _shown(path: Path, spec: dict[str, Any]) -> np.ndarray | str:
    """What the network is shown of a file, uint8 [height, width, 3], or why it cannot be read."""
    try:
        return fit(read(path), spec)
    except UserError as error:
        return str(error)


def _outputs(
    device: RunnerDevice, bundle: Bundle, pixels: Sequence[np.ndarray], scratch: Path, stand_in: bool
) -> np.ndarray:
    """What the pushed bundle answers [N, ...]. Raises UserError for anything else."""
    images, outputs = scratch / "images.npy", scratch / "outputs.npy"
    np.save(images, np.stack(pixels))
    device.push(images, images.name)
    try:
        device.predict(PUSHED, images.name, outputs, BLOCK_SECONDS, stand_in=stand_in)
    finally:
        device.drop(images.name)
    return read_outputs(outputs, str(bundle.path), len(pixels), bundle)
