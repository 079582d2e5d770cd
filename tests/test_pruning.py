"""Networks of which channels were taken out: which ones, how far, and how a checkpoint of one comes back."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_TRAIN, Trained, assert_one_line, kdpipe, replace_file, rewrite_manifest, train
from safetensors.torch import load_file, save, save_file
from torch import nn

from kdpipe import pipeline
from kdpipe.chain import Chain, train_order
from kdpipe.core.config import DataPlan, StudentSettings, TeacherPlan, TrainConfig, control_of, read_recipe, validated
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Checkpoint, PrunedFacts
from kdpipe.data.dataset import Dataset
from kdpipe.distill.precision import Choices
from kdpipe.networks import models
from kdpipe.networks.narrow import narrow, narrow_as
from kdpipe.networks.pruning import _Cut, prune
from kdpipe.networks.segmenters import given_encoder
from kdpipe.networks.start import begin
from kdpipe.networks.weights import load_weights
from kdpipe.report.words import found_lines
from kdpipe.runtime.task import TASKS

NETWORK = {"model": "test_resnet", "input": {"size": 32}}
BRIEF = {**SMALL_TRAIN, "epochs": 1, "batch_size": 16}
CLASSES = 10


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("pruning") / "artifacts")


@pytest.fixture(scope="module")
def dataset(chain: Chain) -> Dataset:
    return chain.data(DataPlan(source="digits", test_split=None, most_images=80))


@pytest.fixture(scope="module")
def taught(chain: Chain, dataset: Dataset) -> Checkpoint:
    return chain.teacher(validated(TeacherPlan, {**NETWORK, "train": BRIEF}, "teacher"), dataset)


@pytest.fixture(scope="module")
def student(chain: Chain, dataset: Dataset, taught: Checkpoint) -> Checkpoint:
    """Half of its teacher, taught by it."""
    return chain.distill(configuration(prune={"from": taught.path, "keep": 0.5}), dataset, taught)


def configuration(**change: Any) -> TrainConfig:
    if "keep" in change.get("prune", {}):  # in steps that layers as narrow as these have
        change["prune"] = {"round_to": 8, **change["prune"]}
    return validated(TrainConfig, {**NETWORK, "train": BRIEF, **change}, "student")


def whole(name: str, side: int, **more: Any) -> tuple[nn.Module, InputSpec]:
    """A network whose channels differ as those of trained ones do: scales and statistics are not all the same."""
    torch.manual_seed(0)
    network, spec = models.create(
        validated(StudentSettings, {"model": name, "input": {"size": side}, **more}, "t"), CLASSES
    )
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return network.eval(), spec


def pruned(network: nn.Module, name: str, spec: InputSpec, **settings: Any) -> PrunedFacts:
    config = validated(StudentSettings, {"model": name, "prune": {"from": "x", "round_to": 8, **settings}}, "t")
    return prune(network, name, spec, config.prune)


# ---- what goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "side", "keep", "more"),
    [
        ("mobilenetv3_small_050", 32, 0.5, {}),
        ("resnet8", 16, 0.7, {}),
        ("unet", 32, 0.6, {"encoder": "test_resnet", "model_args": {"decoder_channels": [16, 16, 16, 16, 16]}}),
    ],
)
def test_a_pruned_network_comes_back_from_its_weights_alone(
    name: str, side: int, keep: float, more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, without the library that pruned it; it is as small as was asked, and not much smaller."""
    network, spec = whole(name, side, **more)
    before = {key: value.shape for key, value in network.state_dict().items()}
    macs = models.multiply_accumulates(network, spec)
    parameters = sum(each.numel() for each in network.parameters())
    facts = pruned(network, name, spec, keep=keep)
    found = models.multiply_accumulates(network, spec)
    assert keep - 0.02 < facts.macs_share <= keep and facts.macs_share == found / macs
    assert facts.parameters_share == sum(each.numel() for each in network.parameters()) / parameters < 1
    narrower = [
        value.shape[0] for key, value in network.state_dict().items() if value.ndim and value.shape[0] != before[key][0]
    ]
    assert narrower and all(width % facts.round_to == 0 for width in narrower)

    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # as if it were not installed
    path, images = tmp_path / "w.safetensors", torch.randn(3, *spec.shape)
    models.save_weights(network, path)
    again = whole(name, side, **more)[0]
    narrow_as(again, path, spec, CLASSES)
    load_weights(again, path)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), network.eval()(images))
    for one, other in zip(network.modules(), again.modules(), strict=True):
        assert one.extra_repr() == other.extra_repr()


