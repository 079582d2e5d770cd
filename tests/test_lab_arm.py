"""A 64-bit ARM board behind its own sshd, emulated: what it lacks is brought, and it computes what this host does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import arm64
import numpy as np
import pytest
import yaml
from conftest import Made, assert_one_line, kdpipe

from kdpipe.core.kinds import Bundle
from kdpipe.devices import Device, bootstrap, find_device, opened
from kdpipe.devices.ssh import SshDevice

pytestmark = pytest.mark.lab

TARGETS = ("onnxruntime", "tflite")
STATIC = [(target, variant) for target in TARGETS for variant in ("float32", "int8")]


@pytest.fixture(scope="module")
def board() -> Iterator[arm64.Board]:
    with arm64.board() as made:
        yield made


@pytest.fixture(scope="module")
def project(board: arm64.Board, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in whose devices.yaml the board stands as ``pi``."""
    folder = tmp_path_factory.mktemp("project")
    described = {"kind": "ssh", "address": "board", "ssh_config": str(board.config)}
    (folder / "devices.yaml").write_text(yaml.safe_dump({"pi": described}))
    return folder


@pytest.fixture(scope="module")
def brought(board: arm64.Board, project: Path) -> dict[str, object]:
    """What was brought to the board, after it was seen that it lacks it."""
    assert_one_line(kdpipe("devices", "probe", "pi", cwd=project), 2, "no numpy", "kdpipe devices prepare pi")
    before = board.changes()
    done = kdpipe("devices", "prepare", "pi", *(f"--runtime={target}" for target in TARGETS), "--json", cwd=project)
    assert done.returncode == 0, done.stderr
    assert board.changes() == before  # nothing beyond its own folder: no root, nothing of the system's
    said: dict[str, object] = json.loads(done.stdout)
    return said


@pytest.fixture
def pi(brought: dict[str, object], project: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    monkeypatch.chdir(project)
    return find_device("pi")


def test_what_a_device_lacks_is_brought_from_here(
    brought: dict[str, object], pi: SshDevice, project: Path, tmp_path: Path
) -> None:
    """Wheels of its architecture and Python, by content, found again on this host; used from then on."""
    names = [part["name"] for part in brought["packages"]]
    for distribution in ("numpy", "onnxruntime", "ai_edge_litert"):
        assert any(name.startswith(distribution) and "cp311" in name and "aarch64" in name for name in names)
    assert brought["python"].endswith("/.kdpipe/python/python3")
    found = pi.probe()
    assert found.machine == "aarch64" and set(TARGETS) <= set(found.targets)
    assert found.emulated and pi.emulated  # as the device itself found out
    again = kdpipe("devices", "prepare", "pi", *(f"--runtime={target}" for target in TARGETS), cwd=project)
    assert again.returncode == 0 and "taken from" in again.stderr
    assert brought["digest"] in pi.shell(f"ls {pi.root}/python/store")
