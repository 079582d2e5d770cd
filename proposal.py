"""What ``kdpipe init`` proposes: a recipe for a folder of images, a teacher and this machine, with its reasons."""

from __future__ import annotations

import itertools
import json
import os
import re
import secrets
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .core.config import DataPlan, InputSettings, ModelSettings, Recipe, read_recipe, validated
from .core.errors import DeviceLost, UserError, choice
from .core.inputs import Size, sides, size_words
from .core.proc import is_installed
from .core.progress import note
from .core.sealed import UNPRINTABLE, printable
from .data.formats import opened
from .data.listing import list_images
from .data.masks import IMAGES, Masks, has_masks, meaning_of
from .data.sources import TRAIN_NAMES, Parts, usual_parts
from .devices import DEVICES, book, find_device
from .export import TARGETS
from .networks.names import check_name
from .quantize import VARIANTS

WEIGHTS = (".pth", ".pt", ".safetensors")
NOT_CLASSES = ("artifacts",)  # what kdpipe itself may have left there
SAMPLE = 64  # images whose size is looked at
SMALL_SIDE = 128  # pixels: networks for photographs shrink smaller images to nothing
STEP = 32  # pixels: by which most networks shrink an image
MASKS_SIDE = 256  # pixels: the shorter side of what masks are drawn on, where images are larger
MASKS_MODEL = "unet"
SCHEMA_FILE = "kdpipe.schema.json"
SCHEMA_ID = "kdpipe-recipe"

Ask = Callable[[str, str], str]  # a question and the answer that is taken without one


@dataclass(frozen=True)
class Wish:
    """What was said beforehand; None where it is to be asked, or taken as it usually is."""

    weights: Path | None = None
    teacher: str | None = None
    student: str | None = None
    size: int | None = None
    devices: tuple[str, ...] | None = None


class Images(NamedTuple):
    """A folder of images as it was found."""

    source: Path
    parts: Parts
    classes: tuple[str, ...]
    learn: int
    held_out: int
    side: int  # the shorter one of a usual image, pixels
    masks: Size | None = None  # with masks beside them: the input that is usual for them


class Teacher(NamedTuple):
    """The teacher, and how it is known."""

    model: str
    weights: Path | None
    size: int | None  # of its input, where only one is possible
    reason: str


@dataclass(frozen=True)
class Proposal:
    """A recipe as text, and what a person should know of it."""

    name: str
    text: str
    words: str


# ---- what is there ---------------------------------------------------------------------------------------


def look_at(folder: Path | None) -> Images:
    """Find the images below ``folder``, or in the one folder in it that holds some by class.

    Where no folder is named, only one with a training part is looked for, here and one level below: what else lies here
    may be anything.

    Raises:
        UserError: none there, or several data sets.
    """
    named, folder = folder is not None, folder or Path()
    if not folder.is_dir():
        raise UserError(f"no folder {folder}: wanted one with images by class")
    below = [path for path in _folders(folder) if path.name not in NOT_CLASSES]
    ways = [([folder], True), (below, True)]
    for roots, parts in [*ways, ([folder], False), (below, False)] if named else ways:
        found = [(root, layout) for root in roots if (layout := _layout(root, parts)) is not None]
        if len(found) > 1:
            names = ", ".join(root.name for root, _ in found[:4])
            raise UserError(f"{folder} has several folders of images ({names}): name one, such as {found[0][0]}")
        if found:
            return _counted(*found[0])
    there = ", ".join(path.name for path in _folders(folder)[:6]) or "no folders"
    if not named:
        raise UserError(f"no folder with a part 'train' here, found {there}: name the images, kdpipe init FOLDER")
    raise UserError(
        f"no images by class in {folder}: wanted {folder}/train/<class>/* or {folder}/<class>/* (with masks, "
        f"{folder}/train/images/* and masks/*), found {there}"
    )


