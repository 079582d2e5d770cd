"""Decoding, resizing and cropping: the one definition that training-time evaluation, calibration, parity
and the device share.

Resize the shorter side to ``round(size / crop_fraction)`` with Pillow's filter (antialiased, on uint8),
then crop the centre. Normalisation is not here: it is inside every exported graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image


def decode(path: Path) -> Image.Image:
    """Read an image file as RGB.

    Raises:
        OSError: the file is missing, truncated, no image, or unpacks to more than Pillow allows.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, MemoryError):
        raise
    except Exception as error:  # every format's reader raises its own for a broken file
        raise OSError(str(error)) from error


def fit(image: Image.Image, spec: Mapping[str, Any]) -> np.ndarray:
    """An RGB image to uint8 [size, size, 3].

    Args:
        spec: an InputSpec as a mapping: size, crop_fraction, interpolation.
    """
    from PIL import Image

    size = spec["size"]
    shorter = round(size / spec["crop_fraction"])
    width, height = image.size
    scale = shorter / min(width, height)
    target = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    if target != image.size:
        image = image.resize(target, Image.Resampling[spec["interpolation"].upper()])
    left, top = (target[0] - size) // 2, (target[1] - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)), dtype=np.uint8)


def load_images(paths: Iterable[Path], spec: Mapping[str, Any]) -> np.ndarray:
    """Image files to uint8 [N, size, size, 3]. Raises OSError naming the file that can't be read."""
    images = []
    for path in paths:
        try:
            images.append(fit(decode(path), spec))
        except OSError as error:
            raise OSError(f"cannot read image {path}: {error}") from error
    size = spec["size"]
    return np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)
