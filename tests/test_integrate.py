"""docs/integrate.md: its Python runs here, its C++ in the lab; and the conformance kit that both compare with."""

from __future__ import annotations

import json
import re
import subprocess
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Trained, system_command
from PIL import Image

from kdpipe.core.kinds import Bundle
from kdpipe.runtime.preprocess import decode, fit

TEXT = (ROOT / "docs" / "integrate.md").read_text()
BLOCKS = {
    name: re.findall(rf"```{name}\n(.*?)```", TEXT, re.DOTALL)
    for name in ("python", "cpp")
}  # fmt: skip
SHARED, *_, COMPARED = BLOCKS["python"]
# Each section's own block: which of the bundles it opens.
PYTHON = {"onnxruntime": BLOCKS["python"][1], "openvino": BLOCKS["python"][2], "tflite": BLOCKS["python"][3]}


def of_target(bundles: dict[str, Bundle], target: str) -> list[str]:
    return [name for name, bundle in bundles.items() if bundle.facts.target == target]


@pytest.mark.parametrize("target", PYTHON)
def test_the_documents_python_answers_as_the_kit_says(
    bundles: dict[str, Bundle], workdir: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    names = of_target(bundles, target)
    assert len(names) >= 2
    for name in names:
        (workdir / "live").unlink(missing_ok=True)
        (workdir / "live").symlink_to(bundles[name].path)
        exec("".join([SHARED, PYTHON[target], COMPARED]), {})
        said, wanted = capsys.readouterr().out.strip().split(" wanted ")
        assert said == wanted


def test_the_documents_python_refuses_other_outputs(bundles: dict[str, Bundle], workdir: Path) -> None:
    (workdir / "live").symlink_to(bundles["onnxruntime-float32"].path)
    with pytest.raises(AssertionError):
        exec("".join([SHARED, PYTHON["onnxruntime"], "outputs = outputs + 1\n", COMPARED]), {})


def test_the_kit_is_of_a_real_image(bundles: dict[str, Bundle], trained: Trained) -> None:
    """The bytes are what preprocessing makes of the JPEG, and the JPEG is one of the test images."""
    bundle = bundles["tflite-float32"]
    kit, spec = bundle.path / bundle.CONFORMANCE, bundle.facts.input.model_dump()
    expected = json.loads((kit / "expected.json").read_text())
    values = np.fromfile(kit / "input.bin", np.uint8).reshape(expected["input_shape"])
    assert (values[0] == fit(decode(kit / "image.jpg"), spec)).all()  # NHWC
    assert Image.open(kit / "image.jpg").format == "JPEG"
    near = [np.abs(values[0].astype(int) - sample.fitted(spec)).mean() for sample in trained.dataset.samples("test")]
    assert min(near) < 8
    assert expected["says"] == bundle.labels[expected["class"]]
    assert expected["tolerance"] == bundle.facts.golden_tolerance
    size = sum(path.stat().st_size for path in kit.iterdir())
    assert size < 3 * values.size + 16_000
    other = bundles["onnxruntime-float32"].path / bundle.CONFORMANCE
    turned = values.transpose(0, 3, 1, 2)
    assert np.array_equal(np.fromfile(other / "input.bin", np.uint8).reshape(turned.shape), turned)


# ---- C++ -----------------------------------------------------------------------------------------------------


def package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def compiled(folder: Path, name: str, include: Path, library: Path) -> Path:
    """The program of that name in the document, compiled against that library."""
    for block in BLOCKS["cpp"]:
        (folder / block.partition("\n")[0].removeprefix("// ")).write_text(block)
    (folder / f"lib{name}.so.1").symlink_to(library)  # as its release calls it
    program = folder / name
    flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-isystem{include}", f"-Wl,-rpath,{library.parent}:{folder}"]
    line = [system_command("g++"), *flags, str(folder / f"{name}.cpp"), str(library), "-o", str(program)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return program


@pytest.mark.lab
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_documents_cpp_answers_as_the_kit_says(bundles: dict[str, Bundle], tmp_path: Path, target: str) -> None:
    if target == "onnxruntime":
        [library] = (package("onnxruntime") / "capi").glob("libonnxruntime.so.*")
        include = ROOT / "tests" / "native"
    else:
        [library] = (package("openvino") / "libs").glob("libopenvino.so.*")
        include = package("openvino") / "include"
    program = compiled(tmp_path, target, include, library)
    for name in of_target(bundles, target):
        bundle = bundles[name]
        if bundle.facts.runtime.get("inference_precision", "f32") != "f32":
            continue  # the document says where the precision is to be taken from; the program has f32 in it
        kit = bundle.path / bundle.CONFORMANCE
        asked = [program, bundle.file(bundle.facts.entry), kit, *map(str, bundle.facts.input.sides)]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=1800, check=False)
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) <= bundle.facts.golden_tolerance
