"""Runs side by side: one view, one batch and one forward of the teacher for all, and each as if it were alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import SMALL_TRAIN, Trained, train, train_together

from kdpipe.chain import Chain, train_order
from kdpipe.core.artifact import Order
from kdpipe.core.config import DistillPlan, InputSettings, ModelSettings, TrainConfig, control_of, validated
from kdpipe.core.errors import UserError
from kdpipe.distill import loop
from kdpipe.distill.teacher import Teacher
from kdpipe.distill.train import companions
from kdpipe.pipeline import student_runs

INPUT = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
# Dropout, a shuffled teacher, maps for one of them only, phases, fewer and more epochs, another network.
STUDENTS: list[dict[str, object]] = [
    {"method": "labels"},
    {"method": "kd", "model_args": {"drop_rate": 0.3}},
    {"method": "dkd", "shuffled_teacher": True, "train": {"epochs": 2}},
    {"method": "hint", "model": "resnet8"},
    {"method": "stagewise"},
    {"method": "kd", "train": {"learning_rate": 0.1, "optimizer": "sgd"}},
]


def configuration(change: dict[str, object], seed: int = 0, **train: object) -> TrainConfig:
    values = {"model": "test_resnet", "input": INPUT, "label_fraction": 0.1, "seed": seed, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 4, **change.get("train", {}), **train}  # type: ignore[dict-item]
    return validated(TrainConfig, values, "test")


def ordered(trained: Trained, configs: dict[Path, TrainConfig]) -> dict[Path, Order[TrainConfig]]:
    return {out: train_order(config, trained.dataset, trained.teacher) for out, config in configs.items()}


def test_together_as_alone(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs = {tmp_path / f"together-{at}": configuration(change) for at, change in enumerate(STUDENTS)}
    orders = ordered(trained, configs)
    assert companions(orders, trained.dataset) == [orders]
    forwards = []
    forward = Teacher.forward
    monkeypatch.setattr(Teacher, "forward", lambda *arguments: forwards.append(1) or forward(*arguments))
    together = train_together(configs, trained.dataset, trained.teacher)
    assert len(forwards) == 4 * 2, "the teacher is asked once a batch"
    for at, (out, config) in enumerate(configs.items()):
        alone = train(config, trained.dataset, trained.teacher, tmp_path / f"alone-{at}")
        for name in ("model.safetensors", "test_logits.npz", "images.npy"):
            assert together[out].file(name).read_bytes() == alone.file(name).read_bytes(), (config.method, name)
        assert together[out].facts == alone.facts
        assert together[out].key == alone.key


# A memory, phases that end within an epoch, heads that fade.
LATER: list[dict[str, object]] = [
    {"method": "crd", "crd": {"negatives": 96, "width": 16}},
    {
        "method": "hint",
        "hint": {"stages": [1, -2], "normalize": True, "logits": True, "two_stages": 0.3},
        "train": {"average": 0.9},
    },
    {"method": "deep_supervision", "deep": {"width": "doubling", "weight": 0.3, "fade": True, "labels": True}},
]


def test_interrupted_together_as_alone(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that a method remembers is in what is saved, and is its own."""
    configs = {
        tmp_path / f"together-{at}": configuration(change, epochs=3, checkpoint_seconds=0)
        for at, change in enumerate(LATER)
    }
    step, steps = loop.Run._learn, []

    def interrupted(run: loop.Run, batch: loop.Batch) -> None:
        steps.append(run.position)
        if len(steps) == 3 * len(LATER) + 2:  # some of them are ahead of the others
            raise KeyboardInterrupt
        step(run, batch)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(loop.Run, "_learn", interrupted)
        train_together(configs, trained.dataset, trained.teacher)
    assert max(steps) == 3 and not any(out.exists() for out in configs)
    together = train_together(configs, trained.dataset, trained.teacher)
    for at, (out, config) in enumerate(configs.items()):
        alone = train(config, trained.dataset, trained.teacher, tmp_path / f"alone-{at}")
        for name in ("model.safetensors", "history.jsonl", "test_logits.npz"):
            assert together[out].file(name).read_bytes() == alone.file(name).read_bytes(), (config.method, name)


