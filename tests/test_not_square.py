"""Inputs that are not square: the same chain, with a height and a width of its own on every hop."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_one_line, build_cache, kdpipe, listening, rewrite_manifest, train
from PIL import Image
from timm.data import create_transform

from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.config import (
    CachePlan,
    DataPlan,
    ExportConfig,
    InputSettings,
    PackageConfig,
    QuantizeConfig,
    TeacherPlan,
    TrainConfig,
    TrainSettings,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Bundle, Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.data.views import seeded, training_transform
from kdpipe.devices import find_device
from kdpipe.distill.cache import config_of
from kdpipe.networks import models
from kdpipe.runtime.bundle import BundleError, read_facts, replay_golden
from kdpipe.runtime.preprocess import fit

HEIGHT, WIDTH = 24, 40
TRAIN = {"epochs": 6, "batch_size": 8, "workers": 0, "augment": {"flip": 0}}
NETWORK = {"model": "test_resnet", "input": {"size": [HEIGHT, WIDTH]}, "train": TRAIN}
SPEC = InputSpec(size=(HEIGHT, WIDTH), mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=1.0, interpolation="bicubic")
# What is measured: one layout of each, one of them INT8.
BENCHED = ("onnxruntime-float32", "tflite-int8")
TARGETS = ("onnxruntime", "tflite")  # one of each layout; tests/test_mask_targets.py takes oblong inputs through all


@dataclass
class Wide:
    chain: Chain
    dataset: Dataset
    teacher: Checkpoint
    student: Checkpoint
    bundles: dict[str, Bundle]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Wide:
    """Pictures that are bright on the left or on the right, a square teacher, and a student for some targets."""
    folder = tmp_path_factory.mktemp("wide")
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 8)):
        for label in ("left", "right"):
            (folder / "photos" / split / label).mkdir(parents=True)
            for at in range(count):
                height, width = 30 + at, 48 + 2 * (at % 5)
                pixels = generator.integers(0, 120, (height, width, 3), dtype=np.uint8)
                half = slice(0, width // 2) if label == "left" else slice(width // 2, width)
                pixels[:, half] += 120
                Image.fromarray(pixels).save(folder / "photos" / split / label / f"{at}.png")
    chain = Chain(folder / "artifacts")
    dataset = chain.data(DataPlan(source=str(folder / "photos"), val_fraction=0.2))
    square = {"model": "test_resnet", "input": {"size": 32}, "train": TRAIN}
    teacher = chain.teacher(validated(TeacherPlan, square, "test"), dataset)
    student = chain.distill(validated(TrainConfig, NETWORK, "test"), dataset, teacher)
    bundles = {}
    settings = {"calibrate": {"images": 16}, "check_images": 16}
    for target in TARGETS:
        whole = chain.export(ExportConfig(target=target, parity_images=8, hop_images=8), student, dataset)
        config = validated(QuantizeConfig, {"variant": "int8", **settings}, "test")
        small = chain.quantize(config, whole, dataset, find_device("local").probe())
        for model in (whole, small):
            package = PackageConfig(golden_images=2)
            bundles[f"{target}-{model.facts.variant}"] = chain.package(package, model, dataset)
    return Wide(chain, dataset, teacher, student, bundles)


def test_either_layout_and_its_int8(wide: Wide) -> None:
    layouts = {name: bundle.facts.input.layout for name, bundle in wide.bundles.items()}
    assert layouts == {f"{target}-{name}": layout for target, layout in zip(TARGETS, ("NCHW", "NHWC"), strict=True)
                       for name in ("float32", "int8")}  # fmt: skip
    for name, bundle in wide.bundles.items():
        assert bundle.facts.input.size == (HEIGHT, WIDTH), name
        facts = read_facts(bundle.path)
        assert facts["input"]["size"] == [HEIGHT, WIDTH]
        assert replay_golden(bundle.path, facts, stand_in=facts["stand_in"] is not None)["golden_images"] == 2
        expected = json.loads((bundle.path / bundle.CONFORMANCE / "expected.json").read_text())
        sides = [3, HEIGHT, WIDTH] if bundle.facts.input.layout == "NCHW" else [HEIGHT, WIDTH, 3]
        assert expected["input_shape"] == [1, *sides]


def test_it_learned_and_is_judged_the_same_on_a_device(wide: Wide) -> None:
    assert wide.student.facts.test_accuracy == 1
    quick = ["--rounds", 2, "--effort", "quick", "--seconds", 0.1, "--max-seconds", 0.1, "--warm-up-seconds", 0.1]
    done = kdpipe("bench", *(wide.bundles[name].path for name in BENCHED), *quick, "--cold-starts", 1, "--json")
    assert done.returncode == 75, done.stderr
    [measured] = json.loads(done.stdout)["measurements"]
    for name in BENCHED:
        result = measured["facts"]["results"][name]
        assert result["accuracy"]["value"] == 1 and result["batch_one"]["within_tolerance"], name


def test_predict(wide: Wide) -> None:
    done = kdpipe("predict", wide.bundles["tflite-int8"].path, Path(wide.dataset.facts.source) / "val")
    assert done.returncode == 0, done.stderr
    rows = [line.split(",") for line in done.stdout.splitlines()[1:]]
    assert len(rows) == 16 and all(Path(image).parent.name == label for image, label, _ in rows)


def test_the_bundles_own_runner(wide: Wide) -> None:
    """On a device there is nothing but the bundle."""
    bundle = wide.bundles["onnxruntime-int8"].path
    told = [sys.executable, "-m", "runtime", "verify", "."]
    done = subprocess.run(told, cwd=bundle, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["golden_images"] == 2


def test_a_model_of_somebody_elses(wide: Wide, tmp_path: Path) -> None:
    bundle = wide.bundles["onnxruntime-float32"]
    (tmp_path / "net.onnx").write_bytes(bundle.file(bundle.facts.entry).read_bytes())
    said = f"{{size: [{HEIGHT}, {WIDTH}], interpolation: {bundle.facts.input.interpolation}}}"
    quick = ["--rounds", 2, "--effort", "quick", "--seconds", 0.1, "--max-seconds", 0.1, "--warm-up-seconds", 0.1]
    call = ["bench", tmp_path / "net.onnx", "--data", wide.dataset.path, "--cold-starts", 0, *quick, "--json"]
    done = kdpipe(*call, "--input", said)
    assert done.returncode == 75, done.stderr
    [measured] = json.loads(done.stdout)["measurements"]
    assert measured["facts"]["results"]["net.onnx"]["accuracy"]["value"] == 1
    assert_one_line(kdpipe(*call, "--input", "{size: [24, 40, 3]}"), 2, "'size'", "[height, width]")


@pytest.mark.parametrize("size", [[24], [0, 40], [24, 9000], [24, 40, 3], ["24", 40], [24.5, 40], True, "24x40", None])
def test_a_strangers_size(wide: Wide, tmp_path: Path, size: object) -> None:
    """Neither the runner on a device nor this host believes it."""
    bundle = tmp_path / "bundle"
    subprocess.run(["cp", "-r", wide.bundles["onnxruntime-float32"].path, bundle], check=True)
    rewrite_manifest(bundle, lambda value: value["facts"]["input"].update(size=size))
    with pytest.raises(BundleError, match="no input is like that"):
        read_facts(bundle)


@pytest.mark.parametrize("resize", ["fill", 1, None, ["cover"]])
def test_a_strangers_resize(wide: Wide, tmp_path: Path, resize: object) -> None:
    bundle = tmp_path / "bundle"
    subprocess.run(["cp", "-r", wide.bundles["onnxruntime-float32"].path, bundle], check=True)
    assert "resize" not in read_facts(bundle)["input"], "the usual one is not said"
    rewrite_manifest(bundle, lambda value: value["facts"]["input"].update(resize=resize))
    with pytest.raises(BundleError, match="no input is like that"):
        read_facts(bundle)
    assert_one_line(kdpipe("predict", bundle, wide.dataset.samples("test")[0].path), 2, "resize")


def test_golden_images_of_another_shape(wide: Wide, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    subprocess.run(["cp", "-r", wide.bundles["onnxruntime-float32"].path, bundle], check=True)
    rewrite_manifest(bundle, lambda value: value["facts"]["input"].update(size=[WIDTH, HEIGHT]))
    with pytest.raises(BundleError, match="40x24 pixels that the manifest promises"):
        replay_golden(bundle, read_facts(bundle))


# ---- what is written, and what it means ------------------------------------------------------------------------


def test_a_square_has_one_spelling() -> None:
    """So that nothing that was made before has another key."""
    assert InputSettings.model_validate({"size": [32, 32]}).model_dump(mode="json")["size"] == 32
    assert SPEC.model_copy(update={"size": 32}).model_dump(mode="json")["size"] == 32
    written = SPEC.model_dump(mode="json")
    assert written["size"] == [HEIGHT, WIDTH] and InputSpec.model_validate(written) == SPEC


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ([24], "or as [height, width], found [24]"),
        ("wide", "wanted pixels from 1 to 8192"),
        ([4, 96], "wanted at least 8 pixels, found [4, 96]"),
        (4, "wanted at least 8 pixels, found 4"),
        ([96, 10**6], "wanted pixels from 1 to 8192"),
    ],
)
def test_a_size_that_is_none(size: object, words: str) -> None:
    with pytest.raises(UserError) as mistake:
        validated(TrainConfig, {"model": "test_resnet", "input": {"size": size}}, "my.yaml")
    assert str(mistake.value).startswith("my.yaml: 'input.size': ") and words in str(mistake.value)


@pytest.mark.parametrize("shape", [(50, 100), (100, 50), (30, 30), (24, 40), (240, 96)])
def test_fitting_is_what_timm_does(shape: tuple[int, int]) -> None:
    """Where no half pixel is to be rounded: its evaluation resizes until the input is covered, and takes the middle."""
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    steps = create_transform((HEIGHT, WIDTH), interpolation="bicubic", crop_pct=1.0).transforms[:2]
    wanted = Image.fromarray(pixels)
    for step in steps:
        wanted = step(wanted)
    assert wanted.size == (WIDTH, HEIGHT)
    assert np.array_equal(fit(Image.fromarray(pixels), SPEC.model_dump()), np.asarray(wanted))


@pytest.mark.parametrize("crop", ["resized", "pad", "none"])
def test_views_keep_their_proportions(crop: str) -> None:
    """Red grows to the right and green downwards, evenly: how fast each does in a view tells how it was stretched."""
    ramp = np.linspace(0, 255, 240).astype(np.uint8)
    picture = np.zeros((240, 240, 3), np.uint8)
    picture[..., 0], picture[..., 1] = ramp[None, :], ramp[:, None]
    settings = validated(TrainSettings, {"augment": {"crop": crop, "flip": 0, "pad_fraction": 0}}, "test")
    transform = training_transform(settings.augment, SPEC)
    stretches = []
    for number in range(60):
        with seeded(0, number):
            view = transform(Image.fromarray(picture))
        assert view.shape == (3, HEIGHT, WIDTH)
        along = (view[0, :, -3] - view[0, :, 2]).mean() / (WIDTH - 5)
        down = (view[1, -3] - view[1, 2]).mean() / (HEIGHT - 5)
        stretches.append(math.log(along / down))
    assert abs(np.mean(stretches)) < 0.1
    if crop == "resized":
        assert np.std(stretches) > 0.05


def test_padding_is_a_share_of_each_side() -> None:
    """Of the views of a white image, the black that was padded is as wide as the settings say, and no wider."""
    settings = validated(TrainSettings, {"augment": {"crop": "pad", "flip": 0, "pad_fraction": 0.25}}, "test")
    transform = training_transform(settings.augment, SPEC)
    black = []
    for number in range(300):
        with seeded(0, number):
            view = transform(Image.new("RGB", (WIDTH, HEIGHT), "white"))
        seen = view[0] > 0.5
        black.append((HEIGHT - int(seen.any(1).sum()), WIDTH - int(seen.any(0).sum())))
    assert tuple(np.max(black, 0)) == (HEIGHT // 4, WIDTH // 4)


def test_a_network_of_a_fixed_size() -> None:
    config = validated(TrainConfig, {"model": "test_vit", "input": {"size": [32, 48]}}, "test")
    network, spec = models.create(config, 10)
    assert spec.sides == (32, 48) and network(torch.zeros(1, 3, 32, 48)).shape == (1, 10)
    with pytest.raises(UserError, match="'test_vit' cannot take inputs of 32x50 pixels"):
        models.create(validated(TrainConfig, {"model": "test_vit", "input": {"size": [32, 50]}}, "test"), 10)


@pytest.mark.parametrize("method", ["at", "hint", "rkd", "deep_supervision", "stagewise"])
def test_methods_that_look_inside(wide: Wide, tmp_path: Path, method: str) -> None:
    """From a square teacher, whose maps are of other proportions."""
    settings = {**NETWORK, "method": method, "train": {**TRAIN, "epochs": 2, "mixup": 0.2, "cutmix": 1.0}}
    made = train(validated(TrainConfig, settings, "test"), wide.dataset, wide.teacher, tmp_path / "student")
    assert made.facts.input.sides == (HEIGHT, WIDTH) and np.isfinite(made.history[-1].loss)


def test_a_cache_of_a_square_teacher(wide: Wide, tmp_path: Path) -> None:
    plan = {"model": "test_resnet", "input": {"size": [HEIGHT, WIDTH]}, "views": 2, "augment": TRAIN["augment"]}
    config = config_of(validated(CachePlan, {**plan, "workers": 0}, "test"))
    cache = build_cache(config, wide.dataset, wide.teacher, tmp_path / "cache")
    run = {**NETWORK, "cache_views": 2, "train": {**TRAIN, "epochs": 1}}
    made = train(validated(TrainConfig, run, "test"), wide.dataset, wide.teacher, tmp_path / "student", cache)
    assert made.facts.cache == cache.key
    other = {**run, "input": {"size": [WIDTH, HEIGHT]}}
    with pytest.raises(UserError, match="another input"):
        train(validated(TrainConfig, other, "test"), wide.dataset, wide.teacher, tmp_path / "other", cache)


def test_a_teacher_of_other_proportions_is_told(wide: Wide, tmp_path: Path) -> None:
    class Notes(progress.Silence):
        def __init__(self) -> None:
            self.told: list[str] = []

        def note(self, text: str) -> None:
            self.told.append(text)

    notes = Notes()
    with listening(notes):
        config = validated(TrainConfig, {**NETWORK, "train": {**TRAIN, "epochs": 1}}, "test")
        train(config, wide.dataset, wide.teacher, tmp_path / "student")
    assert any("the teacher takes 32 pixels: views of 24x40 are stretched" in text for text in notes.told)
