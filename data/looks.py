"""What is seen of every image while it is decoded: its format, its size, what it looks like, or why it is broken."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from ..core.proc import first_line, in_order
from ..core.progress import progress
from ..runtime.preprocess import FORMATS, as_rgb
from .dataset import Part, Samples
from .formats import opened

if TYPE_CHECKING:
    from PIL import Image

UNSEEN, FINE, BROKEN = range(3)
ROW = np.dtype([("state", "u1"), ("format", "u1"), ("width", "<i4"), ("height", "<i4"), ("hash", "<u8")])
NAMES = (*FORMATS, "MPO")  # a JPEG of several pictures calls itself so
SAMPLED = 1000  # images of a part that ``check: sample`` decodes
CHUNK = 64  # images that a thread decodes at once
HASHED_SIDE = 32  # pixels: a perceptual hash is made of so many squared, and says nothing of an image that has fewer
# Half of the 64 bits are above the median, unless many are equal to it: then nothing is to be seen on the picture.
FEWEST_BITS = 24


class Look(NamedTuple):
    """What was seen of one image; ``fault`` is empty for one that can be read."""

    format: str = ""
    width: int = 0  # pixels, as they lie in the file
    height: int = 0
    small: np.ndarray | None = None  # grey uint8 [32, 32], of which hashes are made; None for a smaller image
    fault: str = ""


class Looks:
    """What was seen of the images of one part: a few bytes an image."""

    def __init__(self, images: int) -> None:
        self.rows = np.zeros(images, ROW)
        self.faults: dict[int, str] = {}  # by position

    def put(self, at: int, seen: Look, perceptual_hash: int) -> None:
        """Keep what was seen of one image."""
        if seen.fault:
            self.rows["state"][at] = BROKEN
            self.faults[at] = seen.fault
        else:
            known = NAMES.index(seen.format) if seen.format in NAMES else len(NAMES)
            self.rows[at] = (FINE, known, seen.width, seen.height, perceptual_hash)

    @property
    def whole(self) -> np.ndarray:
        """Which images are not known to be broken, bool [N]."""
        whole: np.ndarray = self.rows["state"] != BROKEN
        return whole


def look(path: Path, quick: bool = False) -> tuple[Image.Image | None, Look]:
    """Decode an image of the user's, and say what is seen; None where it cannot be read.

    Args:
        quick: a JPEG is decoded whole, but to as few pixels as a look takes.

    Raises:
        UserError: an image of a format that wants a package which is not installed.
    """
    try:
        with opened(path) as image:
            kind, size = image.format or "", image.size
            if quick and kind in ("JPEG", "MPO"):
                image.draft(None, (2 * HASHED_SIDE, 2 * HASHED_SIDE))
            pixels = as_rgb(image)
        return pixels, Look(kind, *size, _small(pixels))
    except (OSError, MemoryError) as error:
        return None, Look(fault=reason(error))


def reason(error: OSError | MemoryError) -> str:
    """Why an image cannot be read, in a few words."""
    from PIL import UnidentifiedImageError

    if isinstance(error, MemoryError):
        return "too large for this machine's memory"
    if isinstance(error, UnidentifiedImageError):
        return "no image of a format that is read"
    return error.strerror if isinstance(error, OSError) and error.strerror else first_line(error)


def _small(image: Image.Image) -> np.ndarray | None:
    """An image as its hash takes it, grey uint8 [32, 32]; None for one that has fewer pixels on a side."""
    from PIL import Image

    shorter = min(image.size)
    if shorter < HASHED_SIDE:
        return None
    factor = shorter // (2 * HASHED_SIDE)
    grey = (image.reduce(factor) if factor > 1 else image).convert("L")
    return np.asarray(grey.resize((HASHED_SIDE, HASHED_SIDE), Image.Resampling.LANCZOS))


def perceptual_hashes(looks: Sequence[Look]) -> list[int]:
    """64 bits for each, nearly the same for images that look alike; 0 for one that is too small or too flat to tell.

    The lowest frequencies of a cosine transform, above or below their median: ``phash`` of imagehash, of many images
    at once (Zauner, Implementation and Benchmarking of Perceptual Image Hash Functions, 2010).
    """
    from scipy.fft import dctn

    hashes = [0] * len(looks)
    known = [at for at, seen in enumerate(looks) if seen.small is not None]
    if known:
        small = np.stack([seen.small for seen in looks if seen.small is not None]).astype(float)
        lowest = dctn(small, axes=(1, 2))[:, :8, :8].reshape(len(known), 64)
        above = lowest > np.median(lowest, axis=1, keepdims=True)
        packed = np.packbits(above, axis=1).view(">u8").ravel()
        for at, bits, tells in zip(known, packed.tolist(), above.sum(axis=1) >= FEWEST_BITS, strict=True):
            hashes[at] = bits if tells else 0
    return hashes


def examine(
    parts: Mapping[Part, Samples],
    looks: Mapping[Part, Looks],
    check: Literal["all", "sample"],
    seed: int,
    quick: Collection[Part],
) -> None:
    """Decode the images of some parts, all or some of them, into ``looks``; all cores decode.

    Args:
        quick: parts that are decoded again later.

    Raises:
        UserError: as ``look`` does.
    """
    chosen: dict[Part, np.ndarray] = {}
    for part, samples in parts.items():
        chosen[part] = np.arange(len(samples))
        if check == "sample":
            chosen[part] = np.random.default_rng(seed).permutation(len(samples))[:SAMPLED]

    def seen(chunk: tuple[Part, np.ndarray]) -> tuple[Part, np.ndarray, list[Look], list[int]]:
        part, positions = chunk
        found = [look(parts[part].path(at), part in quick)[1] for at in positions]
        return part, positions, found, perceptual_hashes(found)

    chunks = (
        (part, positions[at : at + CHUNK])
        for part, positions in chosen.items()
        for at in range(0, len(positions), CHUNK)
    )
    with progress("checking images", sum(map(len, chosen.values()))) as advance:
        for part, positions, found, hashes in in_order(seen, chunks):
            for at, each, bits in zip(positions.tolist(), found, hashes, strict=True):
                looks[part].put(at, each, bits)
            advance(len(positions), "")
