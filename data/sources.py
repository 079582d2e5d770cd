"""Where images come from: the digits, a folder, whatever else timm reads."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..core.config import DataPlan
from ..core.errors import UserError
from ..core.proc import first_line
from ..core.progress import track
from ..core.sealed import UNPRINTABLE, printable
from .listing import REMEMBERED, Others, is_hidden, kind_of, list_images

AUTO = "auto"  # of a part: what it is usually called


class Split(NamedTuple):
    """Images of one split of a source."""

    names: np.ndarray  # of the files below the root, bytes [N]
    labels: np.ndarray  # int32 [N]
    digests: np.ndarray  # of their contents, uint64 [N]; 0 where nobody has asked
    masks: np.ndarray | None = None  # as ``masks.table_of`` has them [N]; None where a number is all there is

    @classmethod
    def of(cls, names: Sequence[bytes] | np.ndarray, labels: Sequence[int] | np.ndarray) -> Split:
        return cls(np.array(names, bytes), np.asarray(labels, np.int32), np.zeros(len(names), np.uint64))

    def at(self, positions: np.ndarray) -> Split:
        """Those at ``positions`` [M], or where a mask [N] is true."""
        masks = None if self.masks is None else self.masks[positions]
        return Split(self.names[positions], self.labels[positions], self.digests[positions], masks)

    def images_by_class(self, classes: int) -> np.ndarray:
        """How many images show each class, int64 [classes]."""
        if self.masks is not None:
            return np.asarray((self.masks["pixels"] > 0).sum(0, dtype=np.int64))
        return np.bincount(self.labels, minlength=classes)


def is_of_timm(source: str) -> bool:
    """Whether timm's dataset factory reads it."""
    return source.partition("/")[0].lower() in ("hfds", "hfids", "wds", "tfds") and "/" in source


