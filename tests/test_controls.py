"""Teachers that know less than they might, what a student's weights begin as, and masked images."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_TRAIN, Told, assert_one_line, kdpipe, listening, train, train_together
from safetensors.torch import load_file, save_file
from torch import nn

from kdpipe import pipeline
from kdpipe.chain import Chain, train_order
from kdpipe.core.artifact import sha256_file
from kdpipe.core.config import (
    DataPlan,
    DistillSettings,
    Recipe,
    TeacherPlan,
    TrainConfig,
    control_of,
    read_recipe,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.distill import loop, losses
from kdpipe.distill.methods import METHODS, LogitMethod, MaskedImages
from kdpipe.distill.teacher import Teacher, TeacherOutput
from kdpipe.networks import models

SPEC = InputSpec(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_fraction=1.0, interpolation="bicubic")
NETWORK = {"model": "test_resnet", "input": {"size": 32}}
BRIEF = {**SMALL_TRAIN, "epochs": 1, "batch_size": 16}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("controls") / "artifacts")


@pytest.fixture(scope="module")
def dataset(chain: Chain) -> Dataset:
    return chain.data(DataPlan(source="digits", test_split=None, most_images=80))


@pytest.fixture(scope="module")
def taught(chain: Chain, dataset: Dataset) -> Checkpoint:
    return chain.teacher(teacher(), dataset)


def teacher(**change: Any) -> TeacherPlan:
    return validated(TeacherPlan, {**NETWORK, "train": BRIEF, **change}, "teacher")


def configuration(**change: Any) -> TrainConfig:
    return validated(TrainConfig, {**NETWORK, **change, "train": {**BRIEF, **change.get("train", {})}}, "student")


def made(name: str = "test_resnet", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.create(configuration(model=name), 10)[0]


# ---- what the teacher is shown as ------------------------------------------------------------------------------


def probabilities(logits: torch.Tensor, temperature: float) -> np.ndarray:
    """Softened, by numpy in float64."""
    scaled = logits.double().numpy() / temperature
    raised = np.exp(scaled - scaled.max(1, keepdims=True))
    return raised / raised.sum(1, keepdims=True)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_a_flattened_teacher_is_the_mean_of_all_shuffled_ones(temperature: float) -> None:
    """Over every permutation, not over a few; what the student is told by kd is then the same in the mean."""
    logits, student = torch.randn(6, 4) * 3, torch.randn(6, 4, requires_grad=True)
    flat = losses.flatten_non_maximal(logits, temperature)
    top = logits.argmax(1)
    others = torch.tensor([[k for k in range(4) if k != each] for each in top])
    shuffled = [
        logits.scatter(1, others[:, list(order)], logits.gather(1, others))
        for order in itertools.permutations(range(3))
    ]
    mean = np.mean([probabilities(each, temperature) for each in shuffled], axis=0)
    np.testing.assert_allclose(probabilities(flat, temperature), mean, rtol=1e-5)
    assert torch.equal(flat.argmax(1), top) and torch.equal(flat.amax(1), logits.amax(1))

    def gradient(teacher_logits: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(losses.kd(student, teacher_logits, temperature), student)[0]

    torch.testing.assert_close(gradient(flat), torch.stack([gradient(each) for each in shuffled]).mean(0))


def test_a_flattened_teacher_at_the_limits() -> None:
    logits = torch.tensor([[5.0, 1.0, 2.0, 0.0], [3.0, 3.0, 3.0, 3.0], [1e4, -1e4, 0.0, 7.0]])
    endless = losses.flatten_non_maximal(logits, float("inf"))
    np.testing.assert_allclose(endless.numpy(), [[5, 1, 1, 1], [3, 3, 3, 3], [1e4] + 3 * [-9993 / 3]], rtol=1e-5)
    torch.testing.assert_close(losses.flatten_non_maximal(logits[:1], 1e4), endless[:1], atol=2e-3, rtol=0)
    assert torch.isfinite(losses.flatten_non_maximal(logits, 0.01)).all()
    two = torch.tensor([[0.3, -2.0]])
    torch.testing.assert_close(losses.flatten_non_maximal(two, 4.0), two)  # nothing to spread
    assert torch.equal(losses.flatten_non_maximal(logits, 4.0), losses.flatten_non_maximal(logits, 4.0))
    with pytest.raises(ValueError, match="temperature above 0"):
        losses.flatten_non_maximal(logits, 0.0)


def test_a_smoothing_teacher_knows_the_label_alone() -> None:
    logits = losses.smoothing_teacher(torch.tensor([2, -1, 0]), 5, 0.9)
    np.testing.assert_allclose(
        probabilities(logits, 1.0), [[0.025, 0.025, 0.9, 0.025, 0.025], 5 * [0.2], [0.9] + 4 * [0.025]], rtol=1e-5
    )
    mixed = torch.zeros(2, 5)
    mixed[0, 1], mixed[0, 4] = 0.3, 0.7
    found = probabilities(losses.smoothing_teacher(mixed, 5, 0.9), 1.0)
    np.testing.assert_allclose(found[0], [0.025, 0.2875, 0.025, 0.025, 0.6375], rtol=1e-5)
    np.testing.assert_allclose(found[1], 0.2, rtol=1e-6)
    places = losses.smoothing_teacher(torch.tensor([[[0, 1], [-1, 2]]]), 3, 0.8)
    assert places.shape == (1, 3, 2, 2) and torch.equal(places[0, :, 1, 0], torch.zeros(3))
    assert places.argmax(1).tolist()[0][0] == [0, 1] and places[0, :, 1, 1].argmax() == 2
    for wrong in (1.0, 0.2, 0.0):
        with pytest.raises(ValueError, match="wanted a confidence"):
            losses.smoothing_teacher(torch.tensor([0]), 5, wrong)


LOOK_AT_ANSWERS = [
    name for name in METHODS if METHODS[name].compares_outputs(DistillSettings(method=name, kd_weight=1))
]


def test_which_methods_look_at_answers() -> None:
    assert {name for name in METHODS if issubclass(METHODS[name], LogitMethod)} <= set(LOOK_AT_ANSWERS)
    assert not {"labels", "masked", "hint", "at", "rkd"} & set(LOOK_AT_ANSWERS)


@pytest.mark.parametrize("method", [name for name in LOOK_AT_ANSWERS if name not in ("cwd", "stagewise")])
def test_a_control_changes_what_a_method_compares_and_nothing_else(method: str) -> None:
    """The confidence that the method softens stays; the loss is that of a teacher who says just this."""
    mine, its = made(), made(seed=1)
    image, label = torch.randn(8, 3, 32, 32), torch.arange(8)
    asked = Teacher(its, SPEC, SPEC)
    said = asked(image)

    def method_of(**settings: Any) -> Any:
        config = validated(DistillSettings, {"method": method, "label_weight": 0, **settings}, "test")
        torch.manual_seed(2)  # the heads that some of them add
        return METHODS[method](config, mine, SPEC, asked, task="classification").eval()

    flattened = method_of(teacher_control="flattened")
    shown = flattened._shown(said, label).logits
    assert torch.equal(shown.argmax(1), said.logits.argmax(1))
    assert len(set(np.round(shown[0].numpy(), 4))) == 2
    if np.isfinite(flattened.softening):
        of = flattened.softening
        np.testing.assert_allclose(probabilities(shown, of).max(1), probabilities(said.logits, of).max(1), rtol=1e-5)
    smoothing = method_of(teacher_control="smoothing")
    assert torch.equal(smoothing._shown(said, label).logits.argmax(1), label)
    plain = method_of()
    for control in (flattened, smoothing):
        by_hand = plain(image, label, TeacherOutput(control._shown(said, label).logits))["loss"]
        assert control(image, label, said)["loss"].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"method": "hint"}, "method 'hint' as it is set does not look at that"),
        ({"method": "labels"}, "method 'labels' as it is set does not look at that"),
        ({"method": "stagewise"}, "method 'stagewise' as it is set does not look at that"),
        ({"method": "cwd"}, "method 'cwd' looks at features here"),
        ({"shuffled_teacher": True}, "one control at a time"),
        ({"standardize_logits": True}, "leave out standardize_logits"),
        ({"teacher_control": "flatened"}, "'flattened' or 'smoothing'"),
    ],
)
def test_a_control_that_would_change_nothing_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        config = validated(DistillSettings, {"teacher_control": "flattened", **change}, "test")
        asked = Teacher(made(seed=1), SPEC, SPEC)
        METHODS[config.method](config, made(), SPEC, asked, task="classification")


# ---- teachers that never learned -------------------------------------------------------------------------------


def test_an_untrained_teacher(chain: Chain, dataset: Dataset) -> None:
    """Random weights by its seed, as training would begin with."""
    never = chain.teacher(teacher(start="untrained"), dataset)
    assert never.facts.method == "untrained" and never.facts.epochs == 0 and never.facts.training_images == 0
    torch.manual_seed(0)
    other = chain.teacher(teacher(start="untrained", seed=1), dataset)
    weights, others = (load_file(each.file(Checkpoint.WEIGHTS)) for each in (never, other))
    assert weights.keys() == others.keys() and not torch.equal(weights["conv1.0.weight"], others["conv1.0.weight"])
    again = Chain(chain.folder.parent / "again").teacher(teacher(start="untrained"), dataset)
    assert again.key == never.key
    assert again.file(Checkpoint.WEIGHTS).read_bytes() == never.file(Checkpoint.WEIGHTS).read_bytes()
    student = chain.distill(configuration(method="hint", label_fraction=0.5), dataset, never)
    assert student.manifest.inputs["teacher"].key == never.key, "it teaches like any other"


def test_a_random_head_forgets_nothing_else(chain: Chain, dataset: Dataset, taught: Checkpoint) -> None:
    headless = chain.teacher(teacher(start="random_head"), dataset)
    assert headless.manifest.inputs["start"].key == taught.key, "the same trained teacher, not another one"
    weights, whole = (load_file(each.file(Checkpoint.WEIGHTS)) for each in (headless, taught))
    differ = {name for name in whole if not torch.equal(weights[name], whole[name])}
    assert differ and all(name.startswith("fc.") for name in differ)
    assert chain.teacher(teacher(start="random_head", seed=0), dataset).key == headless.key
    assert headless.facts.input == taught.facts.input


def test_a_random_head_over_the_users_own_weights(
    chain: Chain, dataset: Dataset, taught: Checkpoint, tmp_path: Path
) -> None:
    own = tmp_path / "own.safetensors"
    shutil.copyfile(taught.file(Checkpoint.WEIGHTS), own)
    headless = chain.teacher(teacher(start="random_head", checkpoint=str(own)), dataset)
    assert headless.manifest.inputs["start"].stage == "adopt"
    weights, whole = load_file(headless.file(Checkpoint.WEIGHTS)), load_file(own)
    assert torch.equal(weights["conv1.0.weight"], whole["conv1.0.weight"])
    assert not torch.equal(weights["fc.weight"], whole["fc.weight"])


def test_a_teacher_of_a_share_of_the_images(chain: Chain, dataset: Dataset, taught: Checkpoint) -> None:
    few = chain.teacher(teacher(label_fraction=0.5), dataset)
    assert few.facts.training_images == pytest.approx(taught.facts.training_images / 2, abs=10)
    positions, all_of_them = (np.load(each.file(Checkpoint.IMAGES)) for each in (few, taught))
    assert set(positions) < set(all_of_them)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"start": "untrained", "checkpoint": "w.pth"}, "leave out checkpoint"),
        ({"start": "untrained", "pretrained": True}, "leave out pretrained"),
        ({"start": "untrained", "label_fraction": 0.5}, "label_fraction is of a teacher that is trained here"),
        ({"pretrained": True, "label_fraction": 0.5}, "label_fraction is of a teacher that is trained here"),
        ({"model": "onnx", "start": "random_head", "checkpoint": "w.onnx"}, "stay as they are"),
    ],
)
def test_a_teacher_that_contradicts_itself(chain: Chain, dataset: Dataset, change: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        chain.teacher(teacher(**change), dataset)


# ---- what a student begins as ----------------------------------------------------------------------------------


def of_eight_classes(taught: Checkpoint, path: Path, prefix: str = "") -> Path:
    """Weights of another task, as a file."""
    weights = load_file(taught.file(Checkpoint.WEIGHTS))
    weights["fc.weight"], weights["fc.bias"] = torch.zeros(8, weights["fc.weight"].shape[1]), torch.zeros(8)
    save_file({f"{prefix}{name}": tensor for name, tensor in weights.items()}, path)
    return path


def first_weights(config: TrainConfig, dataset: Dataset, out: Path) -> dict[str, torch.Tensor]:
    """What a run begins with: so small a rate moves nothing but the statistics of BatchNorm."""
    still = config.train.model_copy(update={"learning_rate": 1e-30, "weight_decay": 0.0})
    done = train(config.model_copy(update={"train": still}), dataset, None, out)
    return {name: tensor for name, tensor in load_file(done.file(Checkpoint.WEIGHTS)).items() if "running" not in name}


def test_a_student_begins_as_a_checkpoint(dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    config = configuration(method="labels", start=taught.path, seed=3)
    order = train_order(config, dataset, None)
    assert order.inputs["start"].key == taught.key and order.key != train_order(configuration(), dataset, None).key
    with listening(told := Told()):
        begun = first_weights(config, dataset, tmp_path / "student")
    assert any("its head included" in note for note in told.notes)
    whole = load_file(taught.file(Checkpoint.WEIGHTS))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in begun.items() if tensor.is_floating_point())


def test_a_start_of_other_classes_leaves_the_head_fresh(dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    path = of_eight_classes(taught, tmp_path / "eight.safetensors", prefix="module.")
    config = configuration(method="labels", start=path)
    order = train_order(config, dataset, None)
    assert order.config.start_sha256 == sha256_file(path) and "start" not in order.inputs
    begun = first_weights(config, dataset, tmp_path / "student")
    scratch = first_weights(configuration(method="labels"), dataset, tmp_path / "scratch")
    whole = load_file(taught.file(Checkpoint.WEIGHTS))
    for name, tensor in begun.items():
        if tensor.is_floating_point():
            assert torch.equal(tensor, scratch[name] if name.startswith("fc.") else whole[name]), name


def test_starts_that_do_not_fit(dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    path = of_eight_classes(taught, tmp_path / "eight.safetensors")
    save_file({"fc.weight": torch.zeros(10, 3)}, tmp_path / "head.safetensors")
    for change, told in [
        ({"model": "resnet8", "start": taught.path}, "is of 'test_resnet', wanted one of 'resnet8': the same network"),
        ({"model": "resnet8", "start": path}, "is of another architecture than .* wanted the same network"),
        ({"start": tmp_path / "head.safetensors"}, "is of another architecture"),
        ({"start": tmp_path / "nothing"}, "start: nothing at .*nothing: wanted a checkpoint's folder"),
        ({"start": taught.path, "pretrained": True}, "start and pretrained both say"),
        ({"start": path, "start_sha256": "0" * 64}, "has sha256 .*, wanted 0000"),
        ({"start": dataset.path}, "is a dataset"),
    ]:
        with pytest.raises(UserError, match=told):
            train(configuration(method="labels", **change), dataset, None, tmp_path / "student")


def test_a_control_begins_as_its_student() -> None:
    config = configuration(start="somewhere", start_sha256="0" * 64)
    control = control_of(config)
    assert (control.start, control.start_sha256) == (config.start, config.start_sha256)


def test_gains_do_not_mix_starts(chain: Chain, dataset: Dataset, taught: Checkpoint) -> None:
    """Two students that differ in their start alone are two rows, each against the control of its own start."""
    from kdpipe.report.tables import distillation_gains

    checkpoints = {"teacher": taught}
    for name, start in (("", None), ("-begun", taught.path)):
        for method in ("labels", "kd"):
            config = configuration(method=method, start=start, label_fraction=0.5)
            checkpoints[f"student-{method}{name}-seed0"] = chain.distill(config, dataset, taught)
    gains = {gain["method"]: gain["seeds"] for gain in distillation_gains(checkpoints)}
    assert set(gains) == {"kd", "kd-begun"}
    for name, seeds in gains.items():
        control = checkpoints[f"student-labels{name.removeprefix('kd')}-seed0"]
        assert [seed["labels_accuracy"] for seed in seeds] == [control.facts.test_accuracy]


# ---- recipes ---------------------------------------------------------------------------------------------------


def test_what_was_made_before_keeps_its_key() -> None:
    """What is left unsaid is in no key."""
    new = {"teacher_control", "masked", "start", "start_sha256"}
    assert not new & configuration().model_dump(mode="json").keys()
    assert not new & teacher().training().model_dump(mode="json").keys()
    assert teacher(label_fraction=0.5).training().label_fraction == 0.5
    said = configuration(teacher_control="flattened", masked={"ratio": 0.5}).model_dump(mode="json")
    assert said["teacher_control"] == "flattened" and said["masked"] == {"ratio": 0.5, "patch": None}


@pytest.mark.parametrize(
    "change", [{"start": "untrained"}, {"start": "random_head", "label_fraction": 0.5}, {"label_fraction": 0.5}]
)
def test_a_plan_finds_what_a_run_made(
    chain: Chain, dataset: Dataset, taught: Checkpoint, tmp_path: Path, change: dict[str, Any]
) -> None:
    """Keys that are known beforehand are those of what is made; paths in a recipe are from its own folder."""
    shutil.copytree(taught.path, tmp_path / "begun")
    values = {
        "name": "controls",
        "data": {"source": "digits", "test_split": None, "most_images": 80},
        "teacher": {**NETWORK, "train": BRIEF, **change},
        "student": {**NETWORK, "start": "begun"},
        "distill": {"train": BRIEF, "label_fraction": 0.5, "students": {"at": {"method": "at", "start": "begun"}}},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(values))
    recipe = read_recipe(tmp_path / "recipe.yaml")
    assert pipeline.run_part(recipe, chain, until="distill") is None
    legs = pipeline.plan(recipe, chain, until="distill")
    assert legs and all(leg.sealed for leg in legs), [leg.id for leg in legs if not leg.sealed]
    assert len(legs) == 5 + (change.get("start") == "random_head")
    assert max(pipeline.levels(legs).values()) == 2 + (change.get("start") == "random_head")


def test_masked_images_are_no_student_of_a_recipe() -> None:
    values = {"name": "r", "data": {"source": "digits"}, "teacher": NETWORK, "student": NETWORK}
    for distill, name in (({"method": "masked"}, "masked"), ({"students": {"it": {"method": "masked"}}}, "it")):
        recipe = validated(Recipe, {**values, "distill": distill}, "test")
        with pytest.raises(UserError, match=f"method masked teaches '{name}' no answers .* the student's start"):
            pipeline.student_runs(recipe.student, recipe.distill)


# ---- masked images ---------------------------------------------------------------------------------------------


def masked(name: str = "test_resnet", spec: InputSpec = SPEC, **settings: Any) -> MaskedImages:
    torch.manual_seed(0)
    config = validated(
        TrainConfig, {"model": name, "input": {"size": spec.size}, "method": "masked", "masked": settings}, "t"
    )
    method = METHODS["masked"](config, models.create(config, 10)[0], spec, None, task="classification")
    assert isinstance(method, MaskedImages)
    method.enter(0)
    return method


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "resnet8", "test_convnext"])
def test_hidden_pixels_are_never_seen(name: str) -> None:
    """What is painted does not depend on them; the loss is the mean absolute difference over them alone."""
    method, view = masked(name, ratio=0.5, patch=8).eval(), torch.randn(3, 3, 32, 32)
    hidden = method.hidden(torch.tensor([0, 1, 2]))
    assert hidden.shape == (3, 1, 32, 32) and hidden.sum((1, 2, 3)).tolist() == 3 * [8 * 64]
    others = torch.where(hidden, torch.randn(3, 3, 32, 32), view)
    label = torch.zeros(3, dtype=torch.int64)

    def shown(image: torch.Tensor) -> torch.Tensor:
        return method.trainable_module(image.masked_fill(hidden, 0), 0).auxiliary[0]

    painted = shown(view)
    assert painted.shape == view.shape and torch.equal(painted, shown(others))
    where = np.broadcast_to(hidden.numpy(), view.shape)
    wanted = np.abs(painted.detach().numpy() - others.numpy())[where].mean()
    result = method(others, label)
    assert "output" not in result and result["loss"].item() == pytest.approx(wanted, rel=1e-5)
    result["loss"].backward()
    head = {id(parameter) for parameter in method.student.student.get_classifier().parameters()}
    trained = {id(p) for p in method.trainable() if p.grad is not None and p.grad.any()}
    assert trained and not head & trained
    assert all(parameter.grad is not None for parameter in method.trainable()), "torchrun waits for each of them"


def test_squares_at_the_border_and_their_count() -> None:
    spec = SPEC.model_copy(update={"size": (30, 44)})
    method = masked(spec=spec, ratio=0.99, patch=16)
    hidden = method.hidden(torch.arange(50))
    assert hidden.shape == (50, 1, 30, 44)
    assert not hidden.flatten(1).all(1).any(), "something is left to be seen"
    seen = ~hidden[:, 0, ::16, ::16].flatten(1)
    assert (seen.sum(1) == 1).all() and (seen.sum(0) > 0).all(), "another square of each view"
    assert torch.equal(method.hidden(torch.tensor([7, 3])), hidden[[7, 3]]), "whatever else is in the batch"
    method.epoch = 1
    assert not torch.equal(method.hidden(torch.arange(50)), hidden)
    assert masked(spec=spec.model_copy(update={"size": 224}), name="test_resnet")._patch == 32
    with pytest.raises(UserError, match="hides a view of 32 pixels whole"):
        masked(patch=32)


def test_masked_images_teach_without_labels(dataset: Dataset, taught: Checkpoint, tmp_path: Path) -> None:
    """No label is looked at, the loss falls, the head stays as it was, and a student begins with a head of its own."""
    config = configuration(method="masked", train={"epochs": 5, "learning_rate": 0.01})
    done = train(config, dataset, taught, tmp_path / "masked")
    assert "teacher" not in done.manifest.inputs
    rows = done.history
    assert rows[-1].loss < 0.9 * rows[0].loss and all(row.validation_accuracy is None for row in rows)
    begun = configuration(method="labels", start=done.path, seed=4)
    weights, whole = first_weights(begun, dataset, tmp_path / "student"), load_file(done.file(Checkpoint.WEIGHTS))
    assert torch.equal(weights["conv1.0.weight"], whole["conv1.0.weight"])
    fresh = first_weights(configuration(method="labels", seed=4), dataset, tmp_path / "scratch")
    assert torch.equal(weights["fc.weight"], fresh["fc.weight"]) and not torch.equal(
        fresh["fc.weight"], whole["fc.weight"]
    )


def test_masked_images_interrupted_side_by_side(
    dataset: Dataset, taught: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As alone and in one go, with dropout in the network and an average of its weights."""
    own = {"method": "masked", "model_args": {"drop_path_rate": 0.2}, "masked": {"ratio": 0.4}}
    often = {"checkpoint_seconds": 0, "epochs": 2, "average": 0.9}
    changes: dict[str, dict[str, Any]] = {"kd": {"method": "kd"}, "masked": own}
    configs = {tmp_path / name: configuration(**change, train=often) for name, change in changes.items()}
    step, steps = loop.Run._learn, []

    def interrupted(run: loop.Run, batch: loop.Batch) -> None:
        steps.append(run.position)
        if len(steps) == 12:
            raise KeyboardInterrupt
        step(run, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Run, "_learn", interrupted)
        train_together(configs, dataset, taught)
    assert max(steps) == 5 and not (tmp_path / "masked").exists()
    together = train_together(configs, dataset, taught)[tmp_path / "masked"]
    alone = train(configs[tmp_path / "masked"], dataset, None, tmp_path / "alone")
    for name in (Checkpoint.WEIGHTS, Checkpoint.HISTORY):
        assert together.file(name).read_bytes() == alone.file(name).read_bytes(), name


def test_masked_images_of_a_command(dataset: Dataset, tmp_path: Path, workdir: Path) -> None:
    """Trained by one command, the start of the next; what can't be selected by is refused."""
    options = ["--model", "test_resnet", "--input.size", "32", "--train.epochs", "1", "--train.workers", "0"]
    done = kdpipe("distill", dataset.path, "--method", "masked", *options, "--out", tmp_path / "begun")
    assert done.returncode == 0, done.stderr
    done = kdpipe(
        "distill", dataset.path, "--method", "labels", *options, "--start", tmp_path / "begun", "--out", tmp_path / "it"
    )
    assert done.returncode == 0, done.stderr
    assert Checkpoint.open(tmp_path / "it").manifest.inputs["start"].key == Checkpoint.open(tmp_path / "begun").key
    done = kdpipe("distill", dataset.path, "--method", "masked", *options, "--train.select", "best")
    assert_one_line(done, 2, "method 'masked' has no accuracy to select by")
    done = kdpipe("distill", dataset.path, "--method", "labels", *options, "--start", tmp_path / "nothing")
    assert_one_line(done, 2, "start: nothing at")
