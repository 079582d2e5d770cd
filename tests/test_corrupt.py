"""The test images with a camera's faults: the same on every machine, before the network's own resizing, any device.

A network whose INT8 fails in the dark alone is made here, by the product's own stages: it is right about every test
image, and the accuracy of dark says what it is worth.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import assert_one_line, kdpipe, replace_file
from PIL import Image
from rich.console import Console

from kdpipe.chain import Chain
from kdpipe.core.artifact import Order
from kdpipe.core.config import (
    AdoptFilePlan,
    BenchPlan,
    DataPlan,
    DeviceSettings,
    PackageConfig,
    QuantizeConfig,
    ReportConfig,
    validated,
)
from kdpipe.core.errors import DeviceLost, UserError
from kdpipe.core.kinds import Bundle, Measurement, Prediction
from kdpipe.core.stats import Interval, no_worse
from kdpipe.data import corrupt as corruptions
from kdpipe.data.corrupt import FAULTS, JPEG_QUALITY, SEVERITIES, corrupt
from kdpipe.data.dataset import Dataset, Samples, index_records, write_images
from kdpipe.deploy.figures import CORRUPTIONS, NAMES, accuracy_of, figures
from kdpipe.devices import accuracy, find_device, opened
from kdpipe.devices.accuracy import Asked
from kdpipe.devices.bench import bench
from kdpipe.devices.journal import Journal
from kdpipe.devices.local import LocalDevice
from kdpipe.devices.session import bench_config
from kdpipe.devices.talk import Talk
from kdpipe.report.faults import faults_table
from kdpipe.report.page import render
from kdpipe.runtime.preprocess import decode, fit
from kdpipe.runtime.task import TASKS

DIGEST = bytes(range(32))
SPEC = {"size": 16, "crop_fraction": 1.0, "interpolation": "bilinear", "antialias": True}


def picture(width: int = 40, height: int = 30) -> Image.Image:
    """The same one everywhere: ramps of two colours, and a step in the third."""
    row, column = np.mgrid[:height, :width]
    pixels = np.stack([row * 255 // max(1, height - 1), column * 255 // max(1, width - 1), 255 * (column > row)], -1)
    return Image.fromarray(pixels.astype(np.uint8))


# ---- the faults ----------------------------------------------------------------------------------------------


GOLDEN = {
    "noise": "c4e674ef421b0a3d45589c4d850354cbf553419deaeb4032ea9d48c3ac21c0f9",
    "dark": "96baf551870bfeb23d909e3fb7cf0b498372040d70bdc6de402e1c09802a5220",
}


@pytest.mark.parametrize("name", GOLDEN)
def test_random_faults_are_the_same_on_every_machine(name: str) -> None:
    """Integers and SHAKE-128 alone: every bit of it."""
    pixels = np.asarray(corrupt(picture(), name, DIGEST))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == GOLDEN[name]


def test_noise_is_what_its_description_says() -> None:
    """One pixel by hand, with nothing of numpy; and all of them by their spread."""
    grey = Image.new("RGB", (100, 80), (128, 128, 128))
    noisy = np.asarray(corrupt(grey, "noise", DIGEST))
    random = hashlib.shake_128(b"noise" + DIGEST).digest(4 * 100 * 80 * 3)
    row, column, colour = 57, 91, 2
    place = (row * 100 + column) * 3 + colour
    total = sum(random[quarter * 100 * 80 * 3 + place] for quarter in range(4)) - 510
    assert noisy[row, column, colour] == 128 + ((total * round(24 * 2**16 / (4 * 65535 / 12) ** 0.5) + 2**15) >> 16)
    off = noisy.astype(float) - 128
    assert off.std() == pytest.approx(24, rel=0.02) and abs(off.mean()) < 0.5
    other = np.asarray(corrupt(grey, "noise", bytes(32)))
    assert abs(np.corrcoef(off.ravel(), other.astype(float).ravel())[0, 1]) < 0.05, "another image, another noise"


def test_dark_is_an_eighth_of_the_light() -> None:
    def light(level: float) -> float:
        return level / 255 / 12.92 if level <= 10 else ((level / 255 + 0.055) / 1.055) ** 2.4

    for level in (60, 128, 255):
        dark = np.asarray(corrupt(Image.new("RGB", (200, 200), (level,) * 3), "dark", DIGEST), float)
        assert light(dark.mean()) == pytest.approx(light(level) / 8, rel=0.03)
        assert dark.std() == pytest.approx(4, rel=0.1)


PIXELS = {
    "jpeg": [[19, 0, 131], [131, 138, 254], [255, 248, 248]],
    "blur": [[0, 0, 21], [123, 130, 255], [255, 255, 255]],
}


@pytest.mark.parametrize("name", PIXELS)
def test_jpeg_and_blur_are_pillows(name: str) -> None:
    """Other versions of libjpeg may round in another way: within two levels."""
    found = np.asarray(corrupt(picture(), name, DIGEST), int)
    assert np.abs(found[[0, 14, 29], [0, 20, 39]] - PIXELS[name]).max() <= 2
    assert JPEG_QUALITY == 10


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((1, 1), (1, 1)),
        ((3, 200), (3, 200)),
        ((640, 480), (640, 480)),
        ((1200, 900), (640, 480)),
        ((70_000, 1), (1920, 1)),  # larger than a JPEG can be
        ((600, 2400), (480, 1920)),
    ],
)
def test_images_of_every_size_and_colour(name: str, size: tuple[int, int], wanted: tuple[int, int]) -> None:
    for colour in ((0, 0, 0), (10, 200, 30)):
        image = Image.new("RGB", size, colour)
        found = corrupt(image, name, DIGEST)
        assert found.mode == "RGB" and found.size == wanted
        assert image.size == size and image.getpixel((0, 0)) == colour, "the image itself is as it was"
        assert fit(found, SPEC).shape == (16, 16, 3)


def test_every_fault_is_named_once_and_changes_the_image() -> None:
    assert set(FAULTS) == set(SEVERITIES) == set(CORRUPTIONS)
    whole = np.asarray(picture())
    for name in FAULTS:
        assert not np.array_equal(np.asarray(corrupt(picture(), name, DIGEST)), whole)


def samples_of(folder: Path, names: list[str]) -> Samples:
    return Samples("classification", folder, index_records([name.encode() for name in names], [0] * len(names), False))


def test_an_image_has_its_fault_wherever_it_stands_and_whatever_it_is_called(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "other.png"):
        (picture(33) if name == "other.png" else picture()).save(tmp_path / name)
    one, many = samples_of(tmp_path, ["a.png"]), samples_of(tmp_path, ["other.png", "other.png", "b.png"])
    for name in FAULTS:
        np.testing.assert_array_equal(one[0].fitted(SPEC, name), many[2].fitted(SPEC, name))
    # In the photograph, before the network's own resizing: that of the faulty one is what every network is shown.
    wanted = fit(corrupt(decode(tmp_path / "a.png"), "dark", one.digest(0)), SPEC)
    np.testing.assert_array_equal(one[0].fitted(SPEC, "dark"), wanted)
    write_images(tmp_path / "images.npy", list(many), SPEC, "dark")
    np.testing.assert_array_equal(np.load(tmp_path / "images.npy")[2], wanted)


def test_an_image_that_went_away_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    samples = samples_of(tmp_path, ["a.png"])
    (tmp_path / "a.png").unlink()
    for ask in (lambda: samples.digest(0), lambda: samples[0].fitted(SPEC, "dark")):
        with pytest.raises(UserError, match=r"cannot read image .*a\.png"):
            ask()


# ---- the option ----------------------------------------------------------------------------------------------


def test_a_session_without_corruptions_has_the_key_that_it_had() -> None:
    assert not {"corruptions", "corrupting"} & bench_config(BenchPlan(), "null").model_dump(mode="json").keys()
    asked = bench_config(BenchPlan(corruptions=("dark", "jpeg")), "null").model_dump(mode="json")
    assert asked["corruptions"] == ["dark", "jpeg"] and asked["corrupting"] == corruptions.CORRUPTING


@pytest.mark.parametrize("given", ["dark,blur", ["dark", "blur"], ["dark, blur"]])
def test_corruptions_are_listed_as_a_person_lists_them(given: object) -> None:
    assert validated(BenchPlan, {"corruptions": given}, "bench").corruptions == ("dark", "blur")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("drak", "'jpeg', 'blur', 'noise' or 'dark', found 'drak'"),
        (["dark", "dark"], "every corruption once"),
        ("", "found ''"),
        (7, "corruptions"),
        ({"dark": 1}, "corruptions"),
    ],
)
def test_corruptions_that_are_none_are_refused(given: object, words: str) -> None:
    with pytest.raises(UserError, match=words):
        validated(BenchPlan, {"corruptions": given}, "bench")


# ---- a network whose INT8 fails in the dark alone ---------------------------------------------------------------


PLAN = BenchPlan(
    rounds=2, seconds=0.02, max_seconds=0.05, min_samples=10, warm_up_seconds=0.02, images=8, cold_starts=1,
    corruptions=("dark", "blur"),
)  # fmt: skip


def write_halves(folder: Path, train: int = 24, test: int = 100, first: int = 0) -> Path:
    """Pictures of one grey whose left or right half is a little brighter."""
    for part, count in (("train", train), ("val", test)):
        for label in ("left", "right"):
            (folder / part / label).mkdir(parents=True, exist_ok=True)
            for at in range(first, first + count):
                generator = np.random.default_rng([at, label == "left", part == "train"])
                grey = generator.uniform(118, 138)
                pixels = generator.normal(grey, 3, (32, 32, 3))
                pixels[:, slice(0, 16) if label == "left" else slice(16, 32)] += 12
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / part / label / f"{at:03d}.png")
    return folder


def write_network(path: Path) -> Path:
    """The mean of either half, of normalised colours; the difference of the two decides."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    halves = np.zeros((2, 3, 32, 32), np.float32)
    halves[0, :, :, :16] = halves[1, :, :, 16:] = 1 / (3 * 32 * 16)
    weights = {"halves": halves, "differ": np.array([[1, -1], [-1, 1]], np.float32), "none": np.zeros(2, np.float32)}
    nodes = [
        helper.make_node("Conv", ["image", "halves"], ["means"], name="halves"),
        helper.make_node("Flatten", ["means"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "differ", "none"], ["logits"], name="differ"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 32, 32])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "halves", [image], [logits], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@dataclasses.dataclass