def test_what_nothing_needs_goes_first() -> None:
    """Channels of zeros are the first of their group, and the network gives the same without them."""
    network, spec = whole("resnet8", 16)
    idle: dict[str, list[int]] = {}
    with torch.no_grad():
        for name, block in network.named_modules():
            if not hasattr(block, "conv2"):
                continue
            channels = sorted(torch.randperm(block.conv1.out_channels)[:8].tolist())
            block.conv1.weight[channels] = 0
            block.bn1.weight[channels] = block.bn1.bias[channels] = 0
            block.conv2.weight[:, channels] = 0
            idle[f"{name}.conv1"] = channels
    cut = _Cut(network, "resnet8", spec, 8)
    groups = [group for group in cut.groups() if group.root in idle]
    assert len(groups) == len(idle) == 3
    assert all(sorted(group.gone(group.width - 8)) == idle[group.root] for group in groups)
    levels = [(group, group.width - 8) for group in groups]
    assert cut.computes_without(levels)
    state, images = cut.without(levels), torch.randn(3, *spec.shape)
    with torch.no_grad():
        wanted = network(images)
        narrow(network, {key: tuple(value.shape) for key, value in state.items()})
        network.load_state_dict(state)
        torch.testing.assert_close(network(images), wanted)


def test_the_count_beforehand_is_that_of_the_layers() -> None:
    """What is planned by widths alone is what torch counts afterwards, for every group and level."""
    network, spec = whole("mobilenetv3_small_050", 32)
    cut = _Cut(network, "it", spec, 8)
    assert cut.products([]) == models.multiply_accumulates(network, spec)
    generator = torch.Generator().manual_seed(0)
    levels = [
        (group, group.levels[int(torch.randint(len(group.levels), (1,), generator=generator))])
        for group in cut.groups()
    ]
    narrow(network, {key: tuple(value.shape) for key, value in cut.without(levels).items()})
    assert cut.products(levels) == models.multiply_accumulates(network, spec)


