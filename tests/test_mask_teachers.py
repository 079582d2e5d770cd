"""Somebody's segmenter as the teacher, a file of ONNX or code of their own: it teaches as a network of ours would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from conftest import SMALL_TRAIN, SMALL_UNET, Made, Trained, assert_one_line, kdpipe
from onnx import helper, numpy_helper
from torch import nn

from kdpipe.chain import Chain
from kdpipe.core.config import TeacherPlan, TrainConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint, Graph
from kdpipe.distill.teacher import open_teacher

SIDES = [32, 48]
LEARN = {**SMALL_UNET, "train": {**SMALL_TRAIN, "epochs": 1, "batch_size": 8}}

OWN = """
import torch
from torch import nn
from torch.nn import functional

class Pixels(nn.Module):
    def __init__(self, num_classes, enlarged=False):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, num_classes, 1)
        self.enlarged = enlarged

    def forward(self, image):
        logits = self.head(self.stem(image).relu())
        return functional.interpolate(logits, image.shape[2:], mode="bilinear") if self.enlarged else logits

class Named(Pixels):
    def forward(self, image):
        return {"out": super().forward(image)}
"""


def ended_by(source: Path, path: Path, kind: str, *more: np.ndarray, kind_of: int = 0, **settings: object) -> Path:
    """A file whose output goes through one more operator."""
    model = onnx.load(source)
    [output] = model.graph.output
    names = [f"more_{at}" for at in range(len(more))]
    for name, array in zip(names, more, strict=True):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    inputs = [output.name, *([""] if kind == "Resize" else []), *names]
    model.graph.node.append(helper.make_node(kind, inputs, ["ended"], **settings))
    model.graph.output.pop()
    kind_of = kind_of or output.type.tensor_type.elem_type
    model.graph.output.append(helper.make_tensor_value_info("ended", kind_of, None))
    onnx.save(model, path)
    return path


def one_by_one(source: Path, path: Path) -> Path:
    """A file that takes one image at a time."""
    model = onnx.load(source)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def files(masked: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The student of masks as files that people have: its graph takes raw colours, at a stride of its own."""
    folder, graph = tmp_path_factory.mktemp("files"), masked.graph.file(Graph.ONNX)
    larger = np.array([1, 1, 2, 2], np.float32)
    return {
        "plain": graph,
        "softmax": ended_by(graph, folder / "softmax.onnx", "Softmax", axis=1),
        "larger": ended_by(graph, folder / "larger.onnx", "Resize", larger, mode="linear"),
        "classes": ended_by(graph, folder / "classes.onnx", "ArgMax", kind_of=7, axis=1, keepdims=0),
        "fixed": one_by_one(graph, folder / "fixed.onnx"),
        "pooled": ended_by(graph, folder / "pooled.onnx", "ReduceMean", np.array([2, 3]), keepdims=0),
        "last": ended_by(graph, folder / "last.onnx", "Transpose", perm=[0, 2, 3, 1]),
    }


def taught_by(masked: Made, chain: Chain, file: Path, **more: object) -> Checkpoint:
    spec = masked.student.facts.input
    shown = {"size": SIDES, "resize": spec.resize, "interpolation": spec.interpolation}
    config = {"model": "onnx", "checkpoint": file, "input": {**shown, "crop_fraction": spec.crop_fraction}, **more}
    return chain.teacher(validated(TeacherPlan, config, "the teacher"), masked.dataset)


def losses(chain: Chain, masked: Made, teacher: Checkpoint, method: str, **more: object) -> list[float]:
    """Of a student that the teacher teaches for one epoch."""
    config = validated(TrainConfig, {**LEARN, "method": method, **more}, "the student")
    return [row.loss for row in chain.train("student", config, masked.dataset, teacher).history]