class Dark:
    chain: Chain
    dataset: Dataset
    bundles: dict[str, Bundle]
    measurement: Measurement


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Dark:
    """That network as anybody's: adopted, quantised on its well-lit training images, packed and measured."""
    folder = tmp_path_factory.mktemp("halves")
    chain = Chain(folder / "artifacts")
    dataset = chain.data(DataPlan(source=str(write_halves(folder / "photos"))))
    told = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "crop_fraction": 1.0, "interpolation": "bilinear"}
    plan = validated(AdoptFilePlan, {"input": told}, "test")
    whole = chain.adopt(plan, write_network(folder / "halves.onnx"), dataset)
    settings = {"calibrate": {"images": 24}, "check_images": 16}
    device = find_device("local").probe()
    small = chain.quantize(validated(QuantizeConfig, settings, "test"), whole, dataset, device)
    bundles = {
        name: chain.package(PackageConfig(), model, dataset) for name, model in (("float32", whole), ("int8", small))
    }
    benched = chain.bench(PLAN, bundles, dataset)
    return Dark(chain, dataset, bundles, benched.one_of_each[0])


def test_an_int8_that_fails_in_the_dark_alone_is_caught(halves: Dark) -> None:
    """Calibrated in the light, its ranges cut off what is dark: the plain accuracy passes, that of dark does not."""
    float32, int8 = (figures(halves.measurement, name) for name in ("float32", "int8"))
    task, verdicts = TASKS["classification"], {}
    for name in ("accuracy", accuracy_of("blur"), accuracy_of("dark")):
        before, after = float32[name], int8[name]
        assert before.trusted and after.trusted and before.scores is not None and after.scores is not None
        change = task.change(before.scores, after.scores)
        verdicts[name] = no_worse(Interval(change.difference, change.low, change.high, change.n), 3.0).answer
        assert float32[name].interval is not None and float32[name].interval.value > 0.97, "float32 sees in the dark"
    assert verdicts == {"accuracy": "holds", "accuracy of blur": "holds", "accuracy of dark": "fails"}
    assert int8[accuracy_of("dark")].interval.value < 0.7
    result = halves.measurement.facts.results["int8"]
    assert result.accuracy.value > 0.97 and result.corrupted["dark"].value == int8[accuracy_of("dark")].interval.value
    assert result.corrupted["dark"].high < result.accuracy.low


