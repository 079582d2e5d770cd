"""Faults that a device's camera adds to an image, made from the user's own held-out images: seeded, one severity each.

A fault happens between the scene and the network, so it is put into the decoded image, before that is resized and
cropped for a network: networks of every input, float32 or INT8, are shown the same faulty photograph. It is first
brought to the size of a small camera's picture, since what spoils a few pixels of a large photograph is gone once that
is made small for a network.

Only integers are added and looked up, and what is random comes from SHAKE-128 (FIPS 202) over the image's own digest:
the same image gets the same fault on every machine, with every version of numpy, wherever it stands among the others.
Pillow makes the JPEG and the blur.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from ..core.config import Corruption

if TYPE_CHECKING:
    from PIL import Image

CORRUPTING = 1  # version of the rules here: part of the key of every session that uses them

SHORTER_SIDE, LONGER_SIDE = 480, 1920  # pixels that a camera's picture has at most
JPEG_QUALITY = 10
BLUR_SHARE = 0.015  # standard deviation of the blur, of the shorter side
NOISE_LEVELS = 24  # standard deviation, of 255
DARK_STOPS = 3  # an eighth of the light
DARK_NOISE_LEVELS = 4

# By name what a person reads of it.
SEVERITIES: dict[Corruption, str] = {
    "jpeg": f"written and read again as JPEG of quality {JPEG_QUALITY}, colours at half the resolution",
    "blur": f"out of focus by a Gaussian of {100 * BLUR_SHARE:g} % of the shorter side",
    "noise": f"grain of {NOISE_LEVELS} of 255 levels on every pixel and colour",
    "dark": f"{1 / 2**DARK_STOPS:g} of the light ({DARK_STOPS} stops), with grain of {DARK_NOISE_LEVELS} levels",
}


def corrupt(image: Image.Image, corruption: Corruption, digest: bytes) -> Image.Image:
    """An RGB image as a camera with this fault gives it, at most 480 pixels on its shorter side and 1920 on its longer.

    Args:
        digest: of the image's file: what is random is drawn from it.
    """
    return FAULTS[corruption](_camera(image), digest)


def _camera(image: Image.Image) -> Image.Image:
    """The image at the size of a camera's picture; one that is no larger as it is."""
    from PIL import Image

    scale = min(1.0, SHORTER_SIDE / min(image.size), LONGER_SIDE / max(image.size))
    if scale == 1.0:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _jpeg(image: Image.Image) -> Image.Image:
    from PIL import Image

    written = io.BytesIO()
    image.save(written, "JPEG", quality=JPEG_QUALITY, subsampling="4:2:0")
    with Image.open(written, formats=["JPEG"]) as read:
        return read.convert("RGB")


def _blur(image: Image.Image) -> Image.Image:
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(BLUR_SHARE * min(image.size)))


def _noise(image: Image.Image, digest: bytes) -> Image.Image:
    from PIL import Image

    pixels = np.asarray(image, np.int32) + _grain(image, NOISE_LEVELS, b"noise" + digest)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _dark(image: Image.Image, digest: bytes) -> Image.Image:
    from PIL import Image

    darker = _darker()[np.asarray(image)]
    pixels = darker + _grain(image, DARK_NOISE_LEVELS, b"dark" + digest)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


FAULTS: dict[Corruption, Callable[[Image.Image, bytes], Image.Image]] = {
    "jpeg": lambda image, _: _jpeg(image),
    "blur": lambda image, _: _blur(image),
    "noise": _noise,
    "dark": _dark,
}


def _grain(image: Image.Image, levels: int, seed: bytes) -> np.ndarray:
    """Noise of that standard deviation, int32 [height, width, 3]: the sum of four bytes is as good as a Gaussian."""
    shape = (4, image.height, image.width, 3)
    random = hashlib.shake_128(seed).digest(int(np.prod(shape)))
    sums = np.frombuffer(random, np.uint8).reshape(shape).sum(0, dtype=np.int32) - 2 * 255
    # The sum's variance is four times that of a byte, (256**2 - 1) / 12; in fixed point, rounded.
    factor = round(levels * 2**16 / (4 * (256**2 - 1) / 12) ** 0.5)
    return np.asarray((sums * factor + 2**15) >> 16)


@cache
def _darker() -> np.ndarray:
    """What becomes of each of the 256 levels of sRGB with less light, int32 [256]."""
    linear = [level / 255 / 12.92 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4 for level in range(256)]
    dark = [light / 2**DARK_STOPS for light in linear]
    encoded = [12.92 * light if light <= 0.0031308 else 1.055 * light ** (1 / 2.4) - 0.055 for light in dark]
    return np.array([round(255 * value) for value in encoded], np.int32)
