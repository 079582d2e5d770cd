"""Sources become one sealed data set: splits that never overlap, images that can be read."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from conftest import Made

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan
from kdpipe.core.errors import UserError
from kdpipe.data.dataset import Dataset
from kdpipe.data.fingerprints import fingerprint_folder
from kdpipe.data.splits import stratified_count, stratified_fraction
from kdpipe.runtime.preprocess import decode, fit

PARTS = ("train", "val", "test")


def prepared(tmp_path: Path, **config: object) -> Dataset:
    return Chain(tmp_path / "artifacts").data(DataPlan.model_validate(config))


def test_digits_parts_are_disjoint_and_stratified(made: Made) -> None:
    names = {part: [sample.path for sample in made.dataset.samples(part)] for part in PARTS}
    assert sum(map(len, names.values())) == 1797
    assert len(set().union(*names.values())) == 1797
    assert len(names["test"]) == pytest.approx(0.3 * 1797, abs=10)
    labels = np.array([sample.label for sample in made.dataset.samples("test")])
    assert np.bincount(labels).min() >= 50


def test_digits_split_is_seeded(tmp_path: Path) -> None:
    def index(folder: str, seed: int) -> object:
        config = {"source": "digits", "test_split": None, "seed": seed}
        return json.loads(prepared(tmp_path / folder, **config).file("index.json").read_text())

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