def test_outputs_with_a_fault_are_those_of_the_faulty_images(halves: Dark) -> None:
    bundle, samples = halves.bundles["float32"], halves.dataset.samples("test")
    spec = bundle.facts.input.model_dump()
    dark = np.stack([sample.fitted(spec, "dark") for sample in samples]).astype(np.float64) / 255
    means = [dark[:, :, half].mean((1, 2, 3)) for half in (slice(0, 16), slice(16, 32))]
    wanted = np.stack([means[0] - means[1], means[1] - means[0]], 1) / 0.25
    np.testing.assert_allclose(halves.measurement.outputs("float32", "dark"), wanted, atol=1e-4)
    assert "logits-jpeg/float32.npy" not in halves.measurement.manifest.files, "nobody asked"


def test_page_and_terminal_tell_them(halves: Dark) -> None:
    report = halves.chain.report(ReportConfig(), [halves.measurement], {})
    [device] = report.numbers["devices"]
    assert list(device["faults"]["asked"]) == ["dark", "blur"]
    rows = {row["name"]: row["faults"] for row in device["faults"]["rows"]}
    assert rows["float32"]["dark"]["difference"] is None
    assert rows["int8"]["dark"]["difference"]["high"] < -0.2 < rows["int8"]["blur"]["difference"]["low"]
    page = report.page.read_text()
    assert "With a camera&#39;s faults" in page or "With a camera's faults" in page
    assert SEVERITIES["dark"] in page and SEVERITIES["jpeg"] not in page
    told = printed(device)
    assert "dark" in told and "blur" in told and "\N{MINUS SIGN}" in told and "jpeg" not in told
    assert all(len(line) <= 110 for line in told.splitlines())


