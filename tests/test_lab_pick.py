"""Picks that take minutes: killed and gone on with, in INT8, and with the best few trained shortly."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import command, kdpipe_process
from lab import Computer, serve

from kdpipe.chain import Chain, sealed
from kdpipe.core.config import DataPlan, TeacherPlan, read_recipe, validated
from kdpipe.core.kinds import Cache, Checkpoint, Measurement, Pick
from kdpipe.data.dataset import Dataset
from kdpipe.picking import WORKSHOP

pytestmark = pytest.mark.lab

PRIOR = "resnet8,60\nresnet14,65\nresnet20,70\ntest_resnet,55\n"
SHORT = {"epochs": 1, "workers": 0, "augment": {"crop": "pad", "flip": 0}}
OPTIONS = (
    "--p90", "60s", "--prior", "prior.csv", "--input.size", "16", "--threads", "1", "--rounds", "2", "--budget", "3",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pick")
    (folder / "prior.csv").write_text(PRIOR)
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return Chain(folder / "artifacts").data(DataPlan(source="digits", test_split=None, most_images=200))


def sessions(folder: Path) -> list[Path]:
    workshop = folder / "artifacts" / WORKSHOP
    return [path for path, manifest in sealed(workshop) if manifest.kind == Measurement.kind]


def test_a_pick_that_was_killed_goes_on_from_its_sessions(folder: Path, dataset: Dataset) -> None:
    """Killed once while a network is made and once after a session: nothing is measured twice, the budget holds."""
    for done in ("drawn-*", "measurement-*"):
        process = subprocess.Popen(
            command("pick", dataset.path, *OPTIONS), cwd=folder, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        workshop = folder / "artifacts" / WORKSHOP
        deadline = time.monotonic() + 600
        while not any(not path.name.endswith(".part") for path in workshop.glob(done)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = sessions(folder)
    assert len(before) == 1
    answer = kdpipe_process("pick", dataset.path, *OPTIONS, "--json", cwd=folder)
    assert answer.returncode in (0, 75), answer.stderr
    told = json.loads(answer.stdout)
    assert told["facts"]["measured"] == 3 and set(before) < set(sessions(folder))
    assert {source.key for source in Pick.open(folder / told["artifact"]).manifest.inputs.values()} == {
        dataset.key, *(Measurement.open(path).key for path in sessions(folder))
    }  # fmt: skip
    chosen = told["facts"]["chosen"]
    measured = [row for row in told["networks"] if row["sessions"]]
    assert chosen == max(measured, key=lambda row: row["prior"])["name"]  # all are within a second
    assert not list((folder / "artifacts" / WORKSHOP).glob("drawn-*"))


def test_the_best_few_are_trained_shortly_from_one_cache_and_validation_decides(folder: Path, dataset: Dataset) -> None:
    plan = validated(
        TeacherPlan, {"model": "test_resnet", "input": {"size": 16}, "train": {**SHORT, "epochs": 4}}, "teacher"
    )
    chain = Chain(folder / "artifacts")
    teacher = chain.teacher(plan, dataset)
    training = ("--distill.train.epochs", 20, "--distill.train.workers", 0, "--distill.train.augment.crop", "pad")
    done = kdpipe_process(
        "pick", dataset.path, *OPTIONS, "--train", 2, "--teacher", teacher.path, *training, "--json", cwd=folder
    )
    assert done.returncode in (0, 75), done.stderr
    told = json.loads(done.stdout)
    students = [
        manifest for _, manifest in sealed(chain.folder)
        if manifest.kind == Checkpoint.kind and "teacher" in manifest.inputs
    ]  # fmt: skip
    assert len(students) == 2 and all(manifest.config["train"]["epochs"] == 2 for manifest in students)
    caches = [manifest.key for _, manifest in sealed(chain.folder) if manifest.kind == Cache.kind]
    assert {Checkpoint.facts_of(manifest).cache for manifest in students} == set(caches) and len(caches) == 1
    rows = {row["name"]: row for row in told["networks"]}
    judged = {name: row["validation"] for name, row in rows.items() if row["validation"] is not None}
    assert judged == {
        f"{manifest.config['model']}-16": Checkpoint.facts_of(manifest).last_validation for manifest in students
    }
    assert judged[told["facts"]["chosen"]] == max(judged.values())
    assert "short training" in told["sentence"]
    recipe_file = Pick.open(folder / told["artifact"]).file(Pick.RECIPE)
    recipe = read_recipe(recipe_file)
    assert recipe.distill.train.epochs == 20 and recipe.teacher.checkpoint == teacher.file(Checkpoint.WEIGHTS)
    assert recipe.student.input.mean == teacher.facts.input.mean
    legs = json.loads(kdpipe_process("run", recipe_file, "--dry-run", "--json", cwd=folder).stdout)["legs"]
    assert any(leg["stage"] == "distill" for leg in legs)
    assert yaml.safe_load(recipe_file.read_text())["student"]["model"] in told["facts"]["chosen"]


def test_what_was_trained_here_is_a_prior(folder: Path, dataset: Dataset) -> None:
    """After the short trainings: candidates are those whose validation is known."""
    done = kdpipe_process(
        "pick", dataset.path, "--p90", "60s", "--prior", "runs", "--input.size", "16", "--threads", "1",
        "--rounds", "2", "--json", cwd=folder,
    )  # fmt: skip
    assert done.returncode in (0, 75), done.stderr
    told = json.loads(done.stdout)
    assert {row["model"] for row in told["networks"]} <= {"resnet8", "resnet14", "resnet20", "test_resnet"}
    assert len(told["networks"]) >= 2 and "(runs)" in told["sentence"]


def told_by(*arguments: object, cwd: Path) -> dict[str, Any]:
    """What a process of its own prints for machines, whatever its converters print."""
    done = subprocess.run(command(*arguments), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 75), done.stderr
    return dict(json.loads(done.stdout))


def test_a_pick_asks_a_device_behind_an_sshd(folder: Path, dataset: Dataset) -> None:
    """In INT8 for TFLite: every session is the device's own, and another pick for it begins with them."""
    computer = Computer()
    try:
        sshd = serve(computer)
        settings = {"kind": "ssh", "address": "device", "ssh_config": str(sshd.config), "python": computer.python()}
        (folder / "devices.yaml").write_text(yaml.safe_dump({"pi": settings}))
        names = ("--candidates", "resnet8", "--device", "pi", "--target", "tflite", "--json")
        before = sessions(folder)
        told = told_by("pick", dataset.path, *OPTIONS, *names, cwd=folder)
        assert told["facts"]["chosen"] == "resnet8-16" and told["facts"]["measured"] == 1
        assert "on 'pi' (tflite, int8)" in told["sentence"]
        made = [Measurement.open(path) for path in set(sessions(folder)) - set(before)]
        assert {each.facts.device for each in made} == {"pi"} and len(made) >= 2
        recipe = read_recipe(Pick.open(folder / told["artifact"]).file(Pick.RECIPE))
        assert recipe.bench.devices == ("pi",) and recipe.export.targets == ("tflite",)
        assert not list((computer.home / ".kdpipe" / "work").iterdir()), "a working folder was left"
        rows = told_by("pick", dataset.path, *OPTIONS, *names, "--p90", "2s", cwd=folder)["networks"]
        assert {row["name"]: row["sessions"] for row in rows}["resnet8-16"] >= 2
        assert len(sessions(folder)) == len(before) + len(made)
    finally:
        computer.close()
