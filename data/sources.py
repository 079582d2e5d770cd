"""Where images come from: the digits, a folder, whatever else timm reads."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.artifact import Draft
from ..core.config import DataPlan
from ..core.errors import UserError
from ..core.proc import first_line
from ..core.progress import track
from .fingerprints import list_images

if TYPE_CHECKING:
    from .dataset import Dataset


class Split(NamedTuple):
    """Images of one split of a source."""

    names: np.ndarray  # of the files below the root, bytes [N]
    labels: np.ndarray  # int32 [N]

    @classmethod
    def of(cls, names: Sequence[bytes], labels: Sequence[int] | np.ndarray) -> Split:
        return cls(np.array(names, bytes), np.asarray(labels, np.int32))

    def at(self, positions: np.ndarray) -> Split:
        """Those at ``positions`` [M]."""
        return Split(self.names[positions], self.labels[positions])


def check_source(config: DataPlan) -> None:
    """Refuse a source that is none, before anything is loaded to read it. Raises UserError."""
    is_timms = config.source.partition("/")[0].lower() in ("hfds", "hfids", "wds", "tfds") and "/" in config.source
    if config.source != "digits" and not Path(config.source).is_dir() and not is_timms:
        raise UserError(
            f"no data at '{config.source}': wanted 'digits', a folder with {config.train_split}/<class>/*, "
            "or a name of timm such as hfds/NAME, wds/PATTERN, tfds/NAME"
        )
    if config.source == "digits" and config.test_split is not None:
        raise UserError(
            "data.test_split: the digits have no test split, wanted null (it is cut from the training part)"
        )


def digits(draft: Draft[Dataset], config: DataPlan) -> tuple[None, list[str], dict[str, Split]]:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_digits

    check_source(config)
    digits = load_digits()
    names, labels = [], []
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{label}/{index:04d}.png"
        path = draft.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)
        names.append(name.encode())
        labels.append(int(label))
    return None, [str(digit) for digit in range(10)], {config.train_split: Split.of(names, labels)}


def _wanted_splits(config: DataPlan) -> list[str]:
    return [config.train_split, *([config.test_split] if config.test_split else [])]


def folder(config: DataPlan) -> tuple[Path, list[str], dict[str, Split]]:
    """``source/<split>/<class>/*``; the classes are those listed, or the training folders in name order."""
    root = Path(config.source)
    splits: dict[str, Split] = {}
    classes: list[str] = [] if config.classes is None else _listed(config.classes)
    for split in _wanted_splits(config):
        place = root / split
        if not place.is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            cure = (
                "or data.test_split: null to cut one" if split == config.test_split else "or another data.train_split"
            )
            raise UserError(f"no folder {place}: wanted {root}/{split}/<class>/*, found {there}; make it, {cure}")
        named = sorted(p.name for p in place.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not named:
            raise UserError(f"no class folders in {place}: wanted {place}/<class>/*.jpg (or png)")
        if classes and set(named) - set(classes):
            extra = ", ".join(sorted(set(named) - set(classes))[:3])
            known = config.classes or root / config.train_split
            raise UserError(f"{place} has classes that {known} lacks: {extra}")
        classes = classes or named
        found = [_images_of(place, split, name) for name in classes]
        if not any(map(len, found)):
            raise UserError(f"no images in {place}: wanted .jpg, .jpeg or .png files in its class folders")
        counts = [len(names) for names in found]
        splits[split] = Split(np.concatenate(found), np.repeat(np.arange(len(classes), dtype=np.int32), counts))
    return root, classes, splits


def _images_of(place: Path, split: str, name: str) -> np.ndarray:
    """Names below the source of one class's images, bytes [N]; none where the class has no folder."""
    below = os.fsencode(f"{split}/{name}/")
    there = list_images(place / name) if (place / name).is_dir() else ()
    return np.array([below + image for image in there], bytes)


def _listed(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists '{twice}' twice: wanted every class once, in the order of the outputs")
    return names


def reader(draft: Draft[Dataset], config: DataPlan) -> tuple[None, list[str], dict[str, Split]]:
    """Anything else that timm's dataset factory reads, copied into the artifact image by image."""
    from timm.data import create_dataset

    check_source(config)
    splits: dict[str, Split] = {}
    names: dict[int, str] = {}
    for split in _wanted_splits(config):
        try:
            dataset = create_dataset(config.source, root=config.root, split=split, input_img_mode="RGB")
        except ImportError as error:
            raise UserError(f"data source {config.source} needs {error.name}: pip install {error.name}") from None
        except Exception as error:  # every reader raises its own
            raise UserError(f"cannot open {config.source}, split '{split}': {first_line(error)}") from error
        known = getattr(dataset.reader, "class_to_idx", None) or {}
        names.update({label: str(name) for name, label in known.items()})
        written: list[bytes] = []
        labels: list[int] = []
        items = _raw_items(dataset)
        for index, (image, label) in enumerate(track(items, f"copying {split}", len(dataset))):
            content, suffix = _encoded(image)
            name = f"images/{split}/{index:07d}{suffix}"
            path = draft.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.append(name.encode())
            labels.append(int(label))
        splits[split] = Split.of(written, labels)
    count = 1 + max(int(split.labels.max()) for split in splits.values())
    return None, [names.get(label, str(label)) for label in range(count)], splits


def _raw_items(dataset: Any) -> Iterator[tuple[Any, int]]:
    """The reader's own (image, label) pairs: bytes where it has bytes, a picture where it decoded."""
    found = dataset.reader
    if hasattr(found, "__getitem__"):
        for index in range(len(found)):
            image, label, *_ = found[index]
            yield image, label
    else:
        for image, label, *_ in found:
            yield image, label


def _encoded(image: Any) -> tuple[bytes, str]:
    """An image as file contents: bytes as they are, a decoded picture as lossless PNG."""
    if hasattr(image, "read"):
        content = image.read()
        return content, ".png" if content[:4] == b"\x89PNG" else ".jpg"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), ".png"
