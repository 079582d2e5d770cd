"""Every method on real networks and real images: what is compared, what is frozen, what is added and dropped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import timm
import torch
from conftest import ROOT, SMALL_TRAIN, Trained, evaluated, train
from torch import nn

from kdpipe.core.config import (
    DistillSettings,
    InputSettings,
    Method,
    ModelSettings,
    TrainConfig,
    read_recipe,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import BestEpoch
from kdpipe.distill import loop, losses
from kdpipe.distill.features import (
    Contrast,
    Review,
    by_place,
    map_shapes,
    paired,
    same_size,
    stage_indices,
    stage_parameters,
)
from kdpipe.distill.methods import LABEL_LOSSES, METHODS, DistillationMethod, LogitMethod, StudentOutput
from kdpipe.distill.ranks import Ranks
from kdpipe.distill.teacher import Teacher, TeacherOutput
from kdpipe.distill.trackers import Nothing
from kdpipe.networks import models
from kdpipe.pipeline import student_runs
from kdpipe.runtime.task import TASKS

SPEC = InputSpec(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_fraction=1.0, interpolation="bicubic")
NETWORKS = ["test_resnet", "test_vit", "resnet8", "test_efficientnet", "test_convnext"]


def network(name: str, classes: int = 10, seed: int = 0) -> nn.Module:
    """A network whose residual branches all count (timm starts some at zero)."""
    torch.manual_seed(seed)
    made = models.create(validated(TrainConfig, {"model": name, "input": {"size": 32}}, "test"), classes)[0]
    for parameter in made.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.1)
    return made


class Taught:
    """A method with its teacher, who is asked as the training loop asks."""

    def __init__(self, config: DistillSettings, student: nn.Module, teacher: nn.Module | None = None) -> None:
        self.teacher = Teacher(teacher, SPEC, SPEC) if teacher is not None else None
        self.method = METHODS[config.method](config, student, SPEC, self.teacher, "the student", task="classification")
        if self.teacher is not None:
            self.teacher.wanted.update(self.method.teacher_indices)

    def __call__(self, image: torch.Tensor, label: torch.Tensor) -> dict[str, torch.Tensor]:
        asked = self.method.asks_teacher
        return self.method(image, label, self.teacher(image) if asked and self.teacher is not None else None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)


def batch(count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.arange(count) % 10


def test_every_method_is_made() -> None:
    assert set(METHODS) == set(get_args(Method))
    assert len(set(METHODS.values())) == len(METHODS), "no method is another one under its name"


def test_every_task_has_a_label_loss() -> None:
    assert set(LABEL_LOSSES) == set(TASKS)


def test_places_of_an_image_are_compared_one_by_one() -> None:
    """A network that says something of every place is taught as if each were an image."""
    outputs = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
    places = by_place(outputs)
    assert places.shape == (40, 3) and torch.equal(places[5 * 2 + 1], outputs[0, :, 2, 1])
    assert torch.equal(by_place(outputs[..., 0, 0]), outputs[..., 0, 0])

    class Everywhere(nn.Conv2d):
        num_classes = 10

    torch.manual_seed(0)
    student, teacher, image = Everywhere(3, 10, 1), nn.Conv2d(3, 10, 1), batch()[0]
    for name in ("hard", "kd", "bkd", "logit_mse", "dkd"):
        config = validated(DistillSettings, {"method": name, "label_weight": 0}, "test")
        method = METHODS[name](config, student, SPEC, Teacher(teacher, SPEC, SPEC), task="classification")
        target = torch.randint(0, 10, (8, 32, 32))
        method._label_loss = nn.CrossEntropyLoss()
        by_image = method(image, target, TeacherOutput(teacher(image)))["kd_loss"]
        loss = method.distillation_loss(
            StudentOutput(by_place(student(image)), [], []), TeacherOutput(by_place(teacher(image))), target.flatten()
        )
        assert by_image.item() == pytest.approx(loss.item(), rel=1e-6), name


@pytest.mark.parametrize("soft", [False, True])
def test_places_without_a_label_teach_dkd_nothing(soft: bool) -> None:
    """Every image has a label where the method needs one, but not at every place."""
    student, teacher, target = torch.randn(6, 4), torch.randn(6, 4), torch.tensor([0, -1, 3, 2, -1, 1])
    student.requires_grad_()
    config = validated(DistillSettings, {"method": "dkd"}, "test")
    network = nn.Conv2d(3, 4, 1)
    network.num_classes = 4
    method = METHODS["dkd"](config, network, SPEC, Teacher(network, SPEC, SPEC), task="classification")
    known = target >= 0
    if soft:
        target = nn.functional.one_hot(target.clamp(min=0), 4) * known[:, None].float()
    found = method.logit_loss(student, teacher, target)
    (gradient,) = torch.autograd.grad(found, student)
    alone = method.logit_loss(student[known], teacher[known], target[known])
    assert found.item() == pytest.approx(alone.item() * 4 / 6, rel=1e-5)
    assert gradient[known].any(1).all() and gradient[~known].abs().max() < 1e-7


@pytest.mark.parametrize("frame", [DistillationMethod, LogitMethod])
def test_a_method_without_a_loss_of_its_own_does_not_train(frame: type) -> None:
    """Nothing stands in for what was forgotten."""

    class Forgetful(frame):
        pass

    teacher = Teacher(network("test_resnet", seed=1), SPEC, SPEC)
    image, label = batch()
    with pytest.raises((TypeError, NotImplementedError), match=r"abstract|no loss of its own"):
        Forgetful(DistillSettings(kd_weight=1), network("test_resnet"), SPEC, teacher)(image, label, teacher(image))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("student", NETWORKS)
def test_any_student_learns_from_any_teacher(method: str, student: str) -> None:
    """CNN from ViT, ViT from CNN, 32 pixels up: one step of every pair gives finite gradients to the student alone."""
    for teacher_name in ("test_resnet", "test_vit"):
        mine, its = network(student), network(teacher_name, seed=1)
        before = {name: tensor.clone() for name, tensor in its.state_dict().items()}
        task = Taught(DistillSettings(method=method), mine, its)
        for phase in range(len(task.phases(40, 10))):
            task.enter(phase)
            task.train()
            result = task(*batch())
            assert ("output" in result) == task.phases(40, 10)[phase].has_accuracy
            assert "output" not in result or result["output"].shape == (8, 10)
            task.zero_grad()
            result["loss"].backward()
            gradients = [p.grad for p in task.trainable() if p.grad is not None]
            assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
            assert any(gradient.any() for gradient in gradients)
        assert all(parameter.grad is None for parameter in its.parameters())
        assert not its.training
        assert all(torch.equal(before[name], tensor) for name, tensor in its.state_dict().items())


@pytest.mark.parametrize("method", [method for method in METHODS if METHODS[method].needs_teacher])
def test_methods_need_a_teacher(method: str) -> None:
    with pytest.raises(UserError, match=f"method '{method}' needs a teacher"):
        Taught(DistillSettings(method=method), network("test_resnet"))


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("kd", lambda s, t, y: losses.kd(s, t, 4.0)),
        ("hard", lambda s, t, y: losses.hard(s, t)),
        ("bkd", lambda s, t, y: losses.bkd(s, t)),
        ("logit_mse", lambda s, t, y: losses.logit_mse(s, t)),
        ("dkd", lambda s, t, y: losses.dkd(s, t, y, 1.0, 8.0, 4.0) / 20),  # the first of twenty warm-up epochs
        ("dist", lambda s, t, y: 2 * losses.dist(s, t, 1.0, 1.0, 4.0)),
    ],
)
def test_total_is_the_labels_loss_and_the_methods(method: str, loss) -> None:
    mine, its = network("test_resnet"), network("test_resnet", seed=1)
    task = Taught(DistillSettings(method=method, label_weight=0.3), mine, its)
    task.eval()
    image, label = batch()
    with torch.no_grad():
        result = task(image, label)
        student, teacher = mine(image), its(image)
        expected = 0.3 * nn.functional.cross_entropy(student, label) + loss(student, teacher, label)
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_dkd_grows_to_its_weight() -> None:
    task = Taught(DistillSettings(method="dkd", label_weight=0), network("test_resnet"), network("test_resnet", seed=1))
    task.eval()

    def value(epoch: int) -> float:
        task.method.epoch = epoch
        return task(*batch())["loss"].item()

    assert value(9) == pytest.approx(10 * value(0), rel=1e-4)
    assert value(19) == pytest.approx(value(50), rel=1e-6)


def test_teacher_sees_its_own_colours_and_size() -> None:
    """The student's normalised view, undone and done again, is what the teacher would have been fed."""
    its = network("test_resnet")
    own = InputSpec(size=48, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), crop_fraction=1.0, interpolation="bicubic")
    raw = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    larger = nn.functional.interpolate(raw, (48, 48), mode="bicubic", antialias=True)

    def normalised(image: torch.Tensor, spec: InputSpec) -> torch.Tensor:
        return (image - torch.tensor(spec.mean).view(1, 3, 1, 1)) / torch.tensor(spec.std).view(1, 3, 1, 1)

    output = Teacher(its, own, SPEC)(normalised(raw, SPEC))
    torch.testing.assert_close(output.logits, its.eval()(normalised(larger, own)).detach(), atol=1e-4, rtol=1e-4)


