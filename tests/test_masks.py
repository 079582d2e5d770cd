"""Masks beside images: what is read of them, what is refused, and that they go wherever their images go."""

from __future__ import annotations

import io
import json
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Told, assert_one_line, kdpipe, listening, replace_file
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP, AugmentOp

from kdpipe.chain import Chain, Wants, fitted_config
from kdpipe.core.config import AugmentSettings, DataConfig, DataPlan, InputSettings, TrainSettings, read_recipe
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.data import pasted
from kdpipe.data.dataset import UNLABELED, Dataset, load_labels
from kdpipe.data.labels import ClassNumbers
from kdpipe.data.masks import IGNORED, Masks, encode, read_palette
from kdpipe.data.splits import spread_fraction
from kdpipe.data.survey import Survey
from kdpipe.data.views import SPATIAL, Pair, TrainingViews, _Moved, moving_transform, seeded, training_images
from kdpipe.networks.models import resolve_input
from kdpipe.runtime import preprocess
from kdpipe.runtime.preprocess import GREY, fit, fit_classes, nearest, placement

HEIGHT, WIDTH = 24, 36
CLASSES = ("ground", "left", "right")
SPEC = InputSpec(
    size=(16, 24), mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=1.0, interpolation="nearest", resize="stretch"
)


def drawn(seed: int, height: int = HEIGHT, width: int = WIDTH, classes: int = 3) -> np.ndarray:
    """A mask: a box of each class but the first somewhere on ground, uint8."""
    generator = np.random.default_rng(seed)
    mask = np.zeros((height, width), np.uint8)
    for number in range(1, classes):
        top, left = generator.integers(0, height - 8), generator.integers(0, width - 10)
        mask[top : top + 8, left : left + 10] = number
    return mask


def painted(mask: np.ndarray, noise: int = 0) -> Image.Image:
    """A picture whose red says the class of each pixel: 80 for each, and a little noise in the others."""
    pixels = np.random.default_rng(noise).integers(0, 60, (*mask.shape, 3), dtype=np.uint8)
    pixels[..., 0] = np.where(mask == IGNORED, 255, mask * 80)
    return Image.fromarray(pixels)


def seen(view: torch.Tensor) -> torch.Tensor:
    """The class that the red of a view [3, H, W] says."""
    return (view[0] * 255 / 80).round().long()


