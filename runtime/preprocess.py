"""Decoding, resizing and cropping: the one definition that training-time evaluation, calibration, parity
and the device share.

Resize with Pillow's filter (antialiased, on uint8) until the image covers ``round(height / crop_fraction)`` by
``round(width / crop_fraction)``, is stretched to it, or fits into it (``resize``: cover, stretch, letterbox); then take
the centre, grey where there is no image. A mask goes the same way, by nearest neighbour. Normalisation is not here: it
is inside every exported graph.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

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


RESIZES = ("cover", "stretch", "letterbox")
GREY = 114  # of 255: what letterbox puts around an image, near the mean colour of photographs
MOST_PIXELS = 2**26  # of a whole image, resized; of what would have more (a thin one), only what is shown is made


class Placement(NamedTuple):
    """Where an image lies that an input is cut from, in pixels of the input."""

    width: int  # of the whole image, resized
    height: int
    left: int  # of the input within it; negative where the input begins before the image
    top: int


def placement(size: tuple[int, int], spec: Mapping[str, Any]) -> Placement:
    """Where an image of ``size`` (width, height) lies for an InputSpec as ``fit`` takes it."""
    height, width = sides(spec)
    whole = round(width / spec["crop_fraction"]), round(height / spec["crop_fraction"])
    resize = spec.get("resize", "cover")
    if resize == "stretch":
        target = whole
    else:
        scales = [wanted / found for wanted, found in zip(whole, size)]
        scale = max(scales) if resize == "cover" else min(scales)
        bound = max if resize == "cover" else min
        target = bound(whole[0], max(1, round(size[0] * scale))), bound(whole[1], max(1, round(size[1] * scale)))
    return Placement(*target, (target[0] - width) // 2, (target[1] - height) // 2)


def fit(image: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """An RGB image to uint8 [height, width, 3].

    Args:
        spec: an InputSpec as a mapping: size, crop_fraction, interpolation, and resize unless it is cover.
    """
    from PIL import Image

    (height, width), place = sides(spec), placement(image.size, spec)
    resampling = Image.Resampling[spec["interpolation"].upper()]
    if place.width * place.height > MOST_PIXELS and place.left >= 0 and place.top >= 0:
        across, down = image.width / place.width, image.height / place.height
        edges = (place.left * across, place.top * down, (place.left + width) * across, (place.top + height) * down)
        return np.asarray(image.resize((width, height), resampling, box=edges), dtype=np.uint8)
    if (place.width, place.height) != image.size:
        image = image.resize((place.width, place.height), resampling)
    if place.left < 0 or place.top < 0:
        shown = Image.new("RGB", (width, height), (GREY, GREY, GREY))
        shown.paste(image, (-place.left, -place.top))
        return np.asarray(shown, dtype=np.uint8)
    box = (place.left, place.top, place.left + width, place.top + height)
    return np.asarray(image.crop(box), dtype=np.uint8)


def fit_classes(classes: np.ndarray, spec: Mapping[str, Any]) -> np.ndarray:
    """The class of every pixel of an image [H, W] as ``fit`` shows it, [height, width] of the same integers.

    By nearest neighbour. Where there is no image, the largest of unsigned integers, -1 of others.
    """
    (height, width), place = sides(spec), placement((classes.shape[1], classes.shape[0]), spec)
    rows = nearest(classes.shape[0], place.height)
    columns = nearest(classes.shape[1], place.width)
    top, left = max(0, -place.top), max(0, -place.left)
    rows = rows[max(0, place.top) :][: height - top]
    columns = columns[max(0, place.left) :][: width - left]
    shown = np.full((height, width), -1).astype(classes.dtype)
    shown[top : top + len(rows), left : left + len(columns)] = classes[np.ix_(rows, columns)]
    return shown


def unfit_classes(classes: np.ndarray, spec: Mapping[str, Any], height: int, width: int) -> np.ndarray:
    """What the network says of its input [h, w], brought back to the image that the input was made of [height, width].

    By nearest neighbour: what is told of a pixel is what the network's answer is judged by. Where the network was shown
    nothing (what a crop left out) it is -1, and then int16; else the type is that of ``classes``.

    Args:
        spec: the InputSpec by which the image was fitted.
    """
    place = placement((width, height), spec)
    rows = (np.arange(height) + 0.5) * place.height / height - place.top
    columns = (np.arange(width) + 0.5) * place.width / width - place.left
    shown = [(at >= 0) & (at < side) for at, side in zip((rows, columns), classes.shape)]
    inside = [np.clip(at.astype(np.int64), 0, side - 1) for at, side in zip((rows, columns), classes.shape)]
    spread = classes[inside[0]].take(inside[1], axis=1)
    if all(each.all() for each in shown):
        return np.asarray(spread)
    return np.where(shown[0][:, None] & shown[1], spread, np.int16(-1)).astype(np.int16)


def nearest(found: int, wanted: int) -> np.ndarray:
    """Which of so many pixels in a row is nearest to the middle of each of so many others, int64 [wanted].

    As Pillow's filters lie: the outer edges of both rows are the same.
    """
    return (2 * np.arange(wanted) + 1) * found // (2 * wanted)