def test_shuffled_teacher_keeps_its_top_1_only() -> None:
    its, mine, (image, label) = network("test_resnet"), network("resnet8"), batch()
    said = Teacher(its, SPEC, SPEC)(image)
    plain = Taught(DistillSettings(), mine, its)._shown(said, label).logits
    shuffled = Taught(DistillSettings(shuffled_teacher=True), mine, its)._shown(said, label).logits
    assert torch.equal(plain.argmax(1), shuffled.argmax(1))
    assert torch.equal(plain.sort(1).values, shuffled.sort(1).values)
    assert not torch.equal(plain, shuffled)


def test_label_smoothing_and_bce() -> None:
    image, label = batch()
    mine = network("test_resnet").eval()
    with torch.no_grad():
        logits = mine(image)

    def value(**config: object) -> float:
        task = Taught(validated(DistillSettings, {"method": "labels", **config}, "test"), mine)
        return task.eval()(image, label)["loss"].item()

    smooth = 0.9 * nn.functional.one_hot(label, 10) + 0.01
    assert value(train={"label_smoothing": 0.1}) == pytest.approx(
        -(smooth * logits.log_softmax(1)).sum(1).mean().item(), rel=1e-5
    )
    hot = nn.functional.one_hot(label, 10).float()
    assert value(label_loss="bce") == pytest.approx(
        nn.functional.binary_cross_entropy_with_logits(logits, hot).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_stages_partition_the_network(name: str) -> None:
    made = network(name)
    indices = stage_indices(made, name)
    assert indices == sorted(set(indices)) and 3 <= len(indices) <= 4
    stages = stage_parameters(made, (32, 32), indices)
    everything = [parameter for stage in stages for parameter in stage]
    assert sorted(everything) == sorted(dict(made.named_parameters()))
    assert all(stages)
    assert {"fc.weight", "head.weight", "classifier.weight", "head.fc.weight"} & set(stages[-1])
    assert len(map_shapes(made, (32, 32), indices)) == len(indices)


def test_pairs_are_the_deepest() -> None:
    assert paired([0, 1, 2], [1, 2, 3, 4]) == ([0, 1, 2], [2, 3, 4])
    assert paired([5], [1, 2]) == ([5], [2])


def test_networks_without_features_say_so() -> None:
    with pytest.raises(UserError, match="gives no intermediate features"):
        stage_indices(nn.Linear(2, 2), "a linear layer")


def test_stagewise_trains_one_stage_at_a_time() -> None:
    mine, its = network("test_resnet"), network("test_resnet", seed=1)
    task = Taught(DistillSettings(method="stagewise"), mine, its)
    groups = stage_parameters(mine, (32, 32), stage_indices(mine, "", with_stem=True))
    for phase in range(len(task.phases(40, 10))):
        before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
        task.enter(phase)
        task.train()
        optimizer = torch.optim.SGD(list(task.trainable()), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            task(*batch())["loss"].backward()
            optimizer.step()
        changed = {name for name, tensor in mine.state_dict().items() if not torch.equal(before[name], tensor)}
        parameters = changed & set(dict(mine.named_parameters()))
        assert parameters and parameters <= set(groups[phase])
        statistics = {name.rpartition(".")[0] for name in changed if "running" in name}
        trained = {name.rpartition(".")[0] for name in groups[phase]}
        assert statistics <= trained  # frozen BatchNorms keep theirs


def test_stagewise_may_let_statistics_move() -> None:
    config = validated(DistillSettings, {"method": "stagewise", "stagewise": {"frozen_batchnorm": "train"}}, "test")
    mine = network("test_resnet")
    task = Taught(config, mine, network("test_resnet", seed=1))
    task.enter(2)
    task.train()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items() if "running" in name}
    task(*batch())
    assert all(not torch.equal(before[name], tensor) for name, tensor in mine.state_dict().items() if name in before)


def test_stagewise_loss_vanishes_for_the_teacher_itself() -> None:
    its = network("test_resnet")
    task = Taught(DistillSettings(method="stagewise"), network("test_resnet"), its)
    task.eval()
    for phase in range(len(task.phases(40, 10)) - 1):
        task.method._phase = phase
        assert task(*batch())["loss"].item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize(("epochs", "steps_per_epoch"), [(1, 7), (3, 15), (43, 1), (6, 351)])
def test_stagewise_costs_what_the_others_cost(epochs: int, steps_per_epoch: int) -> None:
    """Few epochs or many: the phases share the steps, to within one."""
    task = Taught(DistillSettings(method="stagewise"), network("test_resnet"), network("test_resnet"))
    phases = task.phases(epochs * steps_per_epoch, steps_per_epoch)
    assert [phase.name for phase in phases] == ["stem", "stage 1", "stage 2", "stage 3", "stage 4", "head"]
    steps = [phase.steps for phase in phases]
    assert sum(steps) == epochs * steps_per_epoch and max(steps) - min(steps) <= 1
    with pytest.raises(UserError, match=r"shares 5 step\(s\) between 6 phases: wanted one each"):
        task.phases(5, 5)


def test_stagewise_may_have_epochs_of_its_own() -> None:
    config = validated(DistillSettings, {"method": "stagewise", "stagewise": {"epochs": 2}}, "test")
    phases = Taught(config, network("test_resnet"), network("test_resnet")).phases(60, 15)
    assert [phase.steps for phase in phases] == 6 * [30]


def test_the_stem_is_a_stage_where_there_is_one() -> None:
    its = network("test_resnet")
    task = Taught(DistillSettings(method="stagewise"), network("test_resnet"), its)
    assert task.method._stages[0] == ["conv1.0.weight", "conv1.1.weight", "conv1.1.bias", *task.method._stages[0][3:]]
    assert not any(name.startswith("layer") for name in task.method._stages[0])
    # A network that gives no map of its stem learns it with its first stage.
    for other in ("test_convnext", "resnet8"):
        phases = Taught(DistillSettings(method="stagewise"), network(other), its).phases(60, 10)
        assert phases[0].name == "stage 1"


def test_stagewise_ends_phases_within_an_epoch(trained: Trained, tmp_path: Path) -> None:
    """Three epochs asked are three epochs given, whatever the number of phases."""
    import json

    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.2, "method": "stagewise"}
    values["train"] = {**SMALL_TRAIN, "epochs": 3, "batch_size": 32}
    done = train(validated(TrainConfig, values, "test"), trained.dataset, trained.teacher, tmp_path / "student")
    control = {**values, "method": "labels"}
    alone = train(validated(TrainConfig, control, "test"), trained.dataset, None, tmp_path / "control")
    assert (done.facts.epochs, done.facts.steps) == (alone.facts.epochs, alone.facts.steps) == (3, 3 * 8)
    rows = [json.loads(line) for line in done.file("history.jsonl").read_text().splitlines()]
    assert [(row["epoch"], row["phase"]) for row in rows] == [
        (1, "stem"), (1, "stage 1"), (2, "stage 2"), (2, "stage 3"), (3, "stage 4"), (3, "head")
    ]  # fmt: skip
    assert all(0 < row["loss"] < 10 for row in rows)


