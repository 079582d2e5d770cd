"""Killed at any moment and started again, a run ends with exactly the weights of an uninterrupted one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import SMALL_TRAIN, Trained, train

from kdpipe.core.config import TrainConfig, validated

SCRIPT = """
import sys
from pathlib import Path
from kdpipe.chain import train_order
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.config import TrainConfig
from kdpipe.data.dataset import Dataset
from kdpipe.distill.train import train
import kdpipe.distill.loop as loop
step = loop.Run._learn
def told(self, *arguments):
    print("step", flush=True)
    return step(self, *arguments)
loop.Run._learn = told  # says where it is; changes nothing
config = TrainConfig.model_validate_json(sys.argv[1])
config = config.model_copy(update={"train": config.train.model_copy(update={"checkpoint_seconds": 0.0, "workers": 0})})
dataset, teacher = Dataset.open(sys.argv[2]), Checkpoint.open(sys.argv[3])
train(train_order(config, dataset, teacher), dataset, teacher, Path(sys.argv[4]))
"""

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
def test_killed_runs_end_the_same(trained: Trained, tmp_path: Path, name: str, attempt: int) -> None:
    change = RUNS[name]
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.25, **change}
    values["train"] = {**SMALL_TRAIN, "epochs": 3, "batch_size": 32, **change.get("train", {})}
    config = validated(TrainConfig, values, "test")
    whole = train(config, trained.dataset, trained.teacher, tmp_path / "whole")

    out = tmp_path / "killed"
    arguments = [
        sys.executable,
        "-c",
        SCRIPT,
        config.model_dump_json(),
        trained.dataset.path,
        trained.teacher.path,
        out,
    ]
    moments = random.Random(f"{name} {attempt}")
    kills = 0
    for _ in range(2):
        process = subprocess.Popen([str(argument) for argument in arguments], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        steps = moments.randint(2, 9)
        seen = sum(1 for line, _ in zip(process.stdout, range(steps), strict=False) if line == "step\n")
        time.sleep(moments.random() * 0.05)  # anywhere in a step, or in the writing of the state
        process.kill()
        process.wait()
        kills += seen == steps
        if out.exists():
            break
        assert (tmp_path / "killed.part" / "resume" / "state.pt").is_file()
    assert kills >= 1
    subprocess.run([str(argument) for argument in arguments], check=True, stdout=subprocess.DEVNULL)
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
