"""The sealed Dataset: images and labels by part, read when they are asked for."""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, ClassVar, Literal, overload

import numpy as np
from pydantic import ValidationError

from ..core.artifact import Artifact, Record
from ..core.config import Corruption, FittedConfig
from ..core.errors import UserError
from ..core.inputs import Size
from ..core.kinds import Labelled
from ..core.proc import first_line, in_order
from ..runtime import Session, predict
from ..runtime.layout import sides
from ..runtime.preprocess import fit, fit_classes
from .corrupt import corrupt
from .formats import decode
from .labels import LABELS
from .masks import KeptMasks
from .splits import stratified_count
from .survey import Survey

if TYPE_CHECKING:
    from PIL import Image

UNLABELED = -1  # label of an image that has none
RANDOM = "random images"  # the source of what only stands in for a data set
Part = Literal["train", "val", "test", "unlabeled"]
PARTS: tuple[Part, ...] = ("train", "val", "test", "unlabeled")
# What decides which pixels a network is shown; the rest of an InputSpec is arithmetic on them.
GEOMETRY = ("size", "crop_fraction", "interpolation", "antialias", "resize")


@dataclass(frozen=True)
class Sample:
    """One image of a part, and its label."""

    part: Samples = field(repr=False, compare=False)
    position: int
    path: Path  # the user's file
    label: int  # what the index says of it

    def image(self) -> Image.Image:
        """RGB; the resized copy where there is one. Raises UserError for a file that can't be read."""
        return self.part.image(self.position)

    def fitted(self, spec: Mapping[str, Any], corruption: Corruption | None = None) -> np.ndarray:
        """What a network of this InputSpec is evaluated on, uint8 [height, width, 3]. Raises UserError.

        Args:
            corruption: the fault that the image has, if it is to have one.
        """
        return self.part.fitted(self.position, spec, corruption)

    def truth(self, spec: Mapping[str, Any]) -> np.ndarray | np.integer[Any]:
        """What is right of it, as its task judges what a network of this InputSpec says. Raises UserError."""
        return LABELS[self.part.task].read(self, spec)

    def mask(self) -> np.ndarray | None:
        """The class of each pixel of ``image()``, uint8 [H, W], 255 where nobody judges; None without a mask.

        Raises:
            UserError: what was kept is none.
        """
        return self.part.mask(self.position)

    def fitted_mask(self, spec: Mapping[str, Any]) -> np.ndarray | None:
        """The class of each pixel of ``fitted(spec)``, uint8 [height, width], as ``mask``. Raises UserError."""
        return self.part.fitted_mask(self.position, spec)


class Samples(Sequence[Sample]):
    """The images of one part, in the order of the index; memory does not grow with their number."""

    def __init__(
        self,
        task: str,
        root: Path,
        records: np.ndarray,
        copies: np.ndarray | None = None,
        fitted: Mapping[str, np.ndarray] | None = None,
        masks: KeptMasks | None = None,
        fitted_masks: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """``records`` as ``index_records`` makes them, of files below ``root``.

        Args:
            copies: uint8 [bytes], where the records say where in it the copies lie.
            fitted: uint8 [N, height, width, 3] by ``geometry``.
            fitted_masks: uint8 [N, height, width] by ``geometry``.
        """
        self.task, self._root, self._records, self._copies, self._masks = task, root, records, copies, masks
        self._fitted = {} if fitted is None else fitted
        self._fitted_masks = {} if fitted_masks is None else fitted_masks

    @property
    def labels(self) -> np.ndarray:
        """Of every image, int32 [N]."""
        labels: np.ndarray = self._records["label"]
        return labels

    @property
    def masked(self) -> bool:
        """Whether there are masks."""
        return self._masks is not None

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self[position] for position in range(*at.indices(len(self)))]
        if not -len(self) <= at < len(self):
            raise IndexError(at)
        return Sample(self, int(at) % len(self), self.path(at), int(self._records["label"][at]))

    def path(self, at: int) -> Path:
        """The user's file of one image."""
        name: bytes = self._records["file"][at]
        return self._root / os.fsdecode(name)

    def image(self, at: int) -> Image.Image:
        """As ``Sample.image``."""
        try:
            if self._copies is None:
                return decode(self.path(at))
            start, size = int(self._records["start"][at]), int(self._records["size"][at])
            return decode(io.BytesIO(self._copies[start : start + size].tobytes()))
        except OSError as error:
            raise UserError(
                f"cannot read image {self.path(at)} ({first_line(error)}): the data changed while in use"
            ) from None

    def mask(self, at: int) -> np.ndarray | None:
        """As ``Sample.mask``."""
        try:
            return None if self._masks is None else self._masks[at]
        except ValueError as error:
            raise UserError(
                f"the mask of {self.path(at)} is not what kdpipe writes ({error}): make the data again"
            ) from None

    def fitted_mask(self, at: int, spec: Mapping[str, Any]) -> np.ndarray | None:
        """As ``Sample.fitted_mask``."""
        kept = self._fitted_masks.get(geometry(spec))
        if kept is not None:
            return np.asarray(kept[at])
        mask = self.mask(at)
        return None if mask is None else fit_classes(mask, spec)

    def digest(self, at: int) -> bytes:
        """sha256 of the user's file of one image. Raises UserError."""
        try:
            with self.path(at).open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").digest()
        except OSError as error:
            raise UserError(
                f"cannot read image {self.path(at)} ({first_line(error)}): the data changed while in use"
            ) from None

    def fitted(self, at: int, spec: Mapping[str, Any], corruption: Corruption | None = None) -> np.ndarray:
        """As ``Sample.fitted``."""
        if corruption is not None:
            return fit(corrupt(self.image(at), corruption, self.digest(at)), spec)
        kept = self._fitted.get(geometry(spec))
        return fit(self.image(at), spec) if kept is None else np.asarray(kept[at])


