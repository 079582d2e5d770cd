"""The demo of masks: handwritten digits pasted on noise, a digit a class and the ground another.

What is random comes from SHAKE-128 (FIPS 202), and only integers are reckoned with: the same pictures on every machine,
with every version of numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.config import DataPlan
from ..core.proc import in_order
from ..core.progress import track
from .masks import SPOOL, encode, row_of, split_of, with_rarest
from .sources import Split

CLASSES = ("ground", *map(str, range(10)))
HEIGHT, WIDTH = 64, 96  # pixels
# Images of each part; the digits of one part are in no other.
IMAGES = {"train": 800, "val": 160, "test": 400}
DIGITS_OF = {"train": range(6), "val": range(6, 7), "test": range(7, 10)}  # by the last figure of their place
DIGITS = range(2, 5)  # pasted on an image
SIDES = range(24, 41)  # pixels, of a digit
FIGURE = 112  # of 255: so much ink makes a pixel one of the digit
BLOCKS = (5, 7)  # of the ground's colours, down and across
GRAIN = 24  # of 255 levels, at most, on every pixel and colour


def pasted(out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
    """Write the images of all parts and their masks below ``out``; with ``most_images`` so many of each part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    inks = np.round(digits.images * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
    splits: dict[str, Split] = {}
    with (out / SPOOL).open("wb") as spool:
        for part, count in IMAGES.items():
            taken = np.flatnonzero(np.isin(np.arange(len(inks)) % 10, DIGITS_OF[part]))
            count = min(count, config.most_images or count)
            draw = partial(_picture, out, part, config.seed, inks[taken], digits.target[taken])
            names, rows = [], []
            for name, mask, content in track(in_order(draw, range(count)), f"drawing {part}", count):
                names.append(name)
                rows.append(row_of(mask, content, spool, len(CLASSES)))
            splits[config.train_split if part == "train" else part] = split_of(names, rows, len(CLASSES))
    return list(CLASSES), with_rarest(splits, config.train_split)


def _picture(
    out: Path, part: str, seed: int, inks: np.ndarray, labels: np.ndarray, number: int
) -> tuple[bytes, np.ndarray, bytes]:
    """Write one image; its name, its mask uint8 [H, W] and that as it is kept."""
    from PIL import Image

    pixels, mask = _drawn(f"{seed} {part} {number}", inks, labels)
    name = f"images/{part}/{number:04d}.png"
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return name.encode(), mask, encode(mask)


class _Draws:
    """Random integers, the same from the same words."""

    def __init__(self, words: str) -> None:
        self._words = words
        self._bytes = iter(hashlib.shake_128(words.encode()).digest(256))

    def of(self, count: int) -> int:
        """One of 0 to ``count`` - 1, nearly even."""
        return (next(self._bytes) << 8 | next(self._bytes)) * count >> 16

    def grain(self, shape: tuple[int, ...]) -> np.ndarray:
        """Bytes of this shape, uint8."""
        content = hashlib.shake_128(f"{self._words} grain".encode()).digest(int(np.prod(shape)))
        return np.frombuffer(content, np.uint8).reshape(shape)


class _Digit(NamedTuple):
    ink: np.ndarray  # uint8 [side, side]
    label: int
    top: int
    left: int
    colour: np.ndarray  # int32 [3]


def _drawn(words: str, inks: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An image uint8 [H, W, 3] and its mask uint8 [H, W]."""
    from PIL import Image

    draws = _Draws(words)
    blocks = draws.grain((*BLOCKS, 3)) // 2  # ink is lighter
    ground = Image.fromarray(np.ascontiguousarray(blocks)).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    pixels = np.asarray(ground, np.int32)
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for digit in _digits(draws, inks, labels):
        side = len(digit.ink)
        place = slice(digit.top, digit.top + side), slice(digit.left, digit.left + side)
        ink = digit.ink.astype(np.int32)[..., None]
        pixels = pixels.copy()
        pixels[place] = (pixels[place] * (255 - ink) + digit.colour * ink) // 255
        mask[place] = np.where(digit.ink >= FIGURE, np.uint8(digit.label + 1), mask[place])
    noise = _Draws(f"{words} noise").grain((HEIGHT, WIDTH, 3)).astype(np.int32) * (2 * GRAIN + 1) // 256 - GRAIN
    return (pixels + noise).clip(0, 255).astype(np.uint8), mask


def _digits(draws: _Draws, inks: np.ndarray, labels: np.ndarray) -> Iterator[_Digit]:
    from PIL import Image

    count = DIGITS.start + draws.of(len(DIGITS))
    for at in range(count):
        which = draws.of(len(inks))
        side = SIDES.start + draws.of(len(SIDES))
        ink = np.asarray(Image.fromarray(inks[which]).resize((side, side), Image.Resampling.BICUBIC))
        # Side by side, each in a column of its own that it may leave a little: one may lie over another's edge.
        column = WIDTH * at // count
        left = min(max(0, column + draws.of(WIDTH // count) - side // 3), WIDTH - side)
        colour = np.array([draws.of(96) + 160 for _ in range(3)], np.int32)
        yield _Digit(ink, int(labels[which]), draws.of(HEIGHT - side + 1), left, colour)