class _Whole(nn.Module):
    """All of whose channels are normalised together."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2)
        self.norm = nn.GroupNorm(1, channels)
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.stem(image)).mean((2, 3)))


def test_networks_that_cannot_be_pruned() -> None:
    network, spec = whole("resnet8", 16)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    for found, name, settings, told in [
        (
            network,
            "resnet8",
            {"keep": 0.05},
            r"0\.05: 'resnet8' keeps 0\.\d+ of .* where 8 channels are left",
        ),
        (network, "resnet8", {"keep": 0.9, "round_to": 64}, "none of its layers can do with fewer .* multiples of 64"),
        (_Whole(), "mine", {"keep": 0.5}, "'mine' cannot be pruned: none of its layers can do with fewer channels"),
        (nn.Flatten(), "flat", {"keep": 0.5}, "'flat' cannot be pruned"),
    ]:
        with pytest.raises(UserError, match=told):
            pruned(found, name, spec, **settings)
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items()), "left as it was"


# ---- a student that is one ---------------------------------------------------------------------------------------


def test_a_pruned_student(chain: Chain, dataset: Dataset, taught: Checkpoint, student: Checkpoint) -> None:
    facts = student.facts
    assert facts.model == "test_resnet-pruned-to-0.50" and student.settings["model"] == "test_resnet"
    assert facts.pruned is not None and facts.pruned.of == "test_resnet"
    assert facts.macs / taught.facts.macs == facts.pruned.macs_share <= 0.5
    assert facts.parameters / taught.facts.parameters == facts.pruned.parameters_share
    assert student.manifest.inputs["start"].key == taught.key
    told = found_lines(facts, TASKS[facts.task])
    assert f"pruned to {facts.pruned.macs_share:.1%} of the multiply-accumulates" in "\n".join(told)
    restored, _ = models.restore(student)
    saved = load_file(student.file(Checkpoint.WEIGHTS))
    assert all(torch.equal(value, saved[name]) for name, value in restored.state_dict().items())
    assert models.multiply_accumulates(restored, facts.input) == facts.macs
    # From the weights of what it was pruned from, not from random ones: no step changes them so much.
    begun = load_file(taught.file(Checkpoint.WEIGHTS))["fc.weight"]
    columns = [torch.cdist(saved["fc.weight"].T, begun.T).min(1).values]
    assert torch.cat(columns).max() < begun.norm(dim=0).mean() / 2


def test_a_pruned_student_goes_on(chain: Chain, dataset: Dataset, taught: Checkpoint, student: Checkpoint) -> None:
    """As a teacher, as a start, and pruned once more."""
    pupil = chain.distill(configuration(label_fraction=0.2), dataset, student)
    assert pupil.facts.pruned is None and pupil.facts.model == "test_resnet"
    longer = chain.distill(configuration(start=student.path, seed=1), dataset, taught)
    assert longer.facts.pruned == student.facts.pruned and longer.facts.macs == student.facts.macs
    further = chain.distill(configuration(start=student.path, prune={"keep": 0.7}), dataset, taught)
    assert further.facts.model == "test_resnet-pruned-to-0.50-pruned-to-0.70"
    assert further.facts.macs <= 0.7 * student.facts.macs
    assert models.restore(further)[0](torch.zeros(1, *further.facts.input.shape)).shape == (1, CLASSES)


def test_a_pruned_start_of_other_classes_has_a_fresh_head(student: Checkpoint) -> None:
    config = configuration(start=student.path)
    network, spec = models.create(config, 3)
    fresh = network.get_submodule("fc").weight.detach().clone()
    assert begin(network, config, spec, ["a", "b", "c"]) == student.facts.pruned
    head = network.get_submodule("fc").weight
    assert tuple(head.shape) == (3, load_file(student.file(Checkpoint.WEIGHTS))["fc.weight"].shape[1])
    assert torch.equal(head, fresh[:, : head.shape[1]])


def test_what_a_student_is_pruned_from(dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    """A file does too; what does not fit is one line."""
    weights = load_file(taught.file(Checkpoint.WEIGHTS))
    save_file(weights, tmp_path / "own.safetensors")
    order = train_order(configuration(prune={"from": tmp_path / "own.safetensors", "keep": 0.5}), dataset, taught)
    assert order.config.start_sha256 and "start" not in order.inputs
    three = {name: value[:3] if name.startswith("fc.") else value for name, value in weights.items()}
    save_file(three, tmp_path / "three.safetensors")
    for change, told in [
        ({"prune": {"keep": 0.5}}, "wanted what is pruned as prune.from"),
        ({"prune": {"from": taught.path}}, r"wanted prune\.keep too"),
        ({"prune": {"from": tmp_path / "nothing", "keep": 0.5}}, r"prune\.from: nothing at .*nothing"),
        ({"model": "resnet8", "prune": {"from": taught.path, "keep": 0.5}}, "is of 'test_resnet', wanted one of"),
        (
            {"prune": {"from": tmp_path / "three.safetensors", "keep": 0.5}},
            "has no head for the 10 classes of",
        ),
        ({"prune": {"from": taught.path, "keep": 0.011}}, "prune.keep 0.011: 'test_resnet' keeps 0"),
        ({"pretrained": True, "prune": {"from": taught.path, "keep": 0.5}}, r"prune\.from and pretrained both say"),
    ]:
        with pytest.raises(UserError, match=told):
            train(configuration(**change), dataset, taught, tmp_path / "student")


def test_of_a_pruned_classifier_no_encoder_is_made(student: Checkpoint) -> None:
    config = validated(
        StudentSettings, {"model": "unet", "encoder": "test_resnet", "encoder_checkpoint": student.path}, "t"
    )
    with pytest.raises(UserError, match="is pruned, and narrower than 'test_resnet'"):
        given_encoder(config)


# ---- strangers' checkpoints --------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_tampered_with(student: Checkpoint, tmp_path: Path) -> None:
    """Its hashes fit, its widths are nobody's: one line, and no layer wider than the named network's is made."""
    weights = load_file(student.file(Checkpoint.WEIGHTS))
    last = next(name for name in reversed(weights) if weights[name].ndim == 4 and weights[name].shape[-1] == 3)
    for number, (changed, told) in enumerate(
        [
            ({last: torch.zeros(4096, *weights[last].shape[1:])}, "with fewer channels"),
            ({last: torch.zeros(0, *weights[last].shape[1:])}, "with fewer channels"),
            ({last: weights[last][:, :, :1]}, "with fewer channels"),
            ({last: weights[last].flatten(1)}, "with fewer channels"),
            ({last: weights[last][:-1]}, "do not fit together"),
            ({"fc.weight": weights["fc.weight"][:, :-1]}, "do not fit together"),
            ({"fc.bias": weights["fc.bias"][:-1], "fc.weight": weights["fc.weight"][:-1]}, "another class count"),
            ({last: weights[last] * math.nan}, "not finite"),
        ]
    ):
        theirs = tmp_path / f"theirs{number}"
        shutil.copytree(student.path, theirs)
        content = {name: value.contiguous() for name, value in (weights | changed).items()}
        replace_file(theirs, Checkpoint.WEIGHTS, save(content))
        with pytest.raises(UserError, match=told) as error:
            models.restore(Checkpoint.open(theirs))
        assert "\n" not in str(error.value)
    replace_file(theirs, Checkpoint.WEIGHTS, b"not weights at all")
    with pytest.raises(UserError, match="cannot read weights"):
        models.restore(Checkpoint.open(theirs))
    replace_file(theirs, Checkpoint.WEIGHTS, save(weights))
    rewrite_manifest(theirs, lambda value: value["facts"].update(pruned=None))
    with pytest.raises(UserError, match="has shape"):
        models.restore(Checkpoint.open(theirs))
    rewrite_manifest(theirs, lambda value: value["facts"].update(pruned={"of": "x", "keep": 7}))
    with pytest.raises(UserError):
        _ = Checkpoint.open(theirs).facts


# ---- how it is asked for -----------------------------------------------------------------------------------------


def test_where_it_is_from_is_said_once(tmp_path: Path) -> None:
    """``prune.from`` is a start; unsaid, it is in no key; a control is as narrow as its student."""
    said = configuration(prune={"from": tmp_path, "keep": 0.5})
    assert said == configuration(start=tmp_path, prune={"keep": 0.5})
    assert said.start == tmp_path and said.model_dump(mode="json")["prune"] == {"keep": 0.5, "round_to": 8}
    assert (control_of(said).start, control_of(said).prune) == (said.start, said.prune)
    for plain in (configuration(), validated(StudentSettings, NETWORK, "t")):
        assert "prune" not in plain.model_dump(mode="json")
    with pytest.raises(UserError, match=r"start and prune\.from both say where"):
        configuration(start="one", prune={"from": "another", "keep": 0.5})
    for wrong, told in [
        ({"keep": 1}, "'prune.keep': input should be less than 1"),
        ({"keep": 0}, "'prune.keep': input should be greater than or equal to 0.01"),
        ({"keep": "half"}, "'prune.keep': input should be a valid number"),
        ({"keep": 0.5, "round_to": 0}, "'prune.round_to'"),
        ({"keeps": 0.5}, "unknown key 'prune.keeps'; did you mean 'keep'"),
    ]:
        with pytest.raises(UserError, match=told):
            configuration(prune=wrong)


def test_a_recipe_of_pruned_students(chain: Chain, dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    """Several side by side, paths from its own folder; a plan knows the keys of what a run makes."""
    shutil.copytree(taught.path, tmp_path / "begun")
    values = {
        "name": "pruned",
        "data": {"source": "digits", "test_split": None, "most_images": 80},
        "teacher": {**NETWORK, "train": BRIEF},
        "student": {**NETWORK, "prune": {"from": "begun", "keep": 0.7, "round_to": 8}},
        "distill": {
            "train": BRIEF,
            "label_fraction": 0.5,
            "students": {
                "half": {"prune": {"from": "begun", "keep": 0.5, "round_to": 4}},
                "wide": {"prune": {"keep": None}},
            },
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    runs = pipeline.student_runs(recipe.student, recipe.distill)
    assert {run.start for run in runs.values()} == {tmp_path / "begun"}
    legs = pipeline.plan(recipe, chain, until="distill")
    assert any("--prune.keep" in leg.command for leg in legs if leg.command)
    assert pipeline.run_part(recipe, chain, until="distill") is None
    legs = pipeline.plan(recipe, chain, until="distill")
    assert len(legs) == 8 and all(leg.sealed for leg in legs), [leg.id for leg in legs if not leg.sealed]
    made = {leg.name: Checkpoint.open(leg.path).facts for leg in legs if leg.stage == "distill"}
    assert {made[f"student-{name}-seed0"].model for name in ("kd", "labels")} == {"test_resnet-pruned-to-0.70"}
    assert made["student-half-seed0"].macs < made["student-kd-seed0"].macs < made["student-wide-seed0"].macs
    assert made["student-wide-seed0"].pruned is None and made["student-half-seed0"].pruned.round_to == 4


def test_a_pruned_network_is_timed_by_itself(tmp_path: Path) -> None:
    """Which precision is fastest is another question for a narrower network; that of a whole one is as it was."""
    choices = Choices(tmp_path, "data", "cpu")
    files = {choices._file(tmp_path, configuration(prune=prune)) for prune in ({}, {"keep": 0.5}, {"keep": 0.7})}
    assert len(files) == 3


def test_by_commands(trained: Trained, tmp_path: Path) -> None:
    """Distilled with options alone; a mistake is one line."""
    options = ("--model", "test_resnet", "--input.size", 32, "--label-fraction", 0.05, "--train.epochs", 1)
    asked = ("distill", trained.teacher.path, "--data", trained.dataset.path, *options)
    done = kdpipe(
        *asked,
        "--prune.from",
        trained.teacher.path,
        "--prune.keep",
        0.4,
        "--prune.round-to",
        8,
        "--out",
        tmp_path / "s",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert "pruned to" in done.stderr and "of the parameters of test_resnet" in done.stderr
    facts = json.loads(done.stdout)["facts"]
    assert facts["model"] == "test_resnet-pruned-to-0.40" and 0 < facts["pruned"]["macs_share"] <= 0.4
    assert_one_line(kdpipe(*asked, "--prune.keep", 0.4), 2, "wanted what is pruned as prune.from")
    assert_one_line(kdpipe(*asked, "--prune.keep", 4), 2, "prune.keep", "less than 1")
