"""Bundles stand alone: checked, replayed without torch, run by the runner inside them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Made, assert_one_line, flip_a_byte, kdpipe, replace_file

from kdpipe.deploy.bundle import verify
from kdpipe.export import TARGETS

BUNDLES = [f"{target}-{precision}" for target in TARGETS for precision in ("float32", "int8")]

# Importing any of these raises ImportError in the process.
WITHOUT_TORCH = (
    "import sys; sys.modules.update(dict.fromkeys(('torch', 'timm', 'torchvision', 'litert_torch', 'nncf')));"
)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.bundles["onnxruntime-int8"].path, tmp_path / "bundle"))


@pytest.mark.parametrize("name", BUNDLES)
def test_every_bundle_verifies(made: Made, name: str) -> None:
    _, found = verify(made.bundles[name].path)
    assert found["golden_images"] == 8
    assert found["stand_in"] == name.startswith("tensorrt")


def test_verify_needs_no_torch(made: Made) -> None:
    script = WITHOUT_TORCH + "sys.argv = ['kdpipe', 'verify', sys.argv[1]]; from kdpipe.cli import main; main()"
    for name in BUNDLES:
        done = subprocess.run(
            [sys.executable, "-c", script, made.bundles[name].path], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "8 golden images within" in done.stdout


@pytest.mark.parametrize("name", ["onnxruntime-int8", "openvino-int8", "tflite-int8"])
def test_the_shipped_runner_stands_alone(made: Made, tmp_path: Path, name: str) -> None:
    """Copied away, with kdpipe made impossible to import: only the standard library, numpy and the runtime."""
    bundle = Path(shutil.copytree(made.bundles[name].path, tmp_path / "device" / "bundle"))
    (tmp_path / "block").mkdir()
    for module in ("kdpipe", "torch", "pydantic", "PIL"):
        (tmp_path / "block" / f"{module}.py").write_text("raise ImportError('blocked')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "block")}
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "verify", "."],
        cwd=bundle,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["golden_images"] == 8


def test_a_runner_tells_nobody_what_it_opens(made: Made, tmp_path: Path) -> None:
    """onnxruntime's own builds keep what they send in the home, from the moment they are imported."""
    for name in ("home", "temporary"):
        (tmp_path / name).mkdir()
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "temporary"), "PATH": "/usr/bin:/bin"}
    bundle = made.bundles["onnxruntime-float32"].path
    line = [sys.executable, "-m", "runtime", "verify", bundle]
    subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert not list((tmp_path / "home").iterdir()) and not list((tmp_path / "temporary").iterdir())


def test_bundle_holds_what_a_device_needs(made: Made) -> None:
    bundle = made.bundles["tflite-int8"]
    assert json.loads(bundle.file("labels.json").read_text()) == [str(digit) for digit in range(10)]
    assert bundle.facts.input.size == 32
    with np.load(bundle.file("golden.npz")) as golden:
        assert golden["images"].shape == (8, 32, 32, 3)
        assert golden["logits"].shape == (8, 10)
    runner = {path.name for path in (bundle.path / "runtime").glob("*.py")}
    assert runner == {path.name for path in (ROOT / "runtime").glob("*.py")}


def test_lineage_goes_back_to_the_teacher_and_the_data(made: Made) -> None:
    model = made.bundles["openvino-int8"].manifest.inputs["model"]
    student = model.inputs["model"].inputs["graph"].inputs["student"]
    assert student.key == made.student.key
    assert student.inputs["teacher"].key == made.teacher.key
    assert student.inputs["teacher"].inputs["data"].key == made.dataset.key
    assert student.config["temperature"] == 4


@pytest.mark.parametrize("name", ["model.onnx", "labels.json", "golden.npz", "runtime/__init__.py"])
def test_any_changed_file_is_named(copy: Path, name: str) -> None:
    flip_a_byte(copy / name)
    assert_one_line(kdpipe("verify", copy), 2, name, "differs from its manifest")


def test_wrong_golden_outputs_fail(copy: Path) -> None:
    with np.load(copy / "golden.npz") as golden:
        images, logits = golden["images"], golden["logits"]
    np.savez(copy / "golden.npz", images=images, logits=logits[::-1])
    replace_file(copy, "golden.npz", (copy / "golden.npz").read_bytes())
    assert_one_line(kdpipe("verify", copy), 1, "golden outputs are off")


def test_pickles_are_never_loaded(copy: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "owned",))

    np.savez(copy / "golden.npz", images=np.array([Evil()], dtype=object), logits=np.zeros((1, 10)))
    replace_file(copy, "golden.npz", (copy / "golden.npz").read_bytes())
    assert_one_line(kdpipe("verify", copy), 1, "golden.npz", "is not what its header says")
    assert not (tmp_path / "owned").exists()


def test_verify_executes_nothing_of_the_bundle(copy: Path, tmp_path: Path) -> None:
    replace_file(copy, "runtime/__init__.py", f"open({str(tmp_path / 'owned')!r}, 'w')\n".encode())
    done = kdpipe("verify", copy, cwd=copy.parent)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "owned").exists()


def test_runner_refuses_a_changed_bundle(copy: Path) -> None:
    flip_a_byte(copy / "model.onnx")
    done = subprocess.run(
        [sys.executable, "-m", "runtime", "verify", "."], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "model.onnx differs from its manifest" in done.stderr
    assert "Traceback" not in done.stderr
