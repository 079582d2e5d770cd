"""The gate on real bundles that draw masks: what it says of them is what the task says of what they answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import SMALL_MASKS, Made, Trained, assert_one_line, kdpipe, replace_file, rewrite_manifest
from onnx import numpy_helper

from kdpipe.chain import Chain
from kdpipe.core.config import ExportConfig, Recipe, validated
from kdpipe.core.kinds import Bundle, Measurement, Model, Verdict
from kdpipe.data.dataset import Dataset, load_labels
from kdpipe.deploy.gate import FAMILY_LEVEL
from kdpipe.devices.bench import write_labels
from kdpipe.runtime.task import TASKS

TASK = TASKS["segmentation"]
QUICK = {
    "rounds": 2, "seconds": 0.02, "max_seconds": 0.05, "min_samples": 10, "warm_up_seconds": 0.02, "images": 4,
    "cold_starts": 0, "threads": 1, "p50_within": 0.5, "resolution": 0.9,
}  # fmt: skip
SETTINGS = [word for name, value in QUICK.items() for word in ("--set", f"bench.{name}={value}")]


def spoiled(model: Path) -> bytes:
    """A file that calls every pixel what its network thinks least likely: the last convolution's sign is turned."""
    graph = onnx.load(model)
    made_by = {name: node for node in graph.graph.node for name in node.output}
    node = made_by[graph.graph.output[0].name]
    while node.op_type != "Conv":
        node = made_by[node.input[0]]
    for weights in graph.graph.initializer:
        if weights.name in node.input[1:]:
            weights.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weights), weights.name))
    return graph.SerializeToString()


