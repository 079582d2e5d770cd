"""Whether two measurements saw the same images, and what became of those that one of them did not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..core.artifact import Provenance
from ..core.kinds import Measurement
from ..core.sealed import printable
from ..data.dataset import PARTS, Dataset, DatasetFacts, Part


@dataclass(frozen=True)
class ImageChange:
    """What happened to the test images from one measurement to another.

    Attributes:
        same: whether the two saw the same files in the same order with the same labels, so that their outputs pair by
            position. False also where that is not known.
        known: whether both say which images they saw; else ``added`` and so on are 0 and mean nothing.
        added: images that only the second one saw.
        removed: images that only the first one saw.
        relabelled: images that both saw, of which another class is right now.
    """

    same: bool
    known: bool
    added: int = 0
    removed: int = 0
    relabelled: int = 0


def image_change(before: Measurement, after: Measurement) -> ImageChange:
    """What became of the test images, by the hashes of their files.

    Of a measurement that does not say which images it saw (of random input, or of an earlier version) the same is known
    only where the data sets have one key.

    Raises:
        UserError: files of a measurement that are not what it sealed.
    """
    first, second = before.images, after.images
    if first is None or second is None:
        keys = [{found.key for found in _datasets(each)} for each in (before, after)]
        return ImageChange(same=len(keys[0]) > 0 and keys[0] == keys[1], known=False)
    labels = before.labels, after.labels
    same = np.array_equal(first, second) and np.array_equal(*labels)
    counts = _counts(first), _counts(second)
    added, removed = (
        sum(max(0, count - other.get(image, 0)) for image, count in each.items())
        for each, other in (counts[::-1], counts)
    )
    return ImageChange(same, True, added, removed, _relabelled(first, second, *labels))


def _counts(images: np.ndarray) -> Mapping[int, int]:
    known, counts = np.unique(images, return_counts=True)
    return dict(zip(known.tolist(), counts.tolist(), strict=True))


def _relabelled(first: np.ndarray, second: np.ndarray, before: np.ndarray, after: np.ndarray) -> int:
    """Images that stand in both once, whose labels differ: which of several equal ones is meant nobody knows."""
    (one, at), (other, there) = (_singles(images) for images in (first, second))
    _, here, elsewhere = np.intersect1d(one, other, assume_unique=True, return_indices=True)
    return int((before[at[here]] != after[there[elsewhere]]).sum())


def _singles(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The images that stand there once, and where."""
    known, at, counts = np.unique(images, return_index=True, return_counts=True)
    return known[counts == 1], at[counts == 1]


def image_words(before: Measurement, after: Measurement) -> list[str]:
    """What changed in the images of all parts, in a few words each: "12 images added to val"; none where nothing did.

    The held-out images themselves are compared, of the other parts only their number is known. Parts are called as
    their user calls them.
    """
    change = image_change(before, after)
    data = [next(iter(_datasets(each)), None) for each in (before, after)]
    held_out = _user_name("test", data[1])
    counted = {
        f"added to {held_out}": change.added,
        f"removed from {held_out}": change.removed,
        f"of {held_out} relabelled": change.relabelled,
    }
    words = [f"{images_in_words(count)} {what}" for what, count in counted.items() if count]
    if change.known and not change.same and not words:
        words.append(f"the images of {held_out} stand in another order")
    if data[0] is None or data[1] is None or _contents(data[0]) == _contents(data[1]):
        return words
    earlier, later = (DatasetFacts.model_validate(each.facts).images for each in (data[0], data[1]))
    for part in PARTS:
        more = later.get(part, 0) - earlier.get(part, 0)
        if more and not (part == "test" and change.known):
            count = images_in_words(abs(more), "more" if more > 0 else "fewer")
            words.append(f"{count} in {_user_name(part, data[1])}")
    return words or ["other images in the data set, as many as before in every part"]


def _contents(data: Provenance) -> object:
    """What changes whenever an image of the data set does."""
    return data.config.get("fingerprint", data.key)


def _user_name(part: Part, data: Provenance | None) -> str:
    """What whoever brought the images calls a part of them."""
    if part == "val":
        return "validation"
    name = None if data is None else data.config.get(f"{part}_split")
    return printable(name) if isinstance(name, str) else part


def images_in_words(count: int, which: str = "") -> str:
    """A number of images, such as "3 more images"."""
    return f"{count:,} {which}{' ' if which else ''}image{'' if count == 1 else 's'}"


def _datasets(measurement: Measurement) -> list[Provenance]:
    """What the measurement says of the data set that it was measured on, not of those behind its bundles."""
    data = measurement.manifest.inputs.get("data")
    return [] if data is None or data.kind != Dataset.kind else [data]
