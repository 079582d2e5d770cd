"""Killed at any moment and started again, a run ends with exactly the weights of an uninterrupted one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import time
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_TRAIN, Trained, train

from kdpipe.core.config import TrainConfig, validated
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.distill import loop

# What training imports, once for all the processes that are killed.
LIBRARIES = ["torch", "torchvision", "timm", "kdpipe.distill.train", "kdpipe.networks.models"]


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Makes processes that have imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def train_telling(config: TrainConfig, dataset: Path, teacher: Path, out: Path, told: Connection) -> None:
    """In a process of its own: train, and say where it is; that changes nothing."""
    step = loop.Run._learn

    def telling(self: loop.Run, *arguments: Any) -> Any:
        told.send("step")
        return step(self, *arguments)

    loop.Run._learn = telling  # type: ignore[method-assign]
    often = config.train.model_copy(update={"checkpoint_seconds": 0.0, "workers": 0})
    config = config.model_copy(update={"train": often})
    train(config, Dataset.open(dataset), Checkpoint.open(teacher), out)


# Dropout, averaging, mixing, phases that end within an epoch: everything that has a state.
RUNS = {
    "kd": {"method": "kd", "model_args": {"drop_rate": 0.3}, "train": {"average": 0.9, "mixup": 0.2, "select": "best"}},
    "stagewise": {"method": "stagewise", "stagewise": {"handover": "best"}},
    "shuffled": {
        "method": "dkd",
        "shuffled_teacher": True,
        "train": {"optimizer": "sgd", "schedule": "multistep", "milestones": [2]},
    },
}


@pytest.mark.parametrize("attempt", range(int(os.environ.get("KDPIPE_RESUME_ATTEMPTS", "1"))))  # more by hand
@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_end_the_same(
    trained: Trained, processes: ForkServerContext, tmp_path: Path, name: str, attempt: int
) -> None:
    change = RUNS[name]
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.25, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 3, "batch_size": 32, **change.get("train", {})}
    config = validated(TrainConfig, values, "test")
    whole = train(config, trained.dataset, trained.teacher, tmp_path / "whole")

    out = tmp_path / "killed"

    def begin() -> tuple[multiprocessing.context.ForkServerProcess, Connection]:
        told, telling = processes.Pipe(duplex=False)
        arguments = (config, trained.dataset.path, trained.teacher.path, out, telling)
        process = processes.Process(target=train_telling, args=arguments)
        process.start()
        telling.close()
        return process, told

    moments = random.Random(f"{name} {attempt}")
    kills = 0
    for _ in range(2):
        process, told = begin()
        steps = moments.randint(2, 9)
        with contextlib.suppress(EOFError):  # it is done already
            for _ in range(steps):
                told.recv()
            kills += 1
        time.sleep(moments.random() * 0.05)  # anywhere in a step, or in the writing of the state
        process.kill()
        process.join()
        if out.exists():
            break
        assert (tmp_path / "killed.part" / "resume" / "state.pt").is_file()
    assert kills >= 1
    process, _told = begin()
    process.join()
    assert process.exitcode == 0
    assert (out / "model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()
    assert not (tmp_path / "killed.part").exists()
    assert not (out / "resume").exists()


def test_another_configuration_does_not_resume(trained: Trained, tmp_path: Path) -> None:
    """The state of one key is never taken for another's, even in the same folder."""
    values = {
        "model": "test_resnet",
        "input": {"size": 32},
        "label_fraction": 0.05,
        "method": "labels",
        "train": {**SMALL_TRAIN, "epochs": 1},
    }
    part = tmp_path / "out.part" / "resume"
    part.mkdir(parents=True)
    (part / "key").write_text("another")
    (part / "state.pt").write_bytes(b"not even a state")
    made_now = train(validated(TrainConfig, values, "test"), trained.dataset, None, tmp_path / "out")
    assert made_now.facts.epochs == 1
