"""The data report made: of what was listed, decoded and compared."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

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
        self._splits, self._classes = list(parts.values()), classes
        lengths = [len(split.names) for split in self._splits]
        self._ends = np.cumsum(lengths)
        self.sides = np.repeat([SIDES[part] for part in parts], lengths)
        self.labels = np.concatenate([split.labels for split in self._splits])
        self.digests = np.concatenate([split.digests for split in self._splits])

    def copies(self) -> tuple[Twice, int]:
        """As ``find_copies``."""
        return find_copies(self.digests, self.sides, self.labels)

    def look_alikes(self, hashes: np.ndarray) -> Twice:
        """As ``find_look_alikes``."""
        return find_look_alikes(hashes, self.digests, self.sides, self.labels)

    def in_two_parts(self, found: Twice) -> Twins:
        """Those that lie on two sides, in words."""
        return Twins(images=int(found.in_two_parts.sum()), pairs=self._named(found.pairs_in_two_parts))

    def under_two_labels(self, found: Twice) -> Twins:
        """Those that have two labels, in words."""
        return Twins(images=int(found.under_two_labels.sum()), pairs=self._named(found.pairs_under_two_labels))

    def _named(self, pairs: Sequence[tuple[int, int]]) -> tuple[Alike, ...]:
        named = []
        for first, second in pairs:
            (first_name, first_label), (second_name, second_label) = self._name(first), self._name(second)
            named.append(
                Alike(first=first_name, second=second_name, first_label=first_label, second_label=second_label)
            )
        return tuple(named)

    def _name(self, at: int) -> tuple[str, str]:
        part = int(np.searchsorted(self._ends, at, side="right"))
        split, inside = self._splits[part], at - (int(self._ends[part]) - len(self._splits[part].names))
        label = int(split.labels[inside])
        return file_name(split.names[inside]), "" if label == UNLABELED else printable(self._classes[label], 200)


def file_name(name: bytes) -> str:
    """The name of a file below its root as text that can be shown and kept."""
    return printable(os.fsdecode(name), 300)


def survey_of(
    config: DataConfig,
    together: Together,
    parts: Mapping[Part, Split],
    looks: Mapping[Part, Looks],
    others: Others,
    classes: Sequence[str],
    *,
    broken: Sequence[Broken],
    left_out: int,
    copies: tuple[Twice, int] | None,
    copied: Together,
    copies_left_out: int,
) -> Survey:
    """What the parts were found to be made of.

    Args:
        together: the images of ``parts``.
        copies: what ``copied`` found, before copies of held-out images were left out.
    """
    seen = np.concatenate([each.rows for each in looks.values()])
    alike = together.look_alikes(seen["hash"])
    hashed = int(np.count_nonzero(seen["hash"]))
    seen = seen[seen["state"] == FINE]
    formats = np.bincount(seen["format"], minlength=len(NAMES) + 1)
    by_count = np.argsort(-formats, kind="stable")
    shorter, longer = (choose(seen["width"], seen["height"]) for choose in (np.minimum, np.maximum))
    twice, repeated = copies if copies is not None else (None, 0)
    return Survey(
        check=config.check,
        seen=len(seen),
        by_class={
            part: tuple(np.bincount(split.labels, minlength=len(classes)).tolist())
            for part, split in parts.items()
            if part != "unlabeled"
        },
        formats={(*NAMES, "others")[at]: int(formats[at]) for at in by_count if formats[at]},
        shorter_side=_range(shorter),
        longer_side=_range(longer),
        not_read=tuple(
            NotRead(kind=kind, count=count, example=others.examples[kind]) for kind, count in others.counts.items()
        ),
        left_out=left_out,
        broken=tuple(broken),
        duplicates=config.duplicates,
        copies_left_out=copies_left_out,
        copies=Twins() if twice is None else copied.in_two_parts(twice),
        copies_of_two_labels=Twins() if twice is None else copied.under_two_labels(twice),
        repeated=repeated,
        hashed=hashed,
        look_alikes=together.in_two_parts(alike),
        look_alikes_of_two_labels=together.under_two_labels(alike),
    )


def _range(sides: np.ndarray) -> Range | None:
    if not len(sides):
        return None
    return Range(smallest=int(sides.min()), median=float(np.median(sides)), largest=int(sides.max()))
