"""The data stage: a source, checked and split, as one sealed Dataset."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ..core.artifact import Draft, Order, drafting, sha256_file, write_json
from ..core.config import DataConfig
from ..core.errors import UserError
from ..core.proc import in_order
from ..core.progress import note, progress
from .copies import HELD_OUT, read, write_copies
from .dataset import UNLABELED, CopyFacts, Dataset, DatasetFacts, Index, Part, Samples, index_records
from .fingerprints import list_images
from .labels import LABELS
from .sources import Split, digits, reader
from .splits import stratified_fraction

SAMPLED = 1000  # images of a part that ``check: sample`` decodes
CHUNK = 64  # images that a thread decodes at once


def prepare(order: Order[DataConfig], out: Path, held_out_later: bool = False) -> Dataset:
    """Read the source once, check its images, split it.

    A folder's images stay where they are; those of every other source are copied into the artifact. Where the order
    names a shorter side, copies of the images to learn from are made, and the original files are not wanted again.
    The parts are ``train``, ``val`` (for selection, cut from the training split), ``test`` and, if there are such
    images, ``unlabeled``.

    Args:
        held_out_later: ``val`` and ``test`` are about to be decoded anyway: they are not checked here.

    Raises:
        UserError: a missing folder or split, an empty class, an image that can't be decoded.
    """
    config = order.config
    with drafting(Dataset, order, out) as draft:
        if config.source == "digits":
            root, classes, splits = digits(draft, config)
        elif Path(config.source).is_dir():
            root, classes, splits = LABELS[config.task].folder(config)
        else:
            root, classes, splits = reader(draft, config)
        learn = splits[config.train_split]
        if config.test_split is None:
            learn, test = _cut(learn, config.test_fraction, config.seed)
        else:
            test = splits[config.test_split]
        train, val = _cut(learn, config.val_fraction, config.seed + 1)
        parts: dict[Part, Split] = {"train": train, "val": val, "test": test}
        roots: dict[Part, Path] = dict.fromkeys(parts, root or draft.path)
        _check_classes(parts, classes, may_be_empty=config.classes is not None)
        if config.unlabeled is not None:
            roots["unlabeled"] = config.unlabeled.absolute()
            parts["unlabeled"] = _unlabeled(config.unlabeled, _paths(roots, parts, HELD_OUT))
        copied: tuple[Part, ...] = ()
        if config.copies_side is not None:
            copied = tuple(part for part in parts if part not in HELD_OUT)
        checked = [part for part in parts if part not in copied and not (held_out_later and part in HELD_OUT)]
        _check_images(config, {part: Samples(config.task, roots[part], _records(parts[part])) for part in checked})
        copies = [_write_part(draft, part, roots[part], split, config, part in copied) for part, split in parts.items()]
        places = {part: None if place == draft.path else str(place) for part, place in roots.items()}
        write_json(
            draft.path / Dataset.INDEX, Index(classes=tuple(classes), roots=dict(places)).model_dump(mode="json")
        )
        draft.facts = DatasetFacts(
            task=config.task,
            source=config.source,
            classes=len(classes),
            images={part: len(split.names) for part, split in parts.items()},
            copies=_together([facts for facts in copies if facts is not None]),
        )
    return draft.artifact


def _cut(samples: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """(the rest, a seeded stratified fraction), both in the given order."""
    taken = np.zeros(len(samples.names), bool)
    taken[stratified_fraction(samples.labels, fraction, seed)] = True
    return samples.at(np.flatnonzero(~taken)), samples.at(np.flatnonzero(taken))


def _records(split: Split, copied: bool = False) -> np.ndarray:
    return index_records(split.names, split.labels, copied)


def _paths(roots: Mapping[Part, Path], parts: Mapping[Part, Split], wanted: Iterable[Part]) -> list[Path]:
    return [roots[part] / os.fsdecode(name) for part in wanted for name in parts[part].names]


def _check_classes(parts: Mapping[Part, Split], classes: list[str], may_be_empty: bool) -> None:
    if len(classes) < 2:
        raise UserError(f"wanted at least two classes, found {len(classes)}: {', '.join(classes)}")
    counts = np.bincount(parts["train"].labels, minlength=len(classes))
    if (counts == 0).any() and not may_be_empty:
        empty = classes[int(np.argmin(counts))]
        raise UserError(f"class '{empty}' has no training image: add some, or remove the class")


def _unlabeled(folder: Path, held_out: Iterable[Path]) -> Split:
    """Every image below ``folder``, but for copies of those that are held out."""
    if not folder.is_dir():
        raise UserError(f"data.unlabeled: no folder {folder}: wanted a folder of images")
    secret = {sha256_file(path) for path in held_out}
    names = np.array(list(list_images(folder)), bytes)
    kept = np.array([sha256_file(folder / os.fsdecode(name)) not in secret for name in names], bool)
    if not kept.all():
        note(f"{(~kept).sum()} of the images in {folder} are held out for validation or testing: left out")
    if not kept.any():
        raise UserError(f"data.unlabeled: no images of use below {folder}: wanted some, or no data.unlabeled")
    return Split(names[kept], np.full(kept.sum(), UNLABELED, np.int32))


def _check_images(config: DataConfig, parts: Mapping[Part, Samples]) -> None:
    """Decode the images, all or some: a broken one is named before any training. Raises UserError."""
    if config.check == "none":
        return
    chosen: dict[Part, np.ndarray] = {}
    for part, samples in parts.items():
        chosen[part] = np.arange(len(samples))
        if config.check == "sample":
            chosen[part] = np.random.default_rng(config.seed).permutation(len(samples))[:SAMPLED]

    def check(chunk: tuple[Samples, np.ndarray]) -> int:
        samples, positions = chunk
        for at in positions:
            read(samples.path(at))
        return len(positions)

    chunks = (
        (samples, chosen[part][at : at + CHUNK])
        for part, samples in parts.items()
        for at in range(0, len(chosen[part]), CHUNK)
    )
    with progress("checking images", sum(map(len, chosen.values()))) as advance:
        for done in in_order(check, chunks):
            advance(done, "")


def _write_part(
    draft: Draft[Dataset], part: Part, root: Path, split: Split, config: DataConfig, copied: bool
) -> CopyFacts | None:
    """Write the records of a part, and the copies of its images if wanted."""
    records, facts = _records(split, copied), None
    if copied and len(split.names):
        assert config.copies_side is not None
        samples = Samples(config.task, root, records)
        out = draft.path / Dataset.copies_name(part)
        records["start"], records["size"], facts = write_copies(samples, config.copies_side, out)
    np.save(draft.path / Dataset.records_name(part), records)
    return facts


def _together(parts: list[CopyFacts]) -> CopyFacts | None:
    if not parts:
        return None
    return parts[0].model_copy(
        update={"resized": sum(each.resized for each in parts), "bytes": sum(each.bytes for each in parts)}
    )
