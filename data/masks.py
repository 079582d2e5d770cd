"""Masks: in a file beside each image the class of every pixel, as a number or as a colour."""

from __future__ import annotations

import io
import itertools
import os
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np

from ..core.config import DataPlan
from ..core.errors import UserError
from ..core.proc import in_order
from ..core.progress import note, track
from ..core.sealed import printable
from ..runtime.layout import sides
from ..runtime.preprocess import nearest
from .formats import opened
from .listing import Others, is_hidden, kind_of, list_images
from .sources import AUTO, Split, holds_artifacts, listed, part_folder, parts_of, text_lines

if TYPE_CHECKING:
    from PIL import Image

    from .dataset import Sample

IMAGES, MASKS = "images", "masks"  # the two folders of a part
CLASSES_FILE, PALETTE_FILE = "classes.txt", "palette.txt"  # what names the classes where nothing else is said
IGNORED = 255  # a pixel that nobody judges
MOST_CLASSES = 255
LOSSLESS = ("PNG", "BMP", "GIF")  # formats that keep every number, and are read as they were written
NUMBERS = ("1", "L", "P", "I", "I;16", "I;16B")  # modes of Pillow that hold one number a pixel
SPREAD = {"L;2": 85, "L;4": 17}  # times which Pillow takes grey levels of 2 and 4 bits
CUT = ("RGB;16B", "RGBA;16B", "LA;16B")  # PNG of which Pillow keeps the high byte
TURNED = range(5, 9)  # orientations of EXIF that exchange height and width
MOVED = range(2, 9)  # those that move any pixel
ORIENTATION = 0x0112
SPOOL = "masks.all"  # of a draft: the masks of all parts end to end, before it is known which are kept


def table_of(classes: int) -> np.dtype[Any]:
    """One mask of so many classes: where it lies in a file, a number of its contents, its pixels and those of each."""
    places = [("start", "<i8"), ("size", "<i8"), ("digest", "<u4"), ("area", "<u4")]
    return np.dtype([*places, ("pixels", "<u4", (classes,))])


# ---- what numbers and colours mean -----------------------------------------------------------------------------


class Meaning(NamedTuple):
    """What the pixels of a user's masks mean."""

    classes: list[str]
    ignored: int  # the number that is no class; -1 where colours are read
    colours: np.ndarray | None = None  # int16 [2**24]: the class of a colour, -1 for none, -2 where it has no meaning
    palette: str = ""  # the file of the colours

    def read(self, image: Image.Image) -> tuple[np.ndarray | None, str]:
        """An opened mask as uint8 [H, W], 255 where it is ignored; None and why, where it is no mask."""
        if image.format not in LOSSLESS:
            return None, f"{image.format}, which need not keep every pixel: wanted PNG"
        tiles = getattr(image, "tile", [])  # of one that is not decoded yet
        written = str(tiles[0][3]) if image.format == "PNG" and tiles else ""
        spread = SPREAD.get(written, 1)
        if written in CUT:
            return None, f"{image.mode} of 16 bits a channel, of which 8 would be read: wanted 8 bits"
        image.load()
        if image.mode in ("RGBA", "LA", "PA"):
            if image.getchannel(image.getbands()[-1]).getextrema() != (255, 255):
                return None, "pixels that are partly transparent: wanted every pixel of a class"
            image = image.convert("L" if image.mode == "LA" else "RGB")
        return self._numbers(image, spread) if self.colours is None else self._of_colours(image)

    def _numbers(self, image: Image.Image, spread: int) -> tuple[np.ndarray | None, str]:
        if image.format == "GIF":
            return None, "GIF, whose writers number the colours anew: wanted PNG, or data.palette"
        if image.mode not in NUMBERS:
            return None, f"colours ({image.mode}): wanted a number of a class for each pixel, or data.palette"
        values = np.asarray(image).astype(np.int64) // spread
        wrong = ((values < 0) | (values >= len(self.classes))) & (values != self.ignored)
        if wrong.any():
            found = sorted(set(values[wrong].tolist()))
            many = f" and {len(found) - 3} more" if len(found) > 3 else ""
            wanted = f"wanted 0 to {len(self.classes) - 1}, or {self.ignored} (data.ignore_index)"
            return None, f"class {', '.join(map(str, found[:3]))}{many}: {wanted}"
        return _judged(np.where(values == self.ignored, IGNORED, values).astype(np.uint8))

    def _of_colours(self, image: Image.Image) -> tuple[np.ndarray | None, str]:
        if image.mode not in ("RGB", "P", "L", "1"):
            return None, f"{image.mode}, which has no colours of 8 bits: wanted those of {self.palette}"
        assert self.colours is not None
        red, green, blue = (channel.astype(np.int32) for channel in np.asarray(image.convert("RGB")).transpose(2, 0, 1))
        packed = red << 16 | green << 8 | blue
        values = self.colours[packed]
        if (wrong := values == -2).any():
            found = int(packed[wrong].min())
            colour = f"{found >> 16} {found >> 8 & 255} {found & 255}"
            return None, f"colour {colour} on {int(wrong.sum())} pixels, which no line of {self.palette} has"
        return _judged(np.where(values < 0, IGNORED, values).astype(np.uint8))


