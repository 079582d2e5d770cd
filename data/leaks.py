"""The same image twice: in what is learned from and what is held out, or under two labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from .dataset import UNLABELED, Part

# What is learned from is one side: an image twice in it teaches twice and tells nothing wrong.
SIDES: Mapping[Part, int] = {"train": 0, "unlabeled": 0, "val": 1, "test": 2}
MOST_PAIRS = 20  # that are named
SIMILAR_BITS = 3  # of 64 that may differ
# Two hashes of which so few bits differ have one of four quarters in common: sorted by it they are near each other. So
# many neighbours are compared, whatever the images: some pairs may be missed where very many look alike.
QUARTERS, NEIGHBOURS = 4, 16
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)  # set in each byte


@dataclass
class Twice:
    """Pairs of images that are the same, or look it.

    Args:
        sides: int [N], as ``SIDES`` has them.
        labels: int [N].
    """

    sides: np.ndarray
    labels: np.ndarray
    in_two_parts: np.ndarray = field(init=False)  # bool [N]: those of the later side
    under_two_labels: np.ndarray = field(init=False)  # bool [N]: both of a pair
    pairs_in_two_parts: list[tuple[int, int]] = field(default_factory=list)  # some of them
    pairs_under_two_labels: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.in_two_parts = np.zeros(len(self.sides), bool)
        self.under_two_labels = np.zeros(len(self.sides), bool)

    def add(self, first: np.ndarray, second: np.ndarray) -> None:
        """Positions [M] of two images each; in any order."""
        turned = self.sides[first] > self.sides[second]
        first, second = np.where(turned, second, first), np.where(turned, first, second)
        apart = self.sides[first] < self.sides[second]
        one, other = self.labels[first], self.labels[second]
        differ = (one != other) & (one != UNLABELED) & (other != UNLABELED)
        self.in_two_parts[second[apart]] = True
        self.under_two_labels[first[differ]] = self.under_two_labels[second[differ]] = True
        for chosen, pairs in ((apart, self.pairs_in_two_parts), (differ, self.pairs_under_two_labels)):
            for at in np.flatnonzero(chosen)[: 0 if len(pairs) >= MOST_PAIRS else MOST_PAIRS]:
                pair = (int(first[at]), int(second[at]))
                if pair not in pairs:
                    pairs.append(pair)


def find_copies(digests: np.ndarray, sides: np.ndarray, labels: np.ndarray) -> tuple[Twice, int]:
    """Images of the same contents, and how many lie twice in one part under one label; ``digests`` of 0 are unknown."""
    found = Twice(sides, labels)
    order = np.lexsort((labels == UNLABELED, sides, digests))
    ordered = digests[order]
    begins = np.ones(len(order), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    first_of_group = order[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))] if len(order) else order
    again = ~begins & (ordered != 0)
    first, second = first_of_group[again], order[again]
    found.add(first, second)
    return found, int(((sides[first] == sides[second]) & (labels[first] == labels[second])).sum())


def find_look_alikes(hashes: np.ndarray, digests: np.ndarray, sides: np.ndarray, labels: np.ndarray) -> Twice:
    """Images that look alike and are no copies, by perceptual hashes uint64 [N], of which 0 is none.

    Time and memory grow with the number of images, not with how many look alike.
    """
    found = Twice(sides, labels)
    known = np.flatnonzero(hashes)
    quarters = np.ascontiguousarray(hashes[known]).view(np.uint16).reshape(len(known), QUARTERS)
    for turn in range(QUARTERS):
        turned = np.ascontiguousarray(np.roll(quarters, turn, axis=1)).view(np.uint64).ravel()
        order = np.argsort(turned, kind="stable")
        ordered, positions = turned[order], known[order]
        for step in range(1, min(NEIGHBOURS, len(known) - 1) + 1):
            differing = BITS[(ordered[step:] ^ ordered[:-step]).view(np.uint8)].reshape(-1, 8)
            near = differing.sum(axis=1, dtype=np.uint8) <= SIMILAR_BITS
            first, second = positions[:-step][near], positions[step:][near]
            copies = (digests[first] == digests[second]) & (digests[first] != 0)
            found.add(first[~copies], second[~copies])
    return found
