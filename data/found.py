"""The data report made: of what was listed, decoded and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..core.config import DataConfig
from ..core.sealed import printable
from .dataset import UNLABELED, Part
from .leaks import SIDES, Twice, find_copies, find_look_alikes
from .listing import Others
from .looks import FINE, NAMES, Looks
from .sources import Split
from .survey import Alike, Broken, NotRead, Range, Survey, Twins


class Together:
    """The images of all parts, one behind the other."""

    def __init__(self, parts: Mapping[Part, Split], classes: Sequence[str]) -> None:
        self._parts, self._classes = dict(parts), classes  # as they are now
        lengths = [len(split.names) for split in parts.values()]
        self._ends = np.cumsum(lengths)
        self.sides = np.repeat(np.array([SIDES[part] for part in parts], int), lengths)
        self.labels = np.concatenate([np.zeros(0, np.int64), *map(_answers, parts.values())])
        # Two pictures of one scene look alike, and their masks differ all the same.
        self._comparable = all(split.masks is None for split in parts.values())
        self.digests = np.concatenate([np.zeros(0, np.uint64), *(split.digests for split in parts.values())])

    def copies(self) -> tuple[Twice, int]:
        """As ``find_copies``."""
        return find_copies(self.digests, self.sides, self.labels)

    def look_alikes(self, hashes: np.ndarray) -> Twice:
        """As ``find_look_alikes``."""
        labels = self.labels if self._comparable else np.full(len(self.labels), UNLABELED)
        return find_look_alikes(hashes, self.digests, self.sides, labels)

    def in_two_parts(self, found: Twice) -> Twins:
        """Those that lie on two sides, in words."""
        return Twins(images=int(found.in_two_parts.sum()), pairs=self._named(found.pairs_in_two_parts))

    def under_two_labels(self, found: Twice) -> Twins:
        """Those that have two labels, in words."""
        return Twins(images=int(found.under_two_labels.sum()), pairs=self._named(found.pairs_under_two_labels))

    def _named(self, pairs: Sequence[tuple[int, int]]) -> tuple[Alike, ...]:
        named = []
        for pair in pairs:
            (first, second), (first_part, second_part), (first_label, second_label) = zip(
                *map(self._told, pair), strict=True
            )
            named.append(
                Alike(
                    first=first,
                    second=second,
                    first_part=first_part,
                    second_part=second_part,
                    first_label=first_label,
                    second_label=second_label,
                )
            )
        return tuple(named)

    def _told(self, at: int) -> tuple[str, str, str]:
        """File, part and label of one image."""
        number = int(np.searchsorted(self._ends, at, side="right"))
        part, split = list(self._parts.items())[number]
        inside = at - (int(self._ends[number]) - len(split.names))
        label = int(split.labels[inside])
        return file_name(split.names[inside]), part, "" if label == UNLABELED else printable(self._classes[label], 200)


def _answers(split: Split) -> np.ndarray:
    """A number for each image, equal where what is right of two is the same, int64 [N]."""
    return np.asarray(split.labels if split.masks is None else split.masks["digest"], np.int64)


class Leaks(NamedTuple):
    """The images of all parts before copies of held-out ones were left out, and how many were; None: none is twice."""

    images: Together | None
    left_out: int


class Unreadable(NamedTuple):
    """The first of the images that cannot be read, and how many there are."""

    first: list[Broken]
    images: int


def file_name(name: bytes) -> str:
    """The name of a file below its root as text that can be shown and kept."""
    return printable(os.fsdecode(name), 300)


def survey_of(
    config: DataConfig,
    parts: Mapping[Part, Split],
    classes: Sequence[str],
    looks: Mapping[Part, Looks],
    others: Others,
    broken: Unreadable,
    leaks: Leaks,
) -> Survey:
    """What the parts were found to be made of."""
    together = Together(parts, classes)
    seen = np.concatenate([each.rows for each in looks.values()])
    alike = together.look_alikes(seen["hash"])
    hashed = int(np.count_nonzero(seen["hash"]))
    seen = seen[seen["state"] == FINE]
    formats = np.bincount(seen["format"], minlength=len(NAMES) + 1)
    by_count = np.argsort(-formats, kind="stable")
    before = leaks.images or Together({}, classes)
    twice, repeated = before.copies()
    return Survey(
        check=config.check,
        seen=len(seen),
        by_class={
            part: tuple(split.images_by_class(len(classes)).tolist())
            for part, split in parts.items()
            if part != "unlabeled"
        },
        **_of_masks(parts),
        formats={(*NAMES, "others")[at]: int(formats[at]) for at in by_count if formats[at]},
        shorter_side=_range(np.minimum(seen["width"], seen["height"])),
        longer_side=_range(np.maximum(seen["width"], seen["height"])),
        not_read=tuple(
            NotRead(kind=kind, count=count, example=others.examples[kind]) for kind, count in others.counts.items()
        ),
        left_out=broken.images,
        broken=tuple(broken.first),
        duplicates=config.duplicates,
        copies_left_out=leaks.left_out,
        copies=before.in_two_parts(twice),
        copies_of_two_labels=before.under_two_labels(twice),
        repeated=repeated,
        hashed=hashed,
        look_alikes=together.in_two_parts(alike),
        look_alikes_of_two_labels=together.under_two_labels(alike),
    )


def _of_masks(parts: Mapping[Part, Split]) -> dict[str, Any]:
    """What a survey says of masks beside images; nothing where there are none."""
    masks = parts["train"].masks
    if masks is None:
        return {}
    pixels, area = masks["pixels"].sum(0, dtype=np.int64), int(masks["area"].sum(dtype=np.int64))
    judged = int(pixels.sum())
    return {
        "images": {part: len(split.names) for part, split in parts.items() if part != "unlabeled"},
        "pixel_shares": tuple((pixels / max(1, judged)).tolist()),
        "unjudged": 1 - judged / max(1, area),
    }


def _range(sides: np.ndarray) -> Range | None:
    if not len(sides):
        return None
    return Range(smallest=int(sides.min()), median=float(np.median(sides)), largest=int(sides.max()))
