"""The contact sheet: a few images of each class on one picture."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..core.sealed import printable
from ..runtime.overlay import overlay
from .copies import shrunk
from .dataset import Samples
from .masks import IGNORED, resized
from .splits import stratified_order

if TYPE_CHECKING:
    from PIL import Image

MOST_CLASSES, EACH, COLUMNS = 24, 6, 2
SIDE, MARGIN, LINE = 72, 6, 16  # pixels
GROUND, INK = (246, 247, 249), (28, 33, 39)


def write_sheet(samples: Samples, classes: Sequence[str], seed: int, path: Path) -> None:
    """A JPEG with a strip for each class, its name above, as far as there is room: of more classes, some even spread.

    Beside an image with a mask lies the same one under it. What cannot be read is left out.
    """
    from PIL import Image, ImageDraw

    orders = {int(samples.labels[order[0]]): order for order in stratified_order(samples.labels, seed)}
    there = sorted(orders)
    shown = [there[at] for at in np.unique(np.linspace(0, len(there) - 1, min(MOST_CLASSES, len(there))).astype(int))]
    width, height = EACH * (SIDE + MARGIN) + MARGIN, LINE + SIDE + 2 * MARGIN
    sheet = Image.new("RGB", (COLUMNS * width, -(-len(shown) // COLUMNS) * height), GROUND)
    draw = ImageDraw.Draw(sheet)
    for strip, label in enumerate(shown):
        left, top = strip % COLUMNS * width + MARGIN, strip // COLUMNS * height
        # Pillow's own font has no other letters.
        title = printable(f"{classes[label]} ({len(orders[label])})", 70).encode("latin-1", "replace").decode("latin-1")
        draw.text((left, top + MARGIN // 2), title, fill=INK)
        pictures = (picture for at in orders[label] for picture in _pictures(samples, int(at)))
        for turn, picture in enumerate(itertools.islice(pictures, EACH)):
            if picture is not None:
                larger = SIDE // max(picture.size)  # a tiny one is shown pixel by pixel
                picture = picture.resize((larger * picture.width, larger * picture.height), Image.Resampling.NEAREST)
                middle = (SIDE - picture.width) // 2, (SIDE - picture.height) // 2
                sheet.paste(picture, (left + turn * (SIDE + MARGIN) + middle[0], top + LINE + MARGIN + middle[1]))
    sheet.save(path, "JPEG", quality=80)


def _pictures(samples: Samples, at: int) -> Iterator[Image.Image | None]:
    """A small picture of one image, and of one with a mask another under it; None for what cannot be read."""
    from PIL import Image

    picture, mask = shrunk(samples.path(at), SIDE), samples.mask(at)
    yield picture
    if mask is not None and picture is not None:
        shown = resized(mask, picture.size)
        yield Image.fromarray(overlay(np.asarray(picture), np.where(shown == IGNORED, -1, shown.astype(np.int16))))