@pytest.mark.parametrize("name", ["plain", "softmax", "fixed"])
def test_a_file_of_masks_teaches_as_its_network_does(
    masked: Made, files: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """The same answers, so the same losses: live and from a cache."""
    chain = Chain(tmp_path / "artifacts")
    teacher = taught_by(masked, chain, files[name])
    assert teacher.facts.test_accuracy == pytest.approx(masked.student.facts.test_accuracy, abs=1e-4)
    spec = masked.student.facts.input
    view = torch.randn(3, 3, *spec.sides)
    first, second = (open_teacher(each, masked.dataset, spec)(view).logits for each in (teacher, masked.student))
    torch.testing.assert_close(first.log_softmax(1), second.log_softmax(1), rtol=1e-3, atol=1e-3)
    if name != "plain":
        return
    for method, more in (("kd", {}), ("cwd", {}), ("kd", {"cache_views": 1})):
        mine, its = (losses(chain, masked, each, method, **more) for each in (teacher, masked.student))
        assert mine == pytest.approx(its, rel=2e-3)
    for method in ("stagewise", "hint"):
        with pytest.raises(UserError, match="gives no intermediate features"):
            losses(chain, masked, teacher, method)


def test_a_file_that_gives_another_grid_teaches(masked: Made, files: dict[str, Path], tmp_path: Path) -> None:
    """Twice as fine as the student's: it is brought to the student's, live and in a cache."""
    chain = Chain(tmp_path / "artifacts")
    teacher = taught_by(masked, chain, files["larger"])
    assert teacher.facts.test_accuracy == pytest.approx(masked.student.facts.test_accuracy, abs=0.02)
    live, cached = (losses(chain, masked, teacher, "kd", cache_views=views) for views in (None, 1))
    assert np.isfinite(live).all() and cached == pytest.approx(live, rel=0.2)


def test_files_that_draw_in_another_way_are_one_line(
    masked: Made, files: dict[str, Path], trained: Trained, packed: Any, tmp_path: Path
) -> None:
    chain = Chain(tmp_path / "artifacts")
    for name, words in {
        "classes": r"gives outputs of shape .* wanted \[N, classes\], or \[N, classes, H, W\]",
        "last": "wanted logits .*one output a class",
    }.items():
        with pytest.raises(UserError, match=words):
            taught_by(masked, chain, files[name])
    size = trained.student.facts.input.size
    with pytest.raises(UserError, match=r"the data's task is segmentation: wanted float32 \[1, 11, height, width\]"):
        taught_by(masked, chain, files["pooled"])
    with pytest.raises(UserError, match=r"wanted logits .*one output a class"):
        taught_by(masked, chain, packed.path / packed.facts.entry, input={"size": size})
    config = validated(TeacherPlan, {"model": "onnx", "checkpoint": files["plain"], "input": {"size": SIDES}}, "it")
    with pytest.raises(UserError, match="wanted logits"):
        chain.teacher(config, trained.dataset)


def test_code_of_ones_own_teaches_and_learns(masked: Made, workdir: Path) -> None:
    """From the command line: a teacher that draws at full size, a student at a stride of four."""
    (workdir / "own_pixels.py").write_text(OWN)
    allow, sides = ("--allow-code", "own_pixels:Pixels"), ("--input.size", json.dumps(SIDES))
    stem, head = nn.Conv2d(3, 8, 4, stride=4), nn.Conv2d(8, masked.dataset.facts.classes, 1)
    weights = {f"{name}.{each}": value for name, part in (("stem", stem), ("head", head))
               for each, value in part.state_dict().items()}  # fmt: skip
    torch.save(weights, "own.pth")
    network = ("--model", "own_pixels:Pixels", *sides)
    taught = ("teacher", masked.dataset.path, *network, "--checkpoint", "own.pth", *allow)
    done = kdpipe(*taught, "--model-args", "{enlarged: true}", "--out", "teacher")
    assert done.returncode == 0, done.stderr
    learn = (
        "distill",
        "teacher",
        "--data",
        masked.dataset.path,
        *network,
        "--train.epochs",
        1,
        "--train.batch-size",
        8,
        "--train.workers",
        0,
    )
    assert_one_line(kdpipe(*learn, "--out", "student"), 2, "--allow-code own_pixels:Pixels")
    for method in ("kd", "dist"):
        done = kdpipe(*learn, *allow, "--method", method, "--out", method)
        assert done.returncode == 0, done.stderr
        assert Checkpoint.open(Path(method)).facts.task == "segmentation"
    done = kdpipe(*learn, *allow, "--method", "stagewise", "--out", "stagewise")
    assert_one_line(done, 2, "own_pixels:Pixels", "features")
    named = [each.replace("Pixels", "Named") if isinstance(each, str) else each for each in taught]
    assert_one_line(kdpipe(*named, "--out", "named"), 2, "'own_pixels:Named' gives dict for an image, wanted logits")
    export = ("export", "kd", "--data", masked.dataset.path, "--parity-images", 8, "--hop-images", 8)
    model = kdpipe(*export, *allow, "--out", "model")
    assert model.returncode == 0, model.stderr
