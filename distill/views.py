"""What the networks see: training views that are a function of (seed, image index, epoch) and of nothing
else, and evaluation images by the definition that the device shares.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Sampler
from torchvision import transforms

from ..core.config import AugmentConfig
from ..core.data import UNLABELED, InputSpec, Sample
from ..core.errors import UserError
from ..core.proc import first_line
from ..runtime.preprocess import decode, fit


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


def training_transform(config: AugmentConfig, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    """RGB picture to float32 [3, size, size], augmented and normalised. Raises UserError."""
    try:
        return _imagenet_style(config, spec) if config.crop == "resized" else _small_image_style(config, spec)
    except (AssertionError, ValueError, KeyError) as error:  # what timm says of a policy it can't read
        raise UserError(
            f"train.augment.auto_augment: '{config.auto_augment}' is no policy of timm ({first_line(error)}), "
            "wanted such as rand-m7-mstd0.5"
        ) from None


def _imagenet_style(config: AugmentConfig, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    transform: Callable[[Image.Image], torch.Tensor] = create_transform(
        spec.size,
        is_training=True,
        scale=(config.min_scale, 1.0),
        hflip=config.flip,
        color_jitter=None,
        auto_augment=config.auto_augment,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        re_prob=config.erase,
    )
    return transform


def _small_image_style(config: AugmentConfig, spec: InputSpec) -> Callable[[Image.Image], torch.Tensor]:
    fitting = spec.model_dump()
    steps: list[Callable[..., object]] = [lambda image: Image.fromarray(fit(image, fitting))]
    if config.crop == "pad":
        steps.append(transforms.RandomCrop(spec.size, padding=round(spec.size * config.pad_fraction)))
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


class TrainingViews(TorchDataset[tuple[torch.Tensor, int]]):
    """Random views, addressed by (view number, image index); views are numbered by epoch."""

    def __init__(self, samples: Sequence[Sample], config: AugmentConfig, spec: InputSpec, seed: int) -> None:
        self._samples, self._seed = samples, seed
        self._transform = training_transform(config, spec)
        self.some_unlabeled = any(sample.label == UNLABELED for sample in samples)

    def __getitem__(self, address: tuple[int, int]) -> tuple[torch.Tensor, int]:
        view, index = address
        sample = self._samples[index]
        with seeded(self._seed, view, index):
            return self._transform(_decode(sample)), sample.label

    def __len__(self) -> int:
        return len(self._samples)


class EpochBatches(Sampler[list[tuple[int, int]]]):
    """Batches of (view number, image index) in an order that depends on (seed, epoch) only.

    ``batch_size`` images a step over all ``ranks``, of which this is number ``rank``. With ``repeats`` an epoch
    has that many views of each of its images, side by side, and so many times fewer images (Hoffer et al. 2020).
    """

    def __init__(
        self, images: int, batch_size: int, seed: int, repeats: int = 1, rank: int = 0, ranks: int = 1
    ) -> None:
        if batch_size < 2 * ranks:
            raise UserError(
                f"train.batch_size is {batch_size}: wanted at least two images for each of {ranks} processes"
            )
        if images < 2 * ranks:
            raise UserError(f"{images} training image(s) make no batch: take more images or a larger fraction")
        self.epoch, self.skip = 0, 0  # set before iterating; skip leaves out batches that were done already
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._repeats, self._rank, self._ranks = repeats, rank, ranks

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng((self._seed, self.epoch)).permutation(self._images).tolist()
        views = [
            (self.epoch * self._repeats + repeat, index)
            for index in order[: math.ceil(self._images / self._repeats)]
            for repeat in range(self._repeats)
        ]
        for step in range(self.skip, len(self)):
            start = step * self._batch_size
            yield views[start : min(start + self._batch_size, self._images)][self._rank :: self._ranks]

    def __len__(self) -> int:
        full, rest = divmod(self._images, self._batch_size)
        return full + (rest >= 2 * self._ranks)  # BatchNorm can't train on a single image


class EvaluationViews(TorchDataset[tuple[torch.Tensor, int]]):
    """Each image once, by ``runtime.preprocess``, as uint8 [size, size, 3]."""

    def __init__(self, samples: Sequence[Sample], spec: InputSpec) -> None:
        self._samples, self._spec = samples, spec.model_dump()

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        sample = self._samples[index]
        return torch.from_numpy(fit(_decode(sample), self._spec).copy()), sample.label

    def __len__(self) -> int:
        return len(self._samples)


def _decode(sample: Sample) -> Image.Image:
    try:
        return decode(sample.path)
    except OSError as error:
        raise UserError(
            f"cannot read image {sample.path} ({first_line(error)}): the data changed while in use"
        ) from None
