"""Several processes of torchrun train a network that draws masks as one would have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import train
from safetensors.numpy import load_file
from test_pixels import FPN, INPUT, Scenes, configuration, scenes  # noqa: F401 (the fixture)
from test_ranks import torchrun

from kdpipe.core.kinds import Checkpoint

pytestmark = pytest.mark.lab

ENCODER = "test_nfnet"  # nothing of a network without BatchNorm looks at the whole batch


@pytest.mark.parametrize("method", ["kd", "cwd"])
def test_two_processes_as_one(scenes: Scenes, tmp_path: Path, method: str) -> None:  # noqa: F811
    """Every loss is a mean over places of images: each process has its share, whatever of it is unknown.

    One step of all images: this decoder norms every channel by itself, and a last digit grows tenfold with each step.
    """
    sgd = {"epochs": 1, "batch_size": 40, "optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 1e-4}
    alone = train(
        configuration(method=method, encoder=ENCODER, train=sgd), scenes.dataset, scenes.teacher, tmp_path / "alone"
    )
    options = {
        "method": method,
        "model": FPN["model"],
        "encoder": ENCODER,
        "model-args": json.dumps(FPN["model_args"]),
        **{f"input.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in INPUT.items()},
        **{f"train.{key}": value for key, value in sgd.items()},
        "train.workers": 0,
        "train.warmup-epochs": 0,
        "train.augment.crop": "none",
        "train.augment.flip": 0,
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", value)]
    out = tmp_path / "two"
    done = torchrun("distill", scenes.teacher.path, "--data", scenes.dataset.path, "--out", out, *flags)
    assert done.returncode == 0, done.stderr
    together = Checkpoint.open(out)
    assert together.key == alone.key
    mine, its = load_file(together.file("model.safetensors")), load_file(alone.file("model.safetensors"))
    apart = max(abs(mine[key] - its[key]).max() for key in its)
    start = train(
        configuration(method="labels", label_weight=0, encoder=ENCODER, train=sgd),
        scenes.dataset,
        None,
        tmp_path / "start",
    )
    before = load_file(start.file("model.safetensors"))
    moved = max(abs(its[key] - before[key]).max() for key in its)
    assert apart < 1e-3 * moved, (apart, moved)