@pytest.fixture(scope="module")
def shelf(masked: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of artifacts of its own: the data and, each by its name, a student's bundles, good and bad."""
    folder = tmp_path_factory.mktemp("gate-of-masks") / "artifacts"
    chain, recipe = Chain(folder), validated(Recipe, SMALL_MASKS, "the small masks")
    shutil.copytree(masked.dataset.path, folder / masked.dataset.path.name)
    dataset = Dataset.open(folder / masked.dataset.path.name)
    for name in ("float32", "int8"):
        shutil.copytree(masked.bundles[f"onnxruntime-{name}"].path, folder / name)
    classes = ExportConfig.of(recipe.export, target="onnxruntime", output="classes")
    model = masked.chain.export(classes, masked.student, masked.dataset)
    shutil.copytree(chain.package(recipe.package, model, dataset).path, folder / "classes")
    whole = masked.models["onnxruntime-float32"]
    worse = shutil.copytree(whole.path, folder / "model-worse")
    replace_file(worse, whole.facts.entry, spoiled(whole.entry))
    rewrite_manifest(worse, lambda value: value.update(key="e" * 64))
    shutil.copytree(chain.package(recipe.package, Model.open(worse), dataset).path, folder / "worse")
    return folder


def gate(shelf: Path, candidate: str, *arguments: object) -> Any:
    return kdpipe("gate", shelf / candidate, *arguments, "--sessions", 1, "--artifacts", shelf, *SETTINGS)


def told(done: Any) -> dict[str, Any]:
    value = json.loads(done.stdout)
    assert Verdict.open(Path(value["artifact"])).facts.answer == value["verdict"]["answer"]
    return {rule["figure"]: rule for rule in value["verdict"]["rules"]}


def scores_of(shelf: Path, key: str) -> np.ndarray:
    """By a measurement's own outputs for one bundle."""
    for path in shelf.glob("measurement-*"):
        measurement = Measurement.open(path)
        for name, source in measurement.manifest.inputs.items():
            if source.key == key:
                return TASK.scores(measurement.outputs(name), measurement.labels)
    raise AssertionError("it was not measured")


def test_another_form_of_the_same_network_keeps_what_it_must(shelf: Path) -> None:
    """Class maps against logits: no pixel changes, and no interval is wider than what so few images hide."""
    done = gate(shelf, "classes", "--baseline", shelf / "float32", "--rule", "mIoU >= baseline - 50pp",
                "--rule", "worst class >= 0%", "--rule", "size <= 1.2 x baseline", "--json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = told(done)
    assert {rule["answer"] for rule in found.values()} == {"pass"}
    accuracy = found["accuracy"]
    assert accuracy["candidate"] == accuracy["baseline"] and accuracy["estimate"]["value"] == 0
    assert accuracy["estimate"]["low"] < 0 < accuracy["estimate"]["high"]


def test_a_worse_network_is_refused(shelf: Path, tmp_path: Path) -> None:
    """By the change that the task itself finds in what the two said; the comment says of which figure."""
    comment = tmp_path / "comment.md"
    done = gate(shelf, "worse", "--baseline", shelf / "float32", "--rule", "mIoU >= baseline - 1pp", "--rule",
                "calibration error <= baseline + 1pp", "--comment", comment, "--json")  # fmt: skip
    assert_one_line(done, 1, "fail: ", "broken")
    accuracy = told(done)["accuracy"]
    before, after = (scores_of(shelf, Bundle.open(shelf / name).key) for name in ("float32", "worse"))
    change = TASK.change(before, after)
    assert accuracy["answer"] == "fail" and accuracy["p_broken"] < FAMILY_LEVEL
    assert accuracy["estimate"]["value"] == pytest.approx(change.difference) and change.difference < -0.01
    assert (accuracy["baseline"], accuracy["candidate"]) == pytest.approx(
        (TASK.summary(before).value, TASK.summary(after).value)
    )
    assert "accuracy >= baseline - 1pp" in comment.read_text()


def test_so_few_images_cannot_tell(shelf: Path) -> None:
    mine = ("float32", "--baseline", shelf / "float32")
    done = gate(shelf, *mine, "--rule", "worst class >= baseline - 90pp", "--rule", "size <= baseline")
    assert done.returncode == 0, done.stderr
    apart = gate(shelf, "classes", "--baseline", shelf / "float32", "--rule", "worst class >= baseline - 90pp")
    assert_one_line(apart, 75, "cannot tell: 0 of 1 rules are kept, 1 is not told; about 30 images would tell")
    assert "24 images are too few for an interval: 30 are" in apart.stdout
    share = TASK.summary(scores_of(shelf, Bundle.open(shelf / "float32").key)).value
    near = gate(shelf, *mine, "--rule", f"accuracy >= {100 * share - 0.1:.2f}%")
    assert_one_line(near, 75, "cannot tell: 0 of 1 rules are kept, 1 is not told", "images would tell")
    assert_one_line(gate(shelf, *mine, "--rule", "mIoU >= 99%"), 1, "fail: 0 of 1 rules are kept")


def test_networks_of_several_inputs_are_judged_on_the_finest(shelf: Path, masked: Made, tmp_path: Path) -> None:
    """Whatever their order: a coarse candidate does not make the labels coarse that its baseline is judged by."""
    bundle = masked.bundles["onnxruntime-float32"]
    height, width = bundle.facts.input.sides
    small = bundle.facts.input.model_copy(update={"size": (height // 2, width // 2)})
    coarse = SimpleNamespace(facts=SimpleNamespace(input=small))
    found = []
    for at, both in enumerate(([coarse, bundle], [bundle, coarse])):
        write_labels(both, masked.dataset, tmp_path / f"{at}.npy")
        found.append(np.load(tmp_path / f"{at}.npy"))
    assert found[0].shape[1:] == (height, width)
    assert np.array_equal(*found) and np.array_equal(
        found[0], load_labels(masked.dataset.samples("test"), bundle.facts.input.model_dump())
    )


def test_other_parts_and_other_tasks_are_one_line(shelf: Path, packed: Bundle, trained: Trained) -> None:
    cropped = shelf / "cropped"
    shutil.copytree(shelf / "int8", cropped)

    def covers(value: dict[str, Any]) -> None:
        value["facts"]["input"]["resize"] = "cover"
        value["key"] = "d" * 64

    rewrite_manifest(cropped, covers)
    rule = ("--rule", "mIoU >= baseline - 1pp")
    done = gate(shelf, "int8", "--baseline", cropped, *rule)
    assert_one_line(done, 2, "are shown different parts of an image")
    labels = gate(shelf, "float32", "--baseline", packed.path, *rule)
    assert_one_line(labels, 2, "classification", "segmentation")
    assert_one_line(gate(shelf, "float32", "--data", trained.dataset.path, "--rule", "mIoU >= 1%"), 2, "classes")
