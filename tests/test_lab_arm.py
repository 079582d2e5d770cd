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

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan
from kdpipe.core.kinds import Measurement
from kdpipe.data.dataset import write_images
from kdpipe.devices import find_device, opened
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
def pi(brought: dict[str, object], project: Path, monkeypatch: pytest.MonkeyPatch) -> SshDevice:
    monkeypatch.chdir(project)
    found = find_device("pi")
    assert isinstance(found, SshDevice)
    return found


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


@pytest.mark.parametrize(("target", "variant"), STATIC)
def test_it_computes_what_this_host_does(made: Made, pi: SshDevice, target: str, variant: str, tmp_path: Path) -> None:
    bundle = made.bundles[f"{target}-{variant}"]
    images = tmp_path / "images.npy"
    write_images(images, made.dataset.samples("test")[:64], bundle.facts.input.model_dump())
    outputs: dict[str, np.ndarray] = {}
    for name, device in (("here", find_device("local")), ("there", pi)):
        (tmp_path / name).mkdir()
        with opened(device, tmp_path / name):
            device.push(bundle.path, "bundle")
            device.push(images, "images")
            answer = device.predict("bundle", "images", tmp_path / f"{name}.npy", 600)
        outputs[name] = np.load(tmp_path / f"{name}.npy")
        assert answer.images == len(outputs[name]) > 0
    arm64.assert_same_outputs(outputs["here"], outputs["there"], variant)


def test_its_latencies_are_marked_and_never_ranked(made: Made, pi: SshDevice, project: Path) -> None:
    """The whole command: whatever an emulated device measures is invalid, and the command says so."""
    bundles = [made.bundles[f"onnxruntime-{variant}"] for variant in ("float32", "int8")]
    # Emulated, every image that is answered takes its time: a data set of a few.
    plan = DataPlan(source="digits", test_split=None, test_fraction=0.3, most_images=100)
    few = ["--data", Chain(project / "artifacts").data(plan).path]
    few += ["--rounds", 2, "--seconds", 0.1, "--max-seconds", 0.1, "--min-samples", 5, "--images", 4]
    few += ["--warm-up-seconds", 0, "--cold-starts", 1]
    out = project / "measurement"
    done = kdpipe("bench", *(bundle.path for bundle in bundles), "--device", "pi", *few, "--out", out, cwd=project)
    assert_one_line(done, 75, "emulated device")
    found = Measurement.open(out).facts
    assert found.emulated and found.probe_before.machine == "aarch64"
    for result in found.results.values():
        assert result.accuracy is not None and result.latency_p50_ms is not None, result.status
        assert result.trust is not None and result.trust.word == "invalid"


def test_bundles_are_deployed_there(made: Made, pi: SshDevice, project: Path) -> None:
    """Their hashes are checked and their golden inputs replayed on it; the one before is a switch away."""
    for target, variant in (("tflite", "int8"), ("onnxruntime", "float32")):
        bundle = made.bundles[f"{target}-{variant}"]
        done = kdpipe("deploy", bundle.path, "--device", "pi", "--json", cwd=project)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout)
        assert said["golden_images"] > 0 and said["max_difference"] <= said["tolerance"]
        assert said["live"]["key"] == bundle.key and said["session"]["runtime"].startswith(("ai-edge", "onnx"))
    assert kdpipe("deploy", "--device", "pi", "--rollback", cwd=project).returncode == 0
    status = kdpipe("devices", "status", "pi", cwd=project)
    assert status.returncode == 0 and "tflite int8" in status.stdout and "intact" in status.stdout


def test_what_can_not_be_brought_leaves_what_was_there(pi: SshDevice, project: Path) -> None:
    """No wheels for it, an unknown runtime: one line, and the Python that was brought before still runs."""
    assert_one_line(kdpipe("devices", "prepare", "pi", "--runtime", "tensorrt", cwd=project), 2, "no wheels", "aarch64")
    assert_one_line(kdpipe("devices", "prepare", "pi", "--runtime", "tflit", cwd=project), 2, "did you mean 'tflite'")
    assert "tflite" in find_device("pi").probe().targets


def test_cleaning_takes_away_what_was_brought(pi: SshDevice, project: Path, board: arm64.Board) -> None:
    """And a device that is new brings it as it is added."""
    done = kdpipe("devices", "clean", "pi", "--everything", cwd=project)
    assert done.returncode == 0, done.stderr
    assert pi.shell(f"ls {pi.root}/python 2>/dev/null; echo .") == "."
    assert_one_line(kdpipe("devices", "probe", "pi", cwd=project), 2, "no numpy", "kdpipe devices prepare pi")
    described = ["ssh", "board", "--ssh-config", board.config]
    added = kdpipe("devices", "add", "new", *described, "--bootstrap", "--json", cwd=project)
    assert added.returncode == 0, added.stderr
    assert json.loads(added.stdout)["python"] == f"{pi.root}/python/python3"
    assert json.loads(kdpipe("devices", "probe", "new", "--json", cwd=project).stdout)["probe"]["targets"]