def begun(trained: Trained, method: str, epochs: int = 3, steps_per_epoch: int = 10, **train: object) -> loop.Run:
    """A run in its first step."""
    config = validated(
        TrainConfig,
        {"model": "resnet8", "input": {"size": 32}, "method": method, "train": {"epochs": epochs, **train}},
        "test",
    )
    student, spec = models.create(config, 10)
    teacher = Teacher(network("test_resnet"), SPEC, spec)
    learner = METHODS[method](config, student, spec, teacher, task="classification")
    steps = epochs * steps_per_epoch
    run = loop.Run(config, learner, trained.dataset, spec, steps, steps_per_epoch, Ranks(), None, Nothing())
    run.begin()
    return run


@pytest.mark.parametrize("decay_all", [False, True])
@pytest.mark.parametrize("method", ["hint", "deep_supervision"])
def test_one_rule_of_decay(trained: Trained, method: str, decay_all: bool) -> None:
    """What is trained beside the network is decayed as the network is: biases and norms or neither."""
    run = begun(trained, method, optimizer="momentum", weight_decay=0.01, decay_all=decay_all)
    decay = {id(each): group["weight_decay"] for group in run._optimizer.param_groups for each in group["params"]}
    parameters = dict(run.method.student.named_parameters())
    assert len(decay) == len(parameters)
    assert any(name.startswith("auxiliaries") and each.ndim == 1 for name, each in parameters.items())
    for name, parameter in parameters.items():
        assert decay[id(parameter)] == (0.01 if decay_all or parameter.ndim > 1 else 0), name


