"""From any source that timm reads to one sealed Dataset."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import Draft, drafting, sha256_file, write_json
from ..core.config import DataConfig, FingerprintedData
from ..core.data import UNLABELED, Dataset, list_images, stratified_fraction
from ..core.errors import UserError
from ..core.proc import first_line
from ..core.progress import note, track
from ..runtime.preprocess import decode

Split = list[tuple[str, int]]  # file below the root, label


def prepare(config: FingerprintedData, out: Path) -> Dataset:
    """Read the source once, check every image, split it.

    A folder's images stay where they are; those of every other source are copied into the artifact.
    The parts are ``train``, ``val`` (for selection, cut from the training split), ``test`` and, if there are such
    images, ``unlabeled``.

    Raises:
        UserError: a missing folder or split, an empty class, an image that can't be decoded.
    """
    with drafting(Dataset, out, stage="data", config=config, inputs={}) as draft:
        if config.source == "digits":
            root, classes, splits = _digits(draft, config)
        elif Path(config.source).is_dir():
            root, classes, splits = _folder(config)
        else:
            root, classes, splits = _reader(draft, config)
        learn = splits[config.train_split]
        if config.test_split is None:
            learn, test = _cut(learn, config.test_fraction, config.seed)
        else:
            test = splits[config.test_split]
        train, val = _cut(learn, config.val_fraction, config.seed + 1) if config.val_fraction else (learn, [])
        parts = {"train": train, "val": val, "test": test}
        roots = dict.fromkeys(parts, root)
        _check_classes(parts, classes, may_be_empty=config.classes is not None)
        if config.unlabeled is not None:
            held_out = [(root or draft.path) / name for name, _ in [*val, *test]]
            roots["unlabeled"] = config.unlabeled.absolute()
            parts["unlabeled"] = _unlabeled(config.unlabeled, held_out)
        _check_images([(roots[part] or draft.path) / name for part, samples in parts.items() for name, _ in samples])
        write_json(
            draft.path / "index.json",
            {
                "classes": classes,
                "roots": {part: folder and str(folder) for part, folder in roots.items()},
                "parts": parts,
            },
        )
        draft.facts.update(
            source=config.source,
            classes=len(classes),
            images={part: len(samples) for part, samples in parts.items()},
        )
    return draft.artifact


def _digits(draft: Draft[Dataset], config: DataConfig) -> tuple[None, list[str], dict[str, Split]]:
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


def _wanted_splits(config: DataConfig) -> list[str]:
    return [config.train_split, *([config.test_split] if config.test_split else [])]


def _folder(config: DataConfig) -> tuple[Path, list[str], dict[str, Split]]:
    """``source/<split>/<class>/*``; the classes are those listed, or the training folders in name order."""
    from timm.data.readers import create_reader

    root = Path(config.source)
    splits: dict[str, Split] = {}
    classes: list[str] = [] if config.classes is None else _listed(config.classes)
    for split in _wanted_splits(config):
        folder = root / split
        if not folder.is_dir():
            there = ", ".join(sorted(p.name for p in root.iterdir() if p.is_dir())) or "no folders"
            cure = (
                "or data.test_split: null to cut one" if split == config.test_split else "or another data.train_split"
            )
            raise UserError(f"no folder {folder}: wanted {root}/{split}/<class>/*, found {there}; make it, {cure}")
        named = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not named:
            raise UserError(f"no class folders in {folder}: wanted {folder}/<class>/*.jpg (or png)")
        if classes and set(named) - set(classes):
            extra = ", ".join(sorted(set(named) - set(classes))[:3])
            known = config.classes or root / config.train_split
            raise UserError(f"{folder} has classes that {known} lacks: {extra}")
        classes = classes or named
        try:
            reader = create_reader("", root=str(folder), class_map={name: at for at, name in enumerate(classes)})
        except RuntimeError:
            raise UserError(f"no images in {folder}: wanted .jpg, .jpeg or .png files in its class folders") from None
        splits[split] = [
            (f"{split}/{name}", label)
            for name, (_, label) in zip(reader.filenames(absolute=False), reader.samples, strict=True)
        ]
    return root, classes, splits


def _listed(path: Path) -> list[str]:
    names = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists '{twice}' twice: wanted every class once, in the order of the outputs")
    return names


def _reader(draft: Draft[Dataset], config: DataConfig) -> tuple[None, list[str], dict[str, Split]]:
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
    reader = dataset.reader
    if hasattr(reader, "__getitem__"):
        for index in range(len(reader)):
            image, label, *_ = reader[index]
            yield image, label
    else:
        for image, label, *_ in reader:
            yield image, label


def _encoded(image: Any) -> tuple[bytes, str]:
    """An image as file contents: bytes as they are, a decoded picture as lossless PNG."""
    if hasattr(image, "read"):
        content = image.read()
        return content, ".png" if content[:4] == b"\x89PNG" else ".jpg"
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue(), ".png"


def _cut(samples: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(the rest, a seeded stratified fraction), both in the given order."""
    taken = set(stratified_fraction([label for _, label in samples], fraction, seed).tolist())
    rest = [sample for at, sample in enumerate(samples) if at not in taken]
    return rest, [sample for at, sample in enumerate(samples) if at in taken]


def _check_classes(parts: dict[str, Split], classes: list[str], may_be_empty: bool) -> None:
    if len(classes) < 2:
        raise UserError(f"wanted at least two classes, found {len(classes)}: {', '.join(classes)}")
    counts = np.bincount([label for _, label in parts["train"]], minlength=len(classes))
    if (counts == 0).any() and not may_be_empty:
        empty = classes[int(np.argmin(counts))]
        raise UserError(f"class '{empty}' has no training image: add some, or remove the class")


def _unlabeled(folder: Path, held_out: Sequence[Path]) -> Split:
    """Every image below ``folder``, but for copies of those that are held out."""
    if not folder.is_dir():
        raise UserError(f"data.unlabeled: no folder {folder}: wanted a folder of images")
    secret = {sha256_file(path) for path in held_out}
    names = [name for name, _ in list_images(folder)]
    kept = [name for name in names if sha256_file(folder / name) not in secret]
    if len(kept) < len(names):
        note(f"{len(names) - len(kept)} of the images in {folder} are held out for validation or testing: left out")
    if not kept:
        raise UserError(f"data.unlabeled: no images of use below {folder}: wanted some, or no data.unlabeled")
    return [(name, UNLABELED) for name in kept]


def _check_images(paths: Sequence[Path]) -> None:
    """Decode everything once: a broken image is named before any training. Raises UserError."""

    def check(path: Path) -> None:
        try:
            decode(path)
        except OSError as error:
            raise UserError(f"cannot read image {path} ({first_line(error)}): replace or remove it") from None

    with ThreadPoolExecutor() as pool:
        for _ in track(pool.map(check, paths), "checking images", len(paths)):
            pass