def digits(out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
    """The 1,797 handwritten digits (8x8, 17 grey levels) that scikit-learn ships."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    names, labels = [], []
    for index, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        name = f"images/{label}/{index:04d}.png"
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(image * (255 / 16)).astype(np.uint8)).save(path)
        names.append(name.encode())
        labels.append(int(label))
    return [str(digit) for digit in range(10)], {config.train_split: Split.of(names, labels)}


# What parts are usually called, in any case of letters. The rule, for `data`, `run` and `init`: held out is what is
# called a test part, since nobody chose anything on it; the validation part is then the one to choose on, and is held
# out itself only where there is no other.
TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "testing")
VAL_NAMES = ("val", "valid", "validation")


class Parts(NamedTuple):
    """What the parts of a folder are called there; None for one that is to be cut from the training part."""

    train: str
    test: str | None
    val: str | None


def usual_parts(root: Path, train: str) -> Parts:
    """The parts of a folder beside that training part, by the rule above."""
    test = _part_called(root, TEST_NAMES, train)
    val = _part_called(root, VAL_NAMES, train)
    return Parts(train, val, None) if test is None else Parts(train, test, val)


def _part_called(root: Path, names: Sequence[str], train: str) -> str | None:
    """A folder with such a name that holds an image of a class of the training part: others are for something else."""
    there = {name.lower(): name for name in _folders(root)}
    classes = _folders(root / train) if (root / train).is_dir() else []
    for part in (there[name] for name in names if name in there and there[name] != train):
        if any(True for name in classes if (root / part / name).is_dir() for _ in list_images(root / part / name)):
            return part
    return None


def usual_splits(
    config: DataPlan, flat: Callable[[Collection[str]], str | None] = lambda _: None
) -> tuple[DataPlan, list[str]]:
    """``config`` with its parts by name, those of a folder as they are called there, and lines that say so.

    Where there are no parts at all but folders of images, the held-out part is cut from these.

    Args:
        flat: says in words what such folders are, by their names; None where they are none of a source.
    """
    root = Path(config.source)
    if not root.is_dir():
        own = (config.test_split, config.val_split)
        test, val = ("val" if own[0] == AUTO else own[0]), (None if own[1] == AUTO else own[1])
        return config.model_copy(update={"test_split": test, "val_split": val}), []
    there = {name.lower(): name for name in _folders(root)}
    train = config.train_split
    if train == "train" and not (root / train).is_dir():
        train = next((there[name] for name in TRAIN_NAMES if name in there), train)
    usual = usual_parts(root, train)
    named = next((there[name] for name in (*VAL_NAMES, *TEST_NAMES) if name in there and there[name] != train), "val")
    test = (usual.test or named) if config.test_split == AUTO else config.test_split
    told = flat(there.values()) if train == "train" and test in ("val", None) and _holds_images(root, there) else None
    if told is not None:
        line = f"{root} has no parts: {told}, and test images are cut from them"
        return config.model_copy(update={"train_split": ".", "test_split": None, "val_split": None}), [line]
    val = config.val_split
    if val == AUTO:
        val = usual.val if config.val_fraction and test == usual.test else None
    _check_apart({"train_split": train, "test_split": test, "val_split": val})
    lines = []
    if train != config.train_split:
        lines.append(f"{root} has no folder '{config.train_split}': '{train}' is taken")
    if config.test_split == AUTO and test != "val":
        lines.append(f"{root}: '{test}' is taken as the held-out part")
    if config.val_split == AUTO and val is not None:
        lines.append(f"{root}: '{val}' is taken as the part for selection, so that none is cut from '{train}'")
    return config.model_copy(update={"train_split": train, "test_split": test, "val_split": val}), lines


def _check_apart(parts: Mapping[str, str | None]) -> None:
    """Refuse a folder that is to be two parts. Raises UserError."""
    known = {os.path.normpath(part): field for field, part in parts.items() if part is not None}
    for field, part in parts.items():
        if part is not None and known[os.path.normpath(part)] != field:
            raise UserError(
                f"data.{field} and data.{known[os.path.normpath(part)]} are both '{part}': wanted two parts, or "
                f"data.{known[os.path.normpath(part)]} null"
            )


def _holds_images(root: Path, there: Mapping[str, str]) -> bool:
    """Whether the folders of a source hold its images: several, none called as a part is, with images in all."""
    if len(there) < 2 or {*TRAIN_NAMES, *TEST_NAMES, *VAL_NAMES} & there.keys():
        return False
    return all(any(True for _ in list_images(root / name)) for name in there.values())


def _folders(place: Path) -> list[str]:
    """The folders in ``place`` that may be parts or classes, by name."""
    there = (path for path in place.iterdir() if path.is_dir() and not is_hidden(os.fsencode(path.name)))
    return sorted(path.name for path in there if not holds_artifacts(path))


def holds_artifacts(folder: Path) -> bool:
    """Whether what kdpipe makes goes there: it may have been started in the folder of the images."""
    return (folder / REMEMBERED).is_dir()


def parts_of(config: DataPlan) -> list[str]:
    """The parts that are read, that to learn from first."""
    return [split for split in (config.train_split, config.test_split, config.val_split) if split]


def names_of(config: DataPlan) -> Iterator[bytes]:
    """The name below the source of every image of its parts, part by part and class by class: what is read of it.

    Raises:
        UserError: a part that is not there.
    """
    places = {split: part_folder(config, split) for split in sorted(parts_of(config))}
    for split, place in places.items():
        for name in _folders(place):
            yield from list_images(place / name, below=os.fsencode(os.path.normpath(f"{split}/{name}") + "/"))


def part_folder(config: DataPlan, split: str, inside: str = "<class>/*") -> Path:
    """The folder of one part, in which there is to be what ``inside`` says. Raises UserError."""
    root = Path(config.source)
    place = root / split
    if not place.is_dir():
        there = ", ".join(_folders(root)) or "no folders"
        own = next((name for name in ("test_split", "val_split") if getattr(config, name) == split), None)
        cure = "or another data.train_split" if own is None else f"or data.{own}: null to cut one"
        raise UserError(f"no folder {place}: wanted {root}/{split}/{inside}, found {there}; make it, {cure}")
    return place


def folder(config: DataPlan, others: Others) -> tuple[Path, list[str], dict[str, Split]]:
    """``source/<split>/<class>/*``; the classes are those listed, or the training folders in name order.

    Args:
        others: told what lies there and is not read.
    """
    root = Path(config.source)
    splits: dict[str, Split] = {}
    classes: list[str] = [] if config.classes is None else listed(config.classes)
    wanted = parts_of(config)
    places = {split: part_folder(config, split) for split in wanted}
    for place in (root, *(place for split, place in places.items() if split != ".")):
        _tell_others(place, root, None if place != root or "." in wanted else wanted, others)
    for split, place in places.items():
        named = _folders(place)
        if not named:
            raise UserError(f"no class folders in {place}: wanted {place}/<class>/*.jpg (or png)")
        if classes and set(named) - set(classes):
            extra = ", ".join(sorted(set(named) - set(classes))[:3])
            known = config.classes or root / config.train_split
            raise UserError(f"{place} has classes that {known} lacks: {extra}")
        classes = classes or named
        found = [_images_of(place, split, name, others) for name in classes]
        if not any(map(len, found)):
            found_there = f", found {others.words()}" if others.counts else ""
            raise UserError(f"no images in {place}: wanted .jpg, .png or the like in its class folders{found_there}")
        counts = [len(names) for names in found]
        splits[split] = Split.of(np.concatenate(found), np.repeat(np.arange(len(classes), dtype=np.int32), counts))
    return root, classes, splits


def _tell_others(place: Path, root: Path, parts: list[str] | None, others: Others) -> None:
    """Tell what lies beside the class folders of a part, or beside the parts of a source."""
    read = set() if parts is None else {Path(part).parts[0] for part in parts}
    with os.scandir(os.fsencode(place)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = Path(os.fsdecode(entry.path))
            name = os.fsencode(path.relative_to(root))
            if kind_of(entry) != "folder":
                others.add("files that lie in no class folder", name)
            elif is_hidden(entry.name):
                others.add("hidden folders", name)
            elif parts is not None and path.name not in read and not holds_artifacts(path):
                others.add("folders that no part is read from", name)


def _images_of(place: Path, split: str, name: str, others: Others) -> np.ndarray:
    """Names below the source of one class's images, bytes [N]; none where the class has no folder."""
    there = list_images(place / name, others, os.fsencode(f"{split}/{name}/")) if (place / name).is_dir() else ()
    return np.array(list(there), bytes)


def text_lines(path: Path, field: str) -> list[str]:
    """The lines of a text file of the user's that are not empty, without what stands around them. Raises UserError."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{field}: cannot read {path} ({first_line(error)}): wanted a text file") from None
    found = [line.strip() for line in lines if line.strip()]
    if (odd := next((line for line in found if UNPRINTABLE.search(line.replace("\t", " "))), None)) is not None:
        raise UserError(f"{field}: '{printable(odd, 120)}' in {path} has control characters: remove them")
    return found


def listed(path: Path) -> list[str]:
    """The classes of a text file, one a line. Raises UserError."""
    names = [line.replace("\t", " ") for line in text_lines(path, "data.classes")]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path} lists '{twice}' twice: wanted every class once, in the order of the outputs")
    return names


def reader(out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
    """Anything else that timm's dataset factory reads, copied into the artifact image by image."""
    from timm.data import create_dataset

    splits: dict[str, Split] = {}
    names: dict[int, str] = {}
    for split in parts_of(config):
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
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
            written.append(name.encode())
            labels.append(int(label))
        splits[split] = Split.of(written, labels)
    count = 1 + max(int(split.labels.max()) for split in splits.values())
    return [names.get(label, str(label)) for label in range(count)], splits


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