def _layout(root: Path, parts: bool) -> Parts | None:
    """Its parts; with ``parts`` only those of folders that are called so."""
    there = {path.name.lower(): path for path in _folders(root)}
    train = next((there[name] for name in TRAIN_NAMES if name in there), None)
    if not parts:
        return Parts(".", None, None) if train is None and _has_classes(root) else None
    return usual_parts(root, train.name) if train is not None and _has_classes(train) else None


def _folders(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir() and not path.name.startswith("."))
    except PermissionError:
        return []


def _has_classes(place: Path) -> bool:
    """Whether two folders in it hold images."""
    folders = (path for path in _folders(place) if path.name not in NOT_CLASSES)
    holding = (path for path in folders if any(True for _ in list_images(path)))
    return len(list(itertools.islice(holding, 2))) == 2


def _counted(root: Path, parts: Parts) -> Images:
    if has_masks(root / parts.train):
        return _counted_masks(root, parts)
    classes = [path for path in _folders(root / parts.train) if path.name not in NOT_CLASSES or parts.train != "."]
    counts = [sum(1 for _ in list_images(path)) for path in classes]
    held_out = 0 if parts.test is None else sum(1 for _ in list_images(root / parts.test))
    shorter = [min(size) for size in _sizes(classes)]
    if not shorter:
        raise UserError(f"none of the first images in {root / parts.train} can be opened: wanted images")
    names = tuple(path.name for path in classes)
    return Images(root, parts, names, sum(counts), held_out, round(statistics.median(shorter)))


def _counted_masks(root: Path, parts: Parts) -> Images:
    plan, _ = Masks().completed(DataPlan(task="segmentation", source=str(root)))
    classes = tuple(meaning_of(plan).classes)
    place = root / parts.train / IMAGES
    learn = sum(1 for _ in list_images(place))
    held_out = 0 if parts.test is None else sum(1 for _ in list_images(root / parts.test / IMAGES))
    found = list(_sizes([place]))
    if not found:
        raise UserError(f"none of the first images in {place} can be opened: wanted images")
    width, height = (statistics.median(sides) for sides in zip(*found, strict=True))
    scale = min(1.0, MASKS_SIDE / min(width, height))
    size = (max(STEP, round(side * scale / STEP) * STEP) for side in (height, width))
    usual = validated(InputSettings, {"size": list(size)}, "the size of the input").size
    return Images(root, parts, classes, learn, held_out, round(min(width, height)), usual)


def _sizes(folders: list[Path]) -> Iterator[tuple[int, int]]:
    """Width and height of some images, the folders taking turns."""
    listed = [(folder, itertools.islice(list_images(folder), SAMPLE)) for folder in folders]
    turns = itertools.zip_longest(*([folder / os.fsdecode(name) for name in names] for folder, names in listed))
    paths = (path for turn in turns for path in turn if path is not None)
    for path in itertools.islice(paths, SAMPLE):
        # What cannot be opened is named by ``kdpipe data``.
        with suppress(OSError, MemoryError, UserError), opened(path) as image:
            yield image.size


def weights_near(folder: Path) -> Path | None:
    """The one file of weights beside the images or here; None where there is none, or several."""
    places = dict.fromkeys(place.absolute() for place in (Path.cwd(), folder, folder.parent))
    there = (path for place in places for path in place.iterdir())
    found = [path for path in there if path.suffix.lower() in WEIGHTS and path.is_file()]
    return found[0] if len(found) == 1 else None


# ---- what is proposed ------------------------------------------------------------------------------------