def test_what_sees_other_views_is_no_companion(trained: Trained, tmp_path: Path) -> None:
    changes: list[dict[str, object]] = [{}, {"seed": 1}, {"label_fraction": 0.2}, {"input": {"size": 40}}]
    configs = {tmp_path / str(at): configuration(change) for at, change in enumerate(changes)}
    configs[tmp_path / "batch"] = configuration({}, batch_size=32)
    configs[tmp_path / "mixed"] = configuration({}, mixup=0.2)
    configs[tmp_path / "augmented"] = configuration({}, augment={"crop": "none"})
    assert len(companions(ordered(trained, configs), trained.dataset)) == len(configs)
    rates = {tmp_path / str(rate): configuration({}, learning_rate=rate) for rate in (0.1, 0.2)}
    assert len(companions(ordered(trained, rates), trained.dataset)) == 1


def test_one_that_fails_does_not_stop_the_others(trained: Trained, tmp_path: Path) -> None:
    good = configuration({"method": "kd"})
    bad = configuration({"method": "kd"}, optimizer="sgd", learning_rate=1e12)
    with pytest.raises(UserError, match="loss became"):
        train_together({tmp_path / "bad": bad, tmp_path / "good": good}, trained.dataset, trained.teacher)
    assert [path.name for path in tmp_path.iterdir()] == ["good"]
    alone = train(good, trained.dataset, trained.teacher, tmp_path / "alone")
    assert (tmp_path / "good" / "model.safetensors").read_bytes() == alone.file("model.safetensors").read_bytes()


def test_a_plan_names_its_students_and_their_controls() -> None:
    students = {
        "hotter": {"temperature": 20},
        "smaller": {"model": "resnet8"},
        "longer": {"method": "dkd", "dkd": {"beta": 2}, "train": {"epochs": 9}},
    }
    plan = validated(DistillPlan, {"seeds": [3, 5], "students": students, "train": {"batch_size": 32}}, "test")
    runs = student_runs(ModelSettings(model="test_resnet"), plan)
    of_one_seed = ["labels", "kd", "hotter", "labels-smaller", "smaller", "labels-longer", "longer"]
    assert list(runs) == [f"student-{name}-seed{seed}" for seed in (3, 5) for name in of_one_seed]
    longer = runs["student-longer-seed5"]
    assert (longer.train.epochs, longer.train.batch_size, longer.dkd.beta, longer.seed) == (9, 32, 2, 5)
    assert runs["student-labels-longer-seed5"] == control_of(longer)
    # A control learns at full weight whatever the balance of the method is, and carries none of its settings.
    unbalanced = validated(TrainConfig, {"model": "x", "label_weight": 0.1, "temperature": 9}, "test")
    assert control_of(unbalanced) == TrainConfig(model="x", method="labels")


def test_a_student_that_changes_the_method_has_its_own_weights() -> None:
    students = {
        "hint": {"method": "hint"},
        "half": {"method": "at", "kd_weight": 500},
        "dist": {"method": "dist", "label_weight": 0.5},
        "hotter": {"temperature": 20},
        "again": {"method": "kd", "kd_weight": 0.5},
    }
    plan = validated(DistillPlan, {"label_weight": 0.1, "kd_weight": 0.9, "students": students}, "test")
    runs = student_runs(ModelSettings(model="test_resnet"), plan)
    weights = {name: (run.label_weight, run.kd_weight) for name, run in runs.items() if run.needs_teacher}
    assert weights == {
        "student-kd-seed0": (0.1, 0.9),
        "student-hint-seed0": (1.0, None),  # the method's own, which is 100
        "student-half-seed0": (1.0, 500),
        "student-dist-seed0": (0.5, None),
        "student-hotter-seed0": (0.1, 0.9),
        "student-again-seed0": (0.1, 0.5),
    }


