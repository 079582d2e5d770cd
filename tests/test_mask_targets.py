"""The contract of tests/test_targets.py over the second task: masks through every target, in every form and in INT8."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import assert_one_line, kdpipe, replace_file, rewrite_manifest

from kdpipe import runtime
from kdpipe.chain import Chain
from kdpipe.core.config import (
    AdoptFilePlan,
    BenchPlan,
    DataPlan,
    ExportConfig,
    InputSettings,
    PackageConfig,
    QuantizeConfig,
    TrainConfig,
    validated,
)
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Bundle, Checkpoint, Model
from kdpipe.data.dataset import Dataset, load_images, load_labels
from kdpipe.deploy.bundle import MOST_GOLDEN_BYTES, verify
from kdpipe.devices import accuracy, find_device, opened
from kdpipe.devices.accuracy import Asked
from kdpipe.devices.journal import Journal
from kdpipe.devices.session import bench_config
from kdpipe.devices.talk import Talk
from kdpipe.export import TARGETS
from kdpipe.export.parity import compare
from kdpipe.networks import models
from kdpipe.quantize.calibrate import shown
from kdpipe.quantize.guard import parted
from kdpipe.quantize.stage import damage
from kdpipe.runtime import open_session, predict
from kdpipe.runtime.bundle import BundleError, apart, read_facts, replay_golden
from kdpipe.runtime.task import TASKS

TASK = TASKS["segmentation"]
SIDES = (32, 48)
DEVICE = find_device("local").probe()
INT8 = {"calibrate": {"images": 8}, "check_images": 8}


class Drawn:
    """A small student that draws masks, and what was made of it so far: each is made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.chain = Chain(folder)
        plan = DataPlan(task="segmentation", source="masks", most_images=32)
        self.dataset: Dataset = self.chain.data(plan)
        settings = {"epochs": 20, "workers": 0, "batch_size": 8, "augment": {"crop": "none", "flip": 0}}
        config = {"model": "fpn", "encoder": "test_resnet", "method": "labels", "train": settings}
        size = {"model_args": {"encoder_depth": 4, "decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}}
        config = validated(TrainConfig, {**config, **size, "input": {"size": SIDES}}, "the student")
        self.student: Checkpoint = self.chain.train("student", config, self.dataset, None)

    def whole(self, target: str, output: str = "logits") -> Model:
        return self.chain.export(ExportConfig(target=target, output=output), self.student, self.dataset)

    def small(self, target: str, output: str = "logits", **more: object) -> Model:
        config = validated(QuantizeConfig, {**INT8, **more}, "int8")
        return self.chain.quantize(config, self.whole(target, output), self.dataset, DEVICE)

    def bundle(self, model: Model, **more: int) -> Bundle:
        return self.chain.package(PackageConfig(**more), model, self.dataset)

    def images(self, part: str = "test", count: int = 16) -> np.ndarray:
        return load_images(self.dataset.balanced(part, count, seed=1), self.student.facts.input.model_dump())

    def torch_outputs(self, images: np.ndarray, output: str = "logits") -> np.ndarray:
        network, spec = models.restore(self.student)
        whole = models.Normalise(network, spec, output).eval()
        with torch.inference_mode():
            return whole(torch.from_numpy(images).permute(0, 3, 1, 2).float()).numpy()


@pytest.fixture(scope="module")
def drawn(small) -> Drawn:
    _, folder = small
    return Drawn(folder.parent / "drawn")


def session_of(model: Model | Bundle) -> runtime.Session:
    return open_session(model.path, model.facts.for_runtime(), 1, stand_in=model.facts.stand_in is not None)


# ---- float32 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_float32_computes_what_torch_computes(drawn: Drawn, target: str) -> None:
    model, images = drawn.whole(target), drawn.images()
    expected, actual = drawn.torch_outputs(images), predict(session_of(model), images)
    assert actual.shape == (len(images), len(drawn.dataset.classes), SIDES[0] // 2, SIDES[1] // 2)
    assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
    assert TASK.agreement(expected, actual) > 0.999
    assert model.facts.parity.agreement > 0.999 and model.facts.output == "logits"
    assert model.facts.input.layout == TARGETS[target].layout and model.facts.input.resize == "stretch"


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "tflite"])
def test_classes_are_what_torch_says(drawn: Drawn, target: str) -> None:
    check_form(drawn, target, "classes")


@pytest.mark.lab  # for the seconds of further exports
@pytest.mark.parametrize(("target", "output"), [*((name, "logits-full") for name in TARGETS), ("tflite", "classes")])
def test_other_forms_compute_what_torch_computes(drawn: Drawn, target: str, output: str) -> None:
    check_form(drawn, target, output)


def test_forms_are_asked_about_the_same_blocks(drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are sent once for all: as many as the form that says most of them allows."""
    bundles = {form: drawn.bundle(drawn.whole("onnxruntime", form)) for form in ("classes", "logits", "logits-full")}
    monkeypatch.setattr(accuracy, "BLOCK_BYTES", 10 * len(drawn.dataset.classes) * 4 * SIDES[0] * SIDES[1])
    device, (journal, scratch) = find_device("local"), (tmp_path / "journal", tmp_path / "scratch")
    journal.mkdir()
    scratch.mkdir()
    config = bench_config(BenchPlan(images=4), "local")
    count = len(drawn.dataset.samples("test"))
    with opened(device, scratch):
        asked = Asked(device, bundles, drawn.dataset, Journal(journal), scratch, Talk(lambda *_: None), config)
        accuracy.push(asked)
        assert accuracy.ask(asked) == {}
        assert [stop - start for start, stop in asked.blocks("classes")][:2] == [10, 10] and count > 20
        images = load_images(drawn.dataset.samples("test"), drawn.student.facts.input.model_dump())
        for form in bundles:
            outputs = accuracy.gather(asked, form, tmp_path / f"{form}.npy")
            expected = drawn.torch_outputs(images, form)
            assert outputs.shape == expected.shape and np.mean(np.abs(outputs - expected) > 1e-3) < 1e-3


def check_form(drawn: Drawn, target: str, output: str) -> None:
    model, images = drawn.whole(target, output), drawn.images()
    expected, actual = drawn.torch_outputs(images, output), predict(session_of(model), images)
    assert model.facts.output == output and actual.shape[-2:] == SIDES
    assert TASK.misfit(actual, len(images), len(drawn.dataset.classes)) is None
    if output == "classes":
        assert actual.dtype == np.uint8
        assert (actual != expected).mean() < 1e-3
        assert model.facts.parity.logit_spread == 1 and model.facts.parity.relative_difference < 1e-3
    else:
        assert np.abs(actual - expected).max() <= 1e-4 * expected.std()
    assert drawn.whole(target).key != model.key


def test_a_graphs_accuracy_is_that_of_the_checkpoint(drawn: Drawn) -> None:
    """Whatever it gives: what is kept of its outputs is judged as torch's are."""
    for output in ("logits", "classes"):
        model = drawn.whole("onnxruntime", output)
        graph = drawn.chain._graph_of(model)
        test = drawn.dataset.samples("test")
        hops = graph.hops
        labels = load_labels([test[int(at)] for at in hops["positions"]], graph.facts.input.model_dump())
        found = TASK.summary(TASK.scores(hops["simplified"], labels))
        assert hops["simplified"].dtype == np.uint8 and hops["simplified"].shape[1:] == SIDES
        assert found.value == pytest.approx(drawn.student.facts.test_accuracy, abs=2e-3)


def test_a_form_is_of_masks_alone(packed: Bundle, trained, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="output 'classes' is nothing that a network for classification gives"):
        Chain(tmp_path).export(ExportConfig(output="classes"), trained.student, trained.dataset)


# ---- INT8 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_int8_is_smaller_and_says_nearly_the_same(drawn: Drawn, target: str) -> None:
    whole, small, images = drawn.whole(target), drawn.small(target), drawn.images()
    assert small.size_bytes < 0.6 * whole.size_bytes
    before, after = (predict(session_of(model), images) for model in (whole, small))
    assert before.shape == after.shape and np.abs(before - after).max() > 1e-4
    assert TASK.agreement(before, after) >= 0.8
    assert small.facts.against_float32.signal_to_noise_db > 5
    noise = small.noise_by_layer
    assert noise[-1].out_db == pytest.approx(small.facts.against_float32.signal_to_noise_db, abs=6)


@pytest.mark.parametrize("target", [name for name in TARGETS if name != "tflite"])
def test_int8_that_decides_is_judged_by_the_logits_it_decides_by(drawn: Drawn, target: str) -> None:
    check_deciding_int8(drawn, target)


@pytest.mark.lab  # for the seconds of its converter
def test_int8_of_tflite_that_decides(drawn: Drawn) -> None:
    check_deciding_int8(drawn, "tflite")


def check_deciding_int8(drawn: Drawn, target: str) -> None:
    small = drawn.small(target, "classes")
    assert small.facts.output == "classes"
    found, logits = small.facts.against_float32, drawn.small(target).facts.against_float32
    assert found.signal_to_noise_db == pytest.approx(logits.signal_to_noise_db, abs=6)
    assert found.agreement == pytest.approx(logits.agreement, abs=0.1)
    actual = predict(session_of(small), drawn.images())
    assert actual.dtype == np.uint8 and len(np.unique(actual)) > 1


def test_the_guard_keeps_masks_right(drawn: Drawn) -> None:
    """Its drop is of the task's own figure, on one half of the held-out images."""
    small = drawn.small("onnxruntime", "classes", max_drop=30, guard_part="test", guard_steps=2)
    guard, whole = small.facts.guard, drawn.whole("onnxruntime", "classes")
    assert guard is not None and guard.curve[0].kept == 0
    held_out = drawn.dataset.balanced("test", len(drawn.dataset.samples("test")), seed=0)
    searching, _ = parted(held_out, TASK)
    spec = whole.facts.input.model_dump()
    labels, images = load_labels(searching, spec), load_images(searching, spec)
    before, after = (TASK.scores(predict(session_of(model), images), labels) for model in (whole, small))
    assert guard.curve[0].drop_points == pytest.approx(-100 * TASK.change(before, after).difference)
    assert guard.confirmed.images == len(held_out) - len(searching)


def test_dead_masks_are_refused() -> None:
    alive = np.random.default_rng(0).integers(0, 3, (8, 4, 4)).astype(np.uint8)
    found = damage(TASK, alive, alive)
    assert found.agreement == 1 and found.signal_to_noise_db is None
    with pytest.raises(GateFailed):
        damage(TASK, alive, np.zeros_like(alive))


def test_calibration_spreads_over_what_images_show() -> None:
    logits = np.zeros((2, 3, 4, 4), np.float32)
    logits[0, 1], logits[1, 2, :2] = 50, 50
    np.testing.assert_allclose(shown(logits)[0], [0, 1, 0], atol=1e-6)
    np.testing.assert_allclose(shown(logits)[1], [1 / 6, 1 / 6, 2 / 3], atol=1e-6)
    assert shown(logits.argmax(1).astype(np.uint8))[1, :3].tolist() == [0.5, 0, 0.5]
    assert np.array_equal(shown(logits[:, :, 0, 0]), logits[:, :, 0, 0])  # of one answer an image: as they are


# ---- parity of classes -------------------------------------------------------------------------------------------


def test_parity_of_classes_is_the_share_of_pixels_that_change() -> None:
    expected = np.random.default_rng(0).integers(0, 3, (4, 5, 5)).astype(np.uint8)
    actual = expected.copy()
    actual[2, 0, :3] = (actual[2, 0, :3] + 1) % 3
    found = compare(TASK, expected, actual, [Path(str(at)) for at in range(4)])
    assert (found.relative, found.max_difference) == (3 / 100, 3 / 25)
    assert found.worst_image.name == "2" and found.agreement == pytest.approx(0.97)
    with pytest.raises(GateFailed, match="float32"):
        compare(TASK, expected, actual.astype(np.float32), [Path("0")] * 4)
    with pytest.raises(GateFailed, match="do not depend"):
        compare(TASK, np.ones_like(expected), actual, [Path("0")] * 4)


def test_outputs_are_as_far_apart_as_they_say() -> None:
    logits = np.zeros((2, 3), np.float32)
    assert apart(logits, np.array([[0, 0, -2], [0, np.nan, 0]], np.float32)).tolist()[0] == 2
    assert apart(logits, np.array([[0, 0, -2], [0, np.nan, 0]], np.float32))[1] > 1e30
    classes = np.zeros((1, 2, 2), np.uint8)
    assert apart(classes, np.array([[[0, 255], [0, 0]]], np.uint8)).tolist() == [0.25]


# ---- bundles -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_bundle_replays_its_masks(drawn: Drawn, target: str) -> None:
    _, found = verify(drawn.bundle(drawn.small(target)).path)
    assert found["golden_images"] >= 2 and found["max_difference"] <= found["tolerance"]


@pytest.mark.parametrize("output", ["logits", "classes"])
def test_a_bundles_golden_outputs_stay_small(drawn: Drawn, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However large they are: of many pixels only some are kept, of images at least two."""
    image_bytes = 3 * SIDES[0] * SIDES[1]
    monkeypatch.setattr("kdpipe.deploy.bundle.MOST_GOLDEN_BYTES", 2 * image_bytes + 2000)
    model = drawn.whole("onnxruntime", output)
    out = drawn.chain.folder.parent / f"golden-{output}"
    shutil.rmtree(out, ignore_errors=True)
    bundle = drawn.chain.package(PackageConfig(golden_images=7), model, drawn.dataset, out)
    assert bundle.facts.golden_images == 2
    assert bundle.file("golden.npz").stat().st_size < 2 * image_bytes + 3000
    assert bundle.facts.golden_step > 1
    replay_golden(bundle.path, read_facts(bundle.path))
    shutil.rmtree(out)


def test_a_strangers_golden_outputs_are_looked_at(drawn: Drawn, tmp_path: Path) -> None:
    bundle = drawn.bundle(drawn.whole("onnxruntime", "classes"))
    assert bundle.file("golden.npz").stat().st_size <= MOST_GOLDEN_BYTES

    def of(name: str, change) -> Path:
        folder = Path(shutil.copytree(bundle.path, tmp_path / name))
        change(folder)
        return folder

    def stored(**arrays: np.ndarray):
        def change(folder: Path) -> None:
            with np.load(folder / "golden.npz") as golden:
                np.savez(tmp_path / "new.npz", **{**golden, **arrays})
            replace_file(folder, "golden.npz", (tmp_path / "new.npz").read_bytes())

        return change

    with np.load(bundle.file("golden.npz")) as golden:
        outputs = golden["logits"]
    for name, change, words in (
        ("step", lambda f: rewrite_manifest(f, lambda m: m["facts"].update(golden_step=0)), "golden step of 0"),
        ("text", lambda f: rewrite_manifest(f, lambda m: m["facts"].update(golden_step="1")), "golden step"),
        ("wide", lambda f: rewrite_manifest(f, lambda m: m["facts"].update(golden_tolerance=0.5)), "tolerance of 0.5"),
        ("other", stored(logits=(outputs + 1) % 2), "golden outputs are off by"),
        ("type", stored(logits=outputs.astype(np.float32)), "tolerance of|the model gives uint8"),
        ("half", stored(logits=outputs[:, ::2]), "golden outputs are uint8 of shape"),
        ("deep", stored(logits=outputs[:, None]), "golden images of shape"),
    ):
        folder = of(name, change)
        with pytest.raises(BundleError, match=words):
            replay_golden(folder, read_facts(folder))


def test_what_an_integration_is_checked_against(drawn: Drawn) -> None:
    import json

    for output, type_, each in (("logits", "float32", 4), ("classes", "uint8", 1)):
        bundle = drawn.bundle(drawn.whole("onnxruntime", output))
        told = json.loads(bundle.file("conformance/expected.json").read_text())
        assert told["outputs_type"] == type_
        assert bundle.file("conformance/outputs.bin").stat().st_size == each * np.prod(told["outputs_shape"])


# ---- somebody's own ----------------------------------------------------------------------------------------------


def test_somebodys_segmenter_is_adopted_as_weights(drawn: Drawn, tmp_path: Path) -> None:
    """Weights by the library's own names, with or without a prefix."""
    state, _ = models.restore(drawn.student)
    torch.save({f"module.{name}": tensor for name, tensor in state.state_dict().items()}, tmp_path / "theirs.pth")
    arguments = drawn.student.facts.model_args
    done = kdpipe(
        "teacher", drawn.dataset.path, "--model", "fpn", "--encoder", "test_resnet",
        "--checkpoint", tmp_path / "theirs.pth", "--input.size", "[32, 48]",
        "--model-args", str(arguments).replace("'", '"'), "--out", tmp_path / "teacher",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    theirs = Checkpoint.open(tmp_path / "teacher")
    assert theirs.facts.test_accuracy == pytest.approx(drawn.student.facts.test_accuracy)
    assert theirs.facts.model == "fpn-test_resnet"


@pytest.mark.parametrize("output", ["logits", "classes"])
def test_somebodys_segmenter_is_adopted_as_a_file(drawn: Drawn, output: str, tmp_path: Path) -> None:
    graph = drawn.chain._graph_of(drawn.whole("onnxruntime", output))
    path = Path(shutil.copy(graph.file(graph.ONNX), tmp_path / "theirs.onnx"))
    plan = AdoptFilePlan(input=InputSettings(resize="stretch", crop_fraction=1.0, interpolation="bicubic"))
    model = Chain(tmp_path / "artifacts").adopt(plan, path, drawn.dataset)
    assert model.facts.output == output and model.facts.task == "segmentation"
    found = predict(session_of(model), drawn.images())
    assert TASK.agreement(found, drawn.torch_outputs(drawn.images(), output)) > 0.99


def test_a_file_of_other_masks_is_one_line(drawn: Drawn, trained, packed: Bundle, tmp_path: Path) -> None:
    done = kdpipe("adopt", packed.file("model.onnx"), "--data", drawn.dataset.path, "--out", tmp_path / "model")
    assert_one_line(done, 2, "gives outputs of shape (1, 10)", "height, width")
    graph = drawn.chain._graph_of(drawn.whole("onnxruntime"))
    done = kdpipe("adopt", graph.file(graph.ONNX), "--data", trained.dataset.path, "--out", tmp_path / "model")
    assert_one_line(done, 2, "gives", "wanted float32 [1, 10]")


def test_random_images_have_no_masks(tmp_path: Path) -> None:
    done = kdpipe("export", "--model", "unet", "--encoder", "test_resnet", "--pretrained", "--classes", 3, cwd=tmp_path)
    assert_one_line(done, 2, "'unet' draws masks", "kdpipe teacher DATA")


def test_onnx_takes_any_number_of_images(drawn: Drawn) -> None:
    for output in ("logits", "classes"):
        entry = drawn.whole("onnxruntime", output).entry
        graph = onnx.load(entry).graph
        assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
        assert not any(tensor.external_data for tensor in graph.initializer)
        images = drawn.images(count=5)
        session = session_of(drawn.whole("onnxruntime", output))
        together, apart_ = predict(session, images), predict(session, images, batch=1)
        assert TASK.agreement(together, apart_) > 0.999
