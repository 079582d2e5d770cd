"""Decoding, resizing and cropping: the one definition that training-time evaluation, calibration, parity
and the device share.

Resize with Pillow's filter (antialiased, on uint8) until the image covers ``round(height / crop_fraction)`` by
``round(width / crop_fraction)``, then crop the centre. Normalisation is not here: it is inside every exported graph.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .layout import sides

if TYPE_CHECKING:
    from PIL import Image

DECODING = 2  # version of the rules of ``decode``: part of every data set's key
INT16_RANGE, INT32_RANGE = 65535.0, 2.0**31 - 1
HOLD_16_BITS = ("PNG", "PPM")  # formats whose integers of 16 bits Pillow may give as 32
# What Pillow decodes by itself, the usual ones first, what has no mark of its own last. Never what it hands to another
# program (EPS to Ghostscript). HEIF is Pillow's own where pillow-heif has told it so.
FORMATS = (
    "JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF", "HEIF", "JPEG2000", "QOI", "DDS", "PSD", "SGI", "ICO",
    "DIB", "PCX", "TGA",
)  # fmt: skip


def decode(source: Path | BinaryIO) -> Image.Image:
    """Read an image file as 8-bit RGB, the way up that its camera noted; of several frames the first.

    Turned as EXIF says; integers of 16 or 32 bits are scaled by the range of their type and floats from 0..1, so
    that an image does not depend on its own extremes; what is transparent lies over white; palettes, CMYK and
    other colour spaces are converted. Upright 8-bit RGB and grey pixels are what the file says.

    Raises:
        OSError: the file is missing, truncated, no image, or unpacks to more than Pillow allows.
    """
    with opened(source) as image:
        return as_rgb(image)


def available(formats: Iterable[str]) -> list[str]:
    """Those of ``formats`` that this Pillow knows."""
    from PIL import Image

    Image.init()
    return [name for name in formats if name in Image.OPEN]


@contextlib.contextmanager
def opened(source: Path | BinaryIO) -> Iterator[Image.Image]:
    """An image file of one of ``FORMATS``, not decoded yet; whatever is wrong with it then is an OSError too."""
    from PIL import Image

    try:
        with Image.open(source, formats=available(FORMATS)) as image:
            yield image
    except (OSError, MemoryError):
        raise
    except Exception as error:  # every format's reader raises its own for a broken file
        raise OSError(str(error) or type(error).__name__) from error


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image as ``decode`` has it; raises whatever its format's reader does."""
    from PIL import Image, ImageOps

    # What calls itself EXIF and is not moves nothing: the pixels are read all the same.
    with contextlib.suppress(SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, struct.error):
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _eight_bits(image)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey integers of 16 or 32 bits, or floats, as RGB of 8 bits."""
    from PIL import Image

    if image.mode == "F":
        largest = 1.0
    else:
        largest = INT32_RANGE if image.mode == "I" and image.format not in HOLD_16_BITS else INT16_RANGE
    values = np.nan_to_num(np.asarray(image).astype(np.float64) / largest, nan=0.0)
    return Image.fromarray(np.round(values.clip(0, 1) * 255).astype(np.uint8)).convert("RGB")


def fit(image: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """An RGB image to uint8 [height, width, 3].

    Args:
        spec: an InputSpec as a mapping: size, crop_fraction, interpolation.
    """
    from PIL import Image

    height, width = sides(spec)
    covered = round(width / spec["crop_fraction"]), round(height / spec["crop_fraction"])
    scale = max(covered[0] / image.width, covered[1] / image.height)
    target = max(covered[0], round(image.width * scale)), max(covered[1], round(image.height * scale))
    if target != image.size:
        image = image.resize(target, Image.Resampling[spec["interpolation"].upper()])
    left, top = (target[0] - width) // 2, (target[1] - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)), dtype=np.uint8)
