"""What is brought to a device that lacks it, without a network; what a phone's services and another tool say."""

from __future__ import annotations

import shlex
import shutil
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Made, assert_one_line, kdpipe

from kdpipe.core.config import DeviceSettings
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.devices import benchmark_model, bootstrap
from kdpipe.devices.adb import services
from kdpipe.devices.local import LocalDevice
from kdpipe.devices.runner import RunnerDevice
from kdpipe.runtime.probe import is_emulated
from kdpipe.runtime.store import digest

CPYTHON = {"executable": "/usr/bin/python3", "implementation": "cpython", "bits": 64}


@pytest.mark.parametrize(
    ("found", "first", "last"),
    [
        ({"version": (3, 11), "machine": "aarch64", "libc": "glibc 2.36"}, "manylinux_2_36", "manylinux2014"),
        ({"version": (3, 9), "machine": "x86_64", "libc": "glibc 2.31"}, "manylinux_2_31", "manylinux1"),
        ({"version": (3, 12), "machine": "aarch64", "libc": "musl 1.2"}, "musllinux_1_2", "musllinux_1_1"),
    ],
)
def test_the_tags_of_a_python(found: dict[str, object], first: str, last: str) -> None:
    tags = bootstrap.Interpreter.model_validate(CPYTHON | found).platforms()
    assert (tags[0], tags[-1]) == (f"{first}_{found['machine']}", f"{last}_{found['machine']}")
    assert len(set(tags)) == len(tags)


@pytest.mark.parametrize("other", [{"bits": 32}, {"libc": ""}, {"libc": "bionic"}])
def test_a_python_without_wheels_is_named(other: dict[str, object]) -> None:
    known = CPYTHON | {"version": (3, 11), "machine": "aarch64", "libc": "glibc 2.36"}
    with pytest.raises(UserError, match=r"no wheels are made for cpython 3\.11 .* on aarch64"):
        bootstrap.Interpreter.model_validate(known | other).platforms()


def test_a_wheel_is_unpacked_as_if_installed(tmp_path: Path) -> None:
    """Its libraries may lie apart; its scripts are for nobody there."""
    with zipfile.ZipFile(tmp_path / "one-1-py3-none-any.whl", "w") as wheel:
        for name in ("one.py", "one-1.data/platlib/one_c.py", "one-1.data/purelib/more/x.py", "one-1.data/scripts/run"):
            wheel.writestr(name, "")
        wheel.writestr("../../outside.py", "")
    bootstrap.unpack(tmp_path / "one-1-py3-none-any.whl", tmp_path / "a" / "site")
    found = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    names = ("one.py", "one_c.py", "more/x.py", "outside.py")
    assert found == {"one-1-py3-none-any.whl", *(f"a/site/{name}" for name in names)}


def test_what_is_kept_is_made_once_and_again_when_it_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made: list[Path] = []

    def make(folder: Path) -> bootstrap.Parts:
        made.append(folder)
        (folder / "a").write_text("1")
        return bootstrap.Parts(parts=[], python="this", start="", programs=[])

    first = bootstrap.kept("key", make)
    assert bootstrap.kept("key", make) == first and len(made) == 1
    assert bootstrap.kept("another", make).folder != first.folder and len(made) == 2
    (first.folder / "a").write_text("2")
    assert bootstrap.kept("key", make) == first and len(made) == 3
    assert (first.folder / "a").read_text() == "1"
    assert sorted(path.name for path in bootstrap.cache_folder().iterdir()) == sorted(
        {bootstrap.kept(key, make).folder.parent.name for key in ("key", "another")}
    )


class Near(RunnerDevice):
    """A folder of this machine, reached as one would reach another."""

    brought: bootstrap.Kept

    def argv(self, command: str) -> list[str]:
        return ["/bin/sh", "-c", command]

    def send(self, source: Path, path: str) -> None:
        if source.is_dir():
            shutil.copytree(source, path, dirs_exist_ok=True)
        else:
            shutil.copyfile(source, path)

    def receive(self, path: str, target: Path) -> None:
        shutil.copyfile(path, target)

    def own_python(self, targets: Sequence[str]) -> bootstrap.Kept:
        return self.brought


def near(folder: Path) -> Near:
    return Near(DeviceSettings(name="near", kind="ssh", address="near", folder=str(folder), python="/no/python"))


def to_bring(folder: Path, mark: str, program: str = sys.executable) -> bootstrap.Kept:
    """Something whose ``site`` has a module ``mark``, and whose Python is this one."""
    (folder / "site").mkdir(parents=True)
    (folder / "site" / f"{mark}.py").write_text("")
    start = f'exec {shlex.quote(program)} "$@"'
    return bootstrap.Kept(folder, digest(folder), bootstrap.Parts(parts=[], python="this", start=start, programs=[]))