def rates(run: loop.Run, steps: int) -> list[float]:
    found = []
    for at in range(steps):
        run._schedule.step_update(at)
        found.append(run._optimizer.param_groups[0]["lr"])
    return found


def test_a_warm_up_of_few_epochs_is_one(trained: Trained) -> None:
    found = rates(begun(trained, "labels", epochs=3, learning_rate=0.1, warmup_epochs=4), 30)
    assert found[0] == pytest.approx(0.001)
    assert found[:8] == sorted(found[:8]) and found[7] == max(found), "a quarter of the steps"
    assert found[7:] == sorted(found[7:], reverse=True)
    # Where it is no more than a quarter, it is what was asked for.
    found = rates(begun(trained, "labels", epochs=10, learning_rate=0.1, warmup_epochs=1), 100)
    assert found[9] < found[10] > found[11]


def test_milestones_are_ends_of_epochs(trained: Trained) -> None:
    settings = {"schedule": "multistep", "milestones": [2, 3], "warmup_epochs": 0, "learning_rate": 1.0}
    found = rates(begun(trained, "labels", epochs=4, **settings), 40)
    assert found == pytest.approx(20 * [1.0] + 10 * [0.1] + 10 * [0.01])


@pytest.mark.parametrize("name", ["kd-cifar", "dkd", "dist"])
def test_recipes_of_the_cifar_protocol_keep_it(trained: Trained, name: str) -> None:
    """Plain momentum, everything decayed, every training image: else no figure compares with the literature's."""
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yaml")
    assert recipe.data.val_fraction == 0
    for settings in (recipe.teacher.train, recipe.distill.train):
        run = begun(trained, "labels", **settings.model_dump())
        assert type(run._optimizer) is torch.optim.SGD
        for group in run._optimizer.param_groups:
            assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.9, False, 5e-4)