def _judged(mask: np.ndarray) -> tuple[np.ndarray | None, str]:
    return (mask, "") if (mask != IGNORED).any() else (None, "no pixel of any class")


def meaning_of(config: DataPlan) -> Meaning:
    """What the masks of a source mean. Raises UserError."""
    names = None if config.classes is None else listed(config.classes)
    if config.palette is not None:
        if config.ignore_index is not None:
            raise UserError(
                "data.ignore_index is a number, data.palette reads colours: leave the colour that is not judged "
                "without a name in the palette"
            )
        meaning = _of_palette(config.palette, names)
    elif names is None:
        raise UserError(
            f"nothing names the classes of the masks in {config.source}: wanted {CLASSES_FILE} there with a class a "
            f"line, in the order of their numbers (or data.classes), or {PALETTE_FILE} with their colours"
        )
    else:
        meaning = Meaning(names, IGNORED if config.ignore_index is None else config.ignore_index)
    if len(meaning.classes) > MOST_CLASSES:
        raise UserError(f"{len(meaning.classes)} classes: wanted at most {MOST_CLASSES} of masks")
    if 0 <= meaning.ignored < len(meaning.classes):
        raise UserError(
            f"data.ignore_index {meaning.ignored} is class '{meaning.classes[meaning.ignored]}' of the list: wanted a "
            f"number that is no class, {len(meaning.classes)} or above"
        )
    return meaning


COLOUR_FIRST = re.compile(r"(\d+)[\s,;]+(\d+)[\s,;]+(\d+)(?:[\s,;]+(.*))?")
NAME_FIRST = re.compile(r"(.*?)[\s,;]+(\d+)[\s,;]+(\d+)[\s,;]+(\d+)")


def read_palette(path: Path) -> list[tuple[tuple[int, int, int], str]]:
    """The colours of a file and their names, empty for a colour of no class; a line each, name first or last.

    Raises:
        UserError: another file, or a colour or a name twice.
    """
    found: list[tuple[tuple[int, int, int], str]] = []
    for number, line in enumerate(text_lines(path, "data.palette"), 1):
        if number == 1 and not re.search(r"\d", line):
            continue  # the heading of a table
        first = COLOUR_FIRST.fullmatch(line)
        last = None if first else NAME_FIRST.fullmatch(line)
        if not (first or last) or (first and re.match(r"\d+[\s,;]", first.group(4) or "")):
            raise UserError(
                f"{path}: wanted a colour and a name such as 128 64 128 road, found {printable(line, 80)!r}"
            )
        values = first.groups()[:3] if first else last.groups()[1:] if last else ()
        name = ((first.group(4) if first else last.group(1) if last else "") or "").strip()
        colour = tuple(int(value) for value in values)
        if max(colour) > 255:
            raise UserError(f"{path}: colour {' '.join(map(str, colour))} of '{printable(name, 80)}': wanted 0 to 255")
        red, green, blue = colour
        if any(other == colour for other, _ in found):
            raise UserError(f"{path} lists the colour {red} {green} {blue} twice: wanted one class for a colour")
        if name and any(other == name for _, other in found):
            raise UserError(f"{path} lists '{printable(name, 80)}' twice: wanted one colour for a class")
        found.append(((red, green, blue), name))
    return found


