"""A new user's way from a folder of pictures and a .pth to a report, every stage for real: minutes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import kdpipe_process
from safetensors.torch import load_file
from test_start import CLASSES, write_signs

from kdpipe.core.errors import ExitCode

pytestmark = pytest.mark.lab
MOST_COMMANDS = 3
# How often and how long is measured is tried elsewhere: the demo does as much as a new user's first look.
SHORT = {"rounds": 2, "seconds": 0.1, "max_seconds": 0.1, "min_samples": 40, "warm_up_seconds": 0.1, "cold_starts": 1}


@pytest.fixture
def road(tmp_path: Path) -> Path:
    """Signs by part and class, and a teacher that somebody trained on them elsewhere."""
    write_signs(tmp_path / "signs", {"train": 30, "test": 15})
    elsewhere = tmp_path / "elsewhere"
    training = ["--train.epochs", 8, "--train.workers", 0, "--train.augment.crop", "pad", "--train.augment.flip", 0]
    data = kdpipe_process("data", tmp_path / "signs", "--test-split", "test", "--artifacts", elsewhere)
    assert data.returncode == 0, data.stderr
    folder = data.stdout.strip().splitlines()[-1]
    taught = kdpipe_process("teacher", folder, "--model", "resnet18", "--input.size", 32, *training)
    assert taught.returncode == 0, taught.stderr
    weights = Path(taught.stdout.strip().splitlines()[-1]) / "model.safetensors"
    torch.save({"epoch": 8, "state_dict": load_file(weights)}, tmp_path / "best.pth")
    return tmp_path


def test_from_a_folder_and_a_pth_to_a_report(road: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two commands, no line of YAML by hand; then what lies there can be told, and nothing is left to be done."""
    monkeypatch.chdir(road)
    short = [word for name, value in SHORT.items() for word in ("--set", f"bench.{name}={value}")]
    typed = [["init", "signs", "--checkpoint", "best.pth", "--yes"], ["run", "signs.yaml", *short]]
    assert len(typed) <= MOST_COMMANDS
    for words in typed:
        done = kdpipe_process(*words)
        assert done.returncode in (ExitCode.DONE, ExitCode.UNTRUSTED), done.stderr
    page = Path(re.findall(r"^report: (.*)$", done.stdout, re.MULTILINE)[0])
    assert page.stat().st_size > 100_000 and "resnet10t" in (page.parent / "report.json").read_text()
    [teacher] = (road / "artifacts").glob("teacher-*")
    facts = json.loads((teacher / "manifest.json").read_text())["facts"]
    assert facts["classes"] == len(CLASSES) and facts["test_accuracy"] > 0.5, "chance is 0.25"
    places = re.findall(r"^ *(\d+)/(\d+) ", done.stderr, re.MULTILINE)
    assert [int(at) for at, _ in places] == list(range(1, len(places) + 1))
    assert len(places) <= int(places[-1][1]) <= len(places) + 4, "but for variants that were refused"
    assert "0 done now" in kdpipe_process("run", "signs.yaml", *short).stdout
    plan = json.loads(kdpipe_process("run", "signs.yaml", *short, "--dry-run", "--json").stdout)
    assert all(leg["sealed"] for leg in plan["legs"])
    assert kdpipe_process("show", page.parent).returncode == kdpipe_process("list").returncode == 0
