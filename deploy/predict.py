"""What a bundle says of image files, here or on a device: a look for a person, no measurement."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import UserError
from ..core.kinds import Bundle
from ..core.proc import in_order
from ..core.progress import progress
from ..core.sealed import printable
from ..data.copies import read
from ..data.listing import list_images
from ..devices import Device, opened
from ..devices.accuracy import block_images, read_outputs
from ..devices.runner import RunnerDevice
from ..runtime.preprocess import fit
from ..runtime.task import TASKS
from .bundle import check_known
from .install import check_runs, with_runner
from .overlays import write

BLOCK_SECONDS = 3600.0  # in which a device must answer a block of images
PUSHED = "bundle"  # what it is called on the device meanwhile


@dataclass(frozen=True)
class Said:
    """What a bundle says of one image, the likeliest or the largest first; or why the image cannot be read."""

    image: Path
    labels: tuple[str, ...] = ()
    figures: tuple[float, ...] = ()  # beside the labels, 0 to 1
    figure: str = ""  # what they are: the probability by the network's own account, or the share of what it was shown
    overlay: Path | None = None  # the picture that was written
    fault: str | None = None


def find(paths: Sequence[Path]) -> list[Path]:
    """The files that are named, and every image below the folders that are named, by name; each once.

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
    return list(dict.fromkeys(found))


def predict(
    bundle: Bundle,
    images: Sequence[Path],
    device: Device,
    top: int | None = None,
    overlays: Sequence[Path] | None = None,
) -> Generator[Said, None, None]:
    """Ask ``bundle`` on ``device`` about image files, in their order; some are under way, however many there are.

    Args:
        top: how many labels of each image, if there are so many; unless it is said, as many as are usual for the task.
        overlays: where each image with the answer drawn over it is written, as ``overlays.place`` says.

    Raises:
        UserError: the device cannot open such a bundle, answered something that is no output of it, or its answers
            cannot be drawn where overlays are wanted.
        DeviceLost: the link is gone.
    """
    check_known(bundle)
    task, spec = TASKS[bundle.facts.task], bundle.facts.input.model_dump()
    if overlays is not None and not task.draws:
        raise UserError(f"{bundle.path} is for {task.name}, which draws nothing over an image: leave --out out")
    with (
        progress(f"asking {bundle.facts.target} on {device.name}", len(images)) as advance,
        answering(bundle, device) as ask,
    ):
        step = block_images(bundle)
        for at in range(0, len(images), step):
            block = images[at : at + step]
            shown = list(in_order(lambda path: _shown(path, spec), block))
            pixels = [each.pixels for each in shown if isinstance(each, _Shown)]
            outputs = ask(pixels) if pixels else None
            yield from _said(bundle, block, shown, outputs, top, None if overlays is None else overlays[at:])
            advance(len(block), "")


def stand_in(bundle: Bundle, device: Device) -> str | None:
    """The runtime that answers for ``bundle`` on ``device`` in place of its own; None where its own does, or none."""
    there = with_runner(device)
    other = None if there.runs(bundle.facts.target) else bundle.facts.stand_in
    return other if other is not None and there.runs(other) else None


@contextmanager
def answering(bundle: Bundle, device: Device) -> Iterator[Callable[[Sequence[np.ndarray]], np.ndarray]]:
    """What asks ``bundle`` on ``device``: images uint8 [H, W, 3] as it is shown them to its outputs [N, ...].

    Raises:
        UserError: as ``predict``, and what is asked too.
        DeviceLost: the link is gone.
    """
    check_known(bundle)
    there, other = with_runner(device), stand_in(bundle, device)
    if other is None:
        check_runs(there, bundle.facts.target)
    with tempfile.TemporaryDirectory() as scratch, opened(there, Path(scratch)):
        there.push(bundle.path, PUSHED)
        yield lambda pixels: _outputs(there, bundle, pixels, Path(scratch), other is not None)


@dataclass(frozen=True)
class _Shown:
    """What the network is shown of a file, uint8 [height, width, 3], and the size of the image itself."""

    pixels: np.ndarray
    height: int
    width: int


def _shown(path: Path, spec: dict[str, Any]) -> _Shown | str:
    """What the network is shown of a file, or why it cannot be read."""
    try:
        image = read(path)
        return _Shown(fit(image, spec), image.height, image.width)
    except UserError as error:
        return str(error)
    except MemoryError:
        return f"image {printable(str(path))} is too large to be fitted to the input"


def _said(
    bundle: Bundle,
    block: Sequence[Path],
    shown: Sequence[_Shown | str],
    outputs: np.ndarray | None,
    top: int | None,
    overlays: Sequence[Path] | None,
) -> Iterator[Said]:
    """What outputs [N, ...] say of those images of a block that could be read, in its order; drawn where wanted."""
    task, classes, spec = TASKS[bundle.facts.task], bundle.labels, bundle.facts.input.model_dump()
    rows = np.cumsum([isinstance(each, _Shown) for each in shown]) - 1

    def one(at: int) -> Said:
        each, path = shown[at], block[at]
        if isinstance(each, str):
            return Said(path, fault=each)
        assert outputs is not None  # of what was shown
        seen = task.see(outputs[rows[at] : rows[at] + 1], spec, each.height, each.width, top)
        if overlays is not None and seen.places is not None:
            try:
                image = np.asarray(read(path))
            except UserError as error:
                return Said(path, fault=str(error))
            if image.shape[:2] != seen.places.shape:
                return Said(path, fault=f"image {path} changed while it was looked at: ask again")
            write(image, seen.places, overlays[at])
        labels = tuple(classes[label] for label in seen.classes)
        return Said(path, labels, seen.figures, task.figure, None if overlays is None else overlays[at])

    yield from in_order(one, range(len(block)))


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