def _of_palette(path: Path, names: Sequence[str] | None) -> Meaning:
    """With ``names``, those of the palette's classes that are meant, in their order; the others are not judged."""
    palette = read_palette(path)
    classes = [name for _, name in palette if name] if names is None else list(names)
    lacking = sorted(set(classes) - {name for _, name in palette})
    if lacking:
        raise UserError(f"{path} has no colour of {', '.join(lacking[:3])}: wanted one for every class of data.classes")
    numbers = {name: number for number, name in enumerate(classes)}
    colours = np.full(1 << 24, -2, np.int16)
    for (red, green, blue), name in palette:
        colours[red << 16 | green << 8 | blue] = numbers.get(name, -1)
    return Meaning(classes, -1, colours, path.name)


# ---- a folder of images and masks ------------------------------------------------------------------------------


class Masks:
    """Beside the images of a part lie their masks, of the same names."""

    demo = "masks"
    inside = f"{IMAGES}/* and {MASKS}/*"
    known_by = "pasted 1"  # another number where the demo's pictures change
    by_timm = False

    def completed(self, config: DataPlan) -> tuple[DataPlan, list[str]]:
        """What names the classes, where it lies with the masks; and the parts of the demo."""
        if config.source == self.demo:
            for field, name in (("test_split", "test"), ("val_split", "val")):
                if getattr(config, field) not in (AUTO, name):
                    raise UserError(f"data.{field}: the demo's masks have a part '{name}' of digits of its own, wanted "
                                    f"{name}, found {getattr(config, field)}")  # fmt: skip
            return config.model_copy(update={"test_split": "test", "val_split": "val"}), []
        usual = (
            ("palette", PALETTE_FILE, "has the colours of the masks"),
            ("classes", CLASSES_FILE, "names the classes"),
        )
        lines = []
        for field, name, words in usual:
            path = Path(config.source) / name
            if getattr(config, field) is None and path.is_file():
                config = config.model_copy(update={field: path})
                lines.append(f"{path} {words}")
        return config, lines

    def flat(self, folders: Collection[str]) -> str | None:
        """In words what the folders of a source without parts are."""
        return "its images lie right there" if {IMAGES, MASKS} <= set(folders) else None

    def may_lack_classes(self, config: DataPlan) -> bool:
        """A list that lies with the masks is of what they show; another one may be of what a network knows."""
        own = config.classes is not None and config.classes.parent.absolute() == Path(config.source).absolute()
        return config.most_images is not None or (config.classes is not None and not own)

    def names(self, config: DataPlan) -> Iterator[bytes]:
        """As ``sources.names_of``: all images, then all masks, part by part."""
        for split in sorted(parts_of(config)):
            for place in (IMAGES, MASKS):
                folder = part_folder(config, split, self.inside) / place
                if folder.is_dir():
                    yield from list_images(folder, below=_below(split, place))

    def make(self, out: Path, config: DataPlan) -> tuple[list[str], dict[str, Split]]:
        """The demo."""
        from .pasted import pasted

        return pasted(out, config)

    def folder(self, config: DataPlan, others: Others, out: Path) -> tuple[Path, list[str], dict[str, Split]]:
        """``source/<split>/images/*`` and ``source/<split>/masks/*``; masks are checked and kept in ``out``."""
        root, meaning = Path(config.source), meaning_of(config)
        pairs: dict[str, list[tuple[bytes, bytes]]] = {}
        parts = [(IMAGES, MASKS) if split == "." else Path(split).parts[:1] for split in parts_of(config)]
        _tell_others(root, root, {CLASSES_FILE, PALETTE_FILE, *itertools.chain(*parts)}, others)
        for split in parts_of(config):
            place = part_folder(config, split, self.inside)
            for name in (IMAGES, MASKS):
                if not (place / name).is_dir():
                    there = (
                        ", ".join(sorted(path.name for path in place.iterdir() if path.is_dir())[:6]) or "no folders"
                    )
                    raise UserError(f"no folder {place / name}: wanted {place}/{IMAGES}/* and {place}/{MASKS}/*, "
                                    f"found {there}")  # fmt: skip
            if place != root:
                _tell_others(place, root, (IMAGES, MASKS), others)
            pairs[split] = list(_paired(place, split, others))
            if not pairs[split] and not others.missing:
                found = f", found {others.words()}" if others.counts else ""
                raise UserError(f"no images in {place / IMAGES}: wanted .jpg, .png or the like{found}")
        splits = {}
        with (out / SPOOL).open("wb") as spool:
            for split, named in pairs.items():
                splits[split] = _read_all(root, named, meaning, others, spool, f"reading masks of {split}")
        _check_white(root, meaning, splits)
        return root, meaning.classes, with_rarest(splits, config.train_split)

    def read(self, sample: Sample, spec: Mapping[str, Any]) -> np.ndarray:
        """The class of each pixel that a network is shown, int16 [height, width]; -1 where nobody judges it."""
        fitted = sample.fitted_mask(spec)
        if fitted is None:
            return np.full(sides(spec), -1, np.int16)
        return np.where(fitted == IGNORED, np.int16(-1), fitted.astype(np.int16))


