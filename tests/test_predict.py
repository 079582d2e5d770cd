"""What a bundle says of image files: labels with probabilities, as CSV or JSON, here or on a device."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Trained, assert_one_line, kdpipe, kdpipe_process, replace_file
from PIL import Image

from kdpipe.core.kinds import Bundle
from kdpipe.deploy import predict
from kdpipe.devices import find_device
from kdpipe.runtime import open_session
from kdpipe.runtime import predict as outputs_of
from kdpipe.runtime.task import TASKS


@pytest.fixture(scope="module")
def digits(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, some pictures of it deeper: each digit's file has the digit in its name."""
    root = tmp_path_factory.mktemp("digits")
    (root / "more").mkdir()
    for at, sample in enumerate(trained.dataset.balanced("test", 20, seed=0)):
        shutil.copyfile(sample.path, root / ("more" if at % 2 else ".") / f"{at:02d}-{sample.label}.png")
    return root


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_labels_with_probabilities(packed: Bundle, trained: Trained, digits: Path) -> None:
    """The same as the student said of these images when it was trained."""
    done = kdpipe("predict", packed.path, digits)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert len(found) == 20 and list(found[0]) == ["image", "label", "probability"]
    assert [Path(row["image"]) for row in found] == sorted(digits.glob("*.png")) + sorted(digits.glob("more/*.png"))
    said = trained.student.tested[0][trained.dataset.positions("test", 20, seed=0)].argmax(1)
    assert [row["label"] for row in found] == [packed.labels[said[int(Path(row["image"]).name[:2])]] for row in found]
    assert all(0.1 <= float(row["probability"]) <= 1 for row in found)


def test_they_are_what_the_model_computes(packed: Bundle, trained: Trained, digits: Path) -> None:
    """Against the outputs of a session of our own, and a softmax written out."""
    image = sorted(digits.glob("*.png"))[0]
    done = kdpipe("predict", packed.path, image, "--top", 99, "--json")
    told = json.loads(done.stdout)
    assert (told["schema_version"], told["device"], told["unreadable"]) == (1, "local", [])
    [found] = told["predictions"]
    position = next(
        at for at, s in enumerate(trained.dataset.samples("test")) if s.path.read_bytes() == image.read_bytes()
    )
    pixels = trained.dataset.samples("test")[position].fitted(packed.facts.input.model_dump())
    [logits] = outputs_of(open_session(packed.path, packed.facts.for_runtime()), pixels[None]).astype(float)
    wanted = {label: np.exp(value) / np.exp(logits).sum() for label, value in zip(packed.labels, logits, strict=True)}
    assert len(found["says"]) == 10
    shares = [each["probability"] for each in found["says"]]
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=1e-5)
    for each in found["says"]:
        assert each["probability"] == pytest.approx(wanted[each["label"]], abs=2e-6)


@pytest.mark.parametrize("name", ["openvino-int8", "tflite-float32", "tensorrt-float32"])
def test_every_kind_of_bundle(bundles: dict[str, Bundle], packed: Bundle, digits: Path, name: str) -> None:
    """One that takes channels last, one of INT8, and one that another runtime answers here."""
    labels = {
        which: [row["label"] for row in rows(kdpipe("predict", bundle.path, digits).stdout)]
        for which, bundle in {"packed": packed, name: bundles[name]}.items()
    }
    assert sum(a == b for a, b in zip(labels["packed"], labels[name], strict=True)) >= 19


def test_on_a_device(packed: Bundle, digits: Path, workdir: Path, tmp_path: Path) -> None:
    """One that devices.yaml describes."""
    device = tmp_path / "device"
    (workdir / "devices.yaml").write_text(f"board: {{kind: local, folder: '{device}'}}\n")
    here, there = (kdpipe("predict", packed.path, digits, "--device", name) for name in ("local", "board"))
    assert there.returncode == 0, there.stderr
    assert there.stdout == here.stdout


def test_images_that_cannot_be_read(packed: Bundle, digits: Path, tmp_path: Path) -> None:
    """They are named, every one of them, and the others are answered."""
    folder = tmp_path / "some"
    shutil.copytree(digits, folder)
    (folder / "03-broken.png").write_bytes(b"no image")
    (folder / "more" / "99-broken.png").write_bytes(sorted(digits.glob("*.png"))[0].read_bytes()[:60])
    done = kdpipe("predict", packed.path, folder)
    assert_one_line(done, 2, "2 of 22 images cannot be read", "03-broken.png")
    assert len(rows(done.stdout)) == 20
    assert "99-broken.png" in done.stderr
    told = json.loads(kdpipe("predict", packed.path, folder, "--json").stdout)
    assert [Path(each["image"]).name for each in told["unreadable"]] == ["03-broken.png", "99-broken.png"]
    assert len(told["predictions"]) == 20


