"""What the networks see: training views that are a function of (seed, image index, epoch) and of nothing
else, and evaluation images by the definition that the device shares.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.nn import functional
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from torchvision import transforms

from ..core.config import AugmentSettings, TrainSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.proc import first_line
from ..runtime.preprocess import fit, fit_classes
from ..runtime.task import TASKS
from .dataset import UNLABELED, Dataset, Sample
from .masks import IGNORED, resized
from .splits import even_fraction


@contextmanager
def seeded(*identity: int) -> Iterator[None]:
    """Make Python's, numpy's and torch's global generators functions of ``identity`` inside the block.

    timm's and torchvision's transforms draw from all three; reseeding them per view frees the views from
    workers, ranks, order and resumption. torch's generator, from which dropout draws between two views,
    is put back afterwards; nothing here draws from the other two unseeded.
    """
    words = np.random.SeedSequence(identity).generate_state(3)
    saved = torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.default_generator.manual_seed(int(words[2]))  # the CPU's alone: 100 times faster than all devices
    try:
        yield
    finally:
        torch.set_rng_state(saved)


def training_transform(config: AugmentSettings, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture to float32 [3, height, width], augmented and normalised. Raises UserError."""
    with _known_policy(config.auto_augment):
        return _imagenet_style(config, spec) if config.crop == "resized" else _small_image_style(config, spec)


@contextmanager
def _known_policy(name: str | None) -> Iterator[None]:
    """Say of what timm cannot read in one line that it is no policy. Raises UserError."""
    try:
        yield
    except (AssertionError, ValueError, KeyError) as error:
        raise UserError(
            f"train.augment.auto_augment: '{name}' is no policy of timm ({first_line(error)}), "
            "wanted such as rand-m7-mstd0.5"
        ) from None


def _imagenet_style(config: AugmentSettings, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    height, width = spec.sides
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        spec.sides,
        is_training=True,
        scale=(config.min_scale, 1.0),
        ratio=(3 / 4 * (width / height), 4 / 3 * (width / height)),  # a crop is stretched as little as a square one
        hflip=config.flip,
        color_jitter=None,
        auto_augment=config.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=config.erase,
    )
    return transform