def _check_white(root: Path, meaning: Meaning, splits: Mapping[str, Split]) -> None:
    """Refuse masks of black and white, as programs write them that know two classes. Raises UserError."""
    tables = [split.masks for split in splits.values() if split.masks is not None]
    pixels = sum(table["pixels"].sum(0, dtype=np.int64) for table in tables)
    white = sum(int(table["area"].sum(dtype=np.int64)) for table in tables) - int(np.sum(pixels))
    if len(meaning.classes) == 2 and meaning.ignored == IGNORED and white and not pixels[1]:
        first, second = meaning.classes
        raise UserError(
            f"the masks in {root} have 0 and 255 alone, and 255 is what nobody judges: where it is '{second}', write "
            f"{PALETTE_FILE} there with the lines '0 0 0 {first}' and '255 255 255 {second}'"
        )


def has_masks(part: Path) -> bool:
    """Whether images and masks lie in the folder of a part."""
    return all((part / name).is_dir() and any(True for _ in list_images(part / name)) for name in (IMAGES, MASKS))


def _below(split: str, place: str) -> bytes:
    return os.fsencode(os.path.normpath(f"{split}/{place}") + "/")


def _tell_others(place: Path, root: Path, known: Collection[str], others: Others) -> None:
    """Tell what lies in a folder of a source and is not ``known``."""
    with os.scandir(os.fsencode(place)) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = place / os.fsdecode(entry.name)
            if path.name in known or holds_artifacts(path):
                continue
            kind = kind_of(entry)
            told = (
                f"{kind}s beside the images" if kind in ("file", "folder") else "links to nowhere, pipes and the like"
            )
            if kind == "folder" and is_hidden(entry.name):
                told = "hidden folders"
            others.add(told, os.fsencode(path.relative_to(root)))


def _stem(name: bytes) -> bytes:
    return os.path.splitext(name)[0]  # noqa: PTH122 (bytes)


