"""Models as people have them: checkpoints of other tools, their own code, torchvision, ONNX files."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from conftest import SMALL_RECIPE, SMALL_TRAIN, Trained, assert_one_line, kdpipe, listening, rewrite_manifest, train
from safetensors.torch import save_file
from torch import Tensor, nn

from kdpipe.chain import Chain, train_order
from kdpipe.core.code import allowing, source_file
from kdpipe.core.config import (
    AdoptConfig,
    AdoptFilePlan,
    ExportConfig,
    InputSettings,
    ModelSettings,
    PackageConfig,
    QuantizeConfig,
    TeacherPlan,
    TrainConfig,
    validated,
)
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Checkpoint, Graph, Model
from kdpipe.core.progress import Silence
from kdpipe.core.stats import matched_share
from kdpipe.data.dataset import Dataset, load_images
from kdpipe.devices import find_device
from kdpipe.distill.teacher import open_teacher
from kdpipe.networks import models
from kdpipe.networks.weights import load_weights
from kdpipe.report.words import advice_sentence
from kdpipe.runtime import open_session, predict

State = dict[str, Tensor]


class Heard(Silence):
    """Keeps what a person would read."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def network(classes: int = 10) -> nn.Module:
    return timm.create_model("test_resnet", num_classes=classes)


def other_weights() -> State:
    """Of a network like ``network``, all different."""
    generator = torch.Generator().manual_seed(7)
    return {
        name: torch.randn(value.shape, generator=generator).abs() if value.is_floating_point() else value
        for name, value in network().state_dict().items()
    }


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: value for name, value in state.items()}


def doubled(state: State) -> State:
    return {name: 2 * value for name, value in state.items()}


def assert_loads(path: Path, wanted: State, entry: str | None = None) -> list[str]:
    """The file gives a network these weights; returns what was told."""
    loaded, heard = network(), Heard()
    with listening(heard):
        load_weights(loaded, path, entry)
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]), name
    return heard.notes


# ---- checkpoints ---------------------------------------------------------------------------------------------

WRAPPINGS: dict[str, Callable[[State], Any]] = {
    "as it is": lambda state: state,
    "ordered": OrderedDict,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: {"step": torch.zeros(1)}}, "param_groups": []}},
    "in an entry of any name": lambda state: {"net": state, "best": 0.9},
    "deep": lambda state: {"checkpoint": {"network": state}, "args": None},
    "data parallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "lightning": lambda state: {
        "epoch": 3,
        "global_step": 90,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(10)},
        "optimizer_states": [{"state": {}, "param_groups": [{"lr": 0.1}]}],
        "hyper_parameters": {"lr": 0.1},
    },
    "two of them": lambda state: {"model_state_dict": prefixed(state, "model.module.")},
    "timm's": lambda state: {
        "arch": "test_resnet", "args": argparse.Namespace(lr=0.1), "state_dict": state, "metric": 77.7, "version": 2,
    },
    "averaged by torch": lambda state: prefixed(state, "module.") | {"n_averaged": torch.tensor(5)},
    "of old, without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_checkpoints_as_other_tools_leave_them(tmp_path: Path, wrapping: str) -> None:
    state = other_weights()
    torch.save(WRAPPINGS[wrapping](state), tmp_path / "w.pth")
    notes = assert_loads(tmp_path / "w.pth", state)
    assert bool(notes) == (wrapping in ("lightning", "averaged by torch"))
    assert all("1 tensors outside" in note and ("criterion" in note or "n_averaged" in note) for note in notes)


@pytest.mark.parametrize("name", ["w.safetensors", "w.bin", "w.pth"])
def test_a_file_is_known_by_its_contents(tmp_path: Path, name: str) -> None:
    state = other_weights()
    save_file(prefixed(state, "model."), tmp_path / name)
    assert assert_loads(tmp_path / name, state) == []
    torch.save(state, tmp_path / name, _use_new_zipfile_serialization=False)
    assert assert_loads(tmp_path / name, state) == []


AVERAGED: dict[str, Callable[[State, State], Any]] = {
    "state_dict_ema": lambda plain, ema: {"state_dict": plain, "state_dict_ema": ema},
    "model_ema": lambda plain, ema: {"model": plain, "model_ema": prefixed(ema, "module.")},
    "ema_model": lambda plain, ema: {"state_dict": prefixed(plain, "model.") | prefixed(ema, "ema_model.module.")},
    "averaged": lambda plain, ema: {"net": plain, "averaged": ema},
}


@pytest.mark.parametrize("entry", AVERAGED)
def test_averaged_weights_are_told_and_chosen(tmp_path: Path, entry: str) -> None:
    plain = other_weights()
    averaged = doubled(plain)
    torch.save(AVERAGED[entry](plain, averaged), tmp_path / "w.pth")
    told = " ".join(assert_loads(tmp_path / "w.pth", plain))
    assert "also holds averaged weights" in told and f"checkpoint_entry '{entry}" in told
    assert_loads(tmp_path / "w.pth", averaged, entry)


def test_averaged_weights_alone_are_taken(tmp_path: Path) -> None:
    state = other_weights()
    torch.save({"epoch": 1, "state_dict_ema": state}, tmp_path / "w.pth")
    assert assert_loads(tmp_path / "w.pth", state) == ["w.pth holds averaged weights, which are taken"]


