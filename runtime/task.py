"""What an answer is and when it is right: one class a task, asked wherever outputs are judged.

Needs numpy and the standard library alone, because a device judges too.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple, Protocol

import numpy as np

from .layout import sides as input_sides
from .overlay import overlay
from .preprocess import nearest, unfit_classes

CONFIDENCE = 0.95
PIECE_BYTES = 8 * 2**20  # of the logits of a dense task that are in memory at full size at a time


class Estimate(NamedTuple):
    """A figure of ``n`` images with the two ends of its interval."""

    value: float
    low: float
    high: float
    n: int


class Change(NamedTuple):
    """Two networks on the same images: the second one's figure minus the first one's, with its interval."""

    difference: float
    low: float
    high: float
    lost: int  # images that the first did better on
    won: int  # images that the second did better on
    p_value: float  # of no difference
    n: int


class Surety(NamedTuple):
    """How sure a network is of what it says, and how often that is right: one value an image, or several."""

    confidence: np.ndarray  # 0 to 1, [N] or [N, B]
    right: np.ndarray  # 0 to 1, of the same shape
    weight: np.ndarray  # how many answers each value is of, of the same shape


class Seen(NamedTuple):
    """What a network sees in one image, the likeliest or the largest first."""

    classes: tuple[int, ...]
    figures: tuple[float, ...]  # of each, 0 to 1: what the task's ``figure`` says
    places: np.ndarray | None = None  # the class of every pixel of the image itself, -1 where it was shown nothing


class Task(Protocol):
    """What the outputs [N, ...] of a network mean."""

    name: str
    metric: str  # name of the figure that ``summary`` gives
    hub_metric: str  # as Hugging Face's Hub calls it
    class_metric: str  # and that ``of_classes`` gives
    unit: str  # in which a person reads it; the figure itself is a share
    dense: bool  # whether an answer has a place for every pixel
    draws: bool  # whether an answer can be drawn over its picture
    outputs: tuple[str, ...]  # what a network may be exported to give
    together: int  # images whose outputs may be in memory together
    counted: str  # what its answers are: "images" or "pixels"
    figure: str  # what the figures of ``see`` are
    summary_note: str  # how its interval is made, for the foot of a table
    change_note: str  # what ``lost`` and ``won`` count, and how interval and p-value of a change are made

    def misfit(self, outputs: np.ndarray, count: int, classes: int) -> str | None:
        """What outputs of ``count`` images and so many classes should have been, in words; None where they are.

        For what a stranger wrote. Whether they are finite is not looked at.
        """

    def mislabeled(self, labels: np.ndarray, outputs: np.ndarray) -> str | None:
        """What labels of the images that these outputs are of should have been, in words; None where they are.

        Also where the outputs themselves are none of this task.
        """

    def class_count(self, outputs: np.ndarray) -> int:
        """How many classes outputs [N, ...] tell apart, as far as they show it."""

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs [N, ...] to what the network says of each image, as ``labels`` are written."""

    def decide_at(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """As ``decide``, of a dense task at the height and width of the network's input."""

    def likeliest(self, outputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """What the network says of each image, the likeliest first, for outputs [N, ...].

        Returns:
            At most ``count`` decisions [N, count, ...], the first being that of ``decide``; and how likely the network
            itself takes each to be, 0 to 1 [N, count].
        """

    def kept(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """As much of outputs [N, ...] as is needed to judge them, for networks whose input has this height and width.

        It is judged as they are, and does not grow with what they are of.
        """

    def output_bytes(self, classes: int, sides: tuple[int, int], output: str) -> int:
        """About how many bytes the outputs for one image have, for networks with this input and ``output``."""

    def part_judged(self, spec: Mapping[str, Any]) -> Hashable:
        """Which part of an image a network with this InputSpec is judged by; None if by the image as one."""

    def see(
        self, outputs: np.ndarray, spec: Mapping[str, Any], height: int, width: int, count: int | None = None
    ) -> Seen:
        """What outputs [1, ...] of an image of this height and width say that it shows.

        Args:
            spec: the InputSpec by which the image was fitted.
            count: of classes, at most; None for as many as a person wants to see.
        """

    def finish(
        self, outputs: np.ndarray, frame: np.ndarray, spec: Mapping[str, Any]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """What becomes of outputs [1, ...] for a picture uint8 [H, W, 3] until it is what a person is shown.

        Yields:
            Name and result of each step, when it is done.
        """

    def pictures(self, decision: np.ndarray) -> dict[str, np.ndarray]:
        """What ``decide_at`` gave for one image, as far as words do not tell it: pictures by their files' names."""

    def among(self, images: int) -> str:
        """What a share of the answers about so many images is a share of, in words."""

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """How right outputs [N, ...] are about images with these labels: one score an image [N, ...]."""

    def confused(self, outputs: np.ndarray, labels: np.ndarray) -> dict[tuple[int, int], int]:
        """How often each class (first) was called each (second), of the pairs that are met at all."""

    def mistaken(self, outputs: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Positions of the images that finite outputs [N, ...] are wrong about, the worst first."""

    def summary(self, scores: np.ndarray) -> Estimate:
        """The figure of all images. Raises ValueError for none."""

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Scores of the same images by two networks, compared in pairs.

        Raises:
            ValueError: of different shapes, or none.
        """

    def by_class(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Scores with what is known of the images' classes, one an image [N, ...], as ``of_classes`` takes them."""

    def of_classes(self, by_class: np.ndarray, confidence: float = CONFIDENCE) -> dict[int, Estimate]:
        """The figure of each class that the labels have, by class; ``n`` counts the images that show it."""

    def surety(self, outputs: np.ndarray, labels: np.ndarray, bins: int) -> Surety | None:
        """How sure finite outputs [N, ...] are of what they say, and how often it is right; None where they don't tell.

        Args:
            bins: of confidence, of equal width, into which the answers about one image are gathered if it has many.
        """

    def guessing(self, labels: np.ndarray) -> float:
        """The figure of the best answer that looks at no image, for images with these labels."""

    def agreement(self, first: np.ndarray, second: np.ndarray) -> float:
        """How far two outputs of the same images say the same, 0 to 1."""

    def differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Positions of the images about which two outputs say something else, the most different first."""

    def tell(self, decision: np.ndarray, classes: Sequence[str]) -> str:
        """What ``decide`` gave for one image, or its label, in a few words."""


class Classification:
    """One class of K an image: the largest of its logits [K] decides."""

    name: str = "classification"
    metric: str = "top-1"
    hub_metric: str = "accuracy"
    class_metric: str = "top-1"
    unit: str = "%"
    dense: bool = False
    draws: bool = False
    outputs: tuple[str, ...] = ("logits",)
    together: int = 64
    counted: str = "images"
    figure: str = "probability"
    summary_note: str = "by Wilson over the test images"
    change_note: str = (
        "Lost: right before, wrong after. Intervals of the difference by Agresti and Min, p by McNemar's exact test."
    )

    def misfit(self, outputs: np.ndarray, count: int, classes: int) -> str | None:
        """Logits [N, K]."""
        fits = outputs.shape == (count, classes) and outputs.dtype == np.float32
        return None if fits else f"float32 [{count}, {classes}]"

    def mislabeled(self, labels: np.ndarray, outputs: np.ndarray) -> str | None:
        """Classes [N] of logits [N, K]."""
        if outputs.ndim != 2 or outputs.shape[1] < 1 or outputs.dtype.kind != "f":
            return "one class an image, with float outputs [images, classes]"
        count, classes = outputs.shape
        fits = labels.shape == (count,) and labels.dtype.kind in "iu" and count > 0
        known = fits and int(labels.min()) >= 0 and int(labels.max()) < classes
        return None if known else f"one class of 0 to {classes - 1} for each of {count} images"

    def class_count(self, outputs: np.ndarray) -> int:
        """K of logits [N, K]."""
        return int(outputs.shape[1])

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Logits [N, K] to classes [N]."""
        return np.asarray(outputs.argmax(1))

    def decide_at(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """Logits [N, K] to classes [N], whatever the input."""
        return self.decide(outputs)

    def likeliest(self, outputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Classes [N, count] with their probability by softmax, for finite logits [N, K]; of equal ones the first.

        Outputs that are probabilities already (none negative, every row with the sum 1) are taken as they are.
        """
        shares = _probabilities(outputs.astype(np.float64))
        best = self.decide(outputs)[:, None]  # what takes no sorting
        classes = best if count == 1 else np.argsort(-outputs, axis=1, kind="stable")[:, :count]
        return classes, np.take_along_axis(shares, classes, 1)

    def kept(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """The logits [N, K] themselves."""
        return outputs

    def output_bytes(self, classes: int, sides: tuple[int, int], output: str) -> int:
        """Of float32."""
        return 4 * classes

    def part_judged(self, spec: Mapping[str, Any]) -> Hashable:
        """None: the image has its class whatever part of it is shown."""
        return None

    def see(
        self, outputs: np.ndarray, spec: Mapping[str, Any], height: int, width: int, count: int | None = None
    ) -> Seen:
        """Classes with their probabilities; the likeliest one unless more are asked for."""
        [classes], [shares] = self.likeliest(outputs, count or 1)
        return Seen(tuple(classes.tolist()), tuple(shares.tolist()))

    def finish(
        self, outputs: np.ndarray, frame: np.ndarray, spec: Mapping[str, Any]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """How likely the likeliest class is [1]."""
        yield "answer", self.likeliest(outputs, 1)[1][0]

    def pictures(self, decision: np.ndarray) -> dict[str, np.ndarray]:
        """None: a word says it all."""
        return {}

    def among(self, images: int) -> str:
        """The images."""
        return f"{images} images"

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Whether the class is right, bool [N], for logits [N, K] and classes [N]."""
        return np.asarray(self.decide(outputs) == labels)

    def confused(self, outputs: np.ndarray, labels: np.ndarray) -> dict[tuple[int, int], int]:
        """Images, in the order in which the pairs are met."""
        return dict(Counter(zip(labels.tolist(), self.decide(outputs).tolist())))

    def mistaken(self, outputs: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Those that are called something else, those first of which it is surest."""
        wrong = np.flatnonzero(~scores)
        return wrong[np.argsort(-self._confidence(outputs)[wrong], kind="stable")]

    def _confidence(self, outputs: np.ndarray) -> np.ndarray:
        """The probability of each image's class [N]."""
        pieces = [self.likeliest(outputs[at : at + BATCH], 1)[1][:, 0] for at in range(0, len(outputs), BATCH)]
        return np.asarray(np.minimum(np.concatenate(pieces), 1.0))

    def summary(self, scores: np.ndarray) -> Estimate:
        """The share that is right, with Wilson's score interval (Wilson 1927)."""
        n = len(scores)
        if n == 0:
            raise ValueError("wanted the score of at least one image")
        [[share], [low], [high]] = (
            each.tolist() for each in _wilson(scores.mean(keepdims=True), np.array([n]), CONFIDENCE)
        )
        return Estimate(share, low, high, n)

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Difference of two shares of the same images.

        The p-value is McNemar's exact test (two-sided binomial on the images that changed). The interval is
        Agresti and Min's (2005): Wald after adding one half to each cell of the 2x2 table.
        """
        if before.shape != after.shape or before.ndim != 1 or len(before) == 0:
            raise ValueError(f"wanted two equally long vectors, found shapes {before.shape} and {after.shape}")
        n = len(before)
        lost, won = int((before & ~after).sum()), int((~before & after).sum())
        b, c, total = lost + 0.5, won + 0.5, n + 2
        centre = (c - b) / total
        half = _normal_quantile() * math.sqrt((b + c) - (c - b) ** 2 / total) / total
        p_value = min(1.0, 2 * _half_binomial_cdf(min(lost, won), lost + won))
        return Change((won - lost) / n, centre - half, centre + half, lost, won, p_value, n)

    def by_class(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Class and whether it was right, int64 [N, 2]."""
        return np.stack([labels, scores], axis=1).astype(np.int64)

    def of_classes(self, by_class: np.ndarray, confidence: float = CONFIDENCE) -> dict[int, Estimate]:
        """The share of each class's images that is right, with Wilson's interval."""
        known, places, counts = np.unique(by_class[:, 0], return_inverse=True, return_counts=True)
        shares = np.bincount(places, by_class[:, 1]) / counts
        found = (each.tolist() for each in (*_wilson(shares, counts, confidence), counts))
        return {int(each): Estimate(*told) for each, told in zip(known, zip(*found))}

    def surety(self, outputs: np.ndarray, labels: np.ndarray, bins: int) -> Surety | None:
        """One value an image [N]: the probability of its class, and whether that is right."""
        right = self.scores(outputs, labels).astype(np.float64)
        return Surety(self._confidence(outputs), right, np.ones(len(right)))

    def guessing(self, labels: np.ndarray) -> float:
        """The share of the commonest class."""
        return float(np.unique(labels, return_counts=True)[1].max() / len(labels))

    def agreement(self, first: np.ndarray, second: np.ndarray) -> float:
        """The share of images that both call the same, for logits [N, K]."""
        return float((self.decide(first) == self.decide(second)).mean())

    def differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Positions of the images that the two call something else, in order."""
        return np.flatnonzero(self.decide(first) != self.decide(second))

    def tell(self, decision: np.ndarray, classes: Sequence[str]) -> str:
        """The name of the class."""
        return classes[int(decision)]


class Segmentation:
    """One class of K a pixel: the largest of its logits decides, once they are enlarged to the labels' size.

    Outputs are logits float [N, K, h, w], at the network's own stride or at full size, or class maps of unsigned
    integers, uint8 [N, h, w]. Labels are integers [N, H, W], -1 where nobody knows.

    The figure is the mean, over the classes that the labels have, of intersection over union, both summed over all
    images. Pixels of an image go together, so the image is the unit of everything: intervals are jackknife ones over
    images (Efron and Tibshirani 1993, 11), by Student's t. Of images of which few changed, or none, a jackknife knows
    too little: as if z^2 more had been seen (Agresti and Coull 1998) that lose or win one of their classes, each
    interval is widened.
    """

    name: str = "segmentation"
    metric: str = "mIoU"
    hub_metric: str = "mean_iou"
    class_metric: str = "IoU"
    unit: str = "%"
    dense: bool = True
    draws: bool = True
    outputs: tuple[str, ...] = ("logits", "logits-full", "classes")
    together: int = 16
    counted: str = "pixels"
    figure: str = "share"
    summary_note: str = "by a jackknife over the test images"
    change_note: str = (
        "Lost: the mean IoU of the image's own classes is lower after. Intervals of the difference by a jackknife over "
        "images, widened for changes that so few images do not show; p by swapping the two image by image."
    )

    def misfit(self, outputs: np.ndarray, count: int, classes: int) -> str | None:
        """Logits [N, K, h, w], or class maps [N, h, w]."""
        wanted = f"float32 [{count}, {classes}, height, width], or uint8 [{count}, height, width] of class numbers"
        if outputs.shape[:1] != (count,) or 0 in outputs.shape:
            return wanted
        if outputs.ndim == 4 and outputs.dtype == np.float32:
            return None if outputs.shape[1] == classes else wanted
        if outputs.ndim != 3 or outputs.dtype != np.uint8:
            return wanted
        largest = int(outputs.max())
        return None if largest < classes else f"class numbers of 0 to {classes - 1} alone, not {largest}"

    def mislabeled(self, labels: np.ndarray, outputs: np.ndarray) -> str | None:
        """Classes [N, H, W], -1 where nobody knows."""
        logits = outputs.ndim == 4 and outputs.dtype.kind == "f"
        if not (logits or (outputs.ndim == 3 and outputs.dtype == np.uint8)) or 0 in outputs.shape:
            return "one class a pixel, with float outputs [images, classes, height, width] or class maps of uint8"
        highest = (outputs.shape[1] if logits else MOST_MAPPED) - 1
        wanted = f"integers [{len(outputs)}, height, width] of -1 to {highest}"
        if labels.ndim != 3 or labels.dtype.kind not in "iu" or len(labels) != len(outputs) or 0 in labels.shape:
            return wanted
        return None if int(labels.min()) >= UNKNOWN and 0 <= int(labels.max()) <= highest else wanted

    def class_count(self, outputs: np.ndarray) -> int:
        """K of logits [N, K, h, w]; of class maps the largest that is said, and one more."""
        return int(outputs.shape[1]) if outputs.ndim == 4 else 1 + int(outputs.max(initial=0))

    @staticmethod
    def enlarged(outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """Logits [..., h, w] in another height and width, float32, as torch's bilinear ``interpolate`` makes them.

        Places are the middles of pixels (``align_corners=False``), and nothing is smoothed where it gets smaller. What
        is given is what is in memory: pass some images at a time.
        """
        height, width = outputs.shape[-2:]
        if (height, width) == tuple(sides):
            return np.asarray(outputs)
        down, across = _between(height, sides[0]), _between(width, sides[1])
        return np.asarray(np.matmul(down, np.matmul(np.asarray(outputs, np.float32), across.T)))

    def decide(self, outputs: np.ndarray) -> np.ndarray:
        """Class maps uint8 [N, h, w] in the outputs' own size; uint16 of more than 256 classes."""
        if outputs.ndim == 3:
            return outputs
        found = np.empty((len(outputs), *outputs.shape[2:]), np.min_scalar_type(max(0, outputs.shape[1] - 1)))
        step = _images_in_a_piece(outputs.shape[1], found.shape[1:])
        for at in range(0, len(outputs), step):
            found[at : at + step] = outputs[at : at + step].argmax(1)
        return found

    def decide_at(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """Class maps of unsigned integers [N, *sides]: logits are enlarged first, class maps by the nearest pixel."""
        if tuple(outputs.shape[-2:]) == tuple(sides):
            return self.decide(outputs)
        maps = np.concatenate(list(self._maps(outputs, sides)))
        return maps.astype(np.min_scalar_type(max(0, self.class_count(outputs) - 1)))

    def likeliest(self, outputs: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Class maps [N, count, h, w] with the mean probability of their pixels, for finite logits [N, K, h, w].

        Class maps say one alone, and not how likely it is: their probability is no number.
        """
        if outputs.ndim == 3:
            return outputs[:, None], np.full((len(outputs), 1), np.nan)
        shares = _probabilities(outputs.astype(np.float64))
        best = self.decide(outputs)[:, None]
        classes = best if count == 1 else np.argsort(-outputs, axis=1, kind="stable")[:, :count].astype(best.dtype)
        return classes, np.take_along_axis(shares, classes.astype(np.intp), 1).mean((2, 3))

    def kept(self, outputs: np.ndarray, sides: tuple[int, int]) -> np.ndarray:
        """Class maps at the size of the input: as logits, those of every pixel of many images would be gigabytes."""
        return self.decide_at(outputs, sides)

    def output_bytes(self, classes: int, sides: tuple[int, int], output: str) -> int:
        """Of float32 at a stride of two at least, where they are not of every pixel; or of class maps."""
        of_a_pixel = {"logits": 1, "logits-full": 4}.get(output, 0) * classes
        return max(1, of_a_pixel) * int(np.prod(sides))

    def part_judged(self, spec: Mapping[str, Any]) -> Hashable:
        """What is left of the image by resizing and cropping: whatever is not shown is not judged."""
        height, width = input_sides(spec)
        resize, crop_fraction = spec.get("resize", "cover"), spec["crop_fraction"]
        whole = resize == "stretch" and crop_fraction == 1
        return "the whole" if whole else (resize, crop_fraction, height / width)

    def see(
        self, outputs: np.ndarray, spec: Mapping[str, Any], height: int, width: int, count: int | None = None
    ) -> Seen:
        """Classes with their shares of the pixels that the network was shown; all unless fewer are wanted."""
        places = self._places(outputs, spec, height, width)
        counts = np.bincount(places[places >= 0], minlength=1)
        classes = [int(each) for each in np.argsort(-counts, kind="stable")[:count] if counts[each]]
        return Seen(tuple(classes), tuple(float(counts[each] / counts.sum()) for each in classes), places)

    def finish(
        self, outputs: np.ndarray, frame: np.ndarray, spec: Mapping[str, Any]
    ) -> Iterator[tuple[str, np.ndarray]]:
        """The class of every pixel of the picture [H, W], then those in colours over it, uint8 [H, W, 3]."""
        places = self._places(outputs, spec, *frame.shape[:2])
        yield "answer", places
        yield "colours", overlay(frame, places)

    def _places(self, outputs: np.ndarray, spec: Mapping[str, Any], height: int, width: int) -> np.ndarray:
        return unfit_classes(self.decide_at(outputs, input_sides(spec))[0], spec, height, width)

    def pictures(self, decision: np.ndarray) -> dict[str, np.ndarray]:
        """The class of every pixel."""
        return {"mask.png": decision}

    def among(self, images: int) -> str:
        """Their pixels."""
        return f"the pixels of {images} images"

    def scores(self, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Pixels of each class of each image, int64 [N, K, 3]: those that are right, that were said, that are labelled.

        Of labelled pixels alone, at the labels' size. K of class maps is 256, whatever they show.

        Raises:
            ValueError: other numbers of images, or a label that no output has.
        """
        tables = self._tables(outputs, labels)
        found = [np.stack([table.diagonal(), table.sum(0), table.sum(1)], axis=1) for table in tables]
        return np.array(found, np.int64).reshape(len(labels), _columns(outputs), 3)

    def confused(self, outputs: np.ndarray, labels: np.ndarray) -> dict[tuple[int, int], int]:
        """Pixels, as ``scores`` judges them."""
        table = sum(self._tables(outputs, labels), start=np.zeros((), np.int64))
        return {(int(label), int(said)): int(table[label, said]) for label, said in np.argwhere(table)}

    def mistaken(self, outputs: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Those with a wrong pixel, those first of which the mean IoU of their own classes is lowest."""
        order = np.argsort(_of_each(scores), kind="stable")
        return order[(scores[order, :, 0] < scores[order, :, 2]).any(1)]

    def _tables(self, outputs: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
        """Of each image its labelled pixels by label and by what is said of them, [K, K]. Raises as ``scores``."""
        if labels.ndim != 3 or len(labels) != len(outputs):
            raise ValueError(f"wanted labels [{len(outputs)}, height, width], found shape {labels.shape}")
        classes, at = _columns(outputs), 0
        for said in self._maps(outputs, labels.shape[1:]):
            for each in said:
                its = labels[at].astype(np.intp)
                if its.min() < UNKNOWN or its.max() >= classes:
                    raise ValueError(f"wanted labels of -1 to {classes - 1}, found {its.min()} to {its.max()}")
                # Rows are labels, the first of them what nobody knows; columns are what was said.
                cells = (its + 1) * classes + each
                yield np.bincount(cells.ravel(), minlength=(classes + 1) * classes).reshape(-1, classes)[1:]
                at += 1

    def _maps(self, outputs: np.ndarray, sides: Sequence[int]) -> Iterator[np.ndarray]:
        """What is said, in another size, some images at a time; class maps by the nearest pixel."""
        height, width = sides
        if outputs.ndim == 3:
            rows, columns = (nearest(*both) for both in zip(outputs.shape[1:], (height, width)))
            for each in outputs:
                yield each[rows[:, None], columns][None]
            return
        for logits in _pieces(outputs, (height, width)):
            yield logits.argmax(1)

    def summary(self, scores: np.ndarray) -> Estimate:
        """Mean IoU of the classes that the labels have. Images without a labelled pixel are not counted.

        Raises:
            ValueError: no labelled pixel.
        """
        scores = _labelled(scores)
        right, whole = _overlaps(scores)
        known = scores[..., 2].sum(0) > 0
        value = float(_shares(right.sum(0), whole.sum(0))[known].mean())
        right, whole = right[:, known], whole[:, known]
        without = _shares(right.sum(0) - right, whole.sum(0) - whole).mean(1)
        return Estimate(value, *_jackknife(value, without, _one_class(scores), (0.0, 1.0)), len(scores))

    def change(self, before: np.ndarray, after: np.ndarray) -> Change:
        """Difference of two mean IoUs of the same images, of those that have a labelled pixel.

        The p-value is of swapping the two networks' answers about each image (a paired permutation test): exact where
        at most 12 images changed, else by 9,999 draws with a fixed seed.

        Raises:
            ValueError: of other images, or no labelled pixel.
        """
        before, after = _as_many_classes(before, after)
        if before.shape != after.shape or not np.array_equal(before[..., 2], after[..., 2]):
            raise ValueError(f"wanted scores of the same labels, found shapes {before.shape} and {after.shape}")
        before, after = _labelled(before), _labelled(after)
        known = before[..., 2].sum(0) > 0
        (first, first_whole), (second, second_whole) = (
            [each[:, known] for each in _overlaps(scores)] for scores in (before, after)
        )

        def apart(left_out: tuple[np.ndarray, ...] | None = None) -> np.ndarray:
            sums = [each.sum(0) for each in (first, first_whole, second, second_whole)]
            if left_out is not None:
                sums = [total - each for total, each in zip(sums, left_out)]
            return np.asarray((_shares(sums[2], sums[3]) - _shares(sums[0], sums[1])).mean(-1))

        value = float(apart())
        without = apart((first, first_whole, second, second_whole))
        low, high = _jackknife(value, without, _one_class(before), (-1.0, 1.0))
        moved = _of_each(after) - _of_each(before)
        p_value = _by_swapping((first, first_whole), (second, second_whole))
        return Change(value, low, high, int((moved < 0).sum()), int((moved > 0).sum()), p_value, len(before))

    def by_class(self, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The scores themselves [N, K, 3]."""
        return scores

    def of_classes(self, by_class: np.ndarray, confidence: float = CONFIDENCE) -> dict[int, Estimate]:
        """The IoU of each class that the labels have, with its interval over the images in which it is seen."""
        right, whole = _overlaps(by_class)
        found = {}
        for each in np.flatnonzero(by_class[..., 2].sum(0) > 0).tolist():
            seen = whole[:, each] > 0
            its, union = right[seen, each], whole[seen, each]
            value = float(its.sum() / union.sum())
            without = _shares(its.sum() - its, union.sum() - union)
            shows = int((by_class[:, each, 2] > 0).sum())
            found[each] = Estimate(value, *_jackknife(value, without, len(its) / shows, (0.0, 1.0), confidence), shows)
        return found

    def surety(self, outputs: np.ndarray, labels: np.ndarray, bins: int) -> Surety | None:
        """One value an image and bin of confidence [N, bins], of its labelled pixels at the labels' size."""
        if outputs.ndim == 3:
            return None
        found = np.zeros((len(labels), 3, bins))  # pixels, their probabilities, those that are right
        at = 0
        for logits in _pieces(outputs, labels.shape[1:]):
            shares, said = _probabilities(logits).max(1), logits.argmax(1)
            for share, each in zip(shares, said):
                known = labels[at] >= 0
                sure = share[known].astype(np.float64)
                place = np.clip(np.ceil(sure * bins).astype(np.intp) - 1, 0, bins - 1)
                right = each[known] == labels[at][known]
                found[at] = [np.bincount(place, weights, bins) for weights in (None, sure, right)]
                at += 1
        pixels = found[:, 0]
        confidence, right = (
            np.divide(found[:, at], pixels, out=np.zeros_like(pixels), where=pixels > 0) for at in (1, 2)
        )
        # The mean of a bin lies in it, whatever the last digit says.
        return Surety(np.minimum(confidence, np.arange(1, bins + 1) / bins), right, pixels)

    def guessing(self, labels: np.ndarray) -> float:
        """The mean IoU of a mask that is the same for every image, and hard to better.

        It begins with the commonest class of each place, and goes on with the class by which the mean IoU gains most
        there, as the classes stand, for as long as it does gain; 0 where no pixel is labelled. Of very many pixels
        every second or third is looked at, in both directions.
        """
        step = math.ceil(math.sqrt(labels.size / GUESSED_PIXELS)) or 1
        labels = labels[:, ::step, ::step]
        classes = 1 + int(labels.max(initial=UNKNOWN))
        counts = np.zeros((classes, *labels.shape[1:]))
        for at in range(0, len(labels), GUESSED_IMAGES):
            block = labels[at : at + GUESSED_IMAGES]
            for each in range(classes):
                counts[each] += np.count_nonzero(block == each, axis=0)
        labelled, shown = counts.sum((1, 2)), counts.sum(0)
        if not labelled.any():
            return 0.0
        best, gains = 0.0, counts
        for _ in range(GUESSES):
            chosen = gains.argmax(0)[None] == np.arange(classes)[:, None, None]
            right = np.where(chosen, counts, 0).sum((1, 2))
            whole = np.where(chosen, shown, 0).sum((1, 2)) + labelled - right
            shares = _shares(right, whole)
            found = float(shares[labelled > 0].mean())
            if found <= best:
                break
            best = found
            # What a place adds to a class's IoU: its pixels of the class to both sums, the others to the union alone.
            now, sums = shares[:, None, None], np.maximum(whole, 1)[:, None, None]
            gains = np.where(labelled[:, None, None] > 0, (counts - now * (shown - counts)) / sums, -np.inf)
        return best

    def agreement(self, first: np.ndarray, second: np.ndarray) -> float:
        """The share of pixels that both call the same."""
        return 1 - float(self._changed(first, second).mean())

    def differing(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Positions of the images of which any pixel is called something else, those with most of them first."""
        changed = self._changed(first, second)
        order = np.argsort(-changed, kind="stable")
        return order[changed[order] > 0]

    def _changed(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Which share of each image's pixels two outputs call something else [N], at the larger of their sizes."""
        sides = [max(both) for both in zip(first.shape[-2:], second.shape[-2:])]
        found: list[np.ndarray] = []
        both = ((each for said in self._maps(outputs, sides) for each in said) for outputs in (first, second))
        for one, other in zip(*both):
            found.append((one != other).mean())
        return np.array(found)

    def tell(self, decision: np.ndarray, classes: Sequence[str]) -> str:
        """The classes with most of the labelled pixels, at most three, as in "road 41 %, sky 22 %, building 18 %"."""
        known = decision[decision >= 0]
        if known.size == 0:
            return "nothing is labelled"
        counts = np.bincount(known.ravel().astype(np.intp))
        told = [int(each) for each in np.argsort(-counts, kind="stable")[:TOLD] if counts[each]]
        names = (classes[each] if each < len(classes) else f"class {each}" for each in told)
        return ", ".join(f"{name} {_per_cent(counts[each] / known.size)}" for name, each in zip(names, told))


UNKNOWN = -1  # of a label: nobody knows
MOST_MAPPED = 256  # classes of a class map
BATCH = 4096  # images whose probabilities are in memory
GUESSED_IMAGES, GUESSED_PIXELS = 64, 10**8  # whose labels are looked at together, and at all
GUESSES = 20  # rounds, at most, of making a fixed mask better
TOLD = 3  # classes of one image
EXACT_IMAGES = 12  # of so many that changed every swap is tried
SWAPS = 9999
SWAPPED_BYTES = 32 * 2**20


def _columns(outputs: np.ndarray) -> int:
    """How many classes the scores of outputs have."""
    return MOST_MAPPED if outputs.ndim == 3 else int(outputs.shape[1])


def _per_cent(share: float) -> str:
    return "< 1 %" if share < 0.005 else f"{share:.0%}".replace("%", " %")


def _probabilities(outputs: np.ndarray) -> np.ndarray:
    """Of logits [N, K, ...] by softmax; what is probabilities already (see ``likeliest``) is taken as it is."""
    if outputs.min() >= 0 and np.allclose(outputs.sum(1), 1, rtol=0, atol=1e-3):
        return outputs
    shares = np.exp(outputs - outputs.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return np.asarray(shares)


def _images_in_a_piece(classes: int, sides: Sequence[int]) -> int:
    return max(1, PIECE_BYTES // (4 * classes * int(np.prod(sides))))


def _pieces(outputs: np.ndarray, sides: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Logits [N, K, h, w] enlarged to ``sides``, some images at a time."""
    height, width = sides
    step = _images_in_a_piece(outputs.shape[1], sides)
    for at in range(0, len(outputs), step):
        yield Segmentation.enlarged(outputs[at : at + step], (height, width))


def _between(source: int, target: int) -> np.ndarray:
    """What each of ``target`` pixels in a row takes of each of ``source``: float32 [target, source], rows of sum 1."""
    places = np.clip((np.arange(target) + 0.5) * (source / target) - 0.5, 0, source - 1)
    first = np.floor(places).astype(np.intp)
    second = np.minimum(first + 1, source - 1)
    taken = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    taken[rows, first] = 1 - (places - first)
    taken[rows, second] += (places - first).astype(np.float32)
    return taken


# ---- figures of images with many pixels ----------------------------------------------------------------------------


def _labelled(scores: np.ndarray) -> np.ndarray:
    """Those of images that have a labelled pixel. Raises ValueError for none."""
    if scores.ndim != 3 or scores.shape[2] != 3:
        raise ValueError(f"wanted scores [images, classes, 3], found shape {scores.shape}")
    found = scores[scores[..., 2].any(1)]
    if len(found) == 0:
        raise ValueError("wanted the scores of at least one image with a labelled pixel")
    return np.asarray(found)


def _as_many_classes(*scores: np.ndarray) -> list[np.ndarray]:
    """Filled up with classes that are nowhere: class maps have as many as can be. Raises ValueError."""
    if any(each.ndim != 3 for each in scores):
        raise ValueError(f"wanted scores [images, classes, 3], found shapes {[each.shape for each in scores]}")
    most = max(each.shape[1] for each in scores)
    return [np.pad(each, ((0, 0), (0, most - each.shape[1]), (0, 0))) for each in scores]


def _overlaps(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intersection and union, float64 [N, K]."""
    right = scores[..., 0].astype(np.float64)
    return right, scores[..., 1] + scores[..., 2] - right


def _shares(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Nothing of nothing is nothing."""
    return np.asarray(np.divide(parts, wholes, out=np.zeros(np.shape(wholes)), where=np.asarray(wholes) > 0))


def _of_each(scores: np.ndarray) -> np.ndarray:
    """The mean IoU of each image's own classes [N]."""
    shown = scores[..., 2] > 0
    return np.asarray(_shares(*_overlaps(scores)).sum(1, where=shown) / np.maximum(shown.sum(1), 1))


def _one_class(scores: np.ndarray) -> float:
    """By how much, times the number of images, the mean IoU drops on average if one image loses one of its classes."""
    labelled = scores[..., 2].astype(np.float64)
    known, shown = labelled.sum(0) > 0, labelled > 0
    part = len(scores) * labelled[:, known] / labelled.sum(0)[known] / int(known.sum())
    return float((part.sum(1) / shown.sum(1)).mean())


def _jackknife(
    value: float, without: np.ndarray, jump: float, bounds: tuple[float, float], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Both ends of the interval of a figure.

    Each arm is Student's, or the longer one of Hall's (1992) where what the images add is skewed: of losses, most of
    them little and few of them large, the lower arm of Student's is too short.

    Args:
        without: the figure without each image [N].
        jump: how far, times N, one more image might move it.
        bounds: within which it lies by its nature; also what is known from a single image.
    """
    n = len(without)
    if n < 2:
        return bounds
    apart = (n - 1) * (without.mean() - without)  # of each image, what it adds
    error = math.sqrt(float(np.square(apart).sum()) * n / (n - 1) + (_normal_quantile(confidence) * jump) ** 2)
    if error == 0:
        return value, value
    skewness, quantile = float((apart**3).sum()) / error**3, _students_quantile(n - 1, confidence)
    low, high = (max(quantile, sign * _unskewed(sign * quantile, skewness)) * error / n for sign in (1, -1))
    return min(value, max(bounds[0], value - low)), max(value, min(bounds[1], value + high))


def _unskewed(quantile: float, skewness: float) -> float:
    """The quantile of a mean over its standard error whose skewness is known: the inverse of Hall's cubic (1992)."""
    if abs(skewness) < 1e-6:
        return quantile
    return 3 / skewness * (float(np.cbrt(1 + skewness * (quantile - skewness / 6))) - 1)


def _by_swapping(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> float:
    """How often the mean IoUs lie as far apart when each image's answers are given to either network by chance.

    Args:
        before, after: intersection and union of each image [N, K].
    """
    first, second = (np.concatenate(each, axis=1) for each in (before, after))
    apart, middle = second - first, (first.sum(0) + second.sum(0)) / 2
    apart = apart[apart.any(1)]
    if len(apart) == 0:
        return 1.0

    def distances(signs: np.ndarray) -> np.ndarray:
        moved = signs @ apart / 2
        one, other = (np.split(middle + sign * moved, 2, axis=-1) for sign in (-1, 1))
        return np.asarray(np.abs((_shares(*other) - _shares(*one)).mean(-1)))

    found = float(distances(np.ones(len(apart)))) * (1 - 1e-9)  # the last digit makes no difference
    if len(apart) <= EXACT_IMAGES:
        every = 2 * (np.arange(2 ** len(apart))[:, None] >> np.arange(len(apart)) & 1) - 1
        return float((distances(every) >= found).mean())
    generator, beyond, left = np.random.default_rng(0), 0, SWAPS
    while left:
        step = min(left, max(1, SWAPPED_BYTES // (8 * len(apart))))
        signs = 2.0 * generator.integers(0, 2, (step, len(apart)), np.int8) - 1
        beyond, left = beyond + int((distances(signs) >= found).sum()), left - step
    return (1 + beyond) / (1 + SWAPS)


# ---- quantiles -----------------------------------------------------------------------------------------------------


def _wilson(shares: np.ndarray, counts: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares [M] with both ends of their score intervals (Wilson 1927).

    Each interval holds its share: rounding may leave an end of it beyond by the last digit where all are right.
    """
    z = _normal_quantile(confidence)
    centre = (shares + z * z / (2 * counts)) / (1 + z * z / counts)
    half = z * np.sqrt(shares * (1 - shares) / counts + z * z / (4 * counts * counts)) / (1 + z * z / counts)
    low, high = np.maximum(0.0, centre - half), np.minimum(1.0, centre + half)
    return shares, np.minimum(shares, low), np.maximum(shares, high)


def _students_quantile(freedom: int, confidence: float) -> float:
    """Of Student's t, for a two-sided interval: exact for 1 and 2 degrees of freedom, else to one per cent.

    Source: Abramowitz and Stegun 26.7.5.
    """
    share = 0.5 + confidence / 2
    if freedom == 1:
        return math.tan(math.pi * (share - 0.5))
    if freedom == 2:
        return (2 * share - 1) * math.sqrt(1 / (2 * share * (1 - share)))
    z = _normal_quantile(confidence)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + math.fsum(term / freedom ** (at + 1) for at, term in enumerate(terms))


def _normal_quantile(confidence: float = CONFIDENCE) -> float:
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def _half_binomial_cdf(successes: int, n: int) -> float:
    """P(X <= successes), X ~ Binomial(n, 1/2); summed in logs, so that a large n is safe."""
    log_factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(successes + 1)
    return float(np.exp(log_factorials[n] - log_factorials[k] - log_factorials[n - k] - n * math.log(2)).sum())


TASKS: dict[str, Task] = {task.name: task for task in (Classification(), Segmentation())}
USUAL_TASK = next(iter(TASKS))  # of what nothing is known