def ask(method: DistillationMethod, its: nn.Module, image: torch.Tensor) -> TeacherOutput:
    """What a teacher says of the maps that the method looks at."""
    teacher = Teacher(its, SPEC, SPEC)
    teacher.wanted.update(method.teacher_indices)
    said: TeacherOutput = teacher(image)
    return said


def settings(method: str, **change: object) -> DistillSettings:
    return validated(DistillSettings, {"method": method, **change}, "test")


def pointwise(head: nn.Module) -> list[int]:
    """Channels that its convolutions of one place make, one after another."""
    return [each.out_channels for each in head.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (1, 1)]


def test_heads_double_up_to_the_wider_network() -> None:
    """Of the teacher where that is wider, else of the student; as narrow as their stages where nothing is said."""
    wide, narrow = network("test_resnet"), network("resnet8")
    channels = [shape[0] for shape in map_shapes(wide, (32, 32), stage_indices(wide, ""))]
    for its, widest in ((wide, max(64, channels[-1])), (narrow, 64)):
        heads = Taught(settings("deep_supervision", deep={"width": "doubling"}), narrow, its).method.student.auxiliaries
        assert [pointwise(head) for head in heads] == [[32, 64], [min(64, widest)]]
        assert [head[-1].in_features for head in heads] == [64, min(64, widest)]
    own = Taught(settings("deep_supervision"), narrow, wide).method.student.auxiliaries
    assert [pointwise(head) for head in own] == [[16, 16], [32]]


def test_heads_weigh_what_is_said() -> None:
    """T^2 KL and the labels of each head at the heads' weight, less with every epoch."""
    mine, its = network("resnet8"), network("test_resnet", seed=1)
    change = {"weight": 0.3, "labels": True, "fade": True}
    task = Taught(
        settings("deep_supervision", deep=change, label_weight=0.5, kd_weight=2, train={"epochs": 4}), mine, its
    )
    task.eval()
    image, label = batch()
    with torch.no_grad():
        said, wanted = task.method.student(image), its(image)

        def one(logits: torch.Tensor) -> float:
            kd = losses.kd(logits, wanted, 4.0)
            return (0.5 * nn.functional.cross_entropy(logits, label) + 2 * kd).item()

        for epoch, weight in enumerate((0.3, 0.225, 0.15, 0.075)):
            task.method.epoch = epoch
            expected = one(said.logits) + weight * sum(map(one, said.auxiliary))
            assert task(image, label)["loss"].item() == pytest.approx(expected, rel=1e-5)