def test_one_of_several_networks_is_named(tmp_path: Path) -> None:
    student = other_weights()
    teacher = doubled(student)
    torch.save({"state_dict": prefixed(student, "student.") | prefixed(teacher, "teacher.")}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"2 networks that fit \('student', 'teacher'\): say which with checkpoint_ent"):
        load_weights(network(), tmp_path / "w.pth")
    assert_loads(tmp_path / "w.pth", teacher, "teacher")
    assert_loads(tmp_path / "w.pth", student, "student")
    with pytest.raises(UserError, match=r"unknown checkpoint_entry of .* 'teachr'.*did you mean 'teacher'"):
        load_weights(network(), tmp_path / "w.pth", "teachr")
    torch.save({"first": student, "second": teacher}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"2 state dicts \('first', 'second'\): say which"):
        load_weights(network(), tmp_path / "w.pth")
    assert_loads(tmp_path / "w.pth", teacher, "second")


def test_a_part_of_a_larger_network_is_no_network(tmp_path: Path) -> None:
    """All names that are wanted are there, and more: under a prefix as without one."""
    larger = timm.create_model("resnet26", num_classes=10).state_dict()
    smaller = timm.create_model("resnet14t", num_classes=10)
    for prefix in ("", "model."):
        torch.save(prefixed(larger, prefix), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"another architecture than 'ResNet' \(.* unknown"):
            load_weights(smaller, tmp_path / "w.pth")


