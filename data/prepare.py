"""The data stage: a source, checked and split, as one sealed Dataset."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..core.artifact import Draft, Order, drafting, write_json
from ..core.config import DataConfig
from ..core.errors import UserError
from ..runtime.task import TASKS, Task
from .copies import HELD_OUT, copy_size, write_copies
from .dataset import UNLABELED, CopyFacts, Dataset, DatasetFacts, Index, Part, Samples, index_records
from .fingerprints import digests
from .found import Leaks, Together, Unreadable, file_name, survey_of
from .labels import LABELS, check_source
from .leaks import SIDES
from .listing import MOST_NAMED, Others, list_images
from .looks import Looks, examine
from .masks import IMAGES, SPOOL, KeptMasks, has_masks, write_masks
from .sheet import write_sheet
from .sources import Split, reader
from .splits import even_fraction, stratified_count
from .survey import Broken, counted

LONGEST_LIST = 1200  # characters of a message that names images


def prepare(
    order: Order[DataConfig],
    out: Path,
    held_out_later: bool = False,
    memory_of: Callable[[Path], Path | None] = lambda _: None,
) -> Dataset:
    """Read the source once, check its images, split it.

    A folder's images stay where they are; those of every other source are copied into the artifact. Where the order
    names a shorter side, copies of the images to learn from are made, and the original files are not wanted again.
    The parts are ``train``, ``val`` (for selection, a part of its own or cut from the training split), ``test`` and, if
    there are such images, ``unlabeled``.

    Args:
        held_out_later: ``val`` and ``test`` are about to be decoded anyway: they are looked at quickly here.
        memory_of: the file that remembers the hashes of the images of a folder, as ``fingerprint_folder`` takes it.

    Raises:
        UserError: a missing folder or split, a class without images, images that can't be read or are copies of
            held-out ones, all of them named at once.
    """
    config, others = order.config, Others()
    with drafting(Dataset, order, out) as draft:
        source = _read_source(draft, config, others)
        classes, roots = source.classes, source.roots
        if not others.missing:  # what is wrong with files is told first, all of it
            _check_classes(config, source.parts["train"], source, "all are held out")

        parts = dict(source.parts)
        in_copies = tuple(part for part in parts if part not in HELD_OUT and config.copies_side is not None)
        records = {part: _records(split, part in in_copies) for part, split in parts.items()}
        samples = {part: Samples(config.task, roots[part], records[part]) for part in parts}
        looks = {part: Looks(len(split.names)) for part, split in parts.items()}
        if config.check != "none":
            checked = {part: samples[part] for part in parts if part not in in_copies}
            examine(checked, looks, config.check, config.seed, quick=HELD_OUT if held_out_later else ())
        facts = [_write_copies(draft, part, samples[part], records[part], config, looks[part]) for part in in_copies]
        broken = _broken(parts, roots, looks, others)
        if broken.images and not config.skip_broken:
            raise _unreadable(broken, roots["train"])
        kept, leaks = {part: found.whole for part, found in looks.items()}, Leaks(None, 0)
        if not source.stays or config.held_out_copies is not None:
            parts = _with_digests(source, kept, memory_of)
            leaks = _leaks(config, parts, classes, kept)
        for part, stay in kept.items():
            parts[part], records[part] = parts[part].at(stay), records[part][stay]
            looks[part].rows = looks[part].rows[stay]
        gone = f"{leaks.left_out} copies of held-out images and {broken.images} broken images were left out"
        _check_classes(config, parts["train"], source, gone)
        if not len(parts["test"].names):
            raise UserError(f"no test image is left ({gone}): add some, or set data.test_split to null to cut them")

        for part, rows in records.items():
            np.save(draft.path / Dataset.records_name(part), rows)
        np.save(draft.path / Dataset.digests_name("test"), _test_digests(source, parts["test"], memory_of))
        places = {part: None if place == draft.path else str(place) for part, place in roots.items()}
        write_json(
            draft.path / Dataset.INDEX, Index(classes=tuple(classes), roots=dict(places)).model_dump(mode="json")
        )
        survey = survey_of(config, parts, classes, looks, others, broken, leaks)
        write_json(draft.path / Dataset.SURVEY, survey.model_dump(mode="json"))
        masks = {part: _write_masks(draft, part, split, config, part in in_copies, len(classes))
                 for part, split in parts.items() if split.masks is not None}  # fmt: skip
        (draft.path / SPOOL).unlink(missing_ok=True)
        shown = Samples(config.task, roots["train"], records["train"], masks=masks.get("train"))
        write_sheet(shown, classes, config.seed, draft.path / Dataset.SHEET)
        draft.facts = DatasetFacts(
            task=config.task,
            source=config.source,
            classes=len(classes),
            images={part: len(split.names) for part, split in parts.items()},
            copies=_together([each for each in facts if each is not None]),
            license=config.license,
        )
    return draft.artifact


class Source(NamedTuple):
    """What a source has: its parts, where their files lie, and what its training split was before it was cut."""

    classes: list[str]
    parts: dict[Part, Split]
    roots: dict[Part, Path]
    whole: Split
    stays: bool  # a user's folder


def _read_source(draft: Draft[Dataset], config: DataConfig, others: Others) -> Source:
    """Read or list the images of a source, and cut it. Raises UserError."""
    check_source(config)
    root, labels, task = None, LABELS[config.task], TASKS[config.task]
    if Path(config.source).is_dir():
        root, classes, splits = labels.folder(config, others, draft.path)
    elif config.source == labels.demo:
        classes, splits = labels.make(draft.path, config)
    else:
        classes, splits = reader(draft.path, config)
    whole = splits[config.train_split]
    if config.test_split is None:
        learn, test = _cut(whole, config.test_fraction, config.seed, task)
    else:
        learn, test = whole, splits[config.test_split]
    if config.val_split is None:
        train, val = _cut(learn, config.val_fraction, config.seed + 1, task)
    else:
        train, val = learn, splits[config.val_split]
    parts: dict[Part, Split] = {"train": train, "val": val, "test": test}
    roots: dict[Part, Path] = dict.fromkeys(parts, root or draft.path)
    if config.unlabeled is not None:
        roots["unlabeled"] = config.unlabeled.absolute()
        if whole.masks is not None and has_masks(roots["unlabeled"]):
            raise UserError(
                f"data.unlabeled: {config.unlabeled} has images and masks, which would be taken for images: wanted its "
                f"folder '{IMAGES}'"
            )
        others.folder = os.fsencode(roots["unlabeled"]) + b"/"
        parts["unlabeled"] = _unlabeled(roots["unlabeled"], others)
    if config.most_images is not None:
        parts = {part: _at_most(split, config.most_images, config.seed) for part, split in parts.items()}
    return Source(classes, parts, roots, whole, stays=root is not None)


def _cut(samples: Split, fraction: float, seed: int, task: Task) -> tuple[Split, Split]:
    """(the rest, a seeded fraction that is even over the classes), both in the given order."""
    taken = np.zeros(len(samples.names), bool)
    taken[even_fraction(samples.labels, fraction, seed, task)] = True
    return samples.at(~taken), samples.at(taken)


def _at_most(samples: Split, count: int, seed: int) -> Split:
    """So many samples, or one of each class if there are more of them, in the given order."""
    wanted = max(count, len(np.unique(samples.labels)))
    return samples.at(np.sort(stratified_count(samples.labels, wanted, seed)))


def _records(split: Split, copied: bool) -> np.ndarray:
    return index_records(split.names, split.labels, copied)


def _check_classes(config: DataConfig, train: Split, source: Source, gone: str) -> None:
    """See that something to learn of every class is left in ``train``, a part of the source.

    Args:
        gone: what became of the others.

    Raises:
        UserError: there is a class without any, and no list of classes that may be so.
    """
    classes = source.classes
    if len(classes) < 2:
        raise UserError(f"wanted at least two classes, found {len(classes)}: {', '.join(classes)}")
    counts = train.images_by_class(len(classes))
    if counts.all() or (LABELS[config.task].may_lack_classes(config) and counts.any()):
        return
    empty = int(np.argmin(counts))
    before = int(source.whole.images_by_class(len(classes))[empty])
    name, cut = classes[empty], config.val_split is None and config.val_fraction > 0
    if not before:
        raise UserError(f"class '{name}' has no training image: add some, or remove the class")
    cuts = [
        *([f"test (data.test_fraction {config.test_fraction:g})"] if config.test_split is None else []),
        *([f"validation (data.val_fraction {config.val_fraction:g})"] if cut else []),
    ]
    many = "1 training image" if before == 1 else f"{before} training images"
    if before <= len(cuts):
        take = "takes one" if len(cuts) == 1 else "take one each"
        cure = ", or set data.val_fraction to 0" if cut else ""
        raise UserError(
            f"class '{name}' has {many}, of which {' and '.join(cuts)} {take}: wanted at least {len(cuts) + 1}; "
            f"add some or remove the class{cure}"
        )
    raise UserError(f"class '{name}' has {many}, and none is left ({gone}): add some or remove the class")


def _unlabeled(folder: Path, others: Others) -> Split:
    """Every image below ``folder``."""
    if not folder.is_dir():
        raise UserError(f"data.unlabeled: no folder {folder}: wanted a folder of images")
    names = list(list_images(folder, others))
    if not names:
        raise UserError(f"data.unlabeled: no images of use below {folder}: wanted some, or no data.unlabeled")
    return Split.of(names, np.full(len(names), UNLABELED, np.int32))


def _with_digests(
    source: Source, kept: Mapping[Part, np.ndarray], memory_of: Callable[[Path], Path | None]
) -> dict[Part, Split]:
    """The parts of a source with the contents of the images that are ``kept``, bool [N] each."""
    parts: dict[Part, Split] = {}
    for part, split in source.parts.items():
        memory = memory_of(source.roots[part]) if source.stays or part == "unlabeled" else None
        contents = digests(source.roots[part], map(bytes, split.names), memory)
        parts[part] = split._replace(digests=np.where(kept[part], contents, 0))
    return parts


def _test_digests(source: Source, test: Split, memory_of: Callable[[Path], Path | None]) -> np.ndarray:
    """What tells the test images from others, whatever becomes of their files."""
    if test.digests.all():
        return test.digests
    return digests(
        source.roots["test"], map(bytes, test.names), memory_of(source.roots["test"]) if source.stays else None
    )


def _leaks(
    config: DataConfig, parts: Mapping[Part, Split], classes: list[str], kept: Mapping[Part, np.ndarray]
) -> Leaks:
    """Which images are in two parts; unless these are to stay, those of the earlier side are not ``kept`` any more.

    Raises:
        UserError: there are such images, and they are refused; or no image without a label is left.
    """
    images, left_out = Together(parts, classes), 0
    for part, split in parts.items() if config.duplicates != "allow" else ():
        later = [other.digests for name, other in parts.items() if SIDES[name] > SIDES[part]]
        copied = np.isin(split.digests, np.concatenate([*later, np.zeros(0, np.uint64)])) & (split.digests != 0)
        kept[part][copied] = False
        left_out += int(copied.sum())
        if part == "unlabeled" and not kept[part].any():
            raise UserError("data.unlabeled: no images of use, all of them are held out: wanted others, or none")
    if left_out and config.duplicates == "refuse":
        pair = images.in_two_parts(images.copies()[0]).pairs[0]
        raise UserError(
            f"{counted(left_out)} to learn from found among validation or test images too, such as {pair.first} and "
            f"{pair.second}: remove one of each, or data.duplicates drop, which leaves those to learn from out"
        )
    return Leaks(images, left_out)


def _write_copies(
    draft: Draft[Dataset], part: Part, samples: Samples, records: np.ndarray, config: DataConfig, looks: Looks
) -> CopyFacts | None:
    """Write resized copies of the images of a part, and where they lie into its ``records``."""
    if not len(records):
        return None
    assert config.copies_side is not None
    out = draft.path / Dataset.copies_name(part)
    records["start"], records["size"], facts = write_copies(samples, config.copies_side, out, looks)
    return facts


def _write_masks(
    draft: Draft[Dataset], part: Part, split: Split, config: DataConfig, copied: bool, classes: int
) -> KeptMasks:
    """Write the masks of a part, of the size of their images' copies where there are any, and where they lie."""
    assert split.masks is not None
    side = config.copies_side if copied else None
    size = None if side is None else functools.partial(copy_size, shorter_side=side)
    content = draft.path / Dataset.masks_name(part)
    places = write_masks(draft.path / SPOOL, split.masks, size, content)
    np.save(draft.path / Dataset.places_name(part), places)
    return KeptMasks(np.memmap(content, np.uint8, "r") if len(places) else np.zeros(0, np.uint8), places, classes)