def _paired(place: Path, split: str, others: Others) -> Iterator[tuple[bytes, bytes]]:
    """The names below the source of each image and its mask. What has no partner is told as missing."""
    images, masks = (_below(split, name) for name in (IMAGES, MASKS))
    of_stem: dict[bytes, bytes] = {}
    for mask in list_images(place / MASKS, others, masks):
        stem = _stem(mask)[len(masks) :]
        if stem in of_stem:
            others.add_missing(mask, f"a second mask of the name, beside {_shown(of_stem[stem])}")
        else:
            of_stem[stem] = mask
    taken: dict[bytes, bytes] = {}
    for image in list_images(place / IMAGES, others, images):
        stem = _stem(image)[len(images) :]
        if stem in taken:
            first = _shown(taken[stem])
            others.add_missing(image, f"a second image of the name, beside {first}: their masks are one file")
            continue
        taken[stem] = image
        if stem in of_stem:
            yield image, of_stem[stem]
        else:
            others.add_missing(image, f"no mask: wanted {_shown(masks + stem)}.png")
    for stem in sorted(of_stem.keys() - taken.keys()):
        others.add_missing(of_stem[stem], "a mask of no image")


def _shown(name: bytes) -> str:
    return printable(os.fsdecode(name), 200)


def _read_all(
    root: Path, pairs: Sequence[tuple[bytes, bytes]], meaning: Meaning, others: Others, spool: BinaryIO, what: str
) -> Split:
    """The images whose masks are as they should be; the others are told as missing. All cores decode."""

    def found(pair: tuple[bytes, bytes]) -> tuple[ReadMask, bytes]:
        image, mask = (root / os.fsdecode(name) for name in pair)
        read = read_mask(mask, image, meaning)
        return read, b"" if read.mask is None else encode(read.mask)

    names: list[bytes] = []
    rows: list[tuple[Any, ...]] = []
    moved: list[bytes] = []
    masks = track(in_order(found, pairs), what, len(pairs))
    for (image, name), (read, content) in zip(pairs, masks, strict=True):
        if read.mask is None:
            others.add_missing(name, read.fault)
            continue
        if read.moved:
            moved.append(image)
        names.append(image)
        rows.append(row_of(read.mask, content, spool, len(meaning.classes)))
    if moved:
        note(
            f"data: EXIF turns or mirrors {len(moved)} images without changing their size, such as {_shown(moved[0])}: "
            "their masks are taken to lie as the image is seen; where they lie as it is stored, drop the EXIF"
        )
    return split_of(names, rows, len(meaning.classes))


def row_of(mask: np.ndarray, content: bytes, spool: BinaryIO, classes: int) -> tuple[Any, ...]:
    """Put a mask behind the others, and say what ``table_of`` holds of it."""
    start = spool.tell()
    spool.write(content)
    pixels = np.bincount(mask.ravel(), minlength=256)[:classes]
    return start, len(content), zlib.crc32(mask.tobytes()), mask.size, pixels


def split_of(names: Sequence[bytes], rows: Sequence[tuple[Any, ...]], classes: int) -> Split:
    """Images with their masks; their numbers are not known yet."""
    table = np.zeros(len(rows), table_of(classes))
    for at, row in enumerate(rows):
        table[at] = row
    return Split.of(names, np.zeros(len(names), np.int32))._replace(masks=table)


class ReadMask(NamedTuple):
    """A mask, uint8 [H, W], 255 where it is ignored; None and why, where it is not one of its image."""

    mask: np.ndarray | None
    fault: str = ""
    moved: bool = False  # whether EXIF moves the pixels of its image in a way that the size does not show


def read_mask(path: Path, image: Path, meaning: Meaning) -> ReadMask:
    """The mask in a file, checked against its image."""
    from .looks import reason

    try:
        with opened(path) as mask:
            found, fault = meaning.read(mask)
    except (OSError, MemoryError) as error:
        return ReadMask(None, reason(error))
    if found is None:
        return ReadMask(None, fault)
    try:
        with opened(image) as picture:
            width, height = picture.size
            orientation = picture.getexif().get(ORIENTATION)
    except (OSError, MemoryError, SyntaxError, ValueError, TypeError, KeyError):
        return ReadMask(found)  # what is wrong with the image is told with all images
    turned, is_square = orientation in TURNED, width == height
    if turned:
        width, height = height, width
    if found.shape != (height, width):
        told = f"{found.shape[1]}x{found.shape[0]} pixels, its image {width}x{height}"
        return ReadMask(None, told + (" (turned as its EXIF says, which no mask is)" if turned else ""))
    return ReadMask(found, moved=orientation in MOVED and (is_square or not turned))


