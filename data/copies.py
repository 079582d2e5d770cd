"""Images of which every file is decoded once: resized copies to learn from, fitted ones to be evaluated on.

A photograph of 12 megapixels takes a hundred times longer to decode than a network of 224 pixels needs.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ..core.artifact import Order, drafting
from ..core.config import AugmentSettings, FittedConfig
from ..core.errors import UserError
from ..core.inputs import InputSpec, size_words
from ..core.proc import first_line, in_order
from ..core.progress import note, track
from ..runtime.preprocess import as_rgb, fit, fit_classes
from .dataset import CopyFacts, Dataset, Fitted, FittedFacts, Part, Samples, images_shape, write_header
from .formats import decode, opened
from .looks import Look, Looks, look, perceptual_hashes

if TYPE_CHECKING:
    from PIL import Image

FILTER, QUALITY = "bicubic", 95
STEP = 64  # pixels: sizes of copies are whole multiples
WORTH_IT = 2.0  # times the copies' shorter side that the images' must be, in the median
FORECAST = 8  # images, the first ones, by which the size of all copies is told
HELD_OUT: tuple[Part, ...] = ("val", "test")


def are_photographs(sample: Iterable[Path], shorter_side: int) -> bool:
    """Whether these images are so much larger than copies would be that copies pay. Reads their headers."""
    sides = []
    for path in sample:
        # What cannot be opened is named when it is decoded.
        with contextlib.suppress(OSError, MemoryError), opened(path) as image:
            sides.append(min(image.size))
    return bool(sides) and float(np.median(sides)) >= WORTH_IT * shorter_side


def side_for(spec: InputSpec, augment: AugmentSettings) -> int:
    """Shorter side, in pixels, that leaves training crops of this network as sharp as they would be.

    The smallest crop that is drawn is then no smaller than the network's input, or half of it on a side where crops
    may be smaller still; rounded up, so that networks of nearly one size share their copies.
    """
    smallest = math.sqrt(augment.min_scale) if augment.crop == "resized" else spec.crop_fraction
    return STEP * math.ceil(max(spec.sides) / max(0.5, smallest) / STEP)


def read(path: Path) -> Image.Image:
    """Decode an image of the user's. Raises UserError."""
    try:
        return decode(path)
    except OSError as error:
        raise UserError(f"cannot read image {path} ({first_line(error)}): replace or remove it") from None


def shrunk(path: Path, side: int) -> Image.Image | None:
    """An image with a longer side of at most so many pixels; None where it cannot be read."""
    with contextlib.suppress(OSError, MemoryError), opened(path) as image:
        if image.format == "JPEG":
            image.draft(None, (side, side))  # decoded to no more pixels than it takes
        picture = as_rgb(image)
        picture.thumbnail((side, side))
        return picture
    return None


def copy_size(size: tuple[int, int], shorter_side: int) -> tuple[int, int]:
    """Width and height of the copy of an image of this width and height."""
    scale = shorter_side / min(size)
    if scale >= 1:
        return size
    width, height = (max(shorter_side, round(side * scale)) for side in size)
    return width, height


