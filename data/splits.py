"""Which images of a part are drawn: seeded, stratified by class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np


def stratified_order(labels: Sequence[int] | np.ndarray, seed: int) -> list[np.ndarray]:
    """Per class, its positions in ``labels`` in a seeded random order."""
    values = np.asarray(labels)
    generator = np.random.default_rng(seed)
    by_class = np.argsort(values, kind="stable")
    ends = np.flatnonzero(np.diff(values[by_class])) + 1
    return [generator.permutation(positions) for positions in np.split(by_class, ends) if len(positions)]


def stratified_fraction(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted positions of ``fraction`` of each class (at least one, or none of 0), nested: 10 % lies inside 20 %."""
    if not fraction or not len(labels):
        return np.empty(0, np.int64)
    chosen = [order[: max(1, round(len(order) * fraction))] for order in stratified_order(labels, seed)]
    return np.sort(np.concatenate(chosen))


def stratified_count(labels: Sequence[int] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of ``count`` samples, as even over the classes as they allow, classes taking turns."""
    orders = stratified_order(labels, seed)
    turns = (order[turn] for turn in range(max(map(len, orders), default=0)) for order in orders if turn < len(order))
    return np.fromiter(itertools.islice(turns, count), dtype=np.int64)