def test_a_teacher_of_no_known_width() -> None:
    class Bare(nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.flatten(1)[:, :10]

    with pytest.raises(UserError, match=r"deep.width is doubling, .* this teacher .* leave it own"):
        Taught(settings("deep_supervision", deep={"width": "doubling"}), network("resnet8"), Bare())
    Taught(settings("deep_supervision"), network("resnet8"), Bare())


@pytest.mark.parametrize(
    ("stages", "expected"), [(None, [1]), (1, [0]), (-1, [2]), ([3, 1], [0, 2]), ([-1, -2, -3], [0, 1, 2])]
)
def test_hints_are_of_the_stages_that_are_named(stages: object, expected: list[int]) -> None:
    mine, its = network("resnet8"), network("test_resnet", seed=1)
    own, others = paired(stage_indices(mine, ""), stage_indices(its, ""))
    task = Taught(settings("hint", hint={"stages": stages}, kd_weight=1, label_weight=0), mine, its)
    assert task.method.student.indices == [own[at] for at in expected]
    assert task.method.teacher_indices == [others[at] for at in expected]
    task.eval()
    with torch.no_grad():
        image, label = batch()
        output, maps = task.method.student(image), task.teacher(image).maps
        pairs = zip(output.auxiliary, (maps[others[at]] for at in expected), strict=True)
        each = [losses.hint(*same_size(*pair)).item() for pair in pairs]
        assert task(image, label)["loss"].item() == pytest.approx(sum(each) / len(each), rel=1e-5)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([1, 4], "hint.stages has 4, and 'the student' and its teacher share 3 stages: wanted 1 to 3, or -3 to -1"),
        (-4, "hint.stages has -4"),
        ([3, -1], "hint.stages names stage 3 of 3 twice"),
    ],
)
def test_hints_of_stages_that_are_none(stages: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Taught(settings("hint", hint={"stages": stages}), network("resnet8"), network("test_resnet"))


def test_kd_beside_hints() -> None:
    mine, its = network("resnet8"), network("test_resnet", seed=1)
    parts = {"kd_weight": 3, "label_weight": 0.5, "temperature": 2}
    task = Taught(settings("hint", hint={"logits": True}, **parts), mine, its).method
    task.eval()
    image, label = batch()
    with torch.no_grad():
        result = task(image, label, ask(task, its, image))
        kd = losses.kd(mine(image), its(image), 2.0)
    assert result["logit_loss"].item() == pytest.approx(kd.item(), rel=1e-5)
    expected = 0.5 * result["task_loss"] + 3 * result["kd_loss"] + kd
    assert result["loss"].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("method", ["hint", "stagewise", "review"])
def test_normalised_maps_have_one_scale(method: str) -> None:
    """Whatever a teacher's channels are scaled by, its loss is the same, and of one size for every family."""
    found = []
    for name in ("test_resnet", "test_vit", "test_convnext"):
        its = network(name, seed=1)
        torch.manual_seed(0)
        change = {"hint": {"normalize": True}, "review": {"warmup_epochs": 0}, "label_weight": 0, "kd_weight": 1}
        task = Taught(settings(method, **change), network("resnet8"), its)
        task.enter(0)
        said = task.teacher(batch()[0])
        larger = {at: maps * torch.linspace(0.1, 1000, maps.shape[1])[:, None, None] for at, maps in said.maps.items()}
        task.train()
        values = [
            task.method(*batch(), TeacherOutput(said.logits, maps))["loss"].item() for maps in (said.maps, larger)
        ]
        assert values[1] == pytest.approx(values[0], rel=1e-3)
        found.append(values[0])
    assert min(found) > 0.3 and max(found) < 2 * min(found), found


def test_hint_in_two_stages() -> None:
    """First what lies up to the hint, by the hint alone; then the network without it."""
    mine, its = network("resnet8"), network("test_resnet", seed=1)
    task = Taught(settings("hint", hint={"two_stages": 0.3, "logits": True}), mine, its)
    phases = task.phases(40, 10)
    assert [(phase.name, phase.steps, phase.has_accuracy) for phase in phases] == [
        ("hint", 12, False),
        ("all", 28, True),
    ]
    assert [phase.steps for phase in task.phases(2, 1)] == [1, 1]
    with pytest.raises(UserError, match="shares 1 step between two phases"):
        task.phases(1, 1)
    parts = stage_parameters(mine, (32, 32), stage_indices(mine, ""))
    below, everything = {name for part in parts[:2] for name in part}, dict(mine.named_parameters())
    for phase, wanted in enumerate((below, set(everything))):
        before = {name: tensor.clone() for name, tensor in task.method.student.state_dict().items()}
        task.enter(phase)
        task.train()
        assert task.asks_teacher
        optimizer = torch.optim.SGD(list(task.trainable()), lr=0.1)
        result = task(*batch())
        result["loss"].backward()
        assert all(parameter.grad is not None for parameter in task.trainable())
        optimizer.step()
        after = task.method.student.state_dict()
        moved = {name for name in after if not torch.equal(before[name], after[name])}
        assert {name.removeprefix("student.") for name in moved if name.startswith("student.")} >= wanted
        assert not {name for name in moved if "running" not in name and "batches" not in name} - {
            *(f"student.{name}" for name in wanted), *(name for name in after if phase == 0 and "auxiliaries" in name)
        }  # fmt: skip
        assert any("auxiliaries" in name for name in moved) == (phase == 0)
        optimizer.zero_grad()
    plain = Taught(settings("hint", hint={"two_stages": 0.3}), mine, its)
    plain.enter(1)
    assert not plain.asks_teacher, "labels alone"
    assert set(plain(*batch())) == {"loss", "output", "task_loss"}


def test_contrast_remembers_the_last_images() -> None:
    """Negative is who is of another image and another class; the oldest make place."""
    contrast = Contrast(4, 6, width=8, remembered=6)

    def remember(labels: list[int], numbers: list[int]) -> torch.Tensor:
        mine, its = torch.randn(len(labels), 8), torch.randn(len(labels), 8)
        found = contrast.remember(mine, its, torch.tensor(labels), torch.tensor(numbers))
        places = [(int(contrast.begin) - len(labels) + at) % 6 for at in range(len(labels))]
        assert torch.equal(contrast.students[places], mine) and torch.equal(contrast.teachers[places], its)
        return found

    first = remember([0, 1, -1, 0], [10, 11, 12, 13])
    assert first.int().tolist() == [
        [0, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]
    ]  # fmt: skip
    # Another view of image 12, whose class nobody knows, and one that takes the place of image 10.
    second = remember([2, -1, -1], [20, 12, -1])
    assert contrast.numbers.tolist() == [-1, 11, 12, 13, 20, 12] and contrast.is_filled.all()
    assert second.int().tolist() == [[1, 1, 1, 1, 0, 1], [1, 1, 0, 1, 1, 0], [0, 1, 1, 1, 1, 1]]


def test_contrast_knows_images_by_number_and_class() -> None:
    mine, its = network("resnet8"), network("test_resnet", seed=1)
    task = Taught(settings("crd", crd={"negatives": 64, "width": 16}), mine, its).method
    (image, label), contrast = batch(), task.student.auxiliaries
    said = ask(task, its, image)
    task(image, label, said, torch.arange(8) + 100)
    assert contrast.labels[:8].tolist() == label.tolist() and contrast.numbers[:8].tolist() == list(range(100, 108))
    mixed = 0.7 * nn.functional.one_hot(label, 10) + 0.3 * nn.functional.one_hot(label.flip(0), 10)
    mixed[3] = 0  # nobody knows
    task(image, mixed, said, torch.arange(8))
    assert contrast.labels[8:16].tolist() == [*label[:3].tolist(), -1, *label[4:].tolist()]
    with pytest.raises(UserError, match=r"crd.negatives is 32: wanted as many as a batch, 64, at least"):
        Taught(settings("crd", crd={"negatives": 32}), mine, its)


@pytest.mark.parametrize(
    ("method", "change", "message"),
    [
        *((name, {}, "a cache holds its logits") for name in ("hint", "at", "rkd", "cc", "crd", "review", "stagewise")),
        ("cwd", {"cwd_on": "features"}, "a cache holds its logits"),
        ("deep_supervision", {"deep": {"width": "doubling"}}, "a cache does not tell that: leave it own"),
    ],
)
def test_what_a_cache_lacks_is_told_before_it_is_made(method: str, change: dict[str, object], message: str) -> None:
    METHODS[method].check(settings(method, **change))  # type: ignore[index]
    with pytest.raises(UserError, match=message):
        METHODS[method].check(settings(method, cache_views=2, **change))  # type: ignore[index]


@pytest.mark.parametrize("method", ["kd", "dist", "deep_supervision", "cwd"])
def test_what_a_cache_has_is_enough(method: Any) -> None:
    METHODS[method].check(settings(method, cache_views=2))  # type: ignore[index]


def test_a_review_goes_from_deep_to_shallow() -> None:
    """What a deeper stage shows reaches shallower ones, and not the other way round."""
    review = Review([4, 8, 16], [5, 6, 7]).eval()
    maps = [torch.randn(2, 4, 8, 6), torch.randn(2, 8, 4, 3), torch.randn(2, 16, 1, 1)]
    before = review(maps)
    assert [tuple(made.shape) for made in before] == [(2, 5, 8, 6), (2, 6, 4, 3), (2, 7, 1, 1)]
    for at in range(3):
        changed = [maps[i] + (i == at) for i in range(3)]
        moved = [not torch.equal(*pair) for pair in zip(review(changed), before, strict=True)]
        assert moved == [each <= at for each in range(3)]
    task = Taught(settings("review"), network("resnet8"), network("test_resnet", seed=1))
    task.eval()

    def value(epoch: int) -> float:
        task.method.epoch = epoch
        return task(*batch())["kd_loss"].item()

    assert value(9) == pytest.approx(10 * value(0), rel=1e-4)


RUNS = [{"method": method} for method in METHODS] + [
    {"method": "kd", "standardize_logits": True},
    {"method": "dkd", "standardize_logits": True},
    {"method": "kd", "shuffled_teacher": True},
    {"method": "labels", "train": {"label_smoothing": 0.1}},
    {"method": "stagewise", "stagewise": {"handover": "best", "frozen_batchnorm": "train", "epochs": 1}},
    {"method": "kd", "train": {"mixup": 0.1, "cutmix": 1.0, "average": 0.9, "clip_gradient": 1.0, "layer_decay": 0.75}},
    {"method": "kd", "train": {"schedule": "multistep", "milestones": [1], "optimizer": "sgd", "learning_rate": 0.05}},
    {"method": "kd", "train": {"precision": "auto"}},
]


@pytest.mark.parametrize("change", RUNS, ids=lambda change: str(change)[:60])
def test_every_method_trains_end_to_end(trained: Trained, tmp_path: Path, change: dict) -> None:
    """From configuration to a sealed checkpoint whose weights are the student's alone."""
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.1, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 4, **change.get("train", {})}
    config = validated(TrainConfig, values, "test")
    checkpoint = train(config, trained.dataset, trained.teacher, tmp_path / "student")
    restored, spec = models.restore(checkpoint)
    logits, labels = evaluated(restored, spec, trained.dataset, "test")
    assert checkpoint.facts.test_accuracy == pytest.approx((logits.argmax(1) == labels).mean(), abs=1e-6)
    assert sorted(path.name for path in checkpoint.path.iterdir()) == [
        "history.jsonl", "images.npy", "labels.json", "manifest.json", "model.safetensors", "test_logits.npz"
    ]  # fmt: skip
    assert (checkpoint.facts.last_validation is not None) == METHODS[config.method].learns_outputs