def test_what_is_brought_is_used_from_then_on(tmp_path: Path) -> None:
    """By content, checked there, started by one script; the next one takes its place, one that fails does not."""
    root = tmp_path / "a device's folder"
    with pytest.raises(UserError, match="'near' has no '/no/python'"):
        near(root).probe()
    device = near(root)
    device.brought = to_bring(tmp_path / "first", "first_mark")
    bootstrap.bring(device, ["onnxruntime"])
    assert "onnxruntime" in near(root).probe().targets
    whole = root / "python" / "store" / device.brought.digest
    assert not (root / "python" / "python3.new").exists() and whole.is_dir()
    there = near(root)
    there.shell(f"{there.python} -c 'import first_mark'")
    assert {path.name for path in whole.rglob("*")} == {"site", "first_mark.py"}  # nothing compiled in there

    device.brought = to_bring(tmp_path / "broken", "broken_mark", "/bin/false")
    with pytest.raises(UserError, match="near"):
        bootstrap.bring(device, ["onnxruntime"])
    there.shell(f"{there.python} -c 'import first_mark'")
    assert {path.name for path in (root / "python").iterdir()} >= {"python3", "store"}
    assert not (root / "python" / "python3.new").exists()
    assert list((root / "python" / "store").iterdir()) == [whole]

    device.brought = to_bring(tmp_path / "second", "second_mark")
    bootstrap.bring(device, ["onnxruntime"])
    there.shell(f"{there.python} -c 'import second_mark'")
    assert [path.name for path in (root / "python" / "store").iterdir()] == [device.brought.digest]


@pytest.mark.parametrize("name", ["local", "null"])
def test_what_has_this_python_is_brought_nothing(name: str) -> None:
    assert_one_line(kdpipe("devices", "prepare", name), 2, f"'{name}' runs with the Python of this kdpipe")


def test_this_machine_is_no_emulator() -> None:
    assert not is_emulated()


# ---- a phone's services: what they are documented to print --------------------------------------------------

POWER = "POWER MANAGER (dumpsys power)\n\nPower Manager State:\n  mWakefulness={}\n  mWakefulnessChanging=false\n"
THERMAL = """IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
\tTemperature{mValue=99.0, mType=0, mName=AP, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
\tTemperature{mValue=41.5, mType=0, mName=AP, mStatus=2}
\tTemperature{mValue=0.0, mType=2, mName=SUBBAT, mStatus=0}
Current cooling devices from HAL:
\tCoolingDevice{mValue=1, mType=2, mName=cpu}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  status: 3
  health: 2
  level: 85
  scale: 100
  temperature: 287
"""


def test_what_a_phones_services_say() -> None:
    found = services(POWER.format("Awake"), THERMAL, BATTERY)
    assert found == {
        "screen": "on",
        "thermal_status": "moderate",
        "temperatures_millicelsius": {"AP": 41500},  # a sensor at 0 is none
        "battery": {"percent": 85, "status": "discharging", "celsius": 28.7},
    }
    assert services(POWER.format("Dozing"), "", "")["screen"] == "off"
    assert services("", "", "") == {"screen": "unavailable", "thermal_status": "unavailable"}


# ---- benchmark_model: what it is documented to print --------------------------------------------------------

TIMES = """count=4 first=130565 curr=120829 min=117370 max=130565 avg=122373 std=4930
count=50 first=1192120 curr=1180550 min=1137370 max=1247760 avg=1.19375e+06 std=1948
Inference timings in us: Init: 870557, First inference: 130565, Warmup (avg): 122373, Inference (avg): 1.19375e+06
"""
ON_GPU = "INFO: Explicitly applied GPU delegate, and the model graph will be {} executed by the delegate.\n"
NOT_THERE = "Though NNAPI delegate is explicitly applied, the model graph will not be executed by the delegate.\n"


def test_another_tools_answer_is_marked(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = benchmark_model.read(ON_GPU.format("partially") + TIMES, "gpu")
    assert (found.tool, found.executed, found.runs) == ("benchmark_model", "partially", 50)
    assert (found.init_ms, found.first_ms, found.mean_ms) == (870.557, 130.565, 1193.75)
    assert benchmark_model.read(TIMES, "cpu").executed is None
    with pytest.raises(GateFailed, match="did not run the model on the nnapi"):
        benchmark_model.read(NOT_THERE + TIMES, "nnapi")
    with pytest.raises(UserError, match="printed no"):
        benchmark_model.read("usage: ...", "cpu")

    # A program that prints that, where it gets a model.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    program = tmp_path / "benchmark_model"
    program.write_text(f'#!/bin/sh\ntest -s "${{1#--graph=}}" && cat <<END\n{ON_GPU.format("completely")}{TIMES}END\n')
    device = LocalDevice(DeviceSettings(benchmark_model=str(program)))
    assert benchmark_model.ask(device, made.bundles["tflite-float32"], "gpu", 2).executed == "completely"
    with pytest.raises(UserError, match="runs bundles of tflite"):
        benchmark_model.ask(device, made.bundles["onnxruntime-float32"], "gpu", 2)
    with pytest.raises(UserError, match="names no benchmark_model"):
        benchmark_model.ask(LocalDevice(DeviceSettings()), made.bundles["tflite-float32"], "gpu", 2)
