"""Which images of a part are drawn: seeded, stratified by class."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from ..runtime.task import Task


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


def spread_fraction(labels: Sequence[int] | np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted positions of ``fraction`` of all (at least one, or none of 0), as even over the classes, nested as above.

    Unlike there a class of few may have none: where an image shows several classes, the one that it counts as is no
    reason to take it.
    """
    if not fraction or not len(labels):
        return np.empty(0, np.int64)
    generator = np.random.default_rng(seed)
    places = np.empty(len(labels))  # of each among those of its class, 0 to 1
    for order in stratified_order(labels, seed):
        places[order] = (np.arange(len(order)) + generator.random(len(order))) / len(order)
    return np.sort(np.argsort(places, kind="stable")[: max(1, round(len(labels) * fraction))])


def even_fraction(labels: Sequence[int] | np.ndarray, fraction: float, seed: int, task: Task) -> np.ndarray:
    """Positions of ``fraction``, even over the classes: of each class, or spread where an image shows several."""
    return (spread_fraction if task.dense else stratified_fraction)(labels, fraction, seed)


def stratified_count(labels: Sequence[int] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """Positions of ``count`` samples, as even over the classes as they allow, classes taking turns."""
    orders = stratified_order(labels, seed)
    turns = (order[turn] for turn in range(max(map(len, orders), default=0)) for order in orders if turn < len(order))
    return np.fromiter(itertools.islice(turns, count), dtype=np.int64)
