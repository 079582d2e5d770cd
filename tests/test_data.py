"""Sources become one sealed data set: splits that never overlap, images that can be read."""

from __future__ import annotations

import io
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import Trained, replace_file

from kdpipe.chain import Chain, Wants, with_fitted
from kdpipe.core.config import DataPlan
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.data.dataset import Dataset, load_images, write_images
from kdpipe.data.fingerprints import fingerprint_folder
from kdpipe.data.splits import stratified_count, stratified_fraction
from kdpipe.runtime.preprocess import decode, fit

PARTS = ("train", "val", "test")


def prepared(tmp_path: Path, **config: object) -> Dataset:
    return Chain(tmp_path / "artifacts").data(DataPlan.model_validate(config))


def test_digits_parts_are_disjoint_and_stratified(trained: Trained) -> None:
    names = {part: [sample.path for sample in trained.dataset.samples(part)] for part in PARTS}
    assert sum(map(len, names.values())) == 1797
    assert len(set().union(*names.values())) == 1797
    assert len(names["test"]) == pytest.approx(0.3 * 1797, abs=10)
    labels = np.array([sample.label for sample in trained.dataset.samples("test")])
    assert np.bincount(labels).min() >= 50


def test_digits_split_is_seeded(tmp_path: Path) -> None:
    def index(folder: str, seed: int) -> object:
        config = {"source": "digits", "test_split": None, "seed": seed}
        return [sample.path.name for sample in prepared(tmp_path / folder, **config).samples("test")]

    assert index("a", 0) == index("b", 0) != index("c", 1)


def test_folder_stays_where_it_is(photos: Path, tmp_path: Path) -> None:
    dataset = prepared(tmp_path, source=str(photos), val_fraction=0.25)
    assert dataset.classes == ["dark", "light"]
    assert dataset.facts.images == {"train": 18, "val": 6, "test": 12}
    for part in PARTS:
        for sample in dataset.samples(part):
            assert sample.path.is_relative_to(photos / ("val" if part == "test" else "train"))
            assert sample.path.parent.name == dataset.classes[sample.label]


def test_test_part_cut_from_training_part(photos: Path, tmp_path: Path) -> None:
    shutil.rmtree(photos / "val")
    dataset = prepared(tmp_path, source=str(photos), test_split=None, test_fraction=0.25, val_fraction=0)
    assert dataset.facts.images == {"train": 18, "val": 0, "test": 6}


def test_changed_images_make_another_data_set(photos: Path, tmp_path: Path) -> None:
    first = prepared(tmp_path, source=str(photos))
    assert prepared(tmp_path, source=str(photos)).path == first.path
    shutil.copy(photos / "train/dark/00.jpg", photos / "train/dark/99.jpg")
    assert prepared(tmp_path, source=str(photos)).key != first.key


def test_fingerprint_reads_contents_not_dates(photos: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.json"
    first = fingerprint_folder(photos, memory)
    assert first.images == 36 and len(first.sample) == 36 and first.sample[0].is_file()
    (photos / "train/dark/00.jpg").touch()
    assert fingerprint_folder(photos, memory) == first == fingerprint_folder(photos)
    memory.write_text("{torn")
    assert fingerprint_folder(photos, memory) == first
    shutil.copy(photos / "train/dark/02.jpg", photos / "train/dark/00.jpg")
    assert fingerprint_folder(photos, memory) != first


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: truncate(root / "train/dark/00.jpg"), "cannot read image .*train/dark/00.jpg"),
        (lambda root: truncate(root / "val/light/01.png"), "cannot read image .*val/light/01.png"),
        (lambda root: (root / "train/dark/00.jpg").write_text("text"), "cannot read image .*train/dark/00.jpg"),
        (lambda root: shutil.rmtree(root / "val"), "no folder .*val: wanted"),
        (lambda root: shutil.rmtree(root / "train"), "no folder .*train: wanted"),
        (lambda root: [p.unlink() for p in (root / "train/dark").iterdir()], "class 'dark' has no training image"),
        (lambda root: shutil.move(root / "val/dark", root / "val/grey"), "classes that .* lacks: grey"),
        (lambda root: [shutil.rmtree(root / s / "light") for s in ("train", "val")], "at least two classes, found 1"),
        (lambda root: [p.unlink() for p in (root / "val").rglob("*.*")], "no images in .*val"),
    ],
)
def test_broken_folders_are_named(photos: Path, tmp_path: Path, damage, message: str) -> None:
    damage(photos)
    with pytest.raises(UserError, match=message) as caught:
        prepared(tmp_path, source=str(photos))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "artifacts").glob("data*"))