def propose(folder: Path | None, wish: Wish, ask: Ask, out: Path | None) -> tuple[Proposal, Path]:
    """A recipe for the images in ``folder``, and where it is to be written.

    At most five questions are asked: the weights, the teacher's network where the weights do not tell, the size of its
    input, the student, the devices.

    Raises:
        UserError: no images, weights that cannot be read or of other classes, an unknown network or device.
    """
    images = look_at(folder)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", images.source.absolute().name).strip("-._") or "recipe"
    path = out or Path(f"{name}.yaml")
    if path.exists():
        raise UserError(f"{path} is there already: choose another --out, or run it: kdpipe run {path}")
    teacher = _teacher(images, wish, ask)
    size, why_size = _size(images, teacher, wish, ask)
    student = _student(images, size, wish, ask)
    devices = _devices(wish, ask)
    targets = _targets(devices)
    text = _written(name, path, images, teacher, size, why_size, student, devices, targets)
    shown = "trained here" if teacher.weights is None else f"{teacher.model} from {teacher.weights.name}"
    where = ", ".join(devices)
    words = (
        f"{len(images.classes)} classes, {images.learn:,} images to learn from; teacher {shown}, student {student}; "
        f"{', '.join(targets)}; measured on {where}"
    )
    return Proposal(name, text, words), path


def _teacher(images: Images, wish: Wish, ask: Ask) -> Teacher:
    weights = wish.weights
    if images.masks is not None:
        if weights is not None:
            raise UserError(
                f"{weights}: which network draws masks is not told by its tensors: leave the weights out here, and "
                "write teacher.model, encoder and checkpoint into the recipe (docs/guide.md)"
            )
        encoder = wish.teacher or ask("The encoder of the teacher to train, a name of timm", "resnet18")
        _check(encoder)
        return Teacher(encoder, None, None, "its encoder; it is trained here on all training images")
    if weights is None and wish.teacher is None:
        near = weights_near(images.source)
        question = "The teacher's weights, a .pth or .safetensors (none: a teacher is trained here)"
        answer = ask(question, str(near or "none"))
        weights = None if answer.strip().lower() in ("", "none") else Path(answer).expanduser()
    if weights is None:
        model = wish.teacher or ask("The network to train as the teacher, a name of timm", "resnet18")
        _check(model)
        return Teacher(model, None, None, "no weights were given: it is trained here on all training images")
    if not weights.is_file():
        raise UserError(f"no file at {weights}: wanted the teacher's weights, .safetensors or .pth")
    if wish.teacher is not None:
        _check(wish.teacher)
        return Teacher(wish.teacher, weights, None, "as it was named")
    from .networks.recognise import recognise
    from .networks.weights import read_state_dicts

    found = recognise(read_state_dicts(weights), weights.stem)
    if found is None:
        question = (
            f"The network that {weights.name} is of, a name of timm or torchvision/NAME (its tensors do not tell)"
        )
        model = ask(question, "")
        if not model:
            raise UserError(
                f"{weights} is of no network of timm or torchvision as it stands: name the one that it is of by --model"
            )
        _check(model)
        return Teacher(model, weights, None, "as it was named")
    if found.classes != len(images.classes):
        raise UserError(
            f"{weights} has {found.classes} outputs and {images.source} has {len(images.classes)} classes: wanted as "
            "many; with fewer images than classes, write data.classes into a recipe (docs/guide.md)"
        )
    reason = f"{weights.name} has exactly its tensors; of several such networks the one of the usual name"
    return Teacher(found.model, weights, found.size, reason)


def _check(model: str) -> None:
    """Refuse an unknown name of a network. Raises UserError."""
    check_name(model)
    if "timm" in sys.modules:  # which knows better, and is here already
        from .networks.models import input_spec

        input_spec(ModelSettings(model=model))


def _size(images: Images, teacher: Teacher, wish: Wish, ask: Ask) -> tuple[Size | None, str]:
    """Side of the input, None for the network's usual one; and why."""
    if images.masks is not None and wish.size is None:
        answer = ask("Pixels of the input, height x width", size_words(images.masks))
        size = validated(InputSettings, {"size": _size_of(answer)}, "the size of the input").size
        return size, f"the images have about {images.side} pixels" if size == images.masks else "as it was named"
    if wish.size is not None:
        return validated(InputSettings, {"size": wish.size}, "--size").size, "as it was named"
    if teacher.size is not None:
        return None, ""
    usual = max(STEP, round(images.side / STEP) * STEP) if images.side < SMALL_SIDE else None
    answer = ask("Pixels of the side on which the teacher was trained (usual: as timm has it)", str(usual or "usual"))
    if answer.strip().lower() in ("", "usual"):
        return None, ""
    size = validated(InputSettings, {"size": answer}, "the size of the input").size
    return size, f"the images have about {images.side} pixels" if size == usual else "as it was named"


