"""What a data set was found to be made of, as a record and in words: the data report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from ..core.artifact import Record
from ..core.sealed import printable

NAMED = 3  # images or classes that a line names
HELD_OUT = ("val", "test")
MOST_SHARES = 12  # classes whose share of the pixels a line names


class Range(Record):
    """Of the images that were seen."""

    smallest: int
    median: float
    largest: int


class Alike(Record):
    """Two images that are the same or look it: their files, their parts, and what they are called."""

    first: str
    second: str
    first_part: str
    second_part: str
    first_label: str  # empty without one
    second_label: str


class Twins(Record):
    """How many images have such a twin, and some of the pairs."""

    images: int = Field(0, ge=0)
    pairs: tuple[Alike, ...] = ()


class NotRead(Record):
    """What lies in the folder and is no image of a part."""

    kind: str
    count: int = Field(ge=0)
    example: str


class Broken(Record):
    """An image that cannot be read."""

    image: str
    reason: str


Share = Annotated[float, Field(ge=0, le=1)]


class Survey(Record):
    """What was found of the images: of those that were ``seen`` (decoded), where it takes decoding."""

    check: Literal["all", "sample", "none"]
    seen: int = Field(ge=0)
    by_class: dict[str, tuple[int, ...]]  # of each part with labels, images by class in the order of the outputs
    # Of masks alone: the images of each such part, since one may show several classes; the share of the pixels of
    # training masks that each class has, and of those that nobody judges.
    images: dict[str, Annotated[int, Field(ge=0)]] | None = None
    pixel_shares: tuple[Share, ...] | None = None
    unjudged: Share | None = None
    formats: dict[str, int]  # the commonest first
    shorter_side: Range | None  # pixels
    longer_side: Range | None
    not_read: tuple[NotRead, ...] = ()
    left_out: int = Field(0, ge=0)  # images that cannot be read
    broken: tuple[Broken, ...] = ()  # the first of them
    duplicates: Literal["drop", "refuse", "allow"] = "drop"
    copies_left_out: int = Field(0, ge=0)  # of held-out images, among those to learn from
    copies: Twins = Twins()  # of the same contents in two parts, those that were left out included
    copies_of_two_labels: Twins = Twins()
    repeated: int = Field(0, ge=0)  # copies within a part under one label
    hashed: int = Field(0, ge=0)  # images that could be compared by what they look like
    look_alikes: Twins = Twins()  # in two parts
    look_alikes_of_two_labels: Twins = Twins()

    @model_serializer(mode="wrap")
    def _without_masks(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """What is of masks alone is left out where there are none."""
        values: dict[str, Any] = serialize(self)
        of_masks = ("images", "pixel_shares", "unjudged")
        return {name: value for name, value in values.items() if value is not None or name not in of_masks}


def summary(survey: Survey, classes: Sequence[str]) -> list[str]:
    """What a data set is made of, a few lines."""
    counts = survey.images or {part: sum(each) for part, each in survey.by_class.items()}
    parts = ", ".join(f"{part} {count}" for part, count in counts.items())
    lines = [f"{sum(counts.values())} images of {len(classes)} classes: {parts}"]
    training = survey.by_class["train"]
    if survey.pixel_shares is not None:
        by_share = sorted(zip(survey.pixel_shares, classes, strict=True), key=lambda each: -each[0])
        shown = [f"{printable(name, 60)} {_share(share)}" for share, name in by_share]
        middle = ["…"] * (len(shown) > MOST_SHARES)
        shown = shown[: MOST_SHARES - 1] + middle + shown[-1:] if middle else shown
        left = f"; {_share(survey.unjudged)} not judged" if survey.unjudged else ""
        lines.append(f"training pixels: {', '.join(shown)}{left}")
    fewest, most = training.index(min(training)), training.index(max(training))
    if training[fewest] == training[most]:
        lines.append(f"{training[most]} training images of each class")
    else:
        ratio = f", {training[most] / training[fewest]:.1f} times as many" if training[fewest] else ""
        lines.append(
            f"training images a class: {training[fewest]} ({printable(classes[fewest], 60)}) to "
            f"{training[most]} ({printable(classes[most], 60)}){ratio}"
        )
    if survey.shorter_side is None or survey.longer_side is None:
        return [*lines, f"no image was looked at (data.check: {survey.check})"]
    sides = [f"{side.smallest} to {side.largest} (median {side.median:g})" if side.smallest < side.largest
             else f"{side.smallest}" for side in (survey.shorter_side, survey.longer_side)]  # fmt: skip
    formats = ", ".join(f"{name} {count}" for name, count in survey.formats.items())
    of = "" if survey.seen == sum(counts.values()) else f" of the {survey.seen} images that were decoded"
    return [*lines, f"pixels{of}: shorter side {sides[0]}, longer side {sides[1]}", f"formats{of}: {formats}"]


def findings(survey: Survey, classes: Sequence[str]) -> list[str]:
    """What a person should know before training on it, a line each; empty where all is as it should be."""
    lines = []
    if survey.left_out:
        shown = [f"{each.image} ({each.reason})" for each in survey.broken[:NAMED]]
        lines.append(f"{counted(survey.left_out)} cannot be read, left out: {_listed(shown, survey.left_out)}")
    if survey.copies_left_out:
        lines.append(
            f"{counted(survey.copies_left_out)} to learn from left out, the same as validation or test images: "
            f"{_pair(survey.copies)}"
        )
    elif survey.copies.images:
        lines.append(f"{counted(survey.copies.images)} held out and in another part too: {_pair(survey.copies)}")
    if survey.copies_of_two_labels.images:
        lines.append(
            f"{counted(survey.copies_of_two_labels.images)} under two labels, the same contents: "
            f"{_pair(survey.copies_of_two_labels, labelled=True)}"
        )
    if survey.look_alikes.images:
        lines.append(
            f"{counted(survey.look_alikes.images)} held out and like one of another part by the looks (judge by eye): "
            f"{_pair(survey.look_alikes)}"
        )
    if survey.look_alikes_of_two_labels.images:
        lines.append(
            f"{counted(survey.look_alikes_of_two_labels.images)} like one of another label by the looks (judge by "
            f"eye): {_pair(survey.look_alikes_of_two_labels, labelled=True)}"
        )
    training = survey.by_class["train"]
    for part in HELD_OUT:
        counts = survey.by_class.get(part, ())
        if sum(counts):
            pairs = zip(classes, counts, training, strict=True)
            lacking = [name for name, count, taught in pairs if taught and not count]
            if lacking:
                lines.append(f"'{part}' has no image of {_listed(lacking, len(lacking))}")
    if survey.pixel_shares is not None:
        missing = [name for name, count in zip(classes, training, strict=True) if not count]
        if missing:
            lines.append(f"no training mask shows {_listed(missing, len(missing))}")
    alone = [name for name, count in zip(classes, training, strict=True) if count == 1]
    if alone:
        lines.append(f"a single training image: {_listed(alone, len(alone))}")
    if survey.not_read:
        kinds = [f"{each.kind}: {each.count} (such as {each.example})" for each in survey.not_read]
        lines.append("not read: " + "; ".join(kinds))
    return lines


def _share(share: float) -> str:
    """As a percentage; what is there is never told as nothing."""
    return "< 0.01 %" if 0 < share < 5e-5 else f"{100 * share:.3g} %"


def counted(count: int) -> str:
    """So many images."""
    return f"{count} image{'s' if count != 1 else ''}"


def _listed(names: Iterable[str], of: int) -> str:
    """The first of so many names."""
    shown = [printable(name, 300) for name in names][:NAMED]
    return ", ".join(shown) + (f" and {of - len(shown)} more" if of > len(shown) else "")


def _pair(found: Twins, labelled: bool = False) -> str:
    """The first of the pairs."""
    if not found.pairs:
        return "unnamed"
    pair = found.pairs[0]
    first, second = (pair.first_label, pair.second_label) if labelled else (pair.first_part, pair.second_part)
    return f"such as {pair.first} ({first}) and {pair.second} ({second})"