def printed(device: Mapping[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=110, force_terminal=False)
    console.print(faults_table(dict(device)))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_names_on_the_page_are_escaped(halves: Dark) -> None:
    numbers = halves.chain.report(ReportConfig(), [halves.measurement], {}).numbers
    text = json.dumps(numbers).replace('"int8"', '"<script>[red]x[/red]"')
    changed = json.loads(text)
    changed["devices"][0]["faults"]["asked"]["dark"] = "<img src=x>"
    pictures = {each["position"]: "" for each in [*changed["flips"], *changed["answers"]["mistakes"]]}
    page = render(changed, pictures)
    assert "<script>[red]" not in page and "<img src=x>" not in page
    assert "[red]x[/red]" in printed(changed["devices"][0]), "no markup of anybody's"


def test_a_report_without_them_says_nothing(halves: Dark, tmp_path: Path) -> None:
    plain = PLAN.model_copy(update={"corruptions": ()})
    order = Order("bench", bench_config(plain, "null"), {**halves.bundles, "data": halves.dataset})
    measurement = bench(order, halves.bundles, halves.dataset, tmp_path / "out")
    assert measurement.facts.results["int8"].corrupted is None
    report = halves.chain.report(ReportConfig(), [measurement], {}, tmp_path / "report")
    assert report.numbers["devices"][0]["faults"] is None and "camera" not in report.page.read_text()
    found = figures(measurement, "int8")[accuracy_of("dark")]
    assert not found.trusted and found.interval is None and "--corruptions dark" in found.why


def test_models_of_others_have_no_images_to_corrupt(halves: Dark, tmp_path: Path) -> None:
    write_network(tmp_path / "net.onnx")
    done = kdpipe("bench", tmp_path / "net.onnx", "--corruptions", "dark", "--device", "null")
    assert_one_line(done, 2, "corruptions are of images", "--data")
    done = kdpipe("bench", halves.bundles["int8"].path, "--corruptions", "drak")
    assert_one_line(done, 2, "corruptions", "'drak'")


# ---- in blocks, kept ---------------------------------------------------------------------------------------------


class Counting(LocalDevice):
    """This host, which notes what it is asked, and whose link is cut at one question for good."""

    def __init__(self, cut_at: int) -> None:
        super().__init__(DeviceSettings())
        self.asked: list[str] = []
        self.cut_at = cut_at

    def predict(self, bundle: str, images: str, *arguments: Any, **options: Any) -> Prediction:
        self.asked.append(images)
        if 0 < self.cut_at <= len(self.asked):
            raise DeviceLost("the cable")
        return super().predict(bundle, images, *arguments, **options)


def test_a_cut_goes_on_with_what_is_lacking(halves: Dark, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "BLOCK_BYTES", 1)
    monkeypatch.setattr(accuracy, "LEAST_BLOCK", 64)
    config = bench_config(PLAN.model_copy(update={"corruptions": ("dark",)}), "local")
    (tmp_path / "journal").mkdir()
    asked_by: list[list[str]] = []
    for cut_at in (7, 0):
        device = Counting(cut_at)
        scratch = tmp_path / str(cut_at)
        scratch.mkdir()
        bundles = {"int8": halves.bundles["int8"]}
        asked = Asked(
            device, bundles, halves.dataset, Journal(tmp_path / "journal"), scratch, Talk(lambda *_: None), config
        )
        with opened(device, scratch):
            accuracy.push(asked)
            if cut_at:
                with pytest.raises(DeviceLost):
                    accuracy.ask(asked)
            else:
                assert accuracy.ask(asked) == {}
                dark = accuracy.gather(asked, "int8", tmp_path / "dark.npy", "dark")
                np.testing.assert_array_equal(dark, halves.measurement.outputs("int8", "dark"))
        asked_by.append(device.asked)
    first, then = asked_by
    assert first[:2] == ["timing-0.npy", "images-00000000.npy"], "alone, then in blocks of 64"
    assert first[-2:] == ["images-dark-00000064.npy"] * 2, "a second try, then the cable"
    assert then == [f"images-dark-{start:08d}.npy" for start in (64, 128, 192)], "goes on with the block that was cut"


# ---- which images ------------------------------------------------------------------------------------------------


def test_strange_digests_are_one_line(halves: Dark, tmp_path: Path) -> None:
    folder = tmp_path / "strange"
    shutil.copytree(halves.measurement.path, folder)
    for values in (np.zeros(3, np.uint64), np.zeros((200, 2), np.float32), np.array(["x"] * 200)):
        content = io.BytesIO()
        np.save(content, values)
        replace_file(folder, Measurement.IMAGES, content.getvalue())
        with pytest.raises(UserError):
            _ = Measurement.open(folder).images


def test_figures_have_every_name(halves: Dark) -> None:
    assert tuple(figures(halves.measurement, "int8")) == NAMES
    with pytest.raises(UserError, match="measured no 'int9': it has float32, int8"):
        figures(halves.measurement, "int9")