@pytest.mark.parametrize("source", ["nowhere", "hfdx/name", "/no/such/folder"])
def test_unknown_sources(tmp_path: Path, source: str) -> None:
    with pytest.raises(UserError, match="no data at"):
        prepared(tmp_path, source=source)


def test_webdataset_through_timm(photos: Path, tmp_path: Path) -> None:
    """A source that is no folder of images: shards, whose images are copied into the artifact."""
    shards = tmp_path / "shards"
    shards.mkdir()
    counts = {}
    for split in ("train", "val"):
        rows = [
            (path, label) for label, name in enumerate(("dark", "light")) for path in (photos / split / name).iterdir()
        ]
        counts[split] = len(rows)
        with tarfile.open(shards / f"{split}-0000.tar", "w") as tar:
            for at, (path, label) in enumerate(rows):
                for suffix, content in ((path.suffix[1:], path.read_bytes()), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{at:04d}.{suffix}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    info = {
        "splits": {
            split: {
                "name": split,
                "num_samples": counts[split],
                "filenames": [f"{split}-0000.tar"],
                "shard_lengths": [counts[split]],
            }
            for split in counts
        }
    }
    (shards / "_info.json").write_text(json.dumps(info))
    dataset = prepared(tmp_path, source="wds/photos", root=str(shards), val_fraction=0)
    assert dataset.facts.images == {"train": 24, "val": 0, "test": 12}
    for sample in dataset.samples("test"):
        assert sample.path.is_relative_to(dataset.path)
        assert (np.asarray(decode(sample.path)).mean() > 125) == bool(sample.label)


def test_stratified_choices() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    tenth, fifth = stratified_fraction(labels, 0.1, seed=3), stratified_fraction(labels, 0.2, seed=3)
    assert np.bincount(labels[tenth]).tolist() == [10, 5, 1]
    assert set(tenth) < set(fifth)
    assert set(tenth) != set(stratified_fraction(labels, 0.1, seed=4))
    twelve = stratified_count(labels, 12, seed=0)
    assert np.bincount(labels[twelve]).tolist() == [4, 4, 4]
    assert len(stratified_count(labels, 1000, seed=0)) == 160


def test_preprocessing_is_resize_then_centre_crop() -> None:
    from PIL import Image

    image = Image.fromarray(np.arange(40 * 80 * 3, dtype=np.uint32).astype(np.uint8).reshape(40, 80, 3))
    whole = {"size": 40, "crop_fraction": 1.0, "interpolation": "bilinear"}
    np.testing.assert_array_equal(fit(image, whole), np.asarray(image)[:, 20:60])
    assert fit(image, {"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic"}).shape == (32, 32, 3)
    np.testing.assert_array_equal(
        fit(image, {"size": 32, "crop_fraction": 0.8, "interpolation": "bicubic"}), np.asarray(image)[4:36, 24:56]
    )
    assert fit(image.resize((7, 5)), {**whole, "size": 224}).shape == (224, 224, 3)


def test_unlabeled_images_without_copies_of_the_held_out(photos: Path, tmp_path: Path) -> None:
    more = tmp_path / "more" / "deep"
    more.mkdir(parents=True)
    shutil.copy(photos / "train" / "dark" / "00.jpg", more / "known.jpg")
    shutil.copy(photos / "val" / "dark" / "00.jpg", more / "secret.jpg")
    (more / "noise.png").write_bytes((photos / "train" / "light" / "01.png").read_bytes())
    dataset = prepared(tmp_path, source=str(photos), val_fraction=0, unlabeled=tmp_path / "more")
    found = dataset.samples("unlabeled")
    assert [sample.path.name for sample in found] == ["known.jpg", "noise.png"]
    assert {sample.label for sample in found} == {-1}
    assert dataset.facts.images["unlabeled"] == 2
    (more / "third.png").write_bytes((photos / "train" / "light" / "03.png").read_bytes())
    again = prepared(tmp_path, source=str(photos), val_fraction=0, unlabeled=tmp_path / "more")
    assert again.key != dataset.key and again.facts.images["unlabeled"] == 3
    (more / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="broken"):
        prepared(tmp_path, source=str(photos), val_fraction=0, unlabeled=tmp_path / "more")
    with pytest.raises(UserError, match="nowhere"):
        prepared(tmp_path, source=str(photos), unlabeled=tmp_path / "nowhere")


def test_listed_classes_give_the_order_and_may_be_empty(photos: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("light\nneither\ndark\n")
    chain = Chain(tmp_path / "artifacts")
    dataset = chain.data(DataPlan(source=str(photos), classes=listed))
    assert dataset.classes == ["light", "neither", "dark"]
    assert {sample.path.parent.name: sample.label for sample in dataset.samples("test")} == {"light": 0, "dark": 2}
    listed.write_text("dark\nlight\n")
    assert chain.data(DataPlan(source=str(photos), classes=listed)).key != dataset.key, "another order, another key"
    for text, wanted in (("dark\ndark\n", "lists 'dark' twice"), ("dark\nother\n", "has classes that .* lacks: light")):
        listed.write_text(text)
        with pytest.raises(UserError, match=wanted):
            chain.data(DataPlan(source=str(photos), classes=listed))
    with pytest.raises(UserError, match="no file at"):
        chain.data(DataPlan(source=str(photos), classes=tmp_path / "nowhere.txt"))


# ---- decoding ------------------------------------------------------------------------------------------------


def ramp(dtype: type, largest: float) -> np.ndarray:
    """Grey values [16, 16] from 0 to ``largest``."""
    return np.linspace(0, largest, 256).reshape(16, 16).astype(dtype)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(
    ("name", "values", "tolerance"),
    [
        ("8.png", GREY, 0),
        ("16.png", ramp(np.uint16, 65535), 0),
        ("16.tiff", ramp(np.uint16, 65535), 0),
        ("16.ppm", ramp(np.uint16, 65535), 0),
        ("32.tiff", ramp(np.int32, 2**31 - 1), 0),
        ("float.tiff", ramp(np.float32, 1.0), 0),
    ],
)
def test_wide_pixels_are_scaled_by_their_type(tmp_path: Path, name: str, values: np.ndarray, tolerance: int) -> None:
    from PIL import Image

    Image.fromarray(values).save(tmp_path / name)
    found = np.asarray(decode(tmp_path / name)).astype(int)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - GREY[..., None].astype(int)).max() <= tolerance
    # A dark picture stays dark: its own extremes do not matter.
    quarter = values / 4 if values.dtype.kind == "f" else values // 4
    Image.fromarray(quarter.astype(values.dtype)).save(tmp_path / name)
    assert np.asarray(decode(tmp_path / name)).max() in (63, 64)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_camera_says(tmp_path: Path, orientation: int) -> None:
    """What the eye sees is the same however the camera was held: made by turning the pixels the other way."""
    from PIL import Image, ImageOps

    seen = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    candidates = [seen, *map(seen.transpose, Image.Transpose)]
    matching = []
    for picture in candidates:
        path = tmp_path / "photo.png"
        picture.save(path, exif=exif)
        if np.array_equal(np.asarray(decode(path)), np.asarray(seen)):
            matching.append(picture)
        with Image.open(path) as image:
            np.testing.assert_array_equal(np.asarray(decode(path)), np.asarray(ImageOps.exif_transpose(image)))
    assert len(matching) == 1


def test_broken_exif_turns_nothing(tmp_path: Path) -> None:
    from PIL import Image

    seen = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    for exif in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12", b"junk"):
        seen.save(tmp_path / "a.png", exif=exif)
        np.testing.assert_array_equal(np.asarray(decode(tmp_path / "a.png")), np.asarray(seen))


def test_transparent_pixels_lie_over_white(tmp_path: Path) -> None:
    from PIL import Image

    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 3] = [0, 85, 170, 255]
    for suffix in ("png", "webp", "tiff"):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", lossless=True)
        assert np.asarray(decode(tmp_path / f"a.{suffix}"))[0, :, 0].tolist() == [255, 170, 85, 0]
    Image.fromarray(pixels[..., [0, 3]]).save(tmp_path / "grey.png")
    assert np.asarray(decode(tmp_path / "grey.png"))[0, :, 0].tolist() == [255, 170, 85, 0]
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "plain.png")
    assert np.asarray(decode(tmp_path / "plain.png"))[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    palette.save(tmp_path / "hole.png", transparency=0)
    assert np.asarray(decode(tmp_path / "hole.png"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_other_colour_spaces_are_converted(tmp_path: Path) -> None:
    from PIL import Image

    red = Image.new("RGB", (16, 16), (200, 30, 20))
    for mode, name, tolerance in (("CMYK", "a.jpg", 6), ("CMYK", "a.tiff", 2), ("L", "l.jpg", 3), ("1", "1.png", 0)):
        wanted = np.asarray(red.convert(mode).convert("RGB")).astype(int)
        red.convert(mode).save(tmp_path / name)
        assert np.abs(np.asarray(decode(tmp_path / name)).astype(int) - wanted).max() <= tolerance


# ---- photographs -----------------------------------------------------------------------------------------------


@pytest.fixture
def camera(tmp_path: Path) -> Path:
    """Large pictures, some of them turned."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for label, brightness in (("dark", 60), ("light", 190)):
            folder = tmp_path / "camera" / split / label
            folder.mkdir(parents=True)
            for at in range(count):
                coarse = np.clip(generator.normal(brightness, 30, (6, 8, 3)), 0, 255).astype(np.uint8)
                exif = Image.Exif()
                exif[0x0112] = 6 if at % 2 else 1
                Image.fromarray(coarse).resize((800, 600)).save(folder / f"{at}.jpg", exif=exif)
    return tmp_path / "camera"


SPECS = tuple(
    InputSpec(size=size, mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=0.875, interpolation="bilinear")
    for size in (48, 32, (24, 40))
)


def test_photographs_are_decoded_once(camera: Path, tmp_path: Path) -> None:
    chain = Chain(tmp_path / "artifacts")
    plan = DataPlan(source=str(camera), val_fraction=0.34)
    dataset = chain.data(plan, wants=lambda: Wants(SPECS, 64))
    copies = dataset.facts.copies
    assert copies is not None and copies.shorter_side == 64 and copies.resized == dataset.facts.images["train"]
    expected = {
        (part, spec.size): [fit(decode(sample.path), spec.model_dump()) for sample in dataset.samples(part)]
        for part in ("val", "test")
        for spec in SPECS
    }
    wanted = [np.asarray(decode(sample.path).resize((64, 48))) for sample in dataset.samples("train")]
    shutil.move(camera, tmp_path / "elsewhere")  # no file is opened again
    for (part, size), images in expected.items():
        spec = next(spec for spec in SPECS if spec.size == size).model_dump()
        np.testing.assert_array_equal(load_images(dataset.samples(part), spec), images)
        out = tmp_path / "pushed.npy"
        write_images(out, dataset.samples(part), spec)
        np.testing.assert_array_equal(np.load(out), images)
        assert dataset.fitted_file(part, spec).read_bytes() == out.read_bytes()
    for sample, like in zip(dataset.samples("train"), wanted, strict=True):
        assert min(sample.image().size) == 64
        assert np.abs(np.asarray(sample.image().resize((64, 48))).astype(int) - like).mean() < 8
    with pytest.raises(UserError, match=r"cannot read image .*the data changed while in use"):
        dataset.samples("test")[0].image()


def test_what_is_kept_is_found_again(camera: Path, tmp_path: Path) -> None:
    plan = DataPlan(source=str(camera), val_fraction=0.34)
    chain = Chain(tmp_path / "artifacts")
    first = chain.data(plan, wants=lambda: Wants(SPECS, 64))
    again = Chain(tmp_path / "artifacts")
    second = again.data(plan, wants=lambda: Wants(SPECS, 64))
    assert second.key == first.key and all(step.sealed_before for step in again.steps)
    assert with_fitted(Dataset.open(first.path)).fitted.keys() == first.fitted.keys()
    # Another network later wants other pixels: only they are made.
    other = SPECS[0].model_copy(update={"size": 40})
    third = Chain(tmp_path / "artifacts").data(plan, wants=lambda: Wants((*SPECS, other), 64))
    assert third.key == first.key and len(third.fitted) == len(SPECS) + 1


def test_small_images_are_left_alone(photos: Path, camera: Path, tmp_path: Path) -> None:
    assert prepared(tmp_path, source=str(photos)).facts.copies is None
    assert prepared(tmp_path, source=str(camera), store="none").facts.copies is None
    assert prepared(tmp_path, source=str(camera)).facts.copies is None, "not twice the usual 512 pixels"
    forced = prepared(tmp_path, source=str(photos), store="resized", store_side=24)
    assert forced.facts.copies is not None
    for sample in forced.samples("train"):
        assert min(sample.image().size) == min(24, *decode(sample.path).size)
        if min(decode(sample.path).size) <= 24:
            np.testing.assert_array_equal(np.asarray(sample.image()), np.asarray(decode(sample.path)))


def test_a_broken_photograph_is_named(camera: Path, tmp_path: Path) -> None:
    for victim in ("train/dark/1.jpg", "val/light/2.jpg"):
        content = (camera / victim).read_bytes()
        truncate(camera / victim)
        with pytest.raises(UserError, match=f"cannot read image .*{victim}"):
            Chain(tmp_path / "artifacts").data(DataPlan(source=str(camera)), wants=lambda: Wants(SPECS, 64))
        (camera / victim).write_bytes(content)


def test_checking_is_optional(photos: Path, tmp_path: Path) -> None:
    (photos / "train/dark/00.jpg").write_text("no picture")
    for check in ("all", "sample"):
        with pytest.raises(UserError, match="cannot read image"):
            prepared(tmp_path / check, source=str(photos), check=check)
    unchecked = prepared(tmp_path, source=str(photos), check="none")
    (photos / "train/dark/00.jpg").write_bytes((photos / "train/dark/02.jpg").read_bytes())
    checked = prepared(tmp_path / "all", source=str(photos))
    assert checked.facts == unchecked.facts


def test_an_odd_name_is_a_name(photos: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photos / "train" / "dark") + b"/\xff odd\n.jpg"
    shutil.copy(os.fsencode(photos / "train/dark/00.jpg"), odd)
    dataset = prepared(tmp_path, source=str(photos), val_fraction=0)
    assert os.fsencode(dataset.samples("train")[12].path) == odd
    assert dataset.samples("train")[-1].label == 1
    with pytest.raises(IndexError):
        dataset.samples("train")[25]


REMEMBER = """
import sys
from pathlib import Path
import kdpipe.data.fingerprints as fingerprints
fingerprints.PATIENCE_SECONDS = 0.2
print(fingerprints.fingerprint_folder(Path(sys.argv[1]), Path(sys.argv[2])).sha256)
"""


def test_what_was_read_is_remembered_through_faults(photos: Path, tmp_path: Path) -> None:
    memory = tmp_path / "memory.sqlite"
    first = fingerprint_folder(photos, memory)
    with sqlite3.connect(memory) as held:
        held.execute("BEGIN EXCLUSIVE")
        other = subprocess.run(
            [sys.executable, "-c", REMEMBER, photos, memory], capture_output=True, text=True, check=True, timeout=1800
        )
    assert other.stdout.strip() == first.sha256


def as_npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("train.npy", lambda records: b"junk"),
        ("train.npy", lambda records: as_npy(np.zeros(3))),
        ("train.npy", lambda records: as_npy(records[["file", "label", "start"]])),
        ("train.npy", lambda records: as_npy(records[["file", "label"]])),
        ("train.npy", lambda records: edited(records, "label", 2)),
        ("train.npy", lambda records: edited(records, "label", -2)),
        ("train.npy", lambda records: edited(records, "start", -1)),
        ("train.npy", lambda records: edited(records, "size", 10**9)),
        ("train.npy", lambda records: edited(records, "size", 0)),
        ("index.json", lambda records: b'{"classes": 7, "roots": {}}'),
        ("index.json", lambda records: b'["dark", "light"]'),
    ],
)
def test_a_strangers_index_is_one_line(photos: Path, tmp_path: Path, name: str, change) -> None:
    dataset = prepared(tmp_path, source=str(photos), store="resized", store_side=24)
    replace_file(dataset.path, name, change(np.load(dataset.file("train.npy"))))
    with pytest.raises(UserError, match="make the data again"):
        Dataset.open(dataset.path).samples("train")


def edited(records: np.ndarray, column: str, value: int) -> bytes:
    records[column][1] = value
    return as_npy(records)