def write_copies(
    samples: Samples, shorter_side: int, out: Path, looks: Looks
) -> tuple[np.ndarray, np.ndarray, CopyFacts]:
    """Write a copy of every image into ``out``, one behind the other.

    An image that is no larger is kept as it is; of one that can't be read there is none. All cores decode.

    Args:
        looks: is told what was seen of each.

    Returns:
        Where each begins and how long it is, in bytes [N]; and what was done.

    Raises:
        UserError: no room, or an image of a format that wants a package which is not installed.
    """
    from PIL import Image

    def copy(at: int) -> tuple[bytes, bool, Look]:
        path = samples.path(at)
        image, seen = look(path)
        if image is None:
            return b"", False, seen
        size = copy_size(image.size, shorter_side)
        if size == image.size:
            return path.read_bytes(), False, seen
        stream = io.BytesIO()
        small = image.resize(size, Image.Resampling[FILTER.upper()])
        small.save(stream, "JPEG", quality=QUALITY, subsampling=0)
        return stream.getvalue(), True, seen

    what = f"copies of {len(samples)} images with a shorter side of {shorter_side} pixels"
    sizes: list[int] = []
    resized = 0
    with out.open("wb") as stream:
        copies = track(in_order(copy, range(len(samples))), "copying images", len(samples))
        for at, (content, smaller, seen) in enumerate(copies):
            looks.put(at, seen, *perceptual_hashes([seen]))
            stream.write(content)
            sizes.append(len(content))
            resized += smaller
            if len(sizes) == min(FORECAST, len(samples)):
                check_room(sum(sizes) * len(samples) // len(sizes), what, out.parent)
    ends = np.cumsum(sizes, dtype=np.int64)
    facts = CopyFacts(shorter_side=shorter_side, filter=FILTER, quality=QUALITY, resized=resized, bytes=int(ends[-1]))
    return ends - sizes, np.asarray(sizes, np.int64), facts


def check_room(wanted_bytes: int, what: str, folder: Path) -> None:
    """Say what a disk is about to take, or refuse. Raises UserError."""
    free = shutil.disk_usage(folder).free
    if wanted_bytes > free:
        raise UserError(
            f"{what}: they take about {wanted_bytes / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB left: "
            "free some, take another folder, or data.store none"
        )
    note(f"{what}: about {wanted_bytes / 2**20:.1f} MiB of {free / 2**30:.1f} GiB free")


def fit_all(orders: Mapping[Path, Order[FittedConfig]], dataset: Dataset) -> dict[Path, Fitted]:
    """Seal what networks of each input are shown of the held-out images; every file is decoded once for all of them.

    Raises:
        UserError: an image that can't be read, or no room.
    """
    specs = [order.config.model_dump() for order in orders.values()]
    parts: dict[Part, Samples] = {part: dataset.samples(part) for part in HELD_OUT}
    with contextlib.ExitStack() as stack:
        drafts = {out: stack.enter_context(drafting(Fitted, order, out)) for out, order in orders.items()}
        images = sum(map(len, parts.values()))
        sizes = ", ".join(sorted({size_words(order.config.size) for order in orders.values()}))
        what = f"{images} held-out images as networks of {sizes} pixels see them"
        check_room(sum(math.prod(images_shape(images, spec)) for spec in specs), what, next(iter(orders)).parent)
        for part, samples in parts.items():

            def fitted(at: int, samples: Samples = samples) -> list[list[np.ndarray]]:
                image, mask = read(samples.path(at)), samples.mask(at)
                return [[fit(image, spec), *([] if mask is None else [fit_classes(mask, spec)])] for spec in specs]

            with contextlib.ExitStack() as files:
                streams: list[list[BinaryIO]] = []
                for spec, draft in zip(specs, drafts.values(), strict=True):
                    shape = images_shape(len(samples), spec)
                    wanted: dict[str, tuple[int, ...]] = {Fitted.file_name(part): shape}
                    if samples.masked:
                        wanted[Fitted.masks_name(part)] = shape[:3]
                    streams.append([files.enter_context((draft.path / name).open("wb")) for name in wanted])
                    for stream, each in zip(streams[-1], wanted.values(), strict=True):
                        write_header(stream, each)
                for found in track(in_order(fitted, range(len(samples))), f"fitting {part} images", len(samples)):
                    for stream, pixels in zip(itertools.chain(*streams), itertools.chain(*found), strict=True):
                        stream.write(pixels.tobytes())
        counts = {part: len(samples) for part, samples in parts.items()}
        for spec, draft in zip(specs, drafts.values(), strict=True):
            draft.facts = FittedFacts(size=spec["size"], images=counts)
    return {out: draft.artifact for out, draft in drafts.items()}
