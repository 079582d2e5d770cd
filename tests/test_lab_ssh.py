"""Devices behind a real sshd: an unprivileged user, a jump host, a link that breaks, and faults on the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made
from lab import Computer, Sshd, serve

from kdpipe.core.config import DeviceSettings, MeasureSettings
from kdpipe.devices import find_device, opened
from kdpipe.devices.ssh import SshDevice

pytestmark = pytest.mark.lab

SHORT = MeasureSettings(seconds=0.1, min_samples=20, images=8, warm_up_seconds=0.1)


def device_of(sshd: Sshd, **settings: Any) -> SshDevice:
    given = {"address": "device", "ssh_config": str(sshd.config), "python": sshd.computer.python(), **settings}
    return SshDevice(DeviceSettings(name="pi", kind="ssh", **given))


@pytest.fixture(scope="module")
def computer() -> Iterator[Computer]:
    made = Computer()
    yield made
    made.close()


@pytest.fixture(scope="module")
def without_rsync() -> Iterator[Computer]:
    made = Computer()
    made.hide("rsync")
    yield made
    made.close()


@pytest.fixture
def sshd(computer: Computer) -> Iterator[Sshd]:
    started = serve(computer)
    yield started
    started.stop()


@pytest.fixture
def images(made: Made, tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    np.save(tmp_path / "images.npy", generator.integers(0, 256, (40, 32, 32, 3), np.uint8))
    return tmp_path / "images.npy"


# ---- the whole path -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["direct", "jump host"])
@pytest.mark.parametrize("files", ["rsync", "sftp"])
def test_a_bundle_runs_behind_an_sshd_as_it_does_here(
    request: pytest.FixtureRequest, made: Made, images: Path, tmp_path: Path, through: str, files: str
) -> None:
    computer: Computer = request.getfixturevalue("computer" if files == "rsync" else "without_rsync")
    sshd = serve(computer, jump=serve(computer) if through == "jump host" else None)
    device, here = device_of(sshd), find_device("local")
    bundle = made.bundles["onnxruntime-int8"]
    probe = device.probe()
    assert probe.machine and "onnxruntime" in probe.runtimes and device.runs("onnxruntime")
    assert device._has_rsync == (files == "rsync")
    outputs = {}
    for name, each in (("there", device), ("here", here)):
        (tmp_path / name).mkdir()
        with opened(each, tmp_path / name):
            each.push(bundle.path, "bundle")
            each.push(images, "images.npy")
            answer = each.predict("bundle", "images.npy", tmp_path / name / "outputs.npy", 120)
            assert answer.images == 40
            assert each.measure("bundle", "images.npy", SHORT, 120).latency_ns
        outputs[name] = np.load(tmp_path / name / "outputs.npy")
    np.testing.assert_array_equal(outputs["there"], outputs["here"])
    assert not list((computer.home / ".kdpipe" / "work").iterdir()), "a working folder was left"
    owner = (computer.home / ".kdpipe" / "store").stat().st_uid
    assert owner == (computer.home).stat().st_uid != 0
    if through == "jump host":
        jumped = sshd.folder / "log"
        assert "Accepted publickey" in jumped.read_text() and "ProxyJump" in sshd.config.read_text()
    computer.run("pkill -x sshd", check=False)
