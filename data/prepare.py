"""The data stage: a source, checked and split, as one sealed Dataset."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from ..core.artifact import Order, drafting, sha256_file, write_json
from ..core.config import DataConfig
from ..core.errors import UserError
from ..core.proc import first_line
from ..core.progress import note, track
from ..runtime.preprocess import decode
from .dataset import UNLABELED, Dataset, DatasetFacts
from .fingerprints import list_images
from .sources import Split, digits, folder, reader
from .splits import stratified_fraction


def prepare(order: Order[DataConfig], out: Path) -> Dataset:
    """Read the source once, check every image, split it.

    A folder's images stay where they are; those of every other source are copied into the artifact.
    The parts are ``train``, ``val`` (for selection, cut from the training split), ``test`` and, if there are such
    images, ``unlabeled``.

    Raises:
        UserError: a missing folder or split, an empty class, an image that can't be decoded.
    """
    config = order.config
    with drafting(Dataset, order, out) as draft:
        if config.source == "digits":
            root, classes, splits = digits(draft, config)
        elif Path(config.source).is_dir():
            root, classes, splits = folder(config)
        else:
            root, classes, splits = reader(draft, config)
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
            draft.path / Dataset.INDEX,
            {
                "classes": classes,
                "roots": {part: folder and str(folder) for part, folder in roots.items()},
                "parts": parts,
            },
        )
        draft.facts = DatasetFacts(
            task=config.task,
            source=config.source,
            classes=len(classes),
            images={part: len(samples) for part, samples in parts.items()},
        )
    return draft.artifact


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
