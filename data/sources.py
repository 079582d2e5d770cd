"""Where images come from: the digits, a folder, whatever else timm reads."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import Draft
from ..core.config import DataPlan
from ..core.errors import UserError
from ..core.proc import first_line
from ..core.progress import track
from .dataset import Dataset

Split = list[tuple[str, int]]  # file below the root, label


def digits(draft: Draft[Dataset], config: DataPlan) -> tuple[None, list[str], dict[str, Split]]:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_digits

    if config.test_split is not None:
        raise UserError(
            "data.test_split: the digits have no test split, wanted null (it is cut from the training part)"
        )
    digits = load_digits()
    split = []
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{label}/{index:04d}.png"
        path = draft.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)
        split.append((name, int(label)))
    return None, [str(digit) for digit in range(10)], {config.train_split: split}


def _wanted_splits(config: DataPlan) -> list[str]:
    return [config.train_split, *([config.test_split] if config.test_split else [])]


def folder(config: DataPlan) -> tuple[Path, list[str], dict[str, Split]]:
    """``source/<split>/<class>/*``; the classes are those listed, or the training folders in name order."""
    from timm.data.readers import create_reader

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
        try:
            found = create_reader("", root=str(place), class_map={name: at for at, name in enumerate(classes)})
        except RuntimeError:
            raise UserError(f"no images in {place}: wanted .jpg, .jpeg or .png files in its class folders") from None
        splits[split] = [
            (f"{split}/{name}", label)
            for name, (_, label) in zip(found.filenames(absolute=False), found.samples, strict=True)
        ]
    return root, classes, splits


def _listed(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists '{twice}' twice: wanted every class once, in the order of the outputs")
    return names


def reader(draft: Draft[Dataset], config: DataPlan) -> tuple[None, list[str], dict[str, Split]]:
    """Anything else that timm's dataset factory reads, copied into the artifact image by image."""
    from timm.data import create_dataset

    if "/" not in config.source or config.source.partition("/")[0].lower() not in ("hfds", "hfids", "wds", "tfds"):
        raise UserError(
            f"no data at '{config.source}': wanted 'digits', a folder with {config.train_split}/<class>/*, "
            "or a name of timm such as hfds/NAME, wds/PATTERN, tfds/NAME"
        )
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
        rows: Split = []
        items = _raw_items(dataset)
        for index, (image, label) in enumerate(track(items, f"copying {split}", len(dataset))):
            content, suffix = _encoded(image)
            name = f"images/{split}/{index:07d}{suffix}"
            path = draft.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            rows.append((name, int(label)))
        splits[split] = rows
    count = 1 + max(label for rows in splits.values() for _, label in rows)
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
