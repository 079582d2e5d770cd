"""Images without labels teach what the teacher says of them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL_TRAIN, Trained, train
from test_methods import Taught, batch, network

from kdpipe.chain import Chain
from kdpipe.core.config import (
    DataPlan,
    DistillPlan,
    DistillSettings,
    InputSettings,
    ModelSettings,
    TrainConfig,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import UNLABELED, Dataset
from kdpipe.distill.methods import METHODS, label_loss
from kdpipe.pipeline import student_runs
from kdpipe.report.tables import distillation_gains
from kdpipe.report.words import gain_sentence


@pytest.fixture(scope="module")
def semi(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Checkpoint]:
    """The digits, with their own pictures once more without labels, and a teacher of them."""
    folder = tmp_path_factory.mktemp("semi")
    chain = Chain(folder / "artifacts")
    plain = chain.data(DataPlan(source="digits", test_split=None))
    some = [sample.path for sample in plain.samples("train")[:300]]
    (folder / "more").mkdir()
    for at, path in enumerate(some):
        (folder / "more" / f"{at}.png").write_bytes(path.read_bytes())
    return chain.data(DataPlan(source="digits", test_split=None, unlabeled=folder / "more")), trained.teacher


def configuration(**change: Any) -> TrainConfig:
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.05, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 2, **change.get("train", {})}
    return validated(TrainConfig, values, "test")


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].needs_labels])
def test_methods_without_labels_take_them(semi: tuple[Dataset, Checkpoint], tmp_path: Path, method: str) -> None:
    dataset, teacher = semi
    done = train(configuration(method=method), dataset, teacher, tmp_path / "student")
    assert done.facts.unlabeled_images == 300
    assert 40 < done.facts.training_images < 70


def test_labels_alone_leave_them_out(semi: tuple[Dataset, Checkpoint], tmp_path: Path) -> None:
    dataset, teacher = semi
    done = train(configuration(method="labels"), dataset, teacher, tmp_path / "student")
    assert done.facts.unlabeled_images == 0


def test_a_control_of_as_many_steps(semi: tuple[Dataset, Checkpoint], tmp_path: Path) -> None:
    """Labels alone make fewer steps an epoch; a second control repeats its images until it made as many."""
    dataset, teacher = semi
    plan = validated(DistillPlan, {"label_fraction": 0.05, "train": {**SMALL_TRAIN, "epochs": 2}}, "test")
    runs = student_runs(ModelSettings(model="test_resnet", input=InputSettings(size=32)), plan, unlabeled=True)
    assert list(runs) == ["student-labels-seed0", "student-labels-steps-seed0", "student-kd-seed0"]
    done = Chain(tmp_path).train_all(runs, dataset, teacher, together=True)
    alone, matched, taught = done.values()
    assert alone.facts.steps == 2 < matched.facts.steps == taught.facts.steps == 2 * 6
    assert alone.facts.training_images == matched.facts.training_images and matched.facts.unlabeled_images == 0
    rows = [json.loads(line) for line in matched.file("history.jsonl").read_text().splitlines()]
    assert len(rows) == matched.facts.epochs == 12 and rows[-1]["loss"] < rows[0]["loss"]
    # The gain is told against each, with the steps.
    gains = distillation_gains({"teacher": teacher, **done})
    assert [(gain["method"], gain["control_steps"], gain["steps"]) for gain in gains] == [("kd", 2, 12), ("kd", 12, 12)]
    assert "; 12 steps against 2)" in gain_sentence(gains[0]) and "against 12" not in gain_sentence(gains[1])
    for gain, control in zip(gains, (alone, matched), strict=True):
        assert gain["seeds"][0]["labels_accuracy"] == control.facts.test_accuracy


def test_a_control_is_that_of_its_student(semi: tuple[Dataset, Checkpoint], tmp_path: Path) -> None:
    """With students of other lengths, each is compared with labels of its own; with control_epochs with those."""
    _, teacher = semi
    for control_epochs, expected in ((None, [(2, 2), (1, 1)]), (3, [(2, 3), (1, 3)])):
        values = {"label_fraction": 0.1, "students": {"short": {"method": "dkd", "train": {"epochs": 1}}}}
        values |= {"control_epochs": control_epochs, "train": {**SMALL_TRAIN, "epochs": 2}}
        plain = Chain(tmp_path).data(DataPlan(source="digits", test_split=None))
        runs = student_runs(
            ModelSettings(model="test_resnet", input=InputSettings(size=32)), validated(DistillPlan, values, "test")
        )
        done = Chain(tmp_path / str(control_epochs)).train_all(runs, plain, teacher, together=True)
        gains = distillation_gains({"teacher": teacher, **done})
        steps = done["student-short-seed0"].facts.steps  # of an epoch
        assert [(gain["steps"] / steps, gain["control_steps"] / steps) for gain in gains] == expected


@pytest.mark.parametrize("train_change", [{}, {"mixup": 0.2, "cutmix": 1.0}], ids=["plain", "mixed"])
def test_no_labels_at_all(semi: tuple[Dataset, Checkpoint], tmp_path: Path, train_change: dict[str, Any]) -> None:
    """From the teacher's word alone a student gets far beyond chance."""
    dataset, teacher = semi
    config = configuration(label_fraction=0, train={"epochs": 12, **train_change})
    done = train(config, dataset, teacher, tmp_path / "student")
    assert done.facts.training_images == 0
    assert done.facts.test_accuracy > 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "dkd"}, "method 'dkd' needs the label of every image and 300 have none"),
        ({"method": "labels", "label_fraction": 0}, "method 'labels' needs labels"),
        ({"method": "hint", "label_fraction": 0}, "method 'hint' needs labels for the outputs"),
        ({"method": "stagewise", "label_fraction": 0}, "method 'stagewise' needs labels for the outputs"),
        ({"method": "crd", "label_fraction": 0}, "method 'crd' needs labels for the outputs"),
    ],
)
def test_missing_labels_are_told(semi: tuple[Dataset, Checkpoint], tmp_path: Path, change: Any, message: str) -> None:
    dataset, teacher = semi
    with pytest.raises(UserError, match=message):
        train(configuration(**change), dataset, teacher, tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_hints_with_kd_need_no_labels(semi: tuple[Dataset, Checkpoint], tmp_path: Path) -> None:
    """Neither beside the hints nor after them."""
    dataset, teacher = semi
    values = {"method": "hint", "label_fraction": 0, "hint": {"logits": True, "two_stages": 0.5}}
    done = train(configuration(**values, train={"epochs": 1}), dataset, teacher, tmp_path / "student")
    assert done.facts.training_images == 0
    assert [row.phase for row in done.history] == ["hint", "all"]


@pytest.mark.parametrize("loss", ["ce", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_loss_is_the_sum_over_the_labeled_by_all(loss: str, smoothing: float) -> None:
    config = validated(DistillSettings, {"label_loss": loss, "train": {"label_smoothing": smoothing}}, "test")
    criterion, logits = label_loss(config), torch.randn(8, 10, requires_grad=True)
    target = torch.arange(8)
    target[[1, 4, 5]] = UNLABELED
    known = target >= 0
    torch.testing.assert_close(criterion(logits, target), criterion(logits[known], target[known]) * 5 / 8)
    criterion(logits, target).backward()
    assert logits.grad is not None and not logits.grad[~known].any()
    assert criterion(logits, torch.full((8,), UNLABELED)) == 0


def test_unlabeled_images_move_the_student_by_the_methods_loss() -> None:
    task = Taught(DistillSettings(), network("test_resnet"), network("test_resnet", seed=1))
    image, label = batch()
    task.eval()
    with torch.no_grad():
        result = task(image, torch.full_like(label, UNLABELED))
    assert result["task_loss"] == 0 and result["loss"] == result["kd_loss"] > 0
