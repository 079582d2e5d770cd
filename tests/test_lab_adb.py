"""A phone behind Google's adb client, as far as it can be had: a small daemon of the lab's own, and arm64 programs.

They run in a sandbox with nothing of Debian's: no C library, no Python, a few commands. It is no Android, and no phone.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import arm64
import numpy as np
import pytest
import yaml
from conftest import Made, assert_one_line, command, kdpipe
from lab import free_port, wait_until

from kdpipe.core.config import MeasureSettings
from kdpipe.core.errors import DeviceLost
from kdpipe.devices import find_device, opened
from kdpipe.devices.adb import AdbDevice

pytestmark = pytest.mark.lab

SHORT = MeasureSettings(seconds=0.1, max_seconds=0.1, min_samples=4, images=2, warm_up_seconds=0)


@pytest.fixture(scope="module")
def phone() -> Iterator[arm64.Phone]:
    with arm64.phone() as made:
        yield made


@pytest.fixture
def project(phone: arm64.Phone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a user with that phone in devices.yaml, with the variables of the client that the phone trusts."""
    described = {"kind": "adb", "address": phone.address, "folder": f"{phone.storage}/kdpipe"}
    (tmp_path / "devices.yaml").write_text(yaml.safe_dump({"pixel": described}))
    for name in ("ANDROID_ADB_SERVER_PORT", "HOME"):
        monkeypatch.setenv(name, phone.environment[name])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Of what is fetched, once for all tests."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield Path(str(patched))


@pytest.fixture
def pixel(phone: arm64.Phone, project: Path, cache: Path) -> AdbDevice:
    """The phone with what was prepared for it."""
    found = find_device("pixel")
    assert isinstance(found, AdbDevice)
    if not (phone.storage / "kdpipe/python/python3").exists():
        done = kdpipe("devices", "prepare", "pixel")
        assert done.returncode == 0, done.stderr
    return found


def test_the_folder_says_of_what_it_is_made(project: Path, cache: Path) -> None:
    """Without any phone: the loader, libc and Python of Debian, wheels for arm64, sizes and hashes; kept."""
    done = kdpipe("devices", "prepare", "phone", "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    names = {part["name"].partition("_")[0].partition("-")[0] for part in said["packages"]}
    assert {"libc6", "python3.11", "libstdc++6", "numpy", "onnxruntime"} <= names
    assert all(len(part["sha256"]) == 64 and part["size_bytes"] > 0 for part in said["packages"])
    folder = Path(said["folder"])
    assert (folder / "lib/ld-linux-aarch64.so.1").exists()
    assert not [path for path in folder.rglob("*") if path.is_symlink()]
    assert said["size_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    again = kdpipe("devices", "prepare", "phone", "--json")
    assert json.loads(again.stdout) == said and "taken from" in again.stderr


def test_a_phone_without_python_says_what_to_do(project: Path) -> None:
    assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "'pixel' has no Python", "kdpipe devices prepare pixel")


def test_a_full_phone_is_one_line(phone: arm64.Phone, project: Path, cache: Path) -> None:
    described = {"full": {"kind": "adb", "address": phone.address, "folder": f"{phone.storage}/small/kdpipe"}}
    (project / "devices.yaml").write_text(yaml.safe_dump(described))
    assert_one_line(kdpipe("devices", "prepare", "full"), 2, "no space on 'full'", "are free")
    full = find_device("full")
    assert isinstance(full, AdbDevice) and full.shell(f"ls {full.root}/python/store") == ""


def test_a_cut_push_goes_on(phone: arm64.Phone, project: Path, cache: Path) -> None:
    """Power lost in the middle of it: one line; the next attempt sends what is missing, and what runs is whole."""
    process = subprocess.Popen(command("devices", "prepare", "pixel"), stderr=subprocess.PIPE, text=True)

    def sizes() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in phone.storage.rglob("*") if path.is_file()}

    wait_until(lambda: len(sizes()) > 300, 120, "a push under way")
    phone.stop()
    _, said = process.communicate(timeout=1800)
    assert process.returncode == 2 and "Traceback" not in said
    assert "'pixel' cannot be reached" in said.strip().splitlines()[-1]
    before = sizes()
    phone.start()
    done = kdpipe("devices", "prepare", "pixel")
    assert done.returncode == 0, done.stderr
    kept = [path for path in before if ".part" in str(path)]
    there = {str(path).replace(".part", ""): mark for path, mark in before.items() if path in kept}
    after = {str(path): mark for path, mark in sizes().items()}
    same = [name for name, mark in there.items() if after[name] == mark]
    assert len(same) >= len(there) - 1 > 200  # all but the one that was cut


