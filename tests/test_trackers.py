"""Curves where people watch them: read back by each tool's own reader."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SMALL_TRAIN, Trained, train, train_together

from kdpipe.core.config import TrainConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint


def configuration(tracker: str, seed: int = 0, **train: object) -> TrainConfig:
    values = {"model": "test_resnet", "input": {"size": 32}, "label_fraction": 0.05, "seed": seed, "tracker": tracker}
    return validated(
        TrainConfig, {**values, "train": {**SMALL_TRAIN, "epochs": 3, "validate_every": 1, **train}}, "test"
    )


def losses(checkpoint: Checkpoint) -> list[float]:
    return [json.loads(line)["loss"] for line in checkpoint.file("history.jsonl").read_text().splitlines()]


def test_tensorboard(trained: Trained, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    configs = {
        tmp_path / name: configuration("tensorboard", learning_rate=rate) for name, rate in (("a", 1e-3), ("b", 2e-3))
    }
    for out, checkpoint in train_together(configs, trained.dataset, trained.teacher).items():
        events = EventAccumulator(str(tmp_path / "curves" / out.name))
        events.Reload()
        assert {"loss", "train_accuracy", "validation_accuracy", "images_per_second"} <= set(events.Tags()["scalars"])
        assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses(checkpoint))
        assert [event.step for event in events.Scalars("loss")] == [1, 2, 3]


def test_mlflow(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    checkpoint = train(configuration("mlflow"), trained.dataset, trained.teacher, tmp_path / "student")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("kdpipe")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "student" and run.info.status == "FINISHED"
    assert run.data.params["train.epochs"] == "3"
    found = client.get_metric_history(run.info.run_id, "loss")
    assert [metric.value for metric in found] == pytest.approx(losses(checkpoint))


# As ``python -m kdpipe`` does, to its end: then whether timm took wandb along.
COMMAND = """
import runpy, sys
sys.argv[:1] = ["kdpipe"]
try:
    runpy.run_module("kdpipe", run_name="__main__")
finally:
    print("timm" in sys.modules, "wandb" in sys.modules)
"""
OWN = """
import wandb  # as a training script does
from torch import nn

def small(num_classes):
    assert wandb.init
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes))
"""


@pytest.mark.parametrize("asks", ["nobody", "a tracker", "a network of one's own"])
def test_a_command_takes_wandb_along_if_somebody_asks_for_it(trained: Trained, tmp_path: Path, asks: str) -> None:
    (tmp_path / "own.py").write_text(OWN)
    words = ["distill", str(trained.dataset.path), "--method", "labels", "--out", str(tmp_path / "student")]
    words += ["--input.size", "32", "--train.epochs", "1", "--train.workers", "0"]
    words += {
        "nobody": ["--model", "test_resnet"],
        "a tracker": ["--model", "test_resnet", "--tracker", "wandb"],
        "a network of one's own": ["--model", "own:small", "--allow-code", "own:small"],
    }[asks]
    offline = {**os.environ, "WANDB_MODE": "offline"}
    done = subprocess.run(
        [sys.executable, "-c", COMMAND, *words], cwd=tmp_path, env=offline, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"True {asks != 'nobody'}"
    logs = list((tmp_path / "curves" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(logs) == (asks == "a tracker")


def test_wandb(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    train(configuration("wandb"), trained.dataset, trained.teacher, tmp_path / "student")
    [log] = (tmp_path / "curves" / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"validation_accuracy" in log.read_bytes()


def test_a_tracker_changes_no_key_and_no_weights(trained: Trained, tmp_path: Path) -> None:
    plain = train(configuration("none"), trained.dataset, trained.teacher, tmp_path / "plain")
    shown = train(configuration("tensorboard"), trained.dataset, trained.teacher, tmp_path / "shown")
    assert plain.key == shown.key
    assert plain.file("model.safetensors").read_bytes() == shown.file("model.safetensors").read_bytes()


def test_a_tracker_that_cannot_start(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
    with pytest.raises(UserError, match="tracker 'mlflow' does not start"):
        train(configuration("mlflow"), trained.dataset, trained.teacher, tmp_path / "student")