def _broken(
    parts: Mapping[Part, Split], roots: Mapping[Part, Path], looks: Mapping[Part, Looks], others: Others
) -> Unreadable:
    """Those of all parts that cannot be read."""
    faults = []
    for part, seen in looks.items():
        folder = os.fsencode(roots[part]) + b"/" if part == "unlabeled" else b""  # lies elsewhere than the others
        faults += [(folder + parts[part].names[at], fault) for at, fault in seen.faults.items()]
    first = [*faults, *others.missing][:MOST_NAMED]
    named = [Broken(image=file_name(name), reason=reason) for name, reason in first]
    return Unreadable(named, len(faults) + others.missing_count)


def _unreadable(broken: Unreadable, root: Path) -> UserError:
    """All that cannot be read in one line, as far as a line goes."""
    cure = "with --skip-broken (data.skip_broken: true in a recipe)"
    if broken.images == 1:
        one = f"{root / broken.first[0].image} ({broken.first[0].reason})"
        return UserError(f"cannot read image {one}: replace or remove it, or leave it out {cure}")
    listed: list[str] = []
    for each in broken.first:
        text = f"{each.image} ({each.reason})"
        if sum(map(len, listed)) + len(text) > LONGEST_LIST:
            break
        listed.append(text)
    more = f" and {broken.images - len(listed)} more" if broken.images > len(listed) else ""
    return UserError(
        f"cannot read {broken.images} images below {root}: {', '.join(listed)}{more}: replace or remove them, or leave "
        f"them out {cure}"
    )


def _together(parts: list[CopyFacts]) -> CopyFacts | None:
    if not parts:
        return None
    return parts[0].model_copy(
        update={"resized": sum(each.resized for each in parts), "bytes": sum(each.bytes for each in parts)}
    )
