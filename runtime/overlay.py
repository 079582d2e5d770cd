"""Class maps as pictures: a colour for every class, laid over the image, and where two maps differ.

Needs numpy alone, because a device draws too.
"""

from __future__ import annotations

import colorsys
import itertools

import numpy as np

MOST_CLASSES = 256  # that a map of bytes can name
GROUND = (64, 64, 64)  # class 0: what most masks have for everything else
# Of what colours are taken from: nothing so dark or pale that its hue is lost.
HUES, LIGHTNESSES, SATURATIONS = 36, (0.38, 0.5, 0.62, 0.75), (0.9, 0.6)
SENSES = (2, 4, 3)  # about how much an eye makes of a step of red, green and blue
SAME = 232  # grey of what two maps agree about
LOST, WON, CHANGED = (200, 30, 30), (20, 130, 60), (230, 160, 20)


def colours(count: int) -> np.ndarray:
    """A colour for each of ``count`` classes, uint8 [count, 3] in RGB; no two alike, the same in every picture.

    Class 0, the ground of most masks, is a dark grey; a class keeps its colour however many others there are.

    Raises:
        ValueError: more classes than a map of bytes can name.
    """
    if not 0 <= count <= MOST_CLASSES:
        raise ValueError(f"wanted at most {MOST_CLASSES} classes to colour, found {count}")
    return PALETTE[:count].copy()


def _far_apart() -> np.ndarray:
    """Colours for all classes: each is the one, of those that are left, that is farthest from all before it."""
    kinds = itertools.product(range(HUES), LIGHTNESSES, SATURATIONS)
    shades = [colorsys.hls_to_rgb(hue / HUES, lightness, saturation) for hue, lightness, saturation in kinds]
    left = np.round(255 * np.array(shades))
    found = [np.array(GROUND, np.float64)]
    apart = np.full(len(left), np.inf)
    while len(found) < MOST_CLASSES:
        apart = np.minimum(apart, (np.square(left - found[-1]) * SENSES).sum(1))
        found.append(left[apart.argmax()])
    return np.array(found, np.uint8)


PALETTE = _far_apart()
_HALVES = PALETTE >> 1


def drawn(classes: np.ndarray) -> np.ndarray:
    """A class map, integers [H, W], as a picture uint8 [H, W, 3]; white where it says nothing (below 0)."""
    picture = PALETTE[classes.astype(np.uint8)]
    if classes.dtype.kind == "i":
        picture[classes < 0] = 255
    return np.asarray(picture)


def overlay(image: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3] with a class map [H, W] over it, half and half: uint8 [H, W, 3].

    Args:
        classes: integers; below 0 where nothing is said, which leaves the image as it is.

    Raises:
        ValueError: of another size than the image.
    """
    if image.shape != (*classes.shape, 3):
        raise ValueError(f"wanted an image and a map of one size, found {image.shape} and {classes.shape}")
    laid = np.asarray((image >> 1) + _HALVES[classes.astype(np.uint8)])  # at most 127 + 127: no byte runs over
    if classes.dtype.kind == "i" and (unsaid := classes < 0).any():
        laid[unsaid] = image[unsaid]
    return laid


def difference(first: np.ndarray, second: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Where two class maps [H, W] say something else, as a picture uint8 [H, W, 3]; light grey where they agree.

    Args:
        labels: what is right [H, W], below 0 where nobody knows. With them a pixel that the second lost is red,
            one that it won green, and one that both have wrong (or nobody knows) yellow; without, it has the
            second's colour.

    Raises:
        ValueError: of different sizes.
    """
    if first.shape != second.shape or (labels is not None and labels.shape != first.shape):
        raise ValueError(f"wanted maps of one size, found {first.shape} and {second.shape}")
    picture = np.full((*first.shape, 3), SAME, np.uint8)
    differ = first != second
    if labels is None:
        picture[differ] = drawn(second)[differ]
        return picture
    picture[differ] = CHANGED
    picture[differ & (first == labels)] = LOST
    picture[differ & (second == labels)] = WON
    return picture
