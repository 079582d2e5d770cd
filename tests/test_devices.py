"""devices.yaml: where it is found, what it may say, and the commands that write it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from conftest import assert_one_line, kdpipe

from kdpipe.core.config import DeviceSettings
from kdpipe.core.errors import UserError
from kdpipe.devices import DEVICES, book, find_device
from kdpipe.devices.ssh import SshDevice


@pytest.fixture
def of_user(workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's own file, which is not there yet; the command runs in an empty folder."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    return tmp_path / "configuration" / "kdpipe" / book.FILE


def test_a_device_is_added_listed_found_and_removed(of_user: Path, workdir: Path) -> None:
    done = kdpipe("devices", "add", "pi5", "ssh", "pi@pi5.local", "--python", "python3.11")
    assert done.returncode == 0 and str(of_user) in done.stdout
    values = {"pi5": {"kind": "ssh", "address": "pi@pi5.local", "python": "python3.11"}}
    assert yaml.safe_load(of_user.read_text()) == values
    listed = json.loads(kdpipe("devices", "list", "--json").stdout)["devices"]
    assert [each["name"] for each in listed] == ["local", "null", "pi5"]
    device = find_device("pi5")
    assert isinstance(device, SshDevice) and device.settings.python == "python3.11"
    assert_one_line(kdpipe("devices", "add", "pi5", "ssh", "pi@other"), 2, "has a 'pi5' already")
    assert kdpipe("devices", "remove", "pi5").returncode == 0
    assert_one_line(kdpipe("devices", "probe", "pi5"), 2, "unknown device 'pi5'", "local")
    assert_one_line(kdpipe("devices", "remove", "pi5"), 2, "unknown device 'pi5'")
    assert_one_line(kdpipe("devices", "remove", "local"), 2, "unknown device 'local'")


def test_the_projects_file_is_the_nearer_one(of_user: Path, workdir: Path) -> None:
    of_user.parent.mkdir(parents=True)
    of_user.write_text("pi5: {kind: ssh, address: far}\norin: {kind: ssh, address: orin}\n")
    (workdir / book.FILE).write_text("# this project's\npi5: {kind: ssh, address: near}\n")
    known = book.known(DEVICES)
    assert known["pi5"].address == "near" and known["orin"].address == "orin"
    kdpipe("devices", "add", "phone", "ssh", "me@phone")
    assert "phone" in yaml.safe_load((workdir / book.FILE).read_text())
    assert "phone" not in of_user.read_text()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- pi5\n", ["wanted a mapping", "list"]),
        ("pi5: ssh\n", ["'pi5'", "wanted a mapping such as {kind: ssh"]),
        ("pi5: {kind: shh, address: pi}\n", ["unknown kind of device of 'pi5' 'shh'", "did you mean 'ssh'"]),
        ("pi5: {kind: ssh}\n", ["'pi5' needs an address"]),
        ("pi5: {kind: ssh, adress: pi}\n", ["unknown key 'adress'", "did you mean 'address'"]),
        ("local: {kind: ssh, address: pi}\n", ["'local' is there by itself"]),
        ("../pi5: {kind: ssh, address: pi}\n", ["'name'", "pattern"]),
        ("pi5: {kind: ssh, address: pi}\npi5: {kind: ssh, address: other}\n", ["pi5", "twice"]),
        ("a: &a [1]\nb: [*a, *a]\nc: {kind: [}\n", ["devices.yaml"]),
        ("\x1b[31mpi5: {kind: ssh}\n", ["devices.yaml"]),
        ("pi5: {kind: ssh, address: -oProxyCommand=touch hacked}\n", ["no address of ssh's"]),
    ],
)
def test_a_wrong_file_is_one_line(of_user: Path, workdir: Path, text: str, words: list[str]) -> None:
    (workdir / book.FILE).write_text(text)
    done = kdpipe("devices", "probe", "pi5")
    assert_one_line(done, 2, *words)
    assert "\x1b" not in done.stderr and not (workdir / "hacked").exists()


def test_a_file_that_is_none_is_one_line(of_user: Path, workdir: Path) -> None:
    (workdir / book.FILE).mkdir()
    assert_one_line(kdpipe("devices", "list"), 2, "devices.yaml cannot be read")


def test_what_cannot_be_described_is_not_written(of_user: Path) -> None:
    with pytest.raises(UserError, match="unknown kind"):
        book.add(DeviceSettings(name="pi5", kind="telnet"), DEVICES)
    assert_one_line(kdpipe("devices", "add", "null", "ssh", "pi"), 2, "there by itself")
    assert_one_line(kdpipe("devices", "add", "a b", "ssh", "pi"), 2, "'name'")
    assert not of_user.exists()


def test_doctor_says_how_a_device_gets_a_runtime(of_user: Path, workdir: Path, tmp_path: Path) -> None:
    """This machine's Python as a device that has numpy and nothing else."""
    import numpy

    packages = Path(numpy.__file__).parents[1]
    (tmp_path / "site").mkdir()
    for path in packages.glob("numpy*"):
        (tmp_path / "site" / path.name).symlink_to(path)
    python = f"env PYTHONPATH={tmp_path / 'site'} {sys.executable} -S"
    (workdir / book.FILE).write_text(yaml.safe_dump({"board": {"kind": "local", "python": python}}))
    found = json.loads(kdpipe("doctor", "--device", "board", "--json").stdout)
    cures = {state["target"]: state["cure"] for state in found["targets"]}
    assert cures["tflite"] == "kdpipe devices prepare board --runtime tflite"
    assert "kdpipe devices" not in cures["tensorrt"]