def filled(root: Path, parts: dict[str, int] | None = None, names: tuple[str, ...] = CLASSES) -> Path:
    """A user's folder of images and masks, no two alike."""
    seed = 0
    for part, count in (parts or {"train": 6, "val": 2, "test": 3}).items():
        for place in ("images", "masks"):
            (root / part / place).mkdir(parents=True)
        for at in range(count):
            seed += 1
            mask = drawn(seed)
            painted(mask, seed).save(root / part / "images" / f"{at}.png")
            Image.fromarray(mask).save(root / part / "masks" / f"{at}.png")
    (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root


@pytest.fixture
def street(tmp_path: Path) -> Path:
    return filled(tmp_path / "street")


def prepared(root: Path, artifacts: Path, **config: Any) -> tuple[Dataset, list[str]]:
    """The data set of a folder, and what was told."""
    told = Told()
    plan = {"source": str(root), "task": "segmentation", "val_fraction": 0.2, **config}
    with listening(told):
        dataset = Chain(artifacts).data(DataPlan.model_validate(plan))
    return dataset, told.notes


# ---- resizing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["cover", "stretch", "letterbox"])
@pytest.mark.parametrize("crop_fraction", [1.0, 0.8])
@pytest.mark.parametrize("shape", [(24, 36), (50, 40), (7, 91), (64, 16), (16, 24), (1, 3), (333, 517)])
def test_a_mask_goes_where_its_image_goes(resize: str, crop_fraction: float, shape: tuple[int, int]) -> None:
    """By nearest neighbour both ways the red of the image is the class of the mask.

    To the pixel, but where the middle of one lies between two others: both are nearest, and Pillow's rounding decides.
    """
    blocks = np.random.default_rng(0).integers(0, 3, (3, 5), dtype=np.uint8)
    mask = blocks[np.ix_(nearest(3, shape[0]), nearest(5, shape[1]))]
    spec = {"size": [16, 24], "crop_fraction": crop_fraction, "interpolation": "nearest", "resize": resize}
    image, fitted = fit(painted(mask), spec), fit_classes(mask, spec)
    assert image.shape == (16, 24, 3) and fitted.shape == (16, 24) and fitted.dtype == np.uint8
    outside = fitted == IGNORED
    same = image[..., 0] == fitted * 80
    assert same[~outside].mean() > (0.99 if shape == (333, 517) else 0.9)
    assert (image[outside] == GREY).all()
    place = placement((shape[1], shape[0]), spec)
    assert outside.any() == (place.left < 0 or place.top < 0) and (resize == "letterbox" or not outside.any())
    signed = fit_classes(mask.astype(np.int16), spec)
    assert np.array_equal(signed, np.where(outside, -1, fitted.astype(np.int16)))


@pytest.mark.parametrize("crop_fraction", [1.0, 0.8])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("shape", [(24, 36), (7, 91), (64, 16), (333, 517)])
def test_of_a_thin_image_only_what_is_shown_is_made(
    crop_fraction: float, interpolation: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same pixels but for rounding; of the last image a whole one would be of 45 million by 224."""
    blots = Image.fromarray(np.random.default_rng(0).integers(60, 196, (3, 4, 3), dtype=np.uint8))
    image = blots.resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    spec = {"size": [16, 24], "crop_fraction": crop_fraction, "interpolation": interpolation, "resize": "cover"}
    whole = fit(image, spec).astype(int)
    monkeypatch.setattr(preprocess, "MOST_PIXELS", 0)
    assert np.abs(fit(image, spec) - whole).max() <= 3, "Pillow rounds between its two passes, in either order"
    monkeypatch.undo()
    thin = Image.fromarray(np.full((1, 200_000, 3), 77, np.uint8))
    place = placement(thin.size, {**spec, "size": 224})
    assert place.width * place.height > 10**9
    assert (fit(thin, {**spec, "size": 224}) == 77).all()


@given(st.integers(1, 700), st.integers(1, 700))
def test_the_nearest_pixel_is_the_nearest(found: int, wanted: int) -> None:
    """Both rows have the same outer edges; distances as fractions."""
    chosen = nearest(found, wanted)
    for at in {0, wanted // 3, wanted - 1}:
        middle = Fraction(2 * at + 1, 2 * wanted)
        assert abs(Fraction(2 * int(chosen[at]) + 1, 2 * found) - middle) <= Fraction(1, 2 * found)
    assert chosen.min() >= 0 and chosen.max() < found and (np.diff(chosen) >= 0).all()


def test_what_each_way_of_resizing_keeps() -> None:
    """A square in the middle of a wide picture is one no more when stretched; else a border is lost or grey."""
    mask = np.zeros((100, 200), np.uint8)
    mask[25:75, 75:125] = 1
    shown = {}
    for resize in ("cover", "stretch", "letterbox"):
        spec = {"size": 40, "crop_fraction": 1.0, "interpolation": "bilinear", "resize": resize}
        fitted = fit_classes(mask, spec)
        rows, columns = np.where(fitted == 1)
        shown[resize] = (np.ptp(rows) + 1, np.ptp(columns) + 1, int((fitted == IGNORED).sum()))
        image = fit(Image.fromarray(np.repeat(mask[..., None] * 200, 3, 2)), spec)
        inside = (image[..., 0] > 100) & (image[..., 0] != GREY)
        assert np.abs(inside.astype(int) - (fitted == 1)).mean() < 0.02, "by any filter they lie on each other"
    assert shown == {"cover": (20, 20, 0), "stretch": (20, 10, 0), "letterbox": (10, 10, 800)}


def test_the_usual_resizing_is_in_no_key() -> None:
    usual = SPEC.model_copy(update={"resize": "cover"})
    assert "resize" not in usual.model_dump() and "resize" not in usual.model_dump(mode="json")
    assert SPEC.model_dump(mode="json")["resize"] == "stretch"
    assert InputSpec.model_validate(usual.model_dump(mode="json")) == usual
    assert InputSpec.model_validate(SPEC.model_dump(mode="json")) == SPEC
    assert "resize" not in InputSettings(size=32).model_dump(mode="json")
    assert "resize" not in fitted_config(usual).model_dump(mode="json")
    assert fitted_config(SPEC).model_dump(mode="json")["resize"] == "stretch"
    photographs = {"input_size": (3, 224, 224), "mean": (0, 0, 0), "std": (1, 1, 1), "crop_pct": 0.875}
    assert resolve_input(InputSettings(), photographs).crop_fraction == 0.875
    boxed = resolve_input(InputSettings(resize="letterbox"), photographs)
    assert (boxed.resize, boxed.crop_fraction) == ("letterbox", 1.0)


# ---- a folder --------------------------------------------------------------------------------------------------


def test_a_folder_of_images_and_masks(street: Path, tmp_path: Path) -> None:
    dataset, told = prepared(street, tmp_path / "artifacts")
    assert dataset.classes == list(CLASSES) and dataset.facts.task == "segmentation"
    assert dataset.facts.images == {"train": 6, "val": 2, "test": 3}
    assert f"{street / 'classes.txt'} names the classes" in told
    for part, count in dataset.facts.images.items():
        samples = dataset.samples(part)
        labels = load_labels(samples, SPEC.model_dump())
        assert labels.shape == (count, 16, 24) and labels.dtype == np.int16
        for sample, label in zip(samples, labels, strict=True):
            assert sample.path.is_relative_to(street), "images stay where they are"
            mask = np.asarray(Image.open(street / part / "masks" / sample.path.name))
            assert np.array_equal(sample.mask(), mask)
            assert np.array_equal(label, fit_classes(mask, SPEC.model_dump()))
            assert sample.label in mask
    survey = dataset.survey
    assert survey.images == dataset.facts.images and survey.by_class["train"][0] == 6
    assert sum(survey.pixel_shares) == pytest.approx(1) and survey.unjudged == 0
    with Image.open(dataset.path / dataset.SHEET) as sheet:
        assert np.asarray(sheet).std() > 20


def test_an_image_is_numbered_by_its_rarest_class(tmp_path: Path) -> None:
    root = filled(tmp_path / "street", {"train": 6, "val": 2, "test": 2})
    for at in range(6):
        mask = drawn(at)
        mask[mask == 2] = 0
        if at == 4:
            mask[0, 0] = 2
        Image.fromarray(mask).save(root / "train/masks" / f"{at}.png")
    dataset, _ = prepared(root, tmp_path / "artifacts")
    assert dataset.samples("train").labels.tolist() == [1, 1, 1, 1, 2, 1]
    assert dataset.survey.by_class["train"] == (6, 6, 1)
    assert any("a single training image: right" in line for line in prepared(root, tmp_path / "others")[1])
    chosen = {sample.position for sample in dataset.balanced("train", 2, seed=3)}
    assert 4 in chosen, "a choice that is even over the classes reaches the rare one"


def test_the_command_says_what_masks_show(street: Path, tmp_path: Path) -> None:
    mask = np.full((HEIGHT, WIDTH), IGNORED, np.uint8)
    mask[:, :9] = 0
    Image.fromarray(mask).save(street / "train/masks/0.png")
    call = ["data", street, "--task", "segmentation", "--artifacts", tmp_path / "artifacts"]
    done = kdpipe(*call)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "11 images of 3 classes: train 6, val 2, test 3"
    assert lines[1].startswith("training pixels: ground ") and lines[1].endswith("; 12.5 % not judged")
    assert lines[2].startswith("training images a class: 5 (left) to 6 (ground)")
    survey = json.loads(kdpipe(*call, "--json").stdout)["survey"]
    assert survey["images"] == {"train": 6, "val": 2, "test": 3} and survey["unjudged"] == pytest.approx(1 / 8)


def test_without_parts_the_test_images_are_cut(tmp_path: Path) -> None:
    filled(tmp_path / "flat", {"train": 12})
    root = tmp_path / "flat"
    for place in ("images", "masks"):
        (root / "train" / place).rename(root / place)
    (root / "train").rmdir()
    dataset, told = prepared(root, tmp_path / "artifacts")
    assert sum(dataset.facts.images.values()) == 12 and dataset.facts.images["test"] >= 2
    assert f"{root} has no parts: its images lie right there, and test images are cut from them" in told
    assert not any("not read" in line for line in told)
    for part in ("train", "test"):
        for sample in dataset.samples(part):
            assert np.array_equal(sample.mask(), np.asarray(Image.open(root / "masks" / sample.path.name)))


def test_whatever_changes_what_masks_say_makes_another_data_set(street: Path, tmp_path: Path) -> None:
    keys = [prepared(street, tmp_path / "artifacts")[0].key]
    assert prepared(street, tmp_path / "artifacts", classes=street / "classes.txt")[0].key == keys[0]
    keys.append(prepared(street, tmp_path / "artifacts", ignore_index=77)[0].key)
    mask = drawn(1)
    mask[0, 0] = 2
    Image.fromarray(mask).save(street / "train/masks/0.png")
    keys.append(prepared(street, tmp_path / "artifacts")[0].key)
    (street / "classes.txt").write_text("earth\nleft\nright\n")
    keys.append(prepared(street, tmp_path / "artifacts")[0].key)
    assert len(set(keys)) == len(keys)


def test_what_is_unsaid_is_in_no_key_of_a_classification() -> None:
    config = DataConfig.of(DataPlan(source="digits"), decoding=1, fingerprint="by name")
    assert not {"palette", "ignore_index", "palette_fingerprint"} & config.model_dump(mode="json").keys()
    survey = Survey(check="all", seen=1, by_class={"train": (1, 0)}, formats={}, shorter_side=None, longer_side=None)
    assert not {"images", "pixel_shares", "unjudged"} & survey.model_dump(mode="json").keys()
    assert ClassNumbers().known_by == "by name"


def test_a_cut_is_as_large_as_it_says() -> None:
    """Even over the classes, and no larger for there being many of them; a smaller one lies inside a larger one."""
    labels = np.repeat(np.arange(12), [40, 20, 20, 10, 1, 1, 1, 1, 1, 1, 2, 2])
    for seed in range(20):
        drawn_by = {share: spread_fraction(labels, share, seed) for share in (0.1, 0.2, 0.5)}
        assert [len(chosen) for chosen in drawn_by.values()] == [10, 20, 50]
        assert set(drawn_by[0.1]) <= set(drawn_by[0.2]) <= set(drawn_by[0.5])
        counts = np.bincount(labels[drawn_by[0.5]], minlength=12)
        assert np.abs(counts[:4] - [20, 10, 10, 5]).max() <= 2
        assert (np.diff(drawn_by[0.2]) > 0).all()
    assert len(spread_fraction(labels, 0.001, 0)) == 1 and len(spread_fraction(labels, 0, 0)) == 0
    assert len({int(at) for seed in range(60) for at in spread_fraction(labels, 0.1, seed)}) > 90, "any may be drawn"


def test_few_images_of_many_classes_are_not_all_held_out(tmp_path: Path) -> None:
    root = filled(tmp_path / "street", {"train": 30}, tuple(f"class {at}" for at in range(12)))
    for path in root.glob("train/masks/*.png"):
        mask = np.array(Image.open(path))
        mask[0, :24] = np.repeat(np.arange(12), 2)
        mask[1, 0] = int(path.stem) % 12
        Image.fromarray(mask).save(path)
    dataset, _ = prepared(root, tmp_path / "artifacts", test_split=None, val_fraction=0.1)
    assert dataset.facts.images == {"train": 22, "val": 2, "test": 6}
    assert training_images(dataset, 0.1, 0, with_unlabeled=False).labeled == 2


# ---- mistakes --------------------------------------------------------------------------------------------------


def put(mask: np.ndarray | Image.Image, name: str = "train/masks/2.png", **settings: Any) -> Callable[[Path], object]:
    def damage(root: Path) -> None:
        (root / "train/masks/2.png").unlink()
        (mask if isinstance(mask, Image.Image) else Image.fromarray(mask)).save(root / name, **settings)

    return damage


def turned(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    painted(drawn(3)).save(root / "train/images/2.png", exif=exif)


def png(path: Path, size: tuple[int, int], bits: int, kind: int, rows: bytes) -> None:
    """A PNG as Pillow cannot write it; its rows have their filter's byte."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = struct.pack(">IIBBBBB", *size, bits, kind, 0, 0, 0)
    chunks = (chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def deep(path: Path, image: Image.Image) -> None:
    """An RGB image of 16 bits a channel."""
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(image).astype(">u2"))
    png(path, image.size, 16, 2, rows)


def transparent() -> Image.Image:
    image = Image.fromarray(drawn(3)).convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 90))
    return image


MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "another size": (put(drawn(3, 20, 36)), "train/masks/2.png (36x20 pixels, its image 36x24)"),
    "turned": (turned, "train/masks/2.png (36x24 pixels, its image 24x36 (turned as its EXIF says, which no mask is))"),
    "no such class": (put(drawn(3) * 3), "train/masks/2.png (class 3, 6: wanted 0 to 2, or 255 (data.ignore_index))"),
    "of 16 bits": (put(drawn(3).astype(np.uint16) + 1000), "(class 1000, 1001, 1002: wanted 0 to 2"),
    "many": (put(np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(HEIGHT, WIDTH) % 200 + 3), "and 197 more"),
    "all ignored": (put(np.full((HEIGHT, WIDTH), 255, np.uint8)), "train/masks/2.png (no pixel of any class)"),
    "no mask": (
        lambda root: (root / "train/masks/2.png").unlink(),
        "train/images/2.png (no mask: wanted train/masks/2.png)",
    ),
    "no image": (lambda root: (root / "train/images/2.png").unlink(), "train/masks/2.png (a mask of no image)"),
    "two images": (
        lambda root: shutil.copy(root / "train/images/2.png", root / "train/images/2.jpg"),
        "train/images/2.png (a second image of the name, beside train/images/2.jpg: their masks are one file)",
    ),
    "two masks": (
        lambda root: shutil.copy(root / "train/masks/2.png", root / "train/masks/2.bmp"),
        "train/masks/2.png (a second mask of the name, beside train/masks/2.bmp)",
    ),
    "lossy": (
        put(drawn(3), "train/masks/2.jpg"),
        "train/masks/2.jpg (JPEG, which need not keep every pixel: wanted PNG)",
    ),
    "colours": (
        put(painted(drawn(3))),
        "train/masks/2.png (colours (RGB): wanted a number of a class for each pixel, or data.palette)",
    ),
    "transparent": (put(transparent()), "train/masks/2.png (pixels that are partly transparent"),
    "numbered anew": (
        put(drawn(3), "train/masks/2.gif"),
        "train/masks/2.gif (GIF, whose writers number the colours anew",
    ),
    "of 48 bits": (
        lambda root: deep(root / "train/masks/2.png", painted(drawn(3))),
        "train/masks/2.png (RGB of 16 bits a channel, of which 8 would be read: wanted 8 bits)",
    ),
    "no picture": (
        lambda root: (root / "train/masks/2.png").write_text("no"),
        "train/masks/2.png (no image of a format",
    ),
    "cut short": (
        lambda root: (root / "train/masks/2.png").write_bytes((root / "train/masks/2.png").read_bytes()[:80]),
        "train/masks/2.png (",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mask_that_is_none_is_one_line(street: Path, tmp_path: Path, name: str) -> None:
    damage, words = MISTAKES[name]
    damage(street)
    done = kdpipe("data", street, "--task", "segmentation", "--artifacts", tmp_path / "artifacts")
    assert_one_line(done, 2, "cannot read image", words, "--skip-broken")
    done = kdpipe("data", street, "--task", "segmentation", "--skip-broken", "--artifacts", tmp_path / "artifacts")
    assert done.returncode == 0, done.stderr
    left = Dataset.open(done.stdout.splitlines()[-1]).facts.images["train"]
    assert left == (6 if name in ("two images", "two masks") else 5)


def test_all_mistakes_are_told_at_once(street: Path, tmp_path: Path) -> None:
    """Those of masks and of images, also where none is left or a class is."""
    for at in range(6):
        put(drawn(3, 20, 36))(street) if at == 2 else (street / f"train/masks/{at}.png").unlink()
    (street / "val/images/0.png").write_bytes(b"no image")
    done = kdpipe("data", street, "--task", "segmentation", "--artifacts", tmp_path / "artifacts")
    words = ("train/images/0.png (no mask", "train/masks/2.png (36x20", "val/images/0")
    assert_one_line(done, 2, "cannot read 7 images", *words)


def without(name: str) -> Callable[[Path], object]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


@pytest.mark.parametrize(
    ("damage", "settings", "words"),
    [
        (without("train/masks"), [], ["no folder", "train/masks: wanted", "found images"]),
        (without("test/images"), [], ["test/images: wanted"]),
        (without("classes.txt"), [], ["nothing names the classes", "classes.txt", "palette.txt"]),
        (lambda root: (root / "classes.txt").write_text("a\nb\nc\nd\n"), [], ["class 'd' has no training image"]),
        (lambda root: (root / "classes.txt").write_text("a\nb\na\n"), [], ["lists 'a' twice"]),
        (lambda root: (root / "classes.txt").write_text("a\n"), [], ["class 1, 2: wanted 0 to 0"]),
        (lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\xfa"), [], ["cannot read", "wanted a text file"]),
        (
            lambda root: (root / "classes.txt").write_text("\n".join(map(str, range(300)))),
            [],
            ["300 classes: wanted at most"],
        ),
        (lambda root: (root / "classes.txt").write_text("a\nb\x1b[31m\nc\n"), [], ["has control characters: remove"]),
        (
            lambda root: [path.unlink() for path in root.glob("test/masks/*")],
            ["--skip-broken"],
            ["no test image is left", "3 broken images were left out"],
        ),
        (lambda root: None, ["--ignore-index", 1], ["ignore_index 1 is class 'left'"]),
        (lambda root: None, ["--ignore-index", -1], ["ignore_index", "greater than or equal to 0"]),
        (lambda root: None, ["--palette", "none.txt"], ["data.palette: no file at none.txt"]),
        (lambda root: None, ["--task", "segmantation"], ["unknown task 'segmantation'", "segmentation"]),
    ],
)
def test_a_folder_that_is_none_is_one_line(
    street: Path, tmp_path: Path, damage: Callable[[Path], object], settings: list[object], words: list[str]
) -> None:
    damage(street)
    call = ["data", street, "--task", "segmentation", "--artifacts", tmp_path / "artifacts"]
    assert_one_line(kdpipe(*call, *settings), 2, *words)


def test_a_source_of_the_other_task_is_one_line(street: Path, tmp_path: Path) -> None:
    for call, words in (
        (["masks"], ["'masks' is made for data.task segmentation"]),
        (["digits", "--task", "segmentation"], ["'digits' is made for data.task classification"]),
        ([street], ["has images and their masks, not classes: say data.task segmentation"]),
        (["hfds/name", "--task", "segmentation"], ["wanted 'masks' or a folder with train/images/* and masks/*"]),
        (["nowhere", "--task", "segmentation"], ["no data at 'nowhere'"]),
        (["masks", "--task", "segmentation", "--test-split", "none"], ["data.test_split", "wanted test"]),
        ([street, "--ignore-index", 3], ["data.palette and data.ignore_index are of masks"]),
    ):
        assert_one_line(kdpipe("data", *call, "--artifacts", tmp_path / "artifacts"), 2, *words)


def test_masks_of_black_and_white(tmp_path: Path) -> None:
    """As many programs write two classes: told, and read with the palette that the line asks for."""
    root = filled(tmp_path / "street", names=("ground", "figure"))
    for path in root.glob("*/masks/*.png"):
        Image.fromarray((np.asarray(Image.open(path)) > 0).astype(np.uint8) * 255).save(path)
    done = kdpipe("data", root, "--task", "segmentation", "--artifacts", tmp_path / "artifacts")
    assert_one_line(done, 2, "have 0 and 255 alone", "'0 0 0 ground' and '255 255 255 figure'")
    (root / "palette.txt").write_text("0 0 0 ground\n255 255 255 figure\n")
    dataset, _ = prepared(root, tmp_path / "artifacts")
    assert set(np.unique(dataset.samples("train")[0].mask())) == {0, 1}


def test_a_list_from_elsewhere_may_name_more(street: Path, tmp_path: Path) -> None:
    """A network may know classes that these images do not show; it is told."""
    (tmp_path / "network.txt").write_text("ground\nleft\nright\nsnow\n")
    dataset, told = prepared(street, tmp_path / "artifacts", classes=tmp_path / "network.txt")
    assert dataset.classes[-1] == "snow" and "data: no training mask shows snow" in told


def test_what_else_lies_there_is_told(street: Path, tmp_path: Path) -> None:
    (street / "train/notes.md").write_text("x")
    (street / "train/masks/legend.txt").write_text("x")
    (street / "train/depth").mkdir()
    _, told = prepared(street, tmp_path / "artifacts")
    [line] = [line for line in told if "not read" in line]
    assert "train/notes.md" in line and "train/depth" in line and "legend.txt" in line


def test_the_same_image_under_two_masks_is_told(street: Path, tmp_path: Path) -> None:
    shutil.copy(street / "train/images/0.png", street / "train/images/9.png")
    Image.fromarray(drawn(77)).save(street / "train/masks/9.png")
    shutil.copy(street / "train/images/1.png", street / "train/images/8.png")
    shutil.copy(street / "train/masks/1.png", street / "train/masks/8.png")
    dataset, told = prepared(street, tmp_path / "artifacts")
    assert dataset.survey.copies_of_two_labels.images == 2 and dataset.survey.repeated == 1
    assert any("under two labels, the same contents: such as train/images/0.png" in line for line in told)
    assert dataset.survey.look_alikes_of_two_labels.images == 0


# ---- what a mask may look like -----------------------------------------------------------------------------------


def four_bits(path: Path, mask: np.ndarray) -> None:
    """A grey PNG of four bits a pixel."""
    rows = b"".join(b"\0" + row.tobytes() for row in mask[:, ::2] << 4 | mask[:, 1::2])
    png(path, (mask.shape[1], mask.shape[0]), 4, 0, rows)


def test_numbers_of_every_depth(street: Path, tmp_path: Path) -> None:
    """16 bits, 4 bits, one bit, an index into colours, a grey with its alpha: all are numbers."""
    mask, places = drawn(3), street / "train/masks"
    Image.fromarray(mask.astype(np.uint16)).save(places / "0.png")
    four_bits(places / "1.png", mask)
    Image.fromarray(mask > 0).save(places / "2.png")
    indexed = Image.fromarray(mask)
    indexed.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    indexed.save(places / "3.png")
    Image.fromarray(mask).convert("LA").save(places / "4.png")
    Image.fromarray(mask).save(places / "5.bmp")
    (places / "5.png").unlink()
    dataset, _ = prepared(street, tmp_path / "artifacts")
    found = {sample.path.stem: sample.mask() for sample in dataset.samples("train")}
    for name in "01345":
        assert np.array_equal(found[name], mask), name
    assert np.array_equal(found["2"], mask > 0)


@pytest.mark.parametrize("turn", [3, 6])
def test_an_image_that_is_turned_has_a_mask_as_it_is_seen(street: Path, tmp_path: Path, turn: int) -> None:
    mask = drawn(3)
    exif = Image.Exif()
    exif[0x0112] = turn
    laid = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90}[turn]
    painted(mask).transpose(laid).save(street / "train/images/2.png", exif=exif)
    Image.fromarray(mask).save(street / "train/masks/2.png")
    dataset, told = prepared(street, tmp_path / "artifacts")
    sample = dataset.samples("train")[2]
    assert np.array_equal(np.asarray(sample.image())[..., 0] // 80, sample.mask())
    silent = "EXIF turns or mirrors 1 images without changing their size, such as train/images/2.png"
    assert (silent in str(told)) == (turn == 3), "where the size tells, there is nothing to say"


PALETTE = "name,r,g,b\nground,10 20 30\n0 0 255 right\n255 0 0 left\n1 1 1\n"


def coloured(mask: np.ndarray, mode: str) -> Image.Image:
    """A mask in the colours of the palette above."""
    numbers = np.where(mask == IGNORED, 3, mask).astype(np.uint8)
    image = Image.fromarray(numbers)
    image.putpalette([10, 20, 30, 255, 0, 0, 0, 0, 255, 1, 1, 1])
    return image.convert(mode)


def test_masks_of_colours(street: Path, tmp_path: Path) -> None:
    """Each as RGB, opaque RGBA or with a palette of its own; the classes are the palette's, or those listed."""
    for at, path in enumerate(sorted(street.glob("*/masks/*.png"))):
        mask = np.array(Image.open(path))
        mask[0, :3] = IGNORED
        coloured(mask, ("RGB", "RGBA", "P")[at % 3]).save(path)
    (street / "colours.txt").write_text(PALETTE)
    named = {"palette": street / "colours.txt", "classes": street / "classes.txt"}
    dataset, _ = prepared(street, tmp_path / "artifacts", **named)
    assert dataset.classes == list(CLASSES)
    wanted = drawn(1)
    wanted[0, :3] = IGNORED
    assert np.array_equal(dataset.samples("train")[0].mask(), wanted)
    (street / "classes.txt").unlink()
    (street / "colours.txt").rename(street / "palette.txt")
    dataset, told = prepared(street, tmp_path / "artifacts")
    assert (
        dataset.classes == ["ground", "right", "left"]
        and f"{street / 'palette.txt'} has the colours of the masks" in told
    )
    (tmp_path / "fewer.txt").write_text("ground\nleft\n")
    fewer, _ = prepared(street, tmp_path / "artifacts", palette=street / "palette.txt", classes=tmp_path / "fewer.txt")
    mask = fewer.samples("train")[0].mask()
    assert set(np.unique(mask)) == {0, 1, IGNORED} and (mask[wanted == 2] == IGNORED).all()
    assert len({dataset.key, fewer.key}) == 2
    path = street / "train/masks/4.png"
    pixels = np.array(Image.open(path).convert("RGB"))
    pixels[5, 5:8] = 9, 8, 7
    Image.fromarray(pixels).save(path)
    with pytest.raises(UserError, match=r"4.png \(colour 9 8 7 on 3 pixels, which no line of palette.txt has\)"):
        prepared(street, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1 2 3 road\nsky\n", "wanted a colour and a name such as 128 64 128 road, found 'sky'"),
        ("1 2 300 road\n", "colour 1 2 300 of 'road': wanted 0 to 255"),
        ("1 2 3 road\n1 2 3 sky\n", "lists the colour 1 2 3 twice"),
        ("1 2 3 road\nroad 4 5 6\n", "lists 'road' twice"),
        ("1 2 3 road\n", "wanted at least two classes"),
        ("0 1 2 3 road\n", "wanted a colour and a name such as 128 64 128 road, found '0 1 2 3 road'"),
        ("1 2 3 ground\n4 5 6 left\n7 8 9 snow\n", "has no colour of right"),
    ],
)
def test_a_palette_that_is_none_is_one_line(street: Path, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "colours.txt").write_text(text)
    listed = {"classes": tmp_path / "classes.txt"} if "snow" in text else {}
    (street / "classes.txt").rename(tmp_path / "classes.txt")
    for path in street.glob("*/masks/*.png"):
        Image.new("RGB", (WIDTH, HEIGHT), (1, 2, 3)).save(path)
    with pytest.raises(UserError) as mistake:
        prepared(street, tmp_path / "artifacts", palette=tmp_path / "colours.txt", **listed)
    assert words in str(mistake.value) and "\n" not in str(mistake.value)


def test_names_in_a_palette_may_have_spaces(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\ufeff64 128 64\tAnimal\n192,0,128, Arch way\ntraffic light 3;4;5\n")
    assert read_palette(tmp_path / "p.txt") == [
        ((64, 128, 64), "Animal"), ((192, 0, 128), "Arch way"), ((3, 4, 5), "traffic light"),
    ]  # fmt: skip


# ---- the demo ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    plan = DataPlan(source="masks", task="segmentation", most_images=40)
    return Chain(tmp_path_factory.mktemp("demo")).data(plan)


def test_the_demo(demo: Dataset) -> None:
    assert demo.classes == ["ground", *map(str, range(10))]
    assert demo.facts.images == {"train": 40, "val": 40, "test": 40}
    for part in ("train", "val", "test"):
        masks = np.stack([sample.mask() for sample in demo.samples(part)])
        assert masks.shape == (40, 64, 96) and set(np.unique(masks)) == set(range(11))
        assert 0.7 < (masks == 0).mean() < 0.95
        images = np.stack([np.asarray(sample.image()) for sample in demo.samples(part)])
        assert images.std() > 30 and len({image.tobytes() for image in images}) == 40


def test_the_demo_is_the_same_everywhere() -> None:
    """To the byte, whatever draws random numbers here."""
    inks = np.zeros((2, 8, 8), np.uint8)
    inks[0, 1:7, 3:5] = 255
    inks[1, 2:6, 2:6] = 200
    pixels, mask = pasted._drawn("0 train 0", inks, np.array([1, 7]))
    again, _ = pasted._drawn("0 train 0", inks, np.array([1, 7]))
    other, _ = pasted._drawn("1 train 0", inks, np.array([1, 7]))
    assert np.array_equal(pixels, again) and not np.array_equal(pixels, other)
    assert {0} < set(np.unique(mask)) <= {0, 2, 8}
    words = pasted._Draws("some words")
    assert [words.of(1000) for _ in range(5)] == [255, 619, 798, 655, 325]


def test_no_digit_is_in_two_parts() -> None:
    places = [set(places) for places in pasted.DIGITS_OF.values()]
    assert sum(map(len, places)) == len(set().union(*places)) == 10


# ---- views -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
@pytest.mark.parametrize("resize", ["cover", "stretch", "letterbox"])
def test_a_mask_moves_with_its_image(crop: str, resize: str) -> None:
    spec = SPEC.model_copy(update={"resize": resize})
    settings = AugmentSettings(crop=crop, flip=0.5, erase=0.3, pad_fraction=0.3)
    transform = moving_transform(settings, spec)
    mask, views, differing = drawn(5, 60, 40), set(), []
    for number in range(40):
        with seeded(0, number):
            view, label = transform(painted(mask), mask)
        assert view.shape == (3, 16, 24) and view.dtype == torch.float32
        assert label.shape == (16, 24) and label.dtype == torch.int64
        known = label != UNLABELED
        assert known.any()
        differing.append(float((seen(view)[known] != label[known]).double().mean()))
        assert label.min() >= UNLABELED and label.max() <= 2
        views.add(label.numpy().tobytes())
    assert (
        len(views) > 10 and np.mean(differing) < 0.01
    )  # what lies between two pixels; half a pixel off makes ten times that


def test_nobody_judges_what_is_not_there() -> None:
    """Padding and erased boxes, and nothing else, are no class."""
    mask = np.ones((16, 24), np.uint8)
    white = Image.new("RGB", (24, 16), "white")
    for settings in (
        AugmentSettings(crop="pad", flip=0, pad_fraction=0.25),
        AugmentSettings(crop="none", flip=0, erase=1.0),
    ):
        transform, lost = moving_transform(settings, SPEC), 0
        for number in range(20):
            with seeded(1, number):
                view, label = transform(white, mask)
            assert torch.equal(label == UNLABELED, (view == 0).all(0))
            lost += int((label == UNLABELED).sum())
        assert lost > 0


@pytest.mark.parametrize("name", sorted(NAME_TO_OP))
def test_every_operation_of_timm_is_known_to_move_pixels_or_not(name: str) -> None:
    """What moves pixels moves the mask by as much; what does not leaves every pixel where it is."""
    hparams = {"translate_const": 9, "img_mean": (255, 0, 0), "interpolation": Image.Resampling.NEAREST}
    operation = AugmentOp(name, 0.8, 8, {**hparams, "magnitude_std": 0.5})
    mask = drawn(9, 48, 64)
    moved = 0
    for number in range(30):
        random.seed(number)
        pair = _Moved(operation)(Pair(painted(mask), mask))
        if name in SPATIAL:
            known = pair.mask != IGNORED
            red = np.asarray(pair.image)[..., 0]
            assert np.array_equal(red[known], pair.mask[known] * 80) and (red[~known] == 255).all()
            moved += not np.array_equal(pair.mask, mask)
            continue
        assert np.array_equal(pair.mask, mask)
        halves = np.zeros((48, 64, 3), np.uint8)
        halves[:, 32:] = 200
        shown = np.asarray(operation(Image.fromarray(halves)))
        for half in (shown[:, :24], shown[:, 40:]):
            assert (half == half[0, 0]).all()
    assert moved > 10 or name not in SPATIAL


@pytest.mark.parametrize("policy", ["rand-m9-n3-mstd0.5", "rand-m9-inc1-mstd101", "original", "3a", "v0r-mstd0.5"])
def test_a_policy_of_timm_moves_both(policy: str) -> None:
    """Colours change, so what is compared is where a class lies: a black box on white stays where its mask is."""
    transform = moving_transform(AugmentSettings(crop="none", flip=0.5, auto_augment=policy), SPEC)
    mask = np.zeros((16, 24), np.uint8)
    mask[4:12, 3:9] = 1
    picture = Image.fromarray(np.repeat(np.where(mask, 20, 230).astype(np.uint8)[..., None], 3, 2))
    agreed, moved = [], 0
    for number in range(60):
        with seeded(2, number):
            view, label = transform(picture, mask)
        inside, outside = view[0][label == 1], view[0][label == 0]
        moved += not torch.equal(label, torch.from_numpy(mask.astype(np.int64)))
        if len(inside) and abs(float(inside.mean() - outside.mean())) > 0.2:
            middle = (inside.mean() + outside.mean()) / 2
            dark = (view[0] < middle) == (inside.mean() < outside.mean())
            known = label != UNLABELED
            agreed.append(float((dark[known] == (label[known] == 1)).double().mean()))
    assert moved > 20 and len(agreed) > 40 and np.mean(agreed) > 0.97


def test_a_policy_that_no_mask_follows_is_one_line() -> None:
    with pytest.raises(UserError, match="'augmix-m5-w4-d2' lays moved copies of an image over each other"):
        moving_transform(AugmentSettings(auto_augment="augmix-m5-w4-d2"), SPEC)
    for policy in ("rand-m9-z3", "nonsense"):
        with pytest.raises(UserError, match=f"'{policy}' is no policy of timm"):
            moving_transform(AugmentSettings(auto_augment=policy), SPEC)


EVERYTHING = AugmentSettings(crop="resized", flip=0.5, auto_augment="rand-m9-mstd0.5", erase=0.5)


@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_views_of_masks_depend_on_their_address_only(demo: Dataset, mixing: dict[str, float]) -> None:
    source = training_images(demo, 1.0, 0, with_unlabeled=False)
    config = TrainSettings(augment=EVERYTHING, label_smoothing=0.1, **mixing)
    views = TrainingViews(source, config, SPEC, 11, seed=5)
    addresses = [(view, image) for view in range(2) for image in range(6)]
    first = {address: views[address] for address in addresses}
    random.seed(99)
    torch.manual_seed(99)
    for address in reversed(addresses):
        again = views[address]
        for one, other in zip(first[address][:3], again[:3], strict=True):
            assert torch.equal(one, other)
    assert not torch.equal(first[0, 0].image, first[1, 0].image)
    assert first[0, 0].label.shape == (16, 24)
    if mixing:
        target = first[0, 0].target
        assert target.shape == (11, 16, 24)
        sums = target.sum(0)
        assert sums.max() <= 1 + 1e-5 and (sums[first[0, 0].label != UNLABELED] > 0).any()


def test_a_pasted_box_brings_its_own_labels(street: Path, tmp_path: Path) -> None:
    dataset, _ = prepared(street, tmp_path / "artifacts")
    source = training_images(dataset, 1.0, 0, with_unlabeled=False)
    config = TrainSettings(augment=AugmentSettings(crop="resized", flip=0.5), cutmix=1.0)
    views, mixed = TrainingViews(source, config, SPEC, 3, seed=5), 0
    for number in range(12):
        view = views[(number, number % 6)]
        assert (view.target.argmax(0) == seen(view.image)).double().mean() > 0.97
        assert torch.equal(view.target.sum(0), torch.ones(16, 24))
        mixed += not torch.equal(view.target.argmax(0), view.label)
    assert mixed > 4


def test_images_without_masks(street: Path, tmp_path: Path) -> None:
    """They are seen and moved as the others, and nobody knows what is right of them."""
    more = tmp_path / "more"
    more.mkdir()
    for at in range(3):
        painted(drawn(50 + at, 30, 44), at).save(more / f"{at}.jpg")
    dataset, _ = prepared(street, tmp_path / "artifacts", unlabeled=more)
    [truth, *_] = load_labels(dataset.samples("unlabeled"), SPEC.model_dump())
    assert truth.shape == (16, 24) and (truth == UNLABELED).all() and truth.dtype == np.int16
    source = training_images(dataset, 1.0, 0, with_unlabeled=True)
    views = TrainingViews(source, TrainSettings(augment=EVERYTHING), SPEC, 3, seed=5)
    view = views[(0, len(dataset.samples("train")))]
    assert view.image.shape == (3, 16, 24) and (view.label == UNLABELED).all() and view.label.shape == (16, 24)


def test_masks_are_no_images_without_labels(street: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has images and masks, which would be taken for images: wanted its folder"):
        prepared(street, tmp_path / "artifacts", unlabeled=street / "val")
    dataset, _ = prepared(street, tmp_path / "artifacts", unlabeled=filled(tmp_path / "more") / "train/images")
    assert dataset.facts.images["unlabeled"] == 6


# ---- what is kept ------------------------------------------------------------------------------------------------


def test_masks_of_photographs_are_copied_as_they_are(tmp_path: Path) -> None:
    root = filled(tmp_path / "large")
    masks = {path: drawn(seed, 240, 360) for seed, path in enumerate(sorted(root.glob("*/masks/*.png")))}
    for path, mask in masks.items():
        Image.fromarray(mask).save(path)
        painted(mask).save(path.parent.parent / "images" / path.name)
    plan = DataPlan(source=str(root), task="segmentation", store="resized", store_side=64)
    specs = (SPEC, SPEC.model_copy(update={"resize": "letterbox"}))
    dataset = Chain(tmp_path / "artifacts").data(plan, wants=lambda: Wants(specs, 64))
    assert dataset.facts.copies.resized == 6 and len(dataset.fitted) == 2
    tested = [masks[root / f"test/masks/{at}.png"] for at in range(3)]
    wanted = {spec.resize: [fit_classes(mask, spec.model_dump()) for mask in tested] for spec in specs}
    shutil.move(root, tmp_path / "elsewhere")
    for sample in dataset.samples("train"):
        image, mask = np.asarray(sample.image()), sample.mask()
        assert image.shape[:2] == mask.shape == (64, 96)
        assert np.abs(image[..., 0].astype(int) - mask.astype(int) * 80).mean() < 12
    for spec in specs:
        labels = load_labels(dataset.samples("test"), spec.model_dump())
        for label, expected in zip(labels, wanted[spec.resize], strict=True):
            assert np.array_equal(label, np.where(expected == IGNORED, -1, expected.astype(np.int16)))
        assert dataset.fitted_file("test", spec.model_dump()) is not None
    assert len(list((tmp_path / "artifacts").glob("fitted-*/test.masks.npy"))) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda places, _: (places + 1, None),
        lambda places, _: (places[:-1], None),
        lambda places, _: (places.astype(np.int32), None),
        lambda places, _: (np.where(places > 0, places, -5), None),
        lambda places, _: (places + 2**62, None),
        lambda places, content: (places, content[:-9]),
        lambda places, content: (places, content.replace(b"IDAT", b"IDOT")),
        lambda places, content: (np.array([[0, len(BAD)]] * len(places)), BAD),
        lambda places, content: (np.array([[0, len(RGB)]] * len(places)), RGB),
    ],
)
def test_a_strangers_masks_are_one_line(street: Path, tmp_path: Path, damage: Callable[..., Any]) -> None:
    dataset, _ = prepared(street, tmp_path / "artifacts")
    places, content = damage(np.load(dataset.path / "train.masks.npy"), (dataset.path / "train.masks").read_bytes())
    stream = io.BytesIO()
    np.save(stream, places)
    replace_file(dataset.path, "train.masks.npy", stream.getvalue())
    if content is not None:
        replace_file(dataset.path, "train.masks", content)
    with pytest.raises(UserError, match=r"is not what kdpipe writes.*make the data again"):
        load_labels(Dataset.open(dataset.path).samples("train"), SPEC.model_dump())


BAD = encode(np.full((HEIGHT, WIDTH), 3, np.uint8))  # no such class
RGB = encode(np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def test_a_strangers_survey_of_masks_is_one_line(street: Path, tmp_path: Path) -> None:
    for change in ({"pixel_shares": [1.0]}, {"pixel_shares": [2, 0, 0]}, {"images": {"x": 1}}, {"unjudged": -1}):
        dataset, _ = prepared(street, tmp_path / "artifacts")
        value = json.loads((dataset.path / dataset.SURVEY).read_text())
        replace_file(dataset.path, dataset.SURVEY, json.dumps(value | change).encode())
        with pytest.raises(UserError, match="make the data again"):
            _ = Dataset.open(dataset.path).survey
        shutil.rmtree(tmp_path / "artifacts")


def test_labels_know_nothing_of_other_tasks() -> None:
    assert Masks().demo == "masks" and not Masks().by_timm


def test_recipes_name_files_from_their_own_folder(street: Path, tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(
        "name: my\ndata: {task: segmentation, source: street, palette: street/p.txt}\n"
        "teacher: {model: resnet18}\nstudent: {model: resnet10t}\n"
    )
    recipe = read_recipe(tmp_path / "my.yaml")
    assert recipe.data.palette == street / "p.txt" and recipe.data.source == str(street)


# ---- init --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [{"train": 6, "val": 2, "test": 3}, {"training": 5, "valid": 2}, {".": 9}])
def test_init_knows_masks(tmp_path: Path, parts: dict[str, int]) -> None:
    root = filled(tmp_path / "street", parts)
    done = kdpipe("init", root, "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3 classes" in done.stdout + done.stderr
    recipe = read_recipe(tmp_path / "street.yaml")
    assert recipe.data.task == "segmentation" and recipe.data.source == str(root)
    assert recipe.student.input.size == recipe.teacher.input.size == 32
    assert (recipe.teacher.model, recipe.student.model) == ("unet", "unet")
    images = Chain(tmp_path / "artifacts").data(recipe.data).facts.images
    assert sum(images.values()) == sum(parts.values()) and images["test"] > 0


def test_init_takes_an_input_near_the_images(tmp_path: Path) -> None:
    root = filled(tmp_path / "street", {"train": 3, "val": 1})
    for path in root.glob("*/images/*.png"):
        painted(drawn(1, 360, 480)).save(path)
    kdpipe("init", root, "--yes", "--model", "resnet10t", "--student", "test_resnet", cwd=tmp_path)
    recipe = read_recipe(tmp_path / "street.yaml")
    assert recipe.student.input.size == (256, 352)
    assert (recipe.teacher.encoder, recipe.student.encoder) == ("resnet10t", "test_resnet")


def test_init_of_masks_in_one_line(street: Path, tmp_path: Path) -> None:
    (tmp_path / "net.pth").write_bytes(b"x")
    done = kdpipe("init", street, "--yes", "--checkpoint", tmp_path / "net.pth", cwd=tmp_path)
    assert_one_line(done, 2, "which network draws masks is not told by its tensors")
    (street / "classes.txt").unlink()
    assert_one_line(kdpipe("init", street, "--yes", cwd=tmp_path), 2, "nothing names the classes")