@pytest.mark.parametrize("variant", ["float32", "int8"])
def test_a_phone_computes_what_this_host_does(made: Made, pixel: AdbDevice, variant: str, tmp_path: Path) -> None:
    """Predict, measure and replay what was deployed, by the Python that was brought."""
    bundle = made.bundles[f"onnxruntime-{variant}"]
    found = pixel.probe()
    assert found.machine == "aarch64" and found.emulated and found.screen == "unavailable"
    images = np.random.default_rng(0).integers(0, 256, (8, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    outputs = {}
    for name, device in (("here", find_device("local")), ("there", pixel)):
        (tmp_path / name).mkdir()
        with opened(device, tmp_path / name):
            device.push(bundle.path, "bundle")
            device.push(tmp_path / "images.npy", "images")
            device.predict("bundle", "images", tmp_path / f"{name}.npy", 300)
            samples = device.measure("bundle", "images", SHORT, 300)
            assert len(samples.latency_ns) >= SHORT.min_samples
        outputs[name] = np.load(tmp_path / f"{name}.npy")
    arm64.assert_same_outputs(outputs["here"], outputs["there"], variant)
    deployed = kdpipe("deploy", bundle.path, "--device", "pixel")
    assert deployed.returncode == 0, deployed.stderr


def test_what_a_phone_starts_anew_goes_through_the_loader(pixel: AdbDevice, phone: arm64.Phone) -> None:
    """Its Python cannot start by itself there, so a child that runs was started through the loader."""
    assert "rror" in pixel.shell(f"{phone.storage}/kdpipe/python/store/*/bin/python3.11 -V || echo error")
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import numpy; print(numpy.pi)'], check=True)"
    assert pixel.shell(f'{pixel.python} -c "{code}"') == str(np.pi)


def test_what_goes_wrong_with_a_phone_is_one_line(
    phone: arm64.Phone, pixel: AdbDevice, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing there; another key; gone in the middle of a command, whose exit code adb then calls 0; no adb."""
    described = {"nothing": {"kind": "adb", "address": f"127.0.0.1:{free_port()}"}, "only": {"kind": "adb"}}
    described["unplugged"] = {"kind": "adb", "address": "R58M12ABCDE"}
    described["pixel"] = yaml.safe_load((project / "devices.yaml").read_text())["pixel"]
    (project / "devices.yaml").write_text(yaml.safe_dump(described))
    assert_one_line(kdpipe("devices", "probe", "nothing"), 2, "'nothing' cannot be reached", "Connection refused")
    assert_one_line(kdpipe("devices", "probe", "unplugged"), 2, "'R58M12ABCDE' not found", "plug it in")
    only = find_device("only")
    assert isinstance(only, AdbDevice) and only.shell("echo it") == "it"
    with pytest.raises(DeviceLost, match="went away in the middle"):
        pixel.shell("kill -9 -1; sleep 20")
    phone.stop()
    assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "'pixel' cannot be reached")
    phone.start()
    assert pixel.shell("echo back") == "back"

    stranger = tmp_path / "stranger"
    (stranger / ".android").mkdir(parents=True)
    subprocess.run(["adb", "keygen", stranger / ".android/adbkey"], capture_output=True, check=True)
    port = str(free_port())
    monkeypatch.setenv("HOME", str(stranger))
    monkeypatch.setenv("ANDROID_ADB_SERVER_PORT", port)
    try:
        assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "confirm this machine's key on its screen")
        assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "confirm this machine's key on its screen")
    finally:
        subprocess.run(["adb", "kill-server"], capture_output=True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "no 'adb' on this machine", "apt-get install adb")


def test_cleaning_takes_the_whole_python_away(phone: arm64.Phone, pixel: AdbDevice) -> None:
    done = kdpipe("devices", "clean", "pixel", "--everything")
    assert done.returncode == 0, done.stderr
    left = [path for path in (phone.storage / "kdpipe").rglob("*") if path.is_file() and path.stat().st_size]
    assert sum(path.stat().st_size for path in left) < 100_000, left
    assert_one_line(kdpipe("devices", "probe", "pixel"), 2, "'pixel' has no Python")
