"""Several processes of torchrun train by what remembers, goes in phases or has batch statistics of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from test_ranks import torchrun, torchrun_command, vit  # noqa: F401 (the fixture)

from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset

pytestmark = pytest.mark.lab

RUNS = {
    "crd": ["--crd.negatives", "64", "--crd.width", "16"],
    "hint": [
        "--hint.two-stages",
        "0.4",
        "--hint.logits",
        "true",
        "--hint.normalize",
        "true",
        "--hint.stages",
        "[1, -1]",
    ],
}


@pytest.mark.parametrize("method", RUNS)
def test_killed_ranks_go_on(vit: tuple[Dataset, Checkpoint], tmp_path: Path, method: str) -> None:  # noqa: F811
    """Every process killed in the middle: the same command ends with the weights of an unhurried one."""
    dataset, teacher = vit
    options = f"--method {method} --model resnet8 --input.size 32 --label-fraction 0.1 --train.epochs 4"
    options += " --train.batch-size 32 --train.workers 0 --train.checkpoint-seconds 0"
    arguments = ["distill", teacher.path, "--data", dataset.path, *options.split(), *RUNS[method]]
    done = torchrun(*arguments, "--out", tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "killed"
    killed = subprocess.Popen(torchrun_command(*arguments, "--out", out))
    state, begun = tmp_path / "killed.part" / "resume" / "state.pt", time.monotonic()
    while not state.is_file() and time.monotonic() - begun < 900:
        time.sleep(0.02)
    ranks = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    for pid in (killed.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert state.is_file() and not out.exists()
    assert torchrun(*arguments, "--out", out).returncode == 0
    whole, again = (Checkpoint.open(path) for path in (tmp_path / "whole", out))
    assert whole.file("model.safetensors").read_bytes() == again.file("model.safetensors").read_bytes()
    assert all(np.isfinite(tensor).all() for tensor in load_file(again.file("model.safetensors")).values())
    rows = [json.loads(line) for line in again.file("history.jsonl").read_text().splitlines()]
    assert rows[-1]["phase"] == "all" and rows[0]["phase"] == ("hint" if method == "hint" else "all")