def _size_of(text: str) -> list[int] | str:
    """A height and width as a person writes it, or the side of a square."""
    found = [each.strip() for each in text.lower().split("x")]
    return [int(each) for each in found] if len(found) == 2 and all(map(str.isdigit, found)) else text


def _student(images: Images, size: Size | None, wish: Wish, ask: Ask) -> str:
    small = images.side < SMALL_SIDE and (size is None or max(sides(size)) < SMALL_SIDE)
    usual = "resnet10t" if small else "mobilenetv4_conv_small"
    what = "The student" if images.masks is None else "The student's encoder"
    student = wish.student or ask(f"{what}, a small network of timm", usual)
    _check(student)
    return student


def _devices(wish: Wish, ask: Ask) -> tuple[str, ...]:
    known = [name for name in book.known(DEVICES) if name != "null"]
    devices = wish.devices
    if devices is None:
        question = f"Where it is to run, of {', '.join(known)}" if len(known) > 1 else "Where it is to run"
        devices = tuple(name.strip() for name in ask(question, "local").split(",") if name.strip()) or ("local",)
    for name in devices:
        if name not in known:
            raise choice("device", name, known)
    return devices


def _targets(devices: tuple[str, ...]) -> tuple[str, ...]:
    """What can be made here and runs there; all that can be made, where none is known to run. Raises UserError."""
    able = [
        target
        for target in TARGETS
        if all(map(is_installed, (*TARGETS[target].needs, *VARIANTS[target]["int8"].needs)))
    ]
    if not able:
        raise UserError("no target can be made here: pip install 'kdpipe[all]' (kdpipe doctor says what is missing)")
    runs: set[str] = set()
    for name in devices:
        try:
            runs |= set(find_device(name).probe().targets)
        except DeviceLost as error:
            note(f"'{name}' cannot be asked what it runs: {error}")
    return tuple(target for target in able if target in runs) or tuple(able)


# ---- written ---------------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """A text as YAML reads it back. Raises UserError for one with control characters."""
    if UNPRINTABLE.search(text):
        raise UserError(f"'{printable(text, 120)}' has control characters: rename it")
    words = ("true", "false", "yes", "no", "on", "off", "null", "y", "n")
    plain = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", text) and text.lower() not in words
    return text if plain else json.dumps(text, ensure_ascii=False)


def _path_from(recipe: Path, path: Path) -> str:
    """A path as a recipe has it: from its own folder where it lies in that, else whole."""
    here, there = (Path(os.path.normpath(each.absolute())) for each in (recipe.parent, path))
    return _plain(there.relative_to(here).as_posix() if there.is_relative_to(here) else str(there))