def test_what_does_not_fit_is_told_in_one_line_alone(tmp_path: Path) -> None:
    """Nothing is said of what is left out of a file that is refused as a whole."""
    state, heard = other_weights(), Heard()
    torch.save({f"x{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    with listening(heard), pytest.raises(UserError, match=r"another architecture than 'ResNet' \(.*lacks 'bn1.bias'"):
        load_weights(network(), tmp_path / "w.pth")
    assert heard.notes == []


def test_a_missing_or_other_head_is_said(tmp_path: Path) -> None:
    state = other_weights()
    torch.save({"state_dict": prefixed({k: v for k, v in state.items() if not k.startswith("fc.")}, "backbone.")},
               tmp_path / "w.pth")  # fmt: skip
    with pytest.raises(UserError, match=r"has no head: it lacks 'fc.bias'.*fine-tune it first"):
        load_weights(network(), tmp_path / "w.pth")
    torch.save(network(1000).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"its head 'fc.(weight|bias)' is of 1000 classes, wanted 10 \(another class cou"
    ):
        load_weights(network(), tmp_path / "w.pth")
    plain = nn.Sequential(OrderedDict(stem=nn.Conv2d(3, 8, 3), pool=nn.Flatten(), classifier=nn.Linear(8, 10)))
    torch.save({"stem.weight": torch.zeros(8, 3, 3, 3), "stem.bias": torch.zeros(8)}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has no head: it lacks 'classifier.bias'"):
        load_weights(plain, tmp_path / "w.pth")


def cut(source: Path, out: Path, share: float) -> Path:
    content = source.read_bytes()
    out.write_bytes(content[: int(share * len(content))])
    return out


@pytest.mark.parametrize("share", [0, 1e-5, 0.001, 0.5, 0.9999])
@pytest.mark.parametrize("kind", ["zip", "pickle", "safetensors"])
def test_a_cut_file_is_one_short_line(tmp_path: Path, kind: str, share: float) -> None:
    whole, state = tmp_path / "whole", other_weights()
    if kind == "safetensors":
        save_file(state, whole)
    else:
        torch.save(state, whole, _use_new_zipfile_serialization=kind == "zip")
    part = cut(whole, tmp_path / "w.pth", share)
    with pytest.raises(UserError, match=r"(is cut short|cannot read weights)") as told:
        load_weights(network(), part)
    assert len(str(told.value)) < 200 + len(str(part)) and "\n" not in str(told.value)
    if part.stat().st_size not in range(1, 9):  # of which nobody can say what they were to be
        assert "is cut short" in str(told.value)


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match=r"cannot read weights.*it begins as neither"):
        load_weights(network(), path)
    torch.save(network(), path)
    with pytest.raises(UserError, match=r"more than tensors, which could run code: save its state_dict\(\) alone"):
        load_weights(network(), path)
    torch.save({"x": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="in it is packed"):
        load_weights(network(), path)
    torch.jit.script(nn.Linear(2, 2)).save(path)
    with pytest.raises(UserError, match=r"a TorchScript archive: save its state_dict"):
        load_weights(network(), path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "no weights")
    with pytest.raises(UserError, match=r"cannot read weights"):
        load_weights(network(), path)


def test_the_entry_is_an_option_and_part_of_the_key(trained: Trained, tmp_path: Path) -> None:
    state = models.restore(trained.teacher)[0].state_dict()
    torch.save({"state_dict": network().state_dict(), "state_dict_ema": state}, tmp_path / "t.pth")
    call = ["teacher", trained.dataset.path, "--model", "test_resnet", "--input.size", 32]
    call += ["--checkpoint", tmp_path / "t.pth", "--out"]
    plain = kdpipe(*call, tmp_path / "plain")
    assert plain.returncode == 0, plain.stderr
    assert "also holds averaged weights" in plain.stderr
    averaged = kdpipe(*call, tmp_path / "averaged", "--checkpoint-entry", "state_dict_ema")
    assert averaged.returncode == 0, averaged.stderr
    made = [Checkpoint.open(tmp_path / name) for name in ("plain", "averaged")]
    assert made[0].key != made[1].key
    assert made[1].facts.test_accuracy == trained.teacher.facts.test_accuracy > made[0].facts.test_accuracy


def test_keys_of_before_stay() -> None:
    """What is not said is not in a configuration's dump, and so in no key."""
    for config in (AdoptConfig(model="resnet18"), TrainConfig(model="resnet18"), TeacherPlan(model="resnet18")):
        assert not config.model_dump().keys() & {"code_sha256", "checkpoint_entry"}
        assert validated(type(config), config.model_dump(), "test") == config
    said = AdoptConfig(model="a:b", code_sha256="12", checkpoint_entry="ema")
    assert said.model_dump()["code_sha256"] == "12" and said.model_dump()["checkpoint_entry"] == "ema"
    assert AdoptConfig.model_validate_json(said.model_dump_json()) == said


# ---- what cannot be a good teacher ---------------------------------------------------------------------------


def adopted(trained: Trained, folder: Path, state: State, **settings: Any) -> Checkpoint:
    save_file(state, folder / "teacher.safetensors")
    values = {"model": "test_resnet", "checkpoint": folder / "teacher.safetensors", **settings}
    values["input"] = {"size": 32, **settings.get("input", {})}
    return Chain(folder / "artifacts").teacher(validated(TeacherPlan, values, "test"), trained.dataset)


def test_a_teacher_that_says_nan_is_refused(trained: Trained, tmp_path: Path) -> None:
    state = models.restore(trained.teacher)[0].state_dict()
    with pytest.raises(UserError, match=r"'fc.bias' has values that are not finite"):
        adopted(trained, tmp_path, {**state, "fc.bias": torch.full((10,), torch.nan)})
    norm = next(name for name in state if name.endswith("running_var"))
    with pytest.raises(
        UserError, match=r"not finite \(NaN or infinite\) on 539 of 539 test images: look at its weights"
    ):
        adopted(trained, tmp_path, {**state, norm: torch.full_like(state[norm], -1)})
    assert not list((tmp_path / "artifacts").glob("teacher-*"))


def test_one_at_chance_is_hard_to_overlook(trained: Trained, tmp_path: Path) -> None:
    save_file(other_weights(), tmp_path / "teacher.safetensors")
    call = ["teacher", trained.dataset.path, "--model", "test_resnet", "--input.size", 32]
    done = kdpipe(*call, "--checkpoint", tmp_path / "teacher.safetensors", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    facts = Checkpoint.open(tmp_path / "out").facts
    assert facts.may_guess and facts.guessing == pytest.approx(0.1, abs=0.02)
    *_, accuracy, warning = done.stderr.strip().splitlines()
    assert re.fullmatch(r" +top-1 \d+\.\d\d % \[\d+\.\d\d, \d+\.\d\d\] on 539 test images", accuracy), accuracy
    for word in ("WARNING: not shown to be better than guessing", "input.mean", "data.classes", "input.size"):
        assert word in warning
    again = kdpipe(*call, "--checkpoint", tmp_path / "teacher.safetensors", "--out", tmp_path / "out")
    assert "sealed" in again.stderr and "WARNING" in again.stderr, "it stays true"


def test_accuracies_stand_below_their_stages(trained: Trained, tmp_path: Path) -> None:
    folder = trained.teacher.path.parent
    told: list[str] = []
    chain = Chain(folder, tell=lambda step: told.extend(str(step).splitlines()))
    recipe = validated(TeacherPlan, SMALL_RECIPE["teacher"], "test")
    chain.teacher(recipe, trained.dataset)
    share = f"{100 * trained.teacher.facts.test_accuracy:.2f}"
    found = trained.teacher.facts.test_interval
    assert found is not None and found.low is not None and found.low < found.value < (found.high or 0)
    assert told[-1] == f"    top-1 {share} % [{100 * found.low:.2f}, {100 * (found.high or 0):.2f}] on 539 test images"
    assert not trained.teacher.facts.may_guess


def test_classes_in_another_order_are_found_out(trained: Trained, tmp_path: Path) -> None:
    state = models.restore(trained.teacher)[0].state_dict()
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    heard = Heard()
    with listening(heard):
        adopted(
            trained, tmp_path, {**state, "fc.weight": state["fc.weight"][order], "fc.bias": state["fc.bias"][order]}
        )
    [told] = heard.notes
    assert "stand in another order" in told and "data.classes" in told
    rng = np.random.default_rng(0)
    labels, said = rng.integers(0, 10, 500), rng.integers(0, 10, 500)
    assert matched_share(Counter(zip(labels.tolist(), said.tolist(), strict=True))) < 0.25
    assert matched_share(Counter(zip(labels.tolist(), ((labels + 3) % 10).tolist(), strict=True))) == 1


@pytest.mark.parametrize(("values", "cure"), [("[123.7, 116.3, 103.5]", "divide by 255"), ("[0.5, 0.5, 1.01]", "0..1")])
def test_a_mean_of_0_to_255_is_refused(trained: Trained, tmp_path: Path, values: str, cure: str) -> None:
    call = ["teacher", trained.dataset.path, "--model", "test_resnet", "--input.size", 32]
    assert_one_line(kdpipe(*call, "--input.mean", values), 2, "'input.mean'", cure, "found")
    assert_one_line(kdpipe(*call, "--input.std", "[58.4, 57.1, 57.4]"), 2, "'input.std'", "divide by 255")
    assert_one_line(kdpipe(*call, "--input.std", "[0.2, 0, 0.2]"), 2, "'input.std'", "above 0")
    recipe = {**SMALL_RECIPE, "student": {"model": "test_resnet", "input": {"mean": yaml.safe_load(values)}}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    assert_one_line(kdpipe("run", tmp_path / "r.yaml"), 2, "'student.input.mean'", cure)


def test_advice_says_when_a_model_guesses() -> None:
    advised = {
        "target": "tflite",
        "student": None,
        "untrusted": [],
        "max_drop_points": 0.5,
        "may_do": None,
        "variant": "float32",
    }
    assert "BUT" not in advice_sentence(advised)
    assert "BUT" not in advice_sentence({**advised, "guessing": None})
    sentence = advice_sentence({**advised, "guessing": {"share": 0.3821, "metric": "top-1", "unit": "%"}})
    assert sentence.endswith(
        "; BUT it is not shown to be better than guessing (top-1 38.21 % without looking at the image)"
    )


# ---- the user's own code -------------------------------------------------------------------------------------

OWN = """
from pathlib import Path
from torch import nn

Path("ran").touch()

def make(num_classes, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 4, stride=4), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, num_classes),
    )

class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 10)

    def forward(self, image):
        return self.head(image.mean((2, 3)))

def seven(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))

def broken(num_classes):
    raise KeyError("nothing here")

def number(num_classes):
    return num_classes

class Fails(Fixed):
    def forward(self, image):
        return image["no such thing"]

def leaves(num_classes):
    raise SystemExit(3)
"""
modules = iter(f"nets_of_test_{number}" for number in range(1000))  # an import is remembered by its name


@pytest.fixture
def own(workdir: Path) -> str:
    """The name of a module in the current folder, which leaves a trace when it is run."""
    name = next(modules)
    (workdir / f"{name}.py").write_text(OWN)
    return name


def test_code_is_run_only_where_it_was_named(trained: Trained, own: str, workdir: Path) -> None:
    call = ["distill", trained.dataset.path, "--method", "labels", "--input.size", 32, "--train.epochs", 1]
    call += ["--train.workers", 0, "--label-fraction", 0.1, "--model", f"{own}:make"]
    done = kdpipe(*call, "--out", "student")
    assert_one_line(done, 2, f"'{own}:make'", f"--allow-code {own}:make")
    assert_one_line(kdpipe(*call, "--out", "student", "--allow-code", f"{own}:Fixed"), 2, f"--allow-code {own}:make")
    assert_one_line(kdpipe(*call, "--out", "student", "--allow-code", own), 2, "wanted MODULE:FUNCTION")
    assert not Path("ran").exists() and not Path("student").exists()
    done = kdpipe(*call, "--out", "student", "--allow-code", f"{own}:make", "--model-args", "{width: 6}")
    assert done.returncode == 0, done.stderr
    assert Path("ran").exists()
    made = Checkpoint.open("student")
    assert made.facts.model == f"{own}-make" and made.settings["model"] == f"{own}:make"
    assert made.facts.parameters == 6 * 49 + 25 * 10

    # Later, from the sealed checkpoint: the same permission, wherever the network is made again.
    data = ["--data", trained.dataset.path]
    export = ["export", "student", *data]
    for command in (export, ["cache", "student", *data, "--model", "test_resnet", "--views", 1]):
        done = kdpipe(*command, "--out", "later")
        assert_one_line(done, 2, "is made by code of somebody's own", "no file may", f"--allow-code {own}:make")
    done = kdpipe(*export, "--out", "later", "--allow-code", f"{own}:make")
    assert done.returncode == 0, done.stderr
    parity = Model.open("later").facts.parity
    assert parity is not None and parity.relative_difference < 1e-4


def test_changed_code_is_another_network(trained: Trained, own: str, workdir: Path) -> None:
    chain = Chain("artifacts", allow_code=[f"{own}:make"])
    settings = {"model": f"{own}:make", "method": "labels", "input": {"size": 32}, "label_fraction": 0.1}
    config = validated(TrainConfig, {**settings, "train": {**SMALL_TRAIN, "epochs": 1}}, "test")
    first = chain.distill(config, trained.dataset, None)
    assert chain.distill(config, trained.dataset, None).key == first.key
    with allowing([f"{own}:make"]):
        models.restore(first)
    with pytest.raises(UserError, match=r"no file may have that run"):
        models.restore(first)
    with Path(f"{own}.py").open("a") as stream:
        stream.write("\n# Better.\n")
    assert train_order(config, trained.dataset, None).key != first.key
    with allowing([f"{own}:make"]):
        before = models.create(config, 10)[0]
        Path(f"{own}.py").write_text(OWN.replace("width=4", "width=32"))
        after = models.create(config, 10)[0]
    assert [each[0].out_channels for each in (before, after)] == [4, 32], "no module of before is taken for the new one"
    with pytest.raises(UserError, match=f"made by another version of .*{own}.py"), allowing([f"{own}:make"]):
        models.restore(first)
    pinned = config.model_copy(update={"code_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"code_sha256: .* wanted 000"):
        chain.distill(pinned, trained.dataset, None)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("mak", ["no function 'mak'", "did you mean 'make'"]),
        ("seven", ["gives (1, 7) for an image", "wanted logits (1, 10)"]),
        ("broken", ["KeyError", "nothing here", "line"]),
        ("number", ["gives a int", "torch.nn.Module"]),
        ("Fails", ["cannot take inputs of 32 pixels", "line"]),
        ("leaves", ["SystemExit"]),
    ],
)
def test_what_goes_wrong_in_it_is_one_line(own: str, factory: str, words: list[str]) -> None:
    name = f"{own}:{factory}"
    with allowing([name]), pytest.raises(UserError) as told:
        models.create(ModelSettings(model=name, input=InputSettings(size=32)), 10)
    assert "\n" not in str(told.value)
    for word in words:
        assert word in str(told.value)


def test_each_run_has_its_own_network(workdir: Path) -> None:
    """Whatever a module keeps, and whatever it draws when it is imported."""
    name = next(modules)
    Path(f"{name}.py").write_text(
        "from torch import nn, randn\nrandn(9)\nonly = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))\n"
        "def make(): return only\ndef new(): return nn.Sequential(*only, nn.Linear(10, 10))\n"
    )
    settings = [ModelSettings(model=f"{name}:{each}", input=InputSettings(size=8)) for each in ("make", "new")]
    with allowing([f"{name}:make", f"{name}:new"]):
        first, second = (models.create(settings[0], 10)[0] for _ in range(2))
        assert first is not second and first[1].weight is not second[1].weight
        drawn = []
        for again in range(2):
            torch.manual_seed(5)
            drawn.append(models.create(settings[1], 10)[0][2].weight)
            if not again:
                Path(f"{name}.py").write_text(Path(f"{name}.py").read_text() + "\n# imported again")
    assert torch.equal(*drawn)


def test_factories_of_every_kind(own: str, workdir: Path) -> None:
    with allowing([f"{own}:Fixed"]):
        made, spec = models.create(ModelSettings(model=f"{own}:Fixed", input=InputSettings(size=32)), 10)
    assert made.num_classes == 10 and spec.size == 32 and spec.mean == (0.485, 0.456, 0.406)
    package = workdir / f"{own}_package" / "inner"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("raise RuntimeError('run before it was allowed')")
    (package / "nets.py").write_text("def f(num_classes): return 1")
    assert source_file(f"{own}_package.inner.nets:f") == package / "nets.py", "found without running the package"
    for missing in ("nothing_of_that_name:make", f"{own}.inner:make", f"{own}_package.inner.none:make"):
        with pytest.raises(UserError, match=r"no module"):
            source_file(missing)
    (workdir / f"{own}_b.py").write_text("def make(:\n")
    with allowing([f"{own}_b:make"]), pytest.raises(UserError, match=r"SyntaxError"):
        models.create(ModelSettings(model=f"{own}_b:make"), 10)


def test_a_recipe_cannot_ask_for_code(trained: Trained, own: str, workdir: Path) -> None:
    recipe = {**SMALL_RECIPE, "student": {"model": f"{own}:make", "input": {"size": 32}}}
    for more in ({"allow_code": [f"{own}:make"]}, {"student": {**recipe["student"], "allow_code": True}}):
        Path("r.yaml").write_text(yaml.safe_dump({**recipe, **more}))
        assert_one_line(kdpipe("run", "r.yaml"), 2, "unknown key", "allow_code")
    Path("r.yaml").write_text(yaml.safe_dump(recipe))
    # Before any work: the first thing that is not sealed is not made either.
    assert_one_line(kdpipe("run", "r.yaml"), 2, f"--allow-code {own}:make")
    assert not Path("ran").exists() and not list(Path("artifacts").glob("data-*"))


def test_methods_take_own_networks(trained: Trained, own: str, workdir: Path) -> None:
    """Those on logits do, feature methods say what they lack."""
    values = {"model": f"{own}:make", "input": {"size": 32}, "label_fraction": 0.05}
    values["train"] = {**SMALL_TRAIN, "epochs": 1}
    with allowing([f"{own}:make"]):
        for method in ("kd", "dkd"):
            config = validated(TrainConfig, {**values, "method": method}, "test")
            train(config, trained.dataset, trained.teacher, Path(method))
        with pytest.raises(UserError, match=r"no intermediate features through timm: choose a method that"):
            train(validated(TrainConfig, {**values, "method": "at"}, "t"), trained.dataset, trained.teacher, Path("at"))


def test_a_strangers_manifest_runs_no_code(trained: Trained, own: str, workdir: Path) -> None:
    shutil.copytree(trained.teacher.path, "evil")
    rewrite_manifest(Path("evil"), lambda value: value["config"].update(model=f"{own}:make"))
    with pytest.raises(UserError, match=r"no file may have that run"):
        models.restore(Checkpoint.open("evil"))
    for name in ("hf-hub:timm/resnet18", "../x", "torchvision/../x"):
        rewrite_manifest(Path("evil"), lambda value, name=name: value["config"].update(model=name))
        with pytest.raises(UserError, match=r"unknown model"):
            models.restore(Checkpoint.open("evil"))
    assert not Path("ran").exists()


# ---- torchvision ---------------------------------------------------------------------------------------------


def test_torchvisions_names(tmp_path: Path) -> None:
    made, spec = models.create(ModelSettings(model="torchvision/resnet18", input=InputSettings(size=32)), 7)
    assert made(torch.zeros(1, 3, 32, 32)).shape == (1, 7) and spec.crop_fraction == 1
    spec = models.input_spec(ModelSettings(model="torchvision/efficientnet_b0"))
    assert (spec.size, round(spec.size / spec.crop_fraction), spec.interpolation) == (224, 256, "bicubic")
    vit, _ = models.create(ModelSettings(model="torchvision/vit_b_32", input=InputSettings(size=64)), 3)
    assert vit.num_classes == 3
    inception = models.create(ModelSettings(model="torchvision/googlenet", input=InputSettings(size=64)), 3)[0]
    assert isinstance(inception.train()(torch.zeros(2, 3, 64, 64)), Tensor)
    for name, told in {
        "torchvision/resnet19": "did you mean 'resnet1",
        "torchvision/fasterrcnn_resnet50_fpn": "wanted a classifier of torchvision",
        "torchvision/": "unknown model",
    }.items():
        with pytest.raises(UserError, match=told):
            models.create(ModelSettings(model=name), 3)
    with pytest.raises(UserError, match=r"model_args: 'weights'"):
        models.create(ModelSettings(model="torchvision/resnet18", model_args={"weights": "DEFAULT"}), 3)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def test_torchvisions_pretrained_weights(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From torch's own cache of downloads; another head than theirs begins anew, and nothing else."""
    from torchvision.models import SqueezeNet1_1_Weights, squeezenet1_1

    monkeypatch.setenv("TORCH_HOME", str(workdir))
    cached = workdir / "hub" / "checkpoints" / SqueezeNet1_1_Weights.DEFAULT.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.manual_seed(0)
    given = squeezenet1_1().state_dict()
    torch.save(given, cached)
    config = ModelSettings(model="torchvision/squeezenet1_1", pretrained=True, input=InputSettings(size=64))
    whole = models.create(config, 1000)[0].state_dict()
    assert all(torch.equal(whole[name], value) for name, value in given.items())
    part = models.create(config, 5)[0].state_dict()
    assert [name for name, value in given.items() if not torch.equal(part[name], value)] == [
        "classifier.1.weight", "classifier.1.bias"
    ]  # fmt: skip
    torch.save({"x": Evil()}, cached)
    with pytest.raises(UserError, match=r"cannot make 'torchvision/squeezenet1_1'"):
        models.create(config, 5)
    assert not Path("owned").exists()


def test_a_torchvision_student_is_exported(trained: Trained, tmp_path: Path) -> None:
    values = {
        "model": "torchvision/squeezenet1_1",
        "method": "labels",
        "input": {"size": 32},
        "label_fraction": 0.05,
    }
    config = validated(TrainConfig, {**values, "train": {**SMALL_TRAIN, "epochs": 1}}, "test")
    student = train(config, trained.dataset, None, tmp_path / "student")
    assert student.facts.model == "torchvision-squeezenet1_1"
    made = Chain(tmp_path / "artifacts").export(ExportConfig(target="onnxruntime"), student, trained.dataset)
    assert made.facts.parity is not None and made.facts.model == student.facts.model


# ---- ONNX files ----------------------------------------------------------------------------------------------


class WithSoftmax(nn.Module):
    def __init__(self, network: nn.Module, channels_last: bool = False) -> None:
        super().__init__()
        self.network, self.channels_last = network, channels_last

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image.permute(0, 3, 1, 2) if self.channels_last else image).softmax(1)


def write(network: nn.Module, path: Path, shape: tuple[int, ...], fixed: bool = False, opset: int = 18) -> Path:
    """As a user exports a network."""
    dynamic = None if fixed else ({0: torch.export.Dim("n")},)
    example = torch.zeros(1 if fixed else 2, *shape)
    program = torch.onnx.export(
        network.eval(), (example,), dynamo=True, dynamic_shapes=dynamic, opset_version=opset, verbose=False,
        input_names=["logits"], output_names=["image"],  # confusing on purpose
    )  # fmt: skip
    program.save(str(path), external_data=False)
    return path


@pytest.fixture(scope="module")
def files(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The trained teacher as ONNX files that want normalised colours."""
    folder, (teacher, _) = tmp_path_factory.mktemp("files"), models.restore(trained.teacher)
    return {
        "plain": write(teacher, folder / "plain one.onnx", (3, 32, 32)),
        "fixed": write(teacher, folder / "fixed.onnx", (3, 32, 32), fixed=True),
        "softmax": write(WithSoftmax(teacher, channels_last=True), folder / "softmax.onnx", (32, 32, 3)),
    }


@pytest.fixture(scope="module")
def told(trained: Trained) -> dict[str, Any]:
    """What the user says of those files' input."""
    spec = trained.teacher.facts.input
    return {
        name: getattr(spec, name) for name in ("size", "mean", "std", "crop_fraction", "interpolation")
    }  # as a recipe would have it


def onnx_teacher(trained: Trained, folder: Path, file: Path, told: dict[str, Any]) -> Checkpoint:
    plan = validated(TeacherPlan, {"model": "onnx", "checkpoint": file, "input": told}, "test")
    return Chain(folder / "artifacts").teacher(plan, trained.dataset)


@pytest.mark.parametrize("name", ["plain", "fixed", "softmax"])
def test_an_onnx_file_teaches(
    trained: Trained, files: dict[str, Path], told: dict[str, Any], tmp_path: Path, name: str
) -> None:
    teacher = onnx_teacher(trained, tmp_path, files[name], told)
    assert teacher.facts.test_accuracy == trained.teacher.facts.test_accuracy
    assert teacher.facts.parameters == pytest.approx(trained.teacher.facts.parameters, rel=0.05)  # norms are folded
    assert str(tmp_path) not in (teacher.path / "manifest.json").read_text()
    spec = trained.teacher.facts.input
    asked = [open_teacher(each, trained.dataset, spec) for each in (teacher, trained.teacher)]
    view = torch.randn(3, 3, 32, 32)
    first, second = (each(view).logits.log_softmax(1) for each in asked)
    torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
    if name != "plain":
        return
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.05, "method": "kd"}
    values["train"] = {**SMALL_TRAIN, "epochs": 1}
    student = train(validated(TrainConfig, values, "test"), trained.dataset, teacher, tmp_path / "student")
    assert student.facts.method == "kd"
    with pytest.raises(UserError, match=r"gives no intermediate features"):
        train(validated(TrainConfig, {**values, "method": "at"}, "t"), trained.dataset, teacher, tmp_path / "at")
    with pytest.raises(UserError, match=r"only teaches: see kdpipe adopt"):
        Chain(tmp_path / "artifacts").export(ExportConfig(), teacher, trained.dataset)


def test_what_an_onnx_teacher_cannot_be(
    trained: Trained, files: dict[str, Path], told: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "text.onnx").write_text("hello")
    for file, settings, words in (
        (files["plain"], {**told, "size": 48}, r"takes images of \[3, 32, 32\].*set input.size"),
        (tmp_path / "text.onnx", told, "no ONNX file"),
        (tmp_path / "none.onnx", told, "no file at"),
    ):
        with pytest.raises(UserError, match=words):
            onnx_teacher(trained, tmp_path, file, settings)
    call = ["teacher", trained.dataset.path, "--checkpoint", files["plain"]]
    assert_one_line(kdpipe(*call, "--model", "resnet18"), 2, "is model 'onnx'")
    assert_one_line(kdpipe("teacher", trained.dataset.path, "--model", "x.onnx"), 2, "'onnx', with checkpoint: x.onnx")
    with pytest.raises(UserError, match=r"is a file that is asked, as a teacher"):
        train(validated(TrainConfig, {"model": "onnx"}, "test"), trained.dataset, trained.teacher, tmp_path / "s")


@pytest.mark.parametrize("name", ["plain", "fixed", "softmax"])
def test_an_onnx_file_is_adopted(
    trained: Trained, files: dict[str, Path], told: dict[str, Any], tmp_path: Path, name: str
) -> None:
    """As quantising, packaging and measuring want it: raw colours in, any number of images, exactly what it was."""
    chain = Chain(tmp_path / "artifacts")
    plan = validated(AdoptFilePlan, {"input": told, "hop_images": 539}, "test")
    model = chain.adopt(plan, files[name], trained.dataset)
    graph = next(Graph.open(step.path) for step in chain.steps if step.name == "graph")
    facts = graph.facts
    assert facts.accuracy is not None and facts.accuracy.value == trained.teacher.facts.test_accuracy
    assert facts.parity.exported.relative_difference < 1e-4 and facts.parity.simplified.relative_difference < 1e-4
    assert facts.input.layout == "NCHW" and facts.input.mean == (0, 0, 0) and facts.input.std == (1 / 255,) * 3
    assert chain.steps[-2].found[0].startswith("top-1 ")
    assert re.fullmatch("[A-Za-z0-9_.-]+", model.facts.model)
    if name != "plain":
        return
    dataset, device = trained.dataset, find_device("local").probe()
    calibrate = {"calibrate": {"images": 32}, "check_images": 32}
    small = chain.quantize(validated(QuantizeConfig, calibrate, "test"), model, dataset, device)
    assert small.facts.against_float32 is not None and small.facts.against_float32.agreement > 0.9
    for target in ("openvino", "tensorrt"):
        other = chain.adopt(plan.model_copy(update={"target": target}), files[name], dataset)
        assert other.facts.target == target and other.facts.parity is not None
    assert [step.name for step in chain.steps].count("graph") == 3
    assert len({step.path for step in chain.steps if step.name == "graph"}) == 1, "made once for all of the targets"


def test_files_of_other_habits_are_adopted(
    trained: Trained, files: dict[str, Path], told: dict[str, Any], tmp_path: Path
) -> None:
    """A newer operator set, weights listed as inputs, nodes without names, a second output."""
    import onnx
    from onnx import helper

    model = onnx.version_converter.convert_version(onnx.load(files["plain"]), 21)
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    for node in model.graph.node:
        node.name = ""
    inside = model.graph.node[0].output[0]
    model.graph.output.append(helper.make_tensor_value_info(inside, onnx.TensorProto.FLOAT, None))
    onnx.save(model, tmp_path / "habits.onnx")
    chain = Chain(tmp_path / "artifacts")
    made = chain.adopt(validated(AdoptFilePlan, {"input": told}, "test"), tmp_path / "habits.onnx", trained.dataset)
    graph = onnx.load(made.entry).graph
    assert [value.name for value in graph.input] == ["image"] and [value.name for value in graph.output] == ["logits"]
    assert len({node.name for node in graph.node}) == len(graph.node) and all(node.name for node in graph.node)
    [opset] = [each.version for each in onnx.load(made.entry).opset_import if not each.domain]
    assert opset == 20


@pytest.mark.lab  # for its seconds
def test_adopted_guesses_to_the_report(trained: Trained, tmp_path: Path) -> None:
    """From the command line to the advice, which says what such a model is worth."""
    torch.manual_seed(3)
    file, artifacts = write(network(), tmp_path / "guess.onnx", (3, 32, 32)), tmp_path / "artifacts"
    shutil.copytree(trained.dataset.path, artifacts / trained.dataset.path.name)
    data = artifacts / trained.dataset.path.name
    done = kdpipe("adopt", file, "--data", data)
    assert done.returncode == 0, done.stderr
    assert "WARNING: not shown to be better than guessing" in done.stderr and "input.mean" in done.stderr
    bundle = kdpipe("package", done.stdout.strip())
    assert bundle.returncode == 0, bundle.stderr
    quick = ["--rounds", 2, "--seconds", 0.02, "--max-seconds", 0.05, "--min-samples", 10, "--warm-up-seconds", 0.02]
    bench = kdpipe("bench", bundle.stdout.strip(), *quick, "--images", 4, "--cold-starts", 1)
    assert bench.returncode == 75, bench.stderr
    report = kdpipe("report", bench.stdout.strip())
    assert report.returncode == 0, report.stderr
    assert "BUT it is not shown to be better than guessing (top-1" in " ".join(report.stdout.split())
    page = next(artifacts.glob("report-*")) / "report.html"
    assert "BUT it is not shown to be better than guessing" in page.read_text()


def test_what_is_not_adopted(trained: Trained, files: dict[str, Path], tmp_path: Path) -> None:
    import onnx

    data = trained.dataset.path
    size = ["--input.size", 32, "--out", tmp_path / "out"]
    assert_one_line(kdpipe("adopt", tmp_path / "x.onnx", "--data", data), 2, "no file at")
    (tmp_path / "x.tflite").write_bytes(b"1234TFL3")
    assert_one_line(kdpipe("adopt", tmp_path / "x.tflite", "--data", data), 2, "measured as they are: kdpipe bench")
    (tmp_path / "text.onnx").write_text("hello")
    assert_one_line(kdpipe("adopt", tmp_path / "text.onnx", "--data", data), 2, "no ONNX file")
    assert_one_line(kdpipe("adopt", files["plain"], "--data", data, "--target", "tflite"), 2, "made from torch")
    assert_one_line(
        kdpipe("adopt", files["plain"], "--data", data, "--input.size", 48), 2, "32x32", "input.size says 48"
    )
    assert_one_line(kdpipe("adopt", files["plain"], "--data", data, "--input.mean", "[128, 1, 1]"), 2, "divide by 255")
    other = write(network(7), tmp_path / "seven.onnx", (3, 32, 32))
    assert_one_line(kdpipe("adopt", other, "--data", data, *size), 2, "seven.onnx gives outputs of shape", "[1, 10]")
    model = onnx.load(files["plain"])
    model.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))
    onnx.save(model, tmp_path / "two.onnx")
    assert_one_line(kdpipe("adopt", tmp_path / "two.onnx", "--data", data, *size), 2, "takes 2 inputs")
    onnx.save(onnx.load(files["plain"]), tmp_path / "out.onnx", save_as_external_data=True, location="weights",
              size_threshold=0)  # fmt: skip
    assert_one_line(kdpipe("adopt", tmp_path / "out.onnx", "--data", data, *size), 2, "keeps weights outside")
    assert not (tmp_path / "out").exists()


def test_a_graph_for_one_image_is_adopted_so(trained: Trained, tmp_path: Path) -> None:
    """A transformer whose batch of one is written into what it computes: from then on it takes one at a time too."""
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", img_size=32, num_classes=10)
    torch.nn.init.normal_(vit.head.weight, std=0.5)
    file = write(vit, tmp_path / "one.onnx", (3, 32, 32), fixed=True)
    chain, dataset, heard = Chain(tmp_path / "artifacts"), trained.dataset, Heard()
    told = {"input": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, "parity_images": 8, "hop_images": 8}
    plan = validated(AdoptFilePlan, told, "test")
    with listening(heard):
        by_target = {
            target: chain.adopt(plan.model_copy(update={"target": target}), file, dataset)
            for target in ("onnxruntime", "openvino", "tensorrt")
        }
    [line] = heard.notes
    assert "takes one image at a time from here on too" in line and "dynamic batch dimension" in line
    spec = by_target["onnxruntime"].facts.input.model_dump()
    images = load_images(dataset.samples("test")[:5], spec)
    with torch.inference_mode():
        colours = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
        wanted = vit.eval()((colours - 0.5) / 0.5).numpy()
    for target, model in by_target.items():
        facts = model.facts.for_runtime()
        session = open_session(model.path, facts, stand_in=facts["stand_in"] is not None)
        assert not session.batched, target
        np.testing.assert_allclose(predict(session, images), wanted, atol=1e-4)
    config = {"variant": "int8", "calibrate": {"images": 8}, "check_images": 8, "allow_damage": True}
    device, whole = find_device("local").probe(), by_target["onnxruntime"]
    small = chain.quantize(validated(QuantizeConfig, config, "test"), whole, dataset, device)
    bundle = chain.package(PackageConfig(golden_images=2), small, dataset)
    assert kdpipe("verify", bundle.path).returncode == 0


# ---- without a data set --------------------------------------------------------------------------------------


def test_a_network_is_exported_without_data(trained: Trained, tmp_path: Path) -> None:
    weights = trained.teacher.file(Checkpoint.WEIGHTS)
    call = ["export", "--model", "test_resnet", "--checkpoint", weights, "--input.size", 32, "--classes", 10]
    done = kdpipe(*call, "--artifacts", tmp_path / "artifacts", "--json")
    assert done.returncode == 0, done.stderr
    assert "top-1" not in done.stderr, "on random images no accuracy is told"
    made = Model.open(json.loads(done.stdout)["artifact"])
    assert made.facts.parity is not None and made.facts.parity.images == 64
    data = next(Dataset.open(path) for path in (tmp_path / "artifacts").glob("random-*"))
    assert data.facts.source == "random images"
    shown = kdpipe(*call, "--artifacts", tmp_path / "artifacts")
    assert "compared with torch on 64 random images: its accuracy is not known" in shown.stderr
    # What would be measured or calibrated on noise is refused.
    for command in ("quantize", "package"):
        assert_one_line(kdpipe(command, made.path), 2, "random images", "--data")
        assert_one_line(kdpipe(command, made.path, "--data", data.path), 2, "random images", "--data")


def test_what_cannot_be_exported_without_data(trained: Trained, tmp_path: Path) -> None:
    assert_one_line(kdpipe("export"), 2, "--model NAME with --pretrained")
    assert_one_line(kdpipe("export", "--model", "test_resnet"), 2, "random weights", "--pretrained")
    assert_one_line(kdpipe("export", "--model", "resnet19", "--pretrained"), 2, "did you mean 'resnet")
    assert_one_line(kdpipe("export", trained.teacher.path, "--model", "resnet18"), 2, "not both")
    assert_one_line(
        kdpipe("export", "--model", "resnet18", "--pretrained", "--data", trained.dataset.path),
        2,
        "kdpipe teacher DATA",
    )
    with pytest.raises((UserError, GateFailed)):
        Chain(tmp_path).bare(AdoptConfig(model="onnx", pretrained=True), None, 4)