def with_rarest(splits: Mapping[str, Split], train: str) -> dict[str, Split]:
    """``splits`` whose images are numbered by the rarest class that each shows, as the training images show them.

    So that a cut of each class, or a choice that is even over the classes, spreads over what the images show.
    """
    learned = splits[train]
    assert learned.masks is not None
    pixels = learned.masks["pixels"].sum(0, dtype=np.int64)
    order = np.lexsort((pixels, learned.images_by_class(len(pixels))))  # the rarest first, by images and then by pixels

    def numbers(split: Split) -> np.ndarray:
        assert split.masks is not None
        shown = np.where(split.masks["pixels"][:, order] > 0, np.arange(len(order)), len(order))
        return order[shown.min(axis=1)].astype(np.int32) if len(shown) else np.zeros(0, np.int32)

    return {name: split._replace(labels=numbers(split)) for name, split in splits.items()}


# ---- kept ------------------------------------------------------------------------------------------------------


def encode(mask: np.ndarray) -> bytes:
    """uint8 [H, W] as it is kept: a grey PNG."""
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(mask).save(stream, "PNG")
    return stream.getvalue()


def decode(content: bytes, classes: int) -> np.ndarray:
    """What ``encode`` wrote. Raises ValueError for anything else, or for a class that is none."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            mask = np.asarray(image)
    except Exception as error:  # the reader raises its own for a broken file
        raise ValueError("no PNG") from error
    if mask.dtype != np.uint8 or mask.ndim != 2 or ((mask >= classes) & (mask != IGNORED)).any():
        raise ValueError("no mask")
    return mask


def resized(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W] for its image at ``size`` (width, height), by nearest neighbour."""
    rows, columns = nearest(mask.shape[0], size[1]), nearest(mask.shape[1], size[0])
    return np.asarray(mask[np.ix_(rows, columns)])


class KeptMasks:
    """The masks of a part, in the order of its images; memory does not grow with their number."""

    def __init__(self, content: np.ndarray, places: np.ndarray, classes: int) -> None:
        """``content`` uint8 [bytes]; ``places`` int64 [N, 2], where in it each begins and how long it is."""
        self._content, self._places, self._classes = content, places, classes

    def __getitem__(self, at: int) -> np.ndarray:
        """uint8 [H, W], 255 where nobody judges. Raises ValueError for one that nobody here wrote."""
        start, size = self._places[at].tolist()
        return decode(self._content[start : start + size].tobytes(), self._classes)


def write_masks(
    spool: Path, table: np.ndarray, copy_size: Callable[[tuple[int, int]], tuple[int, int]] | None, out: Path
) -> np.ndarray:
    """Write the masks of a part end to end, and say where each lies, int64 [N, 2].

    Args:
        spool: holds them at ``start`` of each row of the ``table``.
        copy_size: from a mask's (width, height) to that of its image's copy; None where there are no copies.
    """
    sizes = []
    content = np.memmap(spool, np.uint8, "r") if len(table) else np.zeros(0, np.uint8)
    with out.open("wb") as stream:
        for row in table:
            mask = content[row["start"] : row["start"] + row["size"]].tobytes()
            if copy_size is not None:
                whole = decode(mask, IGNORED)
                size = copy_size((whole.shape[1], whole.shape[0]))
                mask = mask if size == (whole.shape[1], whole.shape[0]) else encode(resized(whole, size))
            stream.write(mask)
            sizes.append(len(mask))
    ends = np.cumsum(sizes, dtype=np.int64)
    return np.stack([ends - sizes, np.asarray(sizes, np.int64)], axis=1) if sizes else np.zeros((0, 2), np.int64)
