"""Studies as people run them: killed and gone on with, by several processes at once, on masks, with INT8."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import command, kdpipe_process
from lab import free_port

from kdpipe import study
from kdpipe.chain import Chain
from kdpipe.core.artifact import MANIFEST
from kdpipe.core.config import DataPlan, StudyPlan, TeacherPlan, validated
from kdpipe.core.kinds import Study

pytestmark = pytest.mark.lab

TRAIN = {"epochs": 2, "batch_size": 32, "workers": 0, "validate_every": 2, "augment": {"crop": "pad", "flip": 0}}
PLAN = {
    "student": {"model": "resnet8", "input": {"size": 16}},
    "fractions": [0.05, 0.1],
    "methods": ["kd", "hint"],
    "temperatures": [4],
    "controls": ["shuffled"],
    "seeds": 2,
    "views": 300,
    "claims": ["kd-T4 > labels at 0.1"],
    "distill": {"train": TRAIN},
}
OPTIONS = [
    *("--student", "resnet8", "--student.input.size", "16", "--fractions", "0.05,0.1", "--methods", "kd,hint"),
    *("--temperatures", "4", "--controls", "shuffled", "--seeds", "2", "--views", "300"),
    *("--claim", "kd-T4 > labels at 0.1", "--distill.train.epochs", "2", "--distill.train.batch-size", "32"),
    *("--distill.train.workers", "0", "--distill.train.augment.crop", "pad", "--distill.train.augment.flip", "0"),
    *("--distill.train.validate-every", "2"),
]


def digits(folder: Path) -> tuple[Path, Path]:
    """A data set and a teacher that has learned a little."""
    chain = Chain(folder)
    dataset = chain.data(DataPlan(source="digits", test_split=None, test_fraction=0.3))
    plan = {"model": "resnet8", "input": {"size": 16}, "train": TRAIN}
    return dataset.path, chain.teacher(validated(TeacherPlan, plan, "test"), dataset).path


def whole(folder: Path) -> list[Path]:
    """The manifests of the runs that are sealed: what was killed while it was sealed is none."""
    return [path for path in folder.glob(f"cell-*/{MANIFEST}") if not path.parent.name.endswith(".part")]


def test_killed_and_shared_by_torchrun_a_study_is_the_same(tmp_path: Path) -> None:
    """Killed in the middle, then ended by two processes: every run once, and as one process alone makes it."""
    folder, alone = tmp_path / "artifacts", tmp_path / "alone"
    dataset, teacher = digits(folder)
    arguments, others = (
        command("study", dataset, teacher, "--artifacts", each, *OPTIONS, "--int8", "none") for each in (folder, alone)
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many threads everywhere: sums round alike
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(whole(folder)) < 3 and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.parent: path.stat().st_mtime_ns for path in whole(folder)}
    assert 3 <= len(before) < 16
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [*launch, *arguments[1:], "--json"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # one process alone speaks
    cells = {path.parent: path.stat().st_mtime_ns for path in whole(folder)}
    assert len(cells) == 4 * 2 * 2
    assert before.items() <= cells.items()
    assert not list(folder.glob("*.part"))
    assert len(list(folder.glob("study-*"))) == 1
    assert told["facts"]["runs"] == 16
    done = subprocess.run([*others, "--json"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert made["key"] == told["key"]
    assert made["numbers"]["rows"] == told["numbers"]["rows"]


def test_int8_of_the_claims_methods_is_on_the_page(tmp_path: Path) -> None:
    dataset, teacher = digits(tmp_path)
    done = kdpipe_process("study", dataset, teacher, "--artifacts", tmp_path, *OPTIONS, "--seeds", "1", "--json")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["numbers"]["rows"]
    made = {(row["method"], row["fraction"]) for row in rows if row["int8"]}
    assert made == {("kd-T4", 0.1), ("labels", 0.1)}
    for row in rows:
        if row["int8"]:
            assert abs(row["int8"]["accuracy"]["value"] - row["accuracy"]["value"]) < 10
            assert 0 <= row["int8"]["calibration_error"] <= 100


def test_a_study_of_masks(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    dataset = chain.data(DataPlan(task="segmentation", source="masks", most_images=24))
    network = {
        "model": "unet",
        "encoder": "test_resnet",
        "model_args": {"decoder_channels": [16, 16, 8, 8, 8]},
        "input": {"size": [32, 48]},
    }
    train = {**TRAIN, "batch_size": 8}
    teacher = chain.teacher(validated(TeacherPlan, {**network, "train": train}, "test"), dataset)
    plan = {**PLAN, "student": network, "fractions": [1.0], "seeds": 1, "views": 48, "distill": {"train": train}}
    plan["claims"] = ["kd-T4 > labels at 1"]
    made = study.run(validated(StudyPlan, plan, "test"), dataset, teacher, chain)
    numbers = made.numbers
    assert numbers["task"]["metric"] == "mIoU"
    assert len(numbers["rows"]) == 4
    assert all(0 <= row["agreement"] <= 100 for row in numbers["rows"] if row["method"] != "labels")
    assert all(row["calibration_error"] is None for row in numbers["rows"])  # class maps say nothing of it
    assert [row for row in numbers["rows"] if row["int8"]]
    assert Study.open(made.path).page.read_text().count("mIoU")
