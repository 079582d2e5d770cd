"""docs/segmentation.md, run: every command of it, on a folder of drawn scenes; and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import ROOT, SHORT_BENCH, SMALL_UNET, Made
from PIL import Image
from test_lab_page import SIZES, browse, look
from test_pixels import CLASSES, draw_scenes

from kdpipe.core.config import Recipe, validated
from kdpipe.core.errors import ExitCode
from kdpipe.report import words
from kdpipe.report.masks import masks
from kdpipe.report.page import render
from kdpipe.report.tables import bundles_of

pytestmark = pytest.mark.lab
DOCUMENT = (ROOT / "docs" / "segmentation.md").read_text()
COMMANDS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
[RECIPE] = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
# What the document names, and what is small enough to be trained here: every one of them is replaced somewhere.
SMALL = {
    "--encoder resnet50": "--encoder test_resnet --model-args '{\"decoder_channels\": [16, 16, 8, 8, 8]}'",
    "--encoder mobilenetv3_small_100": "--encoder test_resnet",
    "--input.size '[256, 320]'": "--input.size '[32, 64]'",
    "--train.epochs 100": "--train.epochs 2 --train.batch-size 8 --train.workers 0",
}
BRIEF = {
    "kdpipe bench": "kdpipe bench "
    + " ".join(f"--{name.replace('_', '-')} {each}" for name, each in SHORT_BENCH.items()),
    "kdpipe export": "kdpipe export --parity-images 8",
    "kdpipe quantize": "kdpipe quantize --calibrate.images 8 --check-images 8",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder as the document draws it, and ``kdpipe`` where a shell finds it."""
    root = tmp_path_factory.mktemp("road")
    for at, (part, count) in enumerate({"train": 24, "val": 8, "test": 12}.items()):
        draw_scenes(root / "streets" / part, count, seed=at)
    (root / "streets" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "commands").mkdir()
    script = root / "commands" / "kdpipe"
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kdpipe "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return root


def small_recipe() -> str:
    """The document's recipe with small networks, and as little of everything as there can be."""
    recipe = yaml.safe_load(RECIPE)
    network = {**SMALL_UNET, "input": {"size": [32, 64]}}
    brief = {"epochs": 2, "batch_size": 8, "workers": 0}
    recipe["teacher"] |= {**network, "train": brief}
    recipe["student"] = {"model": "fpn", "encoder": "test_resnet", "input": {"size": [32, 64]}}
    recipe["distill"]["train"] = brief
    recipe["export"] = {"targets": ["onnxruntime"], "parity_images": 8}
    recipe["quantize"] |= {"variants": ["int8"], "calibrate": {"images": 8}, "check_images": 8}
    recipe["bench"] = SHORT_BENCH
    return yaml.safe_dump(recipe)


def test_the_documents_recipe_is_one() -> None:
    found = validated(Recipe, yaml.safe_load(RECIPE), "docs/segmentation.md")
    assert (found.data.task, found.student.encoder) == ("segmentation", "mobilenetv3_small_100")


def test_from_a_folder_to_a_release(folder: Path) -> None:
    """In one shell, in the order of the page: what one command prints, the next one takes."""
    (folder / "streets.yaml").write_text(small_recipe())
    script = "set -e -o pipefail\n" + "".join(COMMANDS)
    for named, small in SMALL.items():
        assert named in script, named
        script = script.replace(named, small)
    for command, brief in BRIEF.items():
        assert command in script, command
        script = script.replace(command, brief)
    # Latencies of so short a session need not be trusted: that is exit 75, and the work is done.
    allowed = f'kdpipe() {{ command kdpipe "$@" || [ $? -eq {int(ExitCode.UNTRUSTED)} ]; }}\n'
    path = f"{folder / 'commands'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["/bin/bash", "-c", allowed + script],
        cwd=folder, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    seen = sorted(path.name for path in (folder / "seen").iterdir())
    images = sorted(path.stem for path in (folder / "streets" / "test" / "images").iterdir())
    assert seen == [f"{name}-overlay.png" for name in images]
    assert Image.open(folder / "seen" / seen[0]).size == (72, 40)
    release = folder / "releases" / "streets" / "1.0.0"
    assert "mIoU" in (release / "README.md").read_text()
    reports = sorted((folder / "artifacts").glob("report-*/report.html"))
    assert len(reports) == 2 and all("frame over<br>network" in page.read_text() for page in reports)


# ---- the page -------------------------------------------------------------------------------------------------------


@SIZES
def test_the_page_of_masks_fits(masked: Made, tmp_path: Path, scheme: str, width: int) -> None:
    """Rows of pictures are no wider than the window, on a desk and on a phone; the decision comes first."""
    numbers = json.loads(json.dumps(masked.report.numbers))
    found = masks(
        numbers, masked.measurement, bundles_of(masked.measurement), masked.chain._sources([masked.measurement])
    )
    seen = look(render(numbers, {}, masks=found), width, scheme, tmp_path)
    assert seen["width"] <= width and seen["width_explained"] <= width
    assert seen["decision"]["text"] == words.decision_sentence(numbers["devices"][0]["decision"])
    for table in seen["tables"]:
        assert table["cells"] and table["wider"] <= 0


@SIZES
def test_masks_are_seen(masked: Made, tmp_path: Path, scheme: str, width: int) -> None:
    """In the browser's own picture of the page every colour of the first row's masks is there."""
    shot, page = tmp_path / "page.png", tmp_path / "framed.html"
    source = masked.report.file(masked.report.PAGE).as_uri()
    page.write_text(f'<body style="margin:0"><iframe src="{source}" style="border:0;width:{width}px;height:9000px">')
    options = ["--force-dark-mode", "--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    browse(page, tmp_path / "profile", *options, f"--window-size={max(width, 500)},9000", f"--screenshot={shot}")
    pixels = np.asarray(Image.open(shot).convert("RGB"))[:, :width].reshape(-1, 3)
    shown = {tuple(each) for each in np.unique(pixels, axis=0).tolist()}
    labels = np.unique(masked.measurement.labels[masked.report.numbers["flips"][0]["position"]])
    from kdpipe.runtime.overlay import colours

    assert len(labels) > 1 and {tuple(colours(11)[label].tolist()) for label in labels if label >= 0} <= shown