def _written(
    name: str,
    path: Path,
    images: Images,
    teacher: Teacher,
    size: Size | None,
    why_size: str,
    student: str,
    devices: tuple[str, ...],
    targets: tuple[str, ...],
) -> str:
    """The recipe, with a reason for what was chosen."""
    parts = images.parts
    held_out = f"{images.held_out:,} held out" if parts.test else "none held out"
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# Written by `kdpipe init` for {len(images.classes)} classes: {images.learn:,} images to learn from, "
        f"{held_out}, about {images.side} pixels.",
        "# What is left out stands at its default. What a run takes: kdpipe run --dry-run; then: kdpipe run.",
        f"name: {_plain(name)}",
        "data:",
        *(["  task: segmentation"] if images.masks is not None else []),
        f"  source: {_path_from(path, images.source)}",
    ]
    if parts.train != "train":
        flat = "its folders are the classes" if images.masks is None else "its images lie right there"
        what = flat if parts.train == "." else "the part to learn from"
        lines.append(f"  train_split: {json.dumps(parts.train)}  # {what}")
    if parts.test is None:
        lines.append("  test_split: null  # no held-out part is there: a fifth of the images is cut for testing")
    else:
        lines.append(f"  test_split: {_plain(parts.test)}  # nothing trains, selects or calibrates on it")
    if parts.val is not None:
        lines.append(f"  val_split: {_plain(parts.val)}  # for selection: none is cut from the images to learn from")
    spelled = list(size) if isinstance(size, tuple) else size
    input_line = f"  input: {{size: {spelled}}}  # {why_size}"
    views = ""
    if size is not None and max(sides(size)) <= 64:
        views = "augment: {crop: pad, flip: 0}  # of small pictures; flip: 0.5 where a mirrored one means the same"
    encoder = "model" if images.masks is None else f"model: {MASKS_MODEL}\n  encoder"
    lines += ["teacher:", f"  {encoder}: {_plain(teacher.model)}  # {teacher.reason}"]
    if teacher.weights is not None:
        lines.append(f"  checkpoint: {_path_from(path, teacher.weights)}")
    lines += [input_line] if size is not None else []
    if teacher.weights is None and views:
        lines += ["  train:", f"    {views}"]
    lines += ["student:", f"  {encoder}: {_plain(student)}"]
    lines += [f"  input: {{size: {spelled}}}"] if size is not None else []
    lines += [
        "distill:",
        "  method: kd  # the teacher's softened outputs; docs/guide.md has the others",
        "  temperature: 4",
        "  seeds: [0]  # [0, 1, 2] says how sure the gain is, and takes three times as long",
        "  train:",
        f"    epochs: {30 if images.learn > 20_000 else 60}",
    ]
    lines += [f"    {views}"] if views else []
    lines += [
        "export:",
        f"  targets: [{', '.join(targets)}]  # what can be made here and run there",
        "bench:",
        f"  devices: [{', '.join(map(_plain, devices))}]",
        "  effort: quick  # a first look; without this line it measures for minutes, for a claim",
    ]
    return "\n".join(lines) + "\n"


def write(proposal: Proposal, path: Path) -> Recipe:
    """Write the recipe, whole or not at all, and never over another; and its schema beside it. Returns what it says.

    Raises:
        UserError: there is one by now, or nothing can be written there.
    """
    ready = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        ready.write_text(proposal.text)
        recipe = read_recipe(ready)
        try:
            os.link(ready, path)  # unlike a rename it never replaces
        except FileExistsError:
            raise UserError(f"{path} is there already: choose another --out, or run it: kdpipe run {path}") from None
        write_schema(path.with_name(SCHEMA_FILE))
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror}): choose another --out") from None
    finally:
        ready.unlink(missing_ok=True)
    return recipe


def schema() -> dict[str, Any]:
    """What a recipe may hold, as JSON schema for editors."""
    found = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        **Recipe.model_json_schema(),
        "title": "A recipe of kdpipe",
    }
    return dict(_with_single_values(found))


def _with_single_values(found: Any) -> Any:
    """A list of any length may be given as its only member, as a recipe may have it."""
    if isinstance(found, list):
        return [_with_single_values(each) for each in found]
    if not isinstance(found, dict):
        return found
    inner = {name: _with_single_values(each) for name, each in found.items()}
    if inner.get("type") != "array" or not isinstance(inner.get("items"), dict):
        return inner
    outer = {name: inner.pop(name) for name in ("default", "description", "title") if name in inner}
    return {"anyOf": [inner, inner["items"]], **outer}


def write_schema(path: Path) -> None:
    """Write it, but not over a file of somebody else's."""
    text = json.dumps(schema(), indent=1) + "\n"
    if path.exists():
        try:
            there = json.loads(path.read_text())
        except ValueError:
            return
        if not isinstance(there, dict) or there.get("$id") != SCHEMA_ID or path.read_text() == text:
            return
    ready = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    ready.write_text(text)
    ready.replace(path)
