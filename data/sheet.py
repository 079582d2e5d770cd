"""The contact sheet: a few images of each class on one picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.sealed import printable
from .copies import shrunk
from .dataset import Samples
from .splits import stratified_order

MOST_CLASSES, EACH, COLUMNS = 24, 6, 2
SIDE, MARGIN, LINE = 72, 6, 16  # pixels
GROUND, INK = (246, 247, 249), (28, 33, 39)


def write_sheet(samples: Samples, classes: Sequence[str], seed: int, path: Path) -> None:
    """A JPEG with a strip for each class, its name above, as far as there is room: of more classes, some even spread.

    What cannot be read is left out.
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
        for turn, at in enumerate(orders[label][:EACH]):
            picture = shrunk(samples.path(int(at)), SIDE)
            if picture is not None:
                larger = SIDE // max(picture.size)  # a tiny one is shown pixel by pixel
                picture = picture.resize((larger * picture.width, larger * picture.height), Image.Resampling.NEAREST)
                middle = (SIDE - picture.width) // 2, (SIDE - picture.height) // 2
                sheet.paste(picture, (left + turn * (SIDE + MARGIN) + middle[0], top + LINE + MARGIN + middle[1]))
    sheet.save(path, "JPEG", quality=80)