def geometry(spec: Mapping[str, Any]) -> str:
    """The part of an InputSpec that decides the pixels, as text."""
    return json.dumps([spec.get(name) for name in GEOMETRY])


def load_images(samples: Iterable[Sample], spec: Mapping[str, Any]) -> np.ndarray:
    """What a network of this InputSpec is shown, uint8 [N, height, width, 3]. Raises UserError."""
    images = [sample.fitted(spec) for sample in samples]
    return np.stack(images) if images else np.zeros(images_shape(0, spec), np.uint8)


def load_labels(samples: Sequence[Sample], spec: Mapping[str, Any]) -> np.ndarray:
    """What is right of each, as their task judges what a network of this InputSpec says [N, ...]. Raises UserError."""
    return np.array([sample.truth(spec) for sample in samples])


def predict_samples(
    session: Session, samples: Sequence[Sample], spec: Mapping[str, Any], batch: int = 64
) -> np.ndarray:
    """Outputs float32 [N, ...] for ``samples``, read a batch at a time: memory does not grow with their number.

    Raises:
        UserError: an image that can't be read.
    """
    starts = range(0, len(samples), batch)
    return np.concatenate([predict(session, load_images(samples[at : at + batch], spec), batch) for at in starts])


def images_shape(count: int, spec: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Shape of so many images as a network of this InputSpec is shown them."""
    return (count, *sides(spec), 3)


def write_header(stream: BinaryIO, shape: tuple[int, ...]) -> None:
    """Begin a .npy file of uint8 in this shape, whose bytes follow."""
    np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": shape})


def write_images(
    path: Path, samples: Sequence[Sample], spec: Mapping[str, Any], corruption: Corruption | None = None
) -> None:
    """What a network of this InputSpec is shown of ``samples``, as .npy of uint8 [N, height, width, 3], one at a time.

    Args:
        corruption: the fault that the images have, if they are to have one.

    Raises:
        UserError: an image that can't be read.
    """
    with path.open("wb") as stream:
        write_header(stream, images_shape(len(samples), spec))
        for pixels in in_order(lambda at: samples[at].fitted(spec, corruption), range(len(samples))):
            stream.write(pixels.tobytes())


def index_records(names: Sequence[bytes] | np.ndarray, labels: Sequence[int] | np.ndarray, copied: bool) -> np.ndarray:
    """An array of ``file`` and ``label``, and with ``copied`` of ``start`` and ``size``, not known yet."""
    files = np.asarray(names, bytes)
    columns: list[Any] = [("file", files.dtype), ("label", "<i4")]
    records = np.zeros(len(files), [*columns, *([("start", "<i8"), ("size", "<i8")] if copied else [])])
    records["file"], records["label"] = files, labels
    return records


class CopyFacts(Record):
    """How the images to learn from were copied, where their files are much larger than any network sees them."""

    shorter_side: int  # pixels
    filter: str
    quality: int  # of JPEG, every pixel with its own colour
    resized: int  # images; the others were no larger and are kept as they were, byte by byte
    bytes: int


class DatasetFacts(Record):
    """Where the images came from, what is asked of them, and how many there are by part."""

    task: str
    source: str
    classes: int
    images: dict[str, int]
    copies: CopyFacts | None = None
    license: str | None = None  # as its user says


class Index(Record):
    """The names of the outputs, and by part the folder below which its files lie (None: the artifact itself)."""

    classes: tuple[str, ...]
    roots: dict[str, str | None]


class FittedFacts(Record):
    """What the images were fitted to, and how many there are by part."""

    size: Size
    images: dict[str, int]


class Fitted(Artifact[FittedFacts]):
    """What networks of one input are shown of the held-out images: exactly what ``Sample.fitted`` gives.

    And of their masks, where they have any, what ``Sample.fitted_mask`` gives.
    """

    kind = "fitted"
    Facts = FittedFacts
    Configs: ClassVar = {"fitted": FittedConfig}
    roles = frozenset({"data"})

    @staticmethod
    def file_name(part: Part) -> str:
        """The file of one part: uint8 [N, height, width, 3]."""
        return f"{part}.npy"

    @staticmethod
    def masks_name(part: Part) -> str:
        """The file of the masks of one part: uint8 [N, height, width]."""
        return f"{part}.masks.npy"

    def pixels(self, part: Part, images: int) -> np.ndarray:
        """Those of one part, memory-mapped. Raises UserError unless there are so many ``images``."""
        shape = images_shape(images, {"size": self.facts.size})
        return self._mapped(self.file_name(part), shape) if images else np.zeros(shape, np.uint8)

    def masks(self, part: Part, images: int) -> np.ndarray | None:
        """The masks of one part, memory-mapped; None where there are none. Raises UserError as ``pixels`` does."""
        name, shape = self.masks_name(part), images_shape(images, {"size": self.facts.size})[:3]
        return self._mapped(name, shape) if images and name in self.manifest.files else None

    def _mapped(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        array = self.array(name, "u", len(shape))
        if array.shape != shape or array.dtype != np.uint8:
            raise UserError(f"{self.path} holds '{name}' as {array.dtype} {array.shape}: make it again")
        return array


@dataclass(frozen=True)
class Dataset(Artifact[DatasetFacts]):
    """Images by reference (a user's folder) or by value (everything else), split once and for all.

    ``index.json`` holds an ``Index``, ``PART.npy`` what ``index_records`` makes; ``PART.copies``, where there are any,
    resized copies end to end; ``PART.masks``, where there are any, the masks of its images (or of their copies) end to
    end as PNG, and ``PART.masks.npy`` where each begins and how long it is, int64 [N, 2]; ``test.digests.npy``
    what tells the test images from others.
    """

    kind = "dataset"
    Facts = DatasetFacts
    INDEX = "index.json"
    SURVEY = "survey.json"  # a ``Survey``
    SHEET = "contact-sheet.jpg"
    fitted: dict[str, Fitted] = field(default_factory=dict, repr=False, compare=False)  # by geometry, what lies beside

    @staticmethod
    def records_name(part: Part) -> str:
        """The file of one part's records."""
        return f"{part}.npy"

    @staticmethod
    def copies_name(part: Part) -> str:
        """The file of one part's copies."""
        return f"{part}.copies"

    @staticmethod
    def masks_name(part: Part) -> str:
        """The file of one part's masks."""
        return f"{part}.masks"

    @staticmethod
    def places_name(part: Part) -> str:
        """The file of where the masks of one part lie."""
        return f"{part}.masks.npy"

    @staticmethod
    def digests_name(part: Part) -> str:
        """The file of what tells the images of one part from others."""
        return f"{part}.digests.npy"

    @cached_property
    def index(self) -> Index:
        """The names of the outputs and where files lie. Raises UserError."""
        try:
            return Index.model_validate(self.json(self.INDEX))
        except ValidationError:
            raise UserError(f"{self.path / self.INDEX} is not what kdpipe writes: make the data again") from None

    @property
    def classes(self) -> list[str]:
        """The names of the outputs, in their order."""
        return list(self.index.classes)

    @cached_property
    def survey(self) -> Survey | None:
        """What the images were found to be; None where it was not looked for. Raises UserError."""
        if self.SURVEY not in self.manifest.files:
            return None
        try:
            found = Survey.model_validate(self.json(self.SURVEY))
            rows = [*found.by_class.values(), *([] if found.pixel_shares is None else [found.pixel_shares])]
            fits = all(len(row) == len(self.index.classes) for row in rows)
            fits = fits and (found.images is None or found.images.keys() == found.by_class.keys())
        except ValidationError:
            fits = False
        if not fits or "train" not in found.by_class:
            raise UserError(f"{self.path / self.SURVEY} is not what kdpipe writes: make the data again")
        return found

    def check_classes_of(self, artifact: Labelled[Any], what: str) -> None:
        """Refuse a checkpoint, model or bundle whose outputs mean something else. Raises UserError."""
        labels = artifact.labels
        if labels != self.classes:
            how = (
                "the same classes in another order"
                if sorted(labels) == sorted(self.classes)
                else f"{len(labels)} other classes than the data ({len(self.classes)})"
            )
            raise UserError(f"{what} {artifact.path} knows {how}: classes and their order must be the same")

    def samples(self, part: Part) -> Samples:
        """The images of one part, in the order of the index."""
        name = self.records_name(part)
        if name not in self.manifest.files:
            return Samples(self.facts.task, self.path, index_records([], [], copied=False))
        copies = None
        if self.copies_name(part) in self.manifest.files:
            copies = np.memmap(self.file(self.copies_name(part)), np.uint8, "r")
        records = self._records(name, copies)
        folder = self.index.roots.get(part)
        fitted, fitted_masks = {}, {}
        for shown, kept in self.fitted.items():
            if part in kept.facts.images:
                fitted[shown] = kept.pixels(part, len(records))
                if (found := kept.masks(part, len(records))) is not None:
                    fitted_masks[shown] = found
        root = self.path if folder is None else Path(folder)
        masks = self._masks(part, len(records))
        return Samples(self.facts.task, root, records, copies, fitted, masks, fitted_masks)

    def _masks(self, part: Part, images: int) -> KeptMasks | None:
        """The masks of one part, if there are any, checked as a stranger's. Raises UserError."""
        name = self.places_name(part)
        if name not in self.manifest.files:
            return None
        places, file = np.asarray(self.array(name, "i", 2)), self.file(self.masks_name(part))
        content = np.memmap(file, np.uint8, "r") if file.stat().st_size else np.zeros(0, np.uint8)
        fits = places.shape == (images, 2) and places.dtype == np.int64
        if fits and images:
            starts, sizes = places[:, 0], places[:, 1]
            fits = bool(starts.min() >= 0 and sizes.min() > 0 and (starts <= len(content) - sizes).all())
        if not fits:
            raise UserError(f"{self.path / name} is not what kdpipe writes: make the data again")
        return KeptMasks(content, places, len(self.index.classes))

    def digests(self, part: Part) -> np.ndarray | None:
        """The first 64 bits of the hash of every image's file, uint64 [N], in the order of ``samples``.

        None in a data set that did not keep them and whose files are gone. Raises UserError for what nobody wrote.
        """
        samples, name = self.samples(part), self.digests_name(part)
        if name in self.manifest.files:
            kept = np.asarray(self.array(name, "u", 1))
            if kept.shape != (len(samples),) or kept.dtype != np.uint64:
                raise UserError(f"{self.path / name} is not what kdpipe writes: make the data again")
            return kept
        try:
            found = in_order(lambda at: int.from_bytes(samples.digest(at)[:8], "big"), range(len(samples)))
            return np.fromiter(found, np.uint64, len(samples))
        except UserError:
            return None

    def _records(self, name: str, copies: np.ndarray | None) -> np.ndarray:
        """The records of one part, checked as a stranger's: what they point to is there. Raises UserError."""
        try:
            records: np.ndarray = np.load(self.file(name), mmap_mode="r", allow_pickle=False)
            wanted = index_records([], [], copied=copies is not None).dtype
            kinds = [(column, records.dtype[column].kind) for column in records.dtype.names or ()]
            fits = records.ndim == 1 and kinds == [(column, wanted[column].kind) for column in wanted.names or ()]
            if fits and len(records):
                fits = records["label"].min() >= UNLABELED and records["label"].max() < len(self.index.classes)
            if fits and len(records) and copies is not None:
                ends = records["start"] + records["size"]
                fits = records["start"].min() >= 0 and records["size"].min() > 0 and ends.max() <= len(copies)
        except (ValueError, EOFError, TypeError, OverflowError, SyntaxError):
            fits = False
        if not fits:
            raise UserError(f"{self.path / name} is not what kdpipe writes: make the data again")
        return records

    def fitted_file(self, part: Part, spec: Mapping[str, Any]) -> Path | None:
        """The file of what a network of this InputSpec is shown of a part, as ``write_images`` writes it, if kept."""
        kept = self.fitted.get(geometry(spec))
        return kept.file(kept.file_name(part)) if kept is not None and part in kept.facts.images else None

    def balanced(self, part: Part, count: int, seed: int, skip: int = 0) -> list[Sample]:
        """``count`` seeded samples of one part (or all it has), classes taking turns, after ``skip`` others."""
        samples = self.samples(part)
        return [samples[at] for at in self.positions(part, skip + count, seed)[skip:]]

    def positions(self, part: Part, count: int, seed: int) -> np.ndarray:
        """Where in ``samples(part)`` the ``balanced`` ones are, as they are drawn."""
        return stratified_count(self.samples(part).labels, count, seed)
