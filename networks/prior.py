"""How good networks are elsewhere, as a first guess how good a student will be: stated as that, never as a result.

The table that is shipped, ``imagenet.csv``, says where it is from. Nothing here imports torch.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..core.errors import UserError
from ..core.sealed import printable

TASK = "classification"  # by which networks are known
TABLE = Path(__file__).with_name("imagenet.csv")
LARGEST_TABLE_BYTES, MOST_ROWS = 2**22, 100_000
# Errors grow as the side shrinks, to this power: that of MobileNetV2, trained at 224, 192, 160 and 128 pixels (errors
# of 28.2, 29.3, 31.2 and 34.7 %, by the README of TensorFlow's models).
SIDE_POWER = 0.35
USUAL_SIDE = 224  # pixels, at which weights are compared
# Weights that were trained on more than ImageNet's own images say less of a network than of those images.
MORE_IMAGES = re.compile(r"in2[12]k|in12k|jft|ssl|ssld|swsl|_ig|laion|openai|fcmae|seer|merged|yfcc|dino|mim")


class Prior(NamedTuple):
    """How good a network is elsewhere, in points, at so many pixels; ``size`` None: whatever its size."""

    points: float
    size: int | None

    def at(self, side: float) -> float:
        """Points at another side of the input, where the error is one of a hundred points."""
        if self.size is None or not 0 < self.points < 100:
            return self.points
        return 100 - (100 - self.points) * math.exp(SIDE_POWER * (math.log(self.size) - math.log(side)))


@cache
def imagenet() -> Mapping[str, Prior]:
    """By network, without the tag of its weights: the best of those trained on ImageNet's own images, else of all."""
    found: dict[str, tuple[bool, float, Prior]] = {}
    for name, prior in read(TABLE):
        model, _, tag = name.partition(".")
        rank = (MORE_IMAGES.search(tag) is None, prior.at(USUAL_SIDE))
        if model not in found or rank > found[model][:2]:
            found[model] = (*rank, prior)
    return {model: prior for model, (_, _, prior) in found.items()}


def of_file(path: Path) -> Mapping[str, Prior]:
    """The user's own table: a line each, ``model,points`` or ``model,points,size``, a header if it has one.

    Raises:
        UserError: no such file, or no such table.
    """
    found: dict[str, Prior] = {}
    for name, prior in read(path):
        model = without_tag(name)
        if model in found:
            raise UserError(f"prior: {path} names '{printable(model, 80)}' twice: wanted one line a network")
        found[model] = prior
    return found


def without_tag(name: str) -> str:
    """The name of a network of timm without that of its weights; of any other as it is."""
    return name if ":" in name or "/" in name else name.partition(".")[0]


def read(path: Path) -> list[tuple[str, Prior]]:
    """Rows of a table. Raises UserError."""
    wanted = "wanted lines such as resnet18,71.5"
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"prior: {path} is no file: {wanted}")
        if path.stat().st_size > LARGEST_TABLE_BYTES:
            raise UserError(f"prior: {path} is larger than {LARGEST_TABLE_BYTES} bytes: {wanted}")
        text = path.read_text(encoding="utf-8-sig")  # what spreadsheets write begins with a mark
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prior: cannot read {path} ({type(error).__name__}): {wanted}") from None
    found = []
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    try:
        rows = list(csv.reader(lines[:MOST_ROWS]))
    except csv.Error as error:
        raise UserError(f"prior: cannot read {path} ({error}): {wanted}") from None
    for number, row in enumerate(rows):
        cells = [cell.strip() for cell in row]
        if number == 0 and cells[:1] == ["model"]:
            continue
        try:
            if not 2 <= len(cells) <= 3 or not cells[0]:
                raise ValueError
            points, size = float(cells[1]), int(cells[2]) if len(cells) == 3 else None
            if not math.isfinite(points) or (size is not None and not 0 < size < 10_000):
                raise ValueError
        except ValueError:
            shown = printable(lines[number], 80)
            raise UserError(f"prior: {path} has '{shown}': wanted model,points or model,points,size") from None
        found.append((cells[0], Prior(points, size)))
    if not found:
        raise UserError(f"prior: {path} names no network: {wanted}")
    return found