def test_a_control_may_have_epochs_of_its_own() -> None:
    plan = validated(DistillPlan, {"control_epochs": 9, "train": {"epochs": 60}}, "test")
    runs = student_runs(ModelSettings(model="test_resnet"), plan)
    assert {name: run.train.epochs for name, run in runs.items()} == {"student-labels-seed0": 9, "student-kd-seed0": 60}
    # One serves all students; those of as many steps as with unlabelled images follow each student's own.
    longer = plan.model_copy(update={"students": {"long": {"train": {"epochs": 90}}}})
    controls = [
        run for run in student_runs(ModelSettings(model="x"), longer, unlabeled=True).values() if not run.needs_teacher
    ]
    assert [(run.train.epochs, run.steps_as_unlabeled) for run in controls] == [(9, False), (60, True), (90, True)]


@pytest.mark.parametrize("together", [True, False], ids=["together", "one after another"])
def test_precision_is_chosen_once(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: bool
) -> None:
    """A method and its control are trained in one precision, also if the control is made anew another day."""
    timed = []
    fastest = loop.fastest
    monkeypatch.setattr(loop, "fastest", lambda *arguments: timed.append(1) or fastest(*arguments))
    values = {"label_fraction": 0.05, "train": {**SMALL_TRAIN, "epochs": 1, "precision": "auto"}}
    student = ModelSettings(model="test_resnet", input=InputSettings(size=32))
    runs = student_runs(student, validated(DistillPlan, values, "test"))
    done = Chain(tmp_path).train_all(runs, trained.dataset, trained.teacher, together)
    control, taught = done["student-labels-seed0"], done["student-kd-seed0"]
    assert len(timed) == 1
    assert control.facts.precision == taught.facts.precision and len(control.facts.precision.seconds_a_step) == 4
    shutil.rmtree(control.path)
    again = Chain(tmp_path).train_all(runs, trained.dataset, trained.teacher, together)["student-labels-seed0"]
    assert len(timed) == 1 and again.facts.precision == taught.facts.precision
    # What cannot be read is chosen anew.
    [remembered] = (tmp_path / ".precisions").iterdir()
    remembered.write_text('{"name": "int3"}')
    shutil.rmtree(again.path)
    Chain(tmp_path).train_all(runs, trained.dataset, trained.teacher, together)
    assert len(timed) == 2


@pytest.mark.parametrize(
    ("students", "message"),
    [
        (
            {"hotter": {"temprature": 4}},
            r"distill.students.hotter: unknown key 'temprature'; did you mean 'temperature'",
        ),
        ({"a": {"train": {"epoch": 4}}}, r"distill.students.a.train: unknown key 'epoch'; did you mean 'epochs'"),
        ({"a": {"method": "kdd"}}, r"distill.students.a: 'method'"),
        ({"kd": {}}, r"distill.students: the name 'kd' is taken"),
        ({"steps": {}}, r"distill.students: the name 'steps' is taken"),
    ],
)
def test_mistaken_students_are_named(students: dict[str, dict[str, object]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        student_runs(ModelSettings(model="test_resnet"), DistillPlan(students=students))


def test_a_chain_trains_them_side_by_side(trained: Trained, tmp_path: Path) -> None:
    train_settings = {**SMALL_TRAIN, "epochs": 1}
    values = {"label_fraction": 0.05, "students": {"dkd": {"method": "dkd"}}, "train": train_settings}
    student = ModelSettings(model="test_resnet", input=InputSettings(size=32))
    runs = student_runs(student, validated(DistillPlan, values, "test"))
    chain = Chain(tmp_path)
    first = chain.train_all(runs, trained.dataset, trained.teacher, together=True)
    assert [(step.name, bool(step.along_with)) for step in chain.steps] == [
        ("student-labels-seed0", False),
        ("student-kd-seed0", True),
        ("student-dkd-seed0", True),
    ]
    apart = Chain(tmp_path / "apart").train_all(runs, trained.dataset, trained.teacher, together=False)
    again = chain.train_all(runs, trained.dataset, trained.teacher, together=True)
    assert all(step.sealed_before for step in chain.steps[3:])
    for name, checkpoint in first.items():
        assert again[name].path == checkpoint.path
        weights = apart[name].file("model.safetensors").read_bytes()
        assert checkpoint.file("model.safetensors").read_bytes() == weights