def test_networks_of_the_cifar_protocol_are_known() -> None:
    assert timm.create_model("resnet8x4", num_classes=10)(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_best_epoch_is_kept_if_asked(trained: Trained, tmp_path: Path) -> None:
    import json

    train_settings = {**SMALL_TRAIN, "epochs": 6, "validate_every": 1, "select": "best", "learning_rate": 0.02}
    values = {
        "model": "test_resnet",
        "input": {"size": 32},
        "label_fraction": 0.1,
        "method": "labels",
        "train": train_settings,
    }
    checkpoint = train(validated(TrainConfig, values, "test"), trained.dataset, None, tmp_path / "student")
    rows = [json.loads(line) for line in checkpoint.file("history.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["validation_accuracy"])
    assert checkpoint.facts.best_validation == BestEpoch(
        epoch=best["epoch"], validation_accuracy=best["validation_accuracy"]
    )
    restored, spec = models.restore(checkpoint)
    logits, labels = evaluated(restored, spec, trained.dataset, "val")
    assert (logits.argmax(1) == labels).mean() == pytest.approx(best["validation_accuracy"])


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_trains(trained: Trained, tmp_path: Path, path: Path) -> None:
    """The recipe's own method, loss, optimiser, schedule and augmentation, on a tiny network and two epochs."""
    recipe = read_recipe(path)
    settings = recipe.distill.train.model_copy(
        update={"epochs": 2, "batch_size": 32, "workers": 0, "precision": "float32", "validate_every": 1}
    )
    student = ModelSettings(model="test_resnet", input=InputSettings(size=32))
    config = student_runs(student, recipe.distill)[f"student-{recipe.distill.method}-seed{recipe.distill.seeds[0]}"]
    plan = config.model_copy(update={"train": settings, "label_fraction": 0.1})
    checkpoint = train(plan, trained.dataset, trained.teacher, tmp_path / "student")
    assert checkpoint.facts.epochs >= 2
    assert checkpoint.facts.method == recipe.distill.method