def test_none_can_be_read(packed: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    done = kdpipe("predict", packed.path, tmp_path / "a.png")
    assert_one_line(done, 2, "1 of 1 images cannot be read", "a.png")
    assert done.stdout == ""


def test_block_by_block(packed: Bundle, digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many images are never in memory at once: blocks are of eight here, some with an image that cannot be read."""
    monkeypatch.setattr(predict, "block_images", lambda _: 8)
    images = predict.find([digits])
    images.insert(4, Path(__file__))
    said = list(predict.predict(packed, images, find_device("local"), top=2))
    assert [each.image for each in said] == images
    assert [each.image for each in said if each.fault is not None] == [Path(__file__)]
    assert {len(each.labels) for each in said if each.fault is None} == {2}
    whole = rows(kdpipe("predict", packed.path, digits).stdout)
    assert [each.labels[0] for each in said if each.fault is None] == [row["label"] for row in whole]


def test_labels_of_strangers(packed: Bundle, tmp_path: Path, digits: Path) -> None:
    """A label with quotes and commas stays one field of one row; one that would move a cursor is refused."""
    bundle = tmp_path / "bundle"
    shutil.copytree(packed.path, bundle)
    image = sorted(digits.glob("*.png"))[0]
    replace_file(bundle, Bundle.LABELS, json.dumps([f'a "{number}", b' for number in range(10)]).encode())
    done = kdpipe("predict", bundle, image)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 2, done.stderr
    [row] = rows(done.stdout)
    assert row["label"].startswith('a "') and row["label"].endswith('", b')
    replace_file(bundle, Bundle.LABELS, json.dumps([f"\n\x1b[2J{number}" for number in range(10)]).encode())
    done = kdpipe("predict", bundle, image)
    assert_one_line(done, 2, "labels.json", "control characters")
    assert done.stdout == ""


def test_a_bundle_that_was_changed(packed: Bundle, tmp_path: Path, digits: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(packed.path, bundle)
    (bundle / "model.onnx").write_bytes(b"junk")
    done = kdpipe("predict", bundle, digits)
    assert_one_line(done, 2, "model.onnx")
    assert done.stdout == ""


def test_a_model_that_cannot_be_opened(packed: Bundle, tmp_path: Path, digits: Path) -> None:
    """Sealed by a stranger, and junk all the same: what opens it is another process, and nothing is printed."""
    bundle = tmp_path / "bundle"
    shutil.copytree(packed.path, bundle)
    replace_file(bundle, "model.onnx", b"junk")
    done = kdpipe("predict", bundle, digits)
    assert_one_line(done, 2, "the runner failed on 'local'")
    assert done.stdout == ""


def test_the_likeliest_first() -> None:
    task = TASKS["classification"]
    outputs = np.array([[0, 3, 1, 3], [1000, -1000, 999, 0]], np.float32)
    classes, shares = task.likeliest(outputs, 3)
    assert classes.tolist() == [[1, 3, 2], [0, 2, 3]]
    assert (classes[:, 0] == task.decide(outputs)).all()
    assert np.isfinite(shares).all() and shares[1].tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.e), 0])
    assert task.likeliest(outputs, 9)[0].shape == (2, 4)


# ---- shells ------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What a shell is told of the last word."""
    environment = {
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
        "_KDPIPE_COMPLETE": "complete_bash",
    }
    done = kdpipe_process(**environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("kdpipe", "expo"), ["export"]),
        (("kdpipe", "devices", "st"), ["status"]),
        (("kdpipe", "distill", "--label-f"), ["--label-fraction"]),
        (("kdpipe", "distill", "a", "--method", "d"), ["dkd", "dist", "deep_supervision"]),
        (("kdpipe", "distill", "a", "--train.select", ""), ["last", "best"]),
        (("kdpipe", "data", "a", "--check", "no"), ["none"]),
        (("kdpipe", "distill", "a", "--standardize-logits", "t"), ["true"]),
    ],
)
def test_completion(words: tuple[str, ...], told: list[str]) -> None:
    assert completed(*words) == told


def test_completion_of_devices(workdir: Path) -> None:
    (workdir / "devices.yaml").write_text("lopi: {kind: ssh, address: pi@pi5}\n")
    assert completed("kdpipe", "deploy", "a", "--device", "lo") == ["local", "lopi"]
    assert completed("kdpipe", "devices", "probe", "lop") == ["lopi"]
    (workdir / "devices.yaml").write_text("lopi: [")
    assert completed("kdpipe", "deploy", "a", "--device", "lo") == []


def test_completion_in_a_shell(tmp_path: Path) -> None:
    """The script itself, in bash: whoever presses the key gets the command."""
    program = tmp_path / "kdpipe"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kdpipe "$@"\n')
    program.chmod(0o755)
    line = (
        'PATH="$1:$PATH"; eval "$(_KDPIPE_COMPLETE=source_bash kdpipe)"; complete -p kdpipe\n'
        'COMP_WORDS=(kdpipe pred); COMP_CWORD=1; _kdpipe_completion kdpipe; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["/bin/bash", "-c", line, "bash", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "predict", done.stdout + done.stderr


def test_pictures_of_any_kind(packed: Bundle, tmp_path: Path) -> None:
    """Named by themselves they need no suffix, and are turned and laid over white as everywhere."""
    Image.new("RGBA", (40, 20), (0, 0, 0, 0)).save(tmp_path / "clear", "PNG")
    Image.new("RGB", (40, 20), "white").save(tmp_path / "white.png")
    clear, white = rows(kdpipe("predict", packed.path, tmp_path / "clear", tmp_path / "white.png").stdout)
    assert (clear["label"], clear["probability"]) == (white["label"], white["probability"])
