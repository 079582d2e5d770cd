"""Several processes of torchrun train what one would have trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_TRAIN, assert_one_line, kdpipe_process, train
from safetensors.numpy import load_file

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, TrainConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.data.views import EpochBatches

RUNS: dict[str, dict[str, Any]] = {
    "kd": {"method": "kd"},
    # Phases, each wrapped anew, with averaging; its teacher is of the same family, so that no adapter has a BatchNorm.
    "stagewise": {"method": "stagewise", "stagewise": {"epochs": 1}, "train": {"average": 0.9}},
    "masked": {"method": "masked"},
}


def torchrun_command(*arguments: object) -> list[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kdpipe"]
    return [*command, *map(str, arguments)]


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(torchrun_command(*arguments), capture_output=True, text=True, timeout=1800, check=False)


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Checkpoint]:
    """The digits and a teacher without BatchNorm."""
    values = {"model": "test_vit", "input": {"size": 32}, "method": "labels", "train": {**SMALL_TRAIN, "epochs": 2}}
    chain = Chain(tmp_path_factory.mktemp("vit") / "artifacts")
    dataset = chain.data(DataPlan(source="digits", test_split=None))
    return dataset, chain.train("teacher", validated(TrainConfig, values, "test"), dataset, None)


SGD = {"epochs": 3, "batch_size": 32, "optimizer": "sgd", "learning_rate": 0.02, "weight_decay": 1e-4}


def distil(vit: tuple[Dataset, Checkpoint], name: str) -> list[object]:
    """The command of one of ``RUNS``, without where it writes."""
    (dataset, teacher), change = vit, RUNS[name]
    options = {
        "method": change["method"],
        "model": "test_vit",
        "input.size": 32,
        "label-fraction": 0.1,
        **{f"train.{key}": value for key, value in SGD.items()},
        "train.workers": 0,
        "train.validate-every": 4,
        "train.augment.crop": "pad",
        "train.augment.flip": 0,
    }
    options |= {
        f"{section}.{key}": value
        for section in ("stagewise", "train")
        for key, value in change.get(section, {}).items()
    }
    flags = [text for key, value in options.items() for text in (f"--{key}", value)]
    return ["distill", teacher.path, "--data", dataset.path, *flags]


@pytest.fixture(scope="module")
def by_two(vit: tuple[Dataset, Checkpoint], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """What two processes make of one of ``RUNS``: each is made when first asked for."""
    folder = tmp_path_factory.mktemp("two")

    def made(name: str) -> Checkpoint:
        out = folder / name
        if not out.exists():
            done = torchrun(*distil(vit, name), "--out", out)
            assert done.returncode == 0, done.stderr
            assert done.stdout.splitlines() == [str(out)], "one process speaks"
        return Checkpoint.open(out)

    return made


IN_LAB = ("masked",)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.lab] * (name in IN_LAB)) for name in RUNS])
def test_two_processes_as_one(
    vit: tuple[Dataset, Checkpoint], by_two: Callable[[str], Checkpoint], tmp_path: Path, name: str
) -> None:
    (dataset, teacher), change = vit, RUNS[name]
    values = {"model": "test_vit", "input": {"size": 32}, "label_fraction": 0.1, **change}
    values["train"] = {**SMALL_TRAIN, **SGD, **change.get("train", {})}
    alone = train(validated(TrainConfig, values, "test"), dataset, teacher, tmp_path / "alone")
    assert alone.facts.training_images % 32 % 2 == 1, "wanted a last batch that does not halve"
    together = by_two(name)
    assert together.key == alone.key
    mine, its = load_file(together.file("model.safetensors")), load_file(alone.file("model.safetensors"))
    worst = max(abs(mine[key] - its[key]).max() for key in its)
    assert worst < 1e-5
    rows = [
        [json.loads(line) for line in run.file("history.jsonl").read_text().splitlines()] for run in (together, alone)
    ]
    for row, expected in zip(*rows, strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert row.get("train_accuracy") == pytest.approx(expected.get("train_accuracy"), abs=0.02)


def test_killed_ranks_go_on(
    vit: tuple[Dataset, Checkpoint], by_two: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """Every process killed in the middle of the run: the same command ends with the weights of an unhurried one."""
    whole = by_two("kd")
    arguments, out = [*distil(vit, "kd"), "--train.checkpoint-seconds", 0], tmp_path / "killed"
    killed = subprocess.Popen(torchrun_command(*arguments, "--out", out))
    state, begun = tmp_path / "killed.part" / "resume" / "state.pt", time.monotonic()
    while not state.is_file() and time.monotonic() - begun < 900:
        time.sleep(0.02)
    ranks = Path(f"/proc/{killed.pid}/task/{killed.pid}/children").read_text().split()
    assert len(ranks) == 2
    for pid in (killed.pid, *map(int, ranks)):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert state.is_file() and not out.exists()
    done = torchrun(*arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    weights = [made.file("model.safetensors").read_bytes() for made in (whole, Checkpoint.open(out))]
    assert weights[0] == weights[1]


def test_processes_part_each_batch() -> None:
    whole = list(EpochBatches(range(45), 16, seed=3))
    parts = [list(EpochBatches(range(45), 16, seed=3, rank=rank, ranks=3)) for rank in range(3)]
    assert len(whole) == 3 and len({len(part) for part in parts}) == 1
    for batch, *shares in zip(whole, *parts, strict=True):
        assert sorted(batch) == sorted(view for share in shares for view in share)
        assert min(map(len, shares)) >= 2


def test_repeats_are_views_of_the_same_image_side_by_side() -> None:
    batches = EpochBatches(range(30), 10, seed=0, repeats=3)
    batches.epoch = 2
    views = [view for batch in batches for view in batch]
    assert len(views) == 30 and len(set(views)) == 30
    assert {index for _, index in views[:3]} == {views[0][1]}
    assert [number for number, _ in views[:3]] == [6, 7, 8]


def test_torchrun_is_for_training(vit: tuple[Dataset, Checkpoint]) -> None:
    done = kdpipe_process("export", vit[1].path, WORLD_SIZE="2", RANK="0")
    assert_one_line(done, 2, "torchrun is for training")


def test_too_small_a_batch_for_so_many() -> None:
    with pytest.raises(UserError, match="at least two images for each of 4 processes"):
        EpochBatches(range(100), 6, seed=0, ranks=4)