def _small_image_style(config: AugmentSettings, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    fitting = spec.model_dump()
    steps: list[Callable[..., object]] = [lambda image: Image.fromarray(fit(image, fitting))]
    if config.crop == "pad":
        height, width = spec.sides
        padding = [round(side * config.pad_fraction) for side in (width, height)]
        steps.append(transforms.RandomCrop(spec.sides, padding=padding))
    if config.flip:
        steps.append(transforms.RandomHorizontalFlip(config.flip))
    if config.auto_augment:
        make = rand_augment_transform if config.auto_augment.startswith("rand") else auto_augment_transform
        steps.append(make(config.auto_augment, {"img_mean": tuple(round(255 * value) for value in spec.mean)}))
    steps += [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    if config.erase:
        steps.append(RandomErasing(config.erase, device="cpu"))
    transform: Callable[[Image.Image], torch.Tensor] = transforms.Compose(steps)
    return transform


class Pair(NamedTuple):
    """An image and its mask of the same size, on their way through what moves both."""

    image: Image.Image  # RGB
    mask: np.ndarray  # uint8 [H, W], 255 where nobody judges


def moving_transform(
    config: AugmentSettings, spec: InputSpec
) -> Callable[[Image.Image, np.ndarray], tuple[torch.Tensor, torch.Tensor]]:
    """RGB picture and its mask uint8 [H, W] to float32 [3, height, width] and the class of each pixel of that.

    What is drawn for the image is drawn for its mask: both are cut, flipped, turned and sheared by the same amount, the
    mask by nearest neighbour. Where there is no image any more (padding, what was turned away, erased) nobody judges.
    The classes are int64 [height, width], ``UNLABELED`` where nobody judges.

    Raises:
        UserError: a policy that timm does not know, or that mixes an image with itself.
    """
    policy = _moving_policy(config, spec)
    normalise = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    erase = RandomErasing(config.erase, device="cpu") if config.erase else None
    cut = partial(_cut, config=config, spec=spec)

    def transform(image: Image.Image, mask: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        pair = cut(Pair(image, mask))
        if config.flip and random.random() < config.flip:
            pair = Pair(pair.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), pair.mask[:, ::-1])
        pair = pair if policy is None else policy(pair)
        view, label = normalise(pair.image), _judged(pair.mask)
        if erase is not None:
            # Beside the colours, one above its class so that what is erased is UNLABELED.
            both = erase(torch.cat([view, (label - UNLABELED).to(view.dtype)[None]]))
            view, label = both[:3].contiguous(), both[3].long() + UNLABELED
        return view, label

    return transform


def _judged(mask: np.ndarray) -> torch.Tensor:
    """A mask uint8 [H, W] as classes int64 [H, W]."""
    label = torch.from_numpy(mask.astype(np.int64))
    return torch.where(label == IGNORED, UNLABELED, label)


def _cut(pair: Pair, config: AugmentSettings, spec: InputSpec) -> Pair:
    """The part of an image that a view shows, at the size of the input."""
    height, width = spec.sides
    if config.crop == "resized":
        aspect = width / height
        top, left, high, wide = transforms.RandomResizedCrop.get_params(
            pair.image, [config.min_scale, 1.0], [3 / 4 * aspect, 4 / 3 * aspect]
        )
        cropped = pair.image.crop((left, top, left + wide, top + high))
        image = cropped.resize((width, height), Image.Resampling[spec.interpolation.upper()])
        return Pair(image, resized(pair.mask[top : top + high, left : left + wide], (width, height)))
    fitting = spec.model_dump()
    image, mask = Image.fromarray(fit(pair.image, fitting)), fit_classes(pair.mask, fitting)
    if config.crop == "none":
        return Pair(image, mask)
    across, down = (round(side * config.pad_fraction) for side in (width, height))
    left, top = random.randint(-across, across), random.randint(-down, down)
    padded = np.pad(mask, ((down, down), (across, across)), constant_values=IGNORED)
    moved = padded[down + top :, across + left :][:height, :width]
    return Pair(image.crop((left, top, left + width, top + height)), moved)


# timm's operations that move pixels; all others change colours in place.
SPATIAL = frozenset({"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "TranslateXRel", "TranslateYRel"})


class _Moved:
    """An operation of timm on an image, and on its mask too if it moves pixels."""

    def __init__(self, operation: Any) -> None:
        self._operation, self._of_mask = operation, None
        if operation.name in SPATIAL:
            self._of_mask = copy.copy(operation)
            self._of_mask.kwargs = {"fillcolor": IGNORED, "resample": Image.Resampling.NEAREST}

    def __call__(self, pair: Pair) -> Pair:
        before = random.getstate()
        image = self._operation(pair.image)
        if self._of_mask is None:
            return Pair(image, pair.mask)
        random.setstate(before)  # the same is drawn again
        return Pair(image, np.asarray(self._of_mask(Image.fromarray(np.ascontiguousarray(pair.mask)))))


def _moving_policy(config: AugmentSettings, spec: InputSpec) -> Callable[[Pair], Pair] | None:
    """The policy of timm, each operation of which is done to both. Raises UserError."""
    name = config.auto_augment
    if not name:
        return None
    if name.startswith("augmix"):
        raise UserError(
            f"train.augment.auto_augment: '{name}' lays moved copies of an image over each other, which no mask "
            "follows: wanted such as rand-m7-mstd0.5"
        )
    settings = {
        "translate_const": int(0.45 * min(spec.sides)),
        "img_mean": tuple(round(255 * value) for value in spec.mean),
        "interpolation": Image.Resampling[spec.interpolation.upper()],  # one, so that nothing is drawn for it
    }
    with _known_policy(name):
        if name.startswith("rand"):
            policy = rand_augment_transform(name, settings)
            policy.ops = [_Moved(operation) for operation in policy.ops]
        else:
            policy = auto_augment_transform(name, settings)
            policy.policy = [[_Moved(operation) for operation in group] for group in policy.policy]
    moving: Callable[[Pair], Pair] = policy  # hands on whatever its operations take
    return moving


class TrainingImages(NamedTuple):
    """The images to learn from. An image's number is its place in the training part, or behind it without label."""

    samples: Sequence[Sample]  # by number
    numbers: np.ndarray  # of those that are taken
    labeled: int  # of the taken
    unlabeled: int
    dense: bool = False  # whether a label has a place for every pixel, which moves with it


def training_images(dataset: Dataset, fraction: float, seed: int, with_unlabeled: bool) -> TrainingImages:
    """A seeded, stratified ``fraction`` of the training part, and all images without labels if wanted."""
    task = TASKS[dataset.facts.task]
    labeled, unlabeled = dataset.samples("train"), dataset.samples("unlabeled") if with_unlabeled else ()
    chosen = even_fraction(labeled.labels, fraction, seed, task)
    others = np.arange(len(labeled), len(labeled) + len(unlabeled))
    numbers = np.concatenate([chosen, others])
    return TrainingImages(Joined(labeled, unlabeled), numbers, len(chosen), len(unlabeled), task.dense)


class Joined(Sequence[Sample]):
    """One sequence behind another; neither is copied."""

    def __init__(self, first: Sequence[Sample], second: Sequence[Sample]) -> None:
        self._first, self._second = first, second

    def __len__(self) -> int:
        return len(self._first) + len(self._second)

    def __getitem__(self, at: Any) -> Any:
        return self._first[at] if at < len(self._first) else self._second[at - len(self._first)]


class TrainingView(NamedTuple):
    """One random view; in a batch, a batch of each."""

    image: torch.Tensor  # float32 [3, height, width], normalised
    label: torch.Tensor  # what is right of the image itself, of each pixel as it moved; UNLABELED where nobody knows
    target: torch.Tensor  # the label, or after mixing distributions [K, ...], nothing where there is no label
    address: tuple[int, int] | list[torch.Tensor]  # view number and image number


class TrainingViews(TorchDataset[TrainingView]):
    """Random views, addressed by (view number, image number); a view is a function of (seed, address) only.

    Mixup (Zhang et al. 2018) and CutMix (Yun et al. 2019) mix an image with a partner of its own, not with its
    neighbour in a batch: so neither the batch nor the process has a say in what a view shows.
    """

    def __init__(self, source: TrainingImages, config: TrainSettings, spec: InputSpec, classes: int, seed: int) -> None:
        self.images = source.numbers
        self._samples, self._config, self._classes, self._seed = source.samples, config, classes, seed
        self._plain = self._moving(config, spec) if source.dense else self._still(config, spec)

    def __getitem__(self, address: tuple[int, int]) -> TrainingView:
        view, index = address
        image, label = self._plain(view, index)
        if not (self._config.mixup or self._config.cutmix):
            return TrainingView(image, label, label, address)
        generator = np.random.default_rng((self._seed, view, index))
        partner = int(generator.choice(self.images))
        other, other_label = self._plain(view, partner)
        cut = bool(self._config.cutmix) and (not self._config.mixup or generator.random() < 0.5)
        alpha = self._config.cutmix if cut else self._config.mixup
        drawn = float(generator.beta(alpha, alpha))
        share: float | torch.Tensor = drawn
        if cut:
            kept = _paste(image, other, drawn, generator)
            # A label of every place is that of the image which is seen there; one of the whole image counts by area.
            share = kept if label.shape == kept.shape else float(kept.double().mean())
        else:
            image.mul_(drawn).add_(other, alpha=1 - drawn)
        target = share * self._distribution(label) + (1 - share) * self._distribution(other_label)
        return TrainingView(image, label, target, address)

    def __len__(self) -> int:
        return len(self.images)

    def _still(self, config: TrainSettings, spec: InputSpec) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
        """What of a view number and an image number makes an image with the label that it has whatever is shown."""
        transform, fitting = training_transform(config.augment, spec), spec.model_dump()

        def plain(view: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            sample = self._samples[index]
            with seeded(self._seed, view, index):
                return transform(sample.image()), torch.as_tensor(sample.truth(fitting))

        return plain

    def _moving(
        self, config: TrainSettings, spec: InputSpec
    ) -> Callable[[int, int], tuple[torch.Tensor, torch.Tensor]]:
        """The same with a label whose every place moves with its pixel."""
        transform = moving_transform(config.augment, spec)

        def plain(view: int, index: int) -> tuple[torch.Tensor, torch.Tensor]:
            image, mask = self._samples[index].image(), self._samples[index].mask()
            if mask is None:
                mask = np.full((image.height, image.width), IGNORED, np.uint8)
            elif mask.shape != (image.height, image.width):
                raise UserError(f"{self._samples[index].path} changed its size while in use: make the data again")
            with seeded(self._seed, view, index):
                return transform(image, mask)

        return plain

    def _distribution(self, label: torch.Tensor) -> torch.Tensor:
        """Smoothed labels [...] as distributions [K, ...]; nothing where there is none."""
        smoothing = self._config.label_smoothing
        hard = functional.one_hot(label.long().clamp(min=0), self._classes).movedim(-1, 0)
        return (hard * (1 - smoothing) + smoothing / self._classes) * (label != UNLABELED)


def _paste(image: torch.Tensor, other: torch.Tensor, share: float, generator: np.random.Generator) -> torch.Tensor:
    """Put a box of ``other`` into ``image``, of about 1 - share of its area; [H, W], 0 in the box and 1 around it."""
    height, width = image.shape[1:]
    side = math.sqrt(1 - share)
    middle = (int(generator.integers(height)), int(generator.integers(width)))
    (top, bottom), (left, right) = (
        (max(0, centre - int(length * side) // 2), min(length, centre + int(length * side) // 2))
        for centre, length in zip(middle, (height, width), strict=True)
    )
    image[:, top:bottom, left:right] = other[:, top:bottom, left:right]
    kept = torch.ones(height, width)
    kept[top:bottom, left:right] = 0
    return kept


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (view number, image number) in an order that depends on (seed, epoch) only.

    ``batch_size`` images a step over all ``ranks``, of which this is number ``rank``. With ``repeats`` an epoch
    has that many views of each of its images, side by side, and so many times fewer images (Hoffer et al. 2020).
    With ``views`` there are so many of an image, in turn.
    """

    def __init__(
        self,
        images: Sequence[int] | np.ndarray,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        rank: int = 0,
        ranks: int = 1,
        views: int | None = None,
    ) -> None:
        if batch_size < 2 * ranks:
            raise UserError(
                f"train.batch_size is {batch_size}: wanted at least two images for each of {ranks} processes"
            )
        if len(images) < 2 * ranks:
            raise UserError(f"{len(images)} training image(s) make no batch: take more images or a larger fraction")
        self.views = views
        self.epoch, self.skip = 0, 0  # set before iterating; skip leaves out batches that were done already
        self._images, self._batch_size, self._seed = np.asarray(images), batch_size, seed
        self._repeats, self._rank, self._ranks = repeats, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._images)
        for step in range(self.skip, len(self)):
            start = step * self._batch_size
            places = range(start, min(start + self._batch_size, len(order)))[self._rank :: self._ranks]
            yield [self._address(order, place) for place in places]

    def _address(self, order: np.ndarray, place: int) -> tuple[int, int]:
        image, repeat = divmod(place, self._repeats)
        view = self.epoch * self._repeats + repeat
        return view if self.views is None else view % self.views, int(order[image])

    def __len__(self) -> int:
        full, rest = divmod(len(self._images), self._batch_size)
        return full + (rest >= 2 * self._ranks)  # BatchNorm can't train on a single image


class EvaluationViews(TorchDataset[tuple[torch.Tensor, torch.Tensor]]):
    """Each image once, by ``runtime.preprocess``, as uint8 [height, width, 3]."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples, self._spec = samples, spec.model_dump()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        sample = self._samples[index]
        return torch.from_numpy(sample.fitted(self._spec).copy()), torch.as_tensor(sample.truth(self._spec))

    def __len__(self) -> int:
        return len(self._samples)
