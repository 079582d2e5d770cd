"""Masks on the page: an image, its label and what is said of it side by side, where they differ, and the colours."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ..core.kinds import Measurement
from ..core.sealed import printable
from ..runtime.overlay import CHANGED, LOST, WON, colours, difference, drawn
from ..runtime.task import TASKS
from . import words
from .compression import Packed, Sources

Numbers = dict[str, Any]
SMALLEST, LARGEST = 120, 320  # pixels of the longer side of a tile: pixels of small inputs are drawn larger
CHANGES = {"right before": LOST, "right after": WON, "both wrong": CHANGED}  # in a difference to float32


class Tile(NamedTuple):
    """One picture of a row of them, as a data URI."""

    caption: str
    uri: str


class Strip(NamedTuple):
    """Pictures of one image side by side, and what is to be said of them."""

    heading: str
    text: str
    tiles: Sequence[Tile]


@dataclass(frozen=True)
class Masks:
    """The pictures of a report whose answers are masks; nothing in that of another task.

    ``flips`` and ``mistakes`` are those of the numbers, in their order. ``legend`` and ``changes`` have a colour, as
    CSS writes it, for each class, and for each way in which a pixel changes.
    """

    flips: Sequence[Strip] = ()
    mistakes: Sequence[Strip] = ()
    legend: dict[str, str] = field(default_factory=dict)
    changes: dict[str, str] = field(default_factory=dict)


def masks(numbers: Numbers, measurement: Measurement, bundles: Mapping[str, Packed], sources: Sources) -> Masks:
    """Draw what ``numbers`` tell of single test images.

    Raises:
        UserError: an image that can't be read.
    """
    task = TASKS[measurement.facts.task]
    if not task.dense or sources.dataset is None:
        return Masks()
    samples, labels = sources.dataset.samples("test"), measurement.labels

    def said(bundle: str, at: int) -> np.ndarray:
        height, width = labels.shape[1:]
        return np.asarray(task.decide_at(measurement.outputs(bundle)[at : at + 1], (height, width))[0])

    def shown(bundle: str, at: int) -> list[Tile]:
        pixels = samples[at].fitted(bundles[bundle].facts.input.model_dump())
        return [Tile("image", photo(pixels)), Tile("label", _map(drawn(labels[at])))]

    def flip(row: Numbers) -> Strip:
        at, bundle, float32 = row["position"], row["bundle"], row["against"]
        before, after = said(float32, at), said(bundle, at)
        tiles = [
            *shown(bundle, at),
            Tile(float32, _map(drawn(before))),
            Tile(bundle, _map(drawn(after))),
            Tile("what changed", _map(difference(before, after, labels[at]))),
        ]
        changed = f"{words.percent(row['changed'], 1)} % of its pixels changed"
        text = f"{changed}. Label: {row['label']}. {float32}: {row['float32']}. {bundle}: {row['variant']}."
        return Strip(row["image"], text, tiles)

    def mistake(bundle: str, row: Numbers) -> Strip:
        at, answer = row["position"], said(bundle, row["position"])
        known = np.where(labels[at] < 0, answer, labels[at])  # nobody is wrong where nobody knows
        tiles = [
            *shown(bundle, at),
            Tile("answer", _map(drawn(answer))),
            Tile("what is wrong", _map(difference(known, answer))),
        ]
        own = f"{task.metric} of this image alone {words.percent(row['score'], 1)} {task.unit}"
        return Strip(row["image"], f"{own}. Label: {row['label']}. Answer: {row['said']}.", tiles)

    answers = numbers["answers"]
    names = [printable(name) for name in sources.dataset.classes]
    return Masks(
        flips=[flip(row) for row in numbers["flips"]],
        mistakes=[mistake(answers["bundle"], row) for row in answers["mistakes"]] if answers else (),
        legend={name: _css(colour) for name, colour in zip(names, colours(len(names)), strict=True)},
        changes={name: _css(colour) for name, colour in CHANGES.items()},
    )


def _css(colour: Sequence[int] | np.ndarray) -> str:
    return "#" + "".join(f"{int(part):02x}" for part in colour)


def photo(picture: np.ndarray) -> str:
    return _uri(picture, "JPEG", {"quality": 85})


def _map(picture: np.ndarray) -> str:
    return _uri(picture, "PNG", {"optimize": True})


def _uri(picture: np.ndarray, kind: str, how: dict[str, Any]) -> str:
    """A picture uint8 [H, W, 3] as a data URI, small enough for a page and large enough for an eye."""
    from PIL import Image

    image, longer = Image.fromarray(picture), max(picture.shape[:2])
    if longer < SMALLEST or longer > LARGEST:
        factor = -(-SMALLEST // longer) if longer < SMALLEST else LARGEST / longer
        size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
        smooth = kind == "JPEG" and longer > LARGEST
        image = image.resize(size, Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, kind, **how)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(stream.getvalue()).decode()
