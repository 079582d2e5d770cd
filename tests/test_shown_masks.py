"""What a person sees of a network that draws masks: overlays of their own images, the report, the kit of a bundle."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, Trained, assert_one_line, kdpipe
from PIL import Image
from test_integrate import BLOCKS, PYTHON, SHARED

from kdpipe.core.kinds import Bundle
from kdpipe.deploy import overlays
from kdpipe.report import words
from kdpipe.report.masks import Masks, masks
from kdpipe.report.page import render
from kdpipe.report.tables import bundles_of, print_summary
from kdpipe.runtime import open_session
from kdpipe.runtime import predict as outputs_of
from kdpipe.runtime.overlay import colours, overlay
from kdpipe.runtime.preprocess import decode, fit, unfit_classes
from kdpipe.runtime.task import TASKS

TASK = TASKS["segmentation"]
INT8 = "onnxruntime-int8"
[MASKS] = [block for block in BLOCKS["python"] if "mask.png" in block]


@pytest.fixture(scope="module")
def bundle(masked: Made) -> Bundle:
    return masked.bundles["onnxruntime-float32"]


@pytest.fixture
def streets(masked: Made, tmp_path: Path) -> Path:
    """A user's folder: four images, of several sizes, one of them deeper, two of one name."""
    root = tmp_path / "streets"
    (root / "more").mkdir(parents=True)
    for at, sample in enumerate(masked.dataset.balanced("test", 4, seed=0)):
        picture = decode(sample.path).resize((60 + 30 * at, 50 + 10 * at))
        picture.save(root / ("more/a.png" if at == 3 else f"{'abc'[at]}.png"))
    Image.open(root / "a.png").save(root / "a.webp", lossless=True)
    return root


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def answer(bundle: Bundle, path: Path) -> np.ndarray:
    """The class of every pixel of an image, by a session of our own."""
    spec = bundle.facts.input.model_dump()
    image = decode(path)
    outputs = outputs_of(open_session(bundle.path, bundle.facts.for_runtime()), fit(image, spec)[None])
    enlarged = TASK.enlarged(outputs, bundle.facts.input.sides)
    return unfit_classes(enlarged[0].argmax(0), spec, image.height, image.width)


# ---- predict --------------------------------------------------------------------------------------------------------


def test_classes_by_their_share(bundle: Bundle, streets: Path) -> None:
    done = kdpipe("predict", bundle.path, streets)
    assert done.returncode == 0, done.stderr
    found = rows(done.stdout)
    assert list(found[0]) == ["image", "label", "share"]
    assert len({row["image"] for row in found}) == 5
    for image in (streets / "b.png", streets / "more" / "a.png"):
        said = answer(bundle, image)
        wanted = {bundle.labels[label]: (said == label).mean() for label in np.unique(said)}
        its = [(row["label"], float(row["share"])) for row in found if row["image"] == str(image)]
        assert dict(its) == pytest.approx(wanted, abs=1e-6)
        assert [share for _, share in its] == sorted((share for _, share in its), reverse=True)
    one = rows(kdpipe("predict", bundle.path, streets, "--top", 1).stdout)
    assert len(one) == 5 and not (streets / "seen").exists()


def test_overlays_at_the_images_own_size(bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    """Beside one another however the images were called; the pictures are the masks over the images, pixel by pixel."""
    before = {path: path.read_bytes() for path in streets.rglob("*.*")}
    done = kdpipe("predict", bundle.path, streets, "--out", tmp_path / "seen", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    written = {each["image"]: Path(each["overlay"]) for each in told["predictions"]}
    assert sorted(str(path.relative_to(tmp_path / "seen")) for path in written.values()) == [
        "a-overlay-2.png", "a-overlay.png", "b-overlay.png", "c-overlay.png", "more/a-overlay.png",
    ]  # fmt: skip
    assert sorted(written.values()) == sorted(path for path in (tmp_path / "seen").rglob("*.*"))
    for image, path in written.items():
        pixels = np.asarray(decode(Path(image)))
        drawn = np.asarray(Image.open(path))
        assert drawn.shape == pixels.shape
        assert (drawn == overlay(pixels, answer(bundle, Path(image)).astype(np.uint8))).all()
    assert all(set(each["says"][0]) == {"label", "share"} for each in told["predictions"])
    assert before == {path: path.read_bytes() for path in streets.rglob("*.*")}


def test_only_overlays_are_written_over(bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    """A second time they are; an image of the user's that is called so, a link or a folder is not, and nothing is."""
    seen = tmp_path / "seen"
    asked = ("predict", bundle.path, streets / "a.png", streets / "b.png", "--out", seen)
    first = kdpipe(*asked)
    assert first.returncode == 0 and rows(first.stdout)[0]["overlay"] == str(seen / "a-overlay.png")
    again = kdpipe(*asked)
    assert (again.returncode, again.stdout) == (0, first.stdout)
    mine = seen / "b-overlay.png"
    for spoil in (
        lambda: Image.new("RGB", (9, 9), "red").save(mine),
        lambda: mine.symlink_to(streets / "c.png"),
        lambda: mine.mkdir(),
        lambda: mine.write_bytes(b"mine"),
    ):
        shutil.rmtree(mine) if mine.is_dir() and not mine.is_symlink() else mine.unlink()
        spoil()
        (seen / "a-overlay.png").unlink(missing_ok=True)
        done = kdpipe(*asked)
        assert_one_line(done, 2, "b-overlay.png", "--out")
        assert done.stdout == "" and not (seen / "a-overlay.png").exists(), "refused before any work"
    (tmp_path / "file").write_text("mine")
    assert_one_line(kdpipe(*asked[:-1], tmp_path / "file"), 2, "is a file", "--out")
    assert (tmp_path / "file").read_text() == "mine"


def test_overlays_beside_the_images(bundle: Bundle, streets: Path) -> None:
    """In the very folder, too: whatever lay there is as it was."""
    before = {path: path.read_bytes() for path in streets.rglob("*.*")}
    assert kdpipe("predict", bundle.path, streets, "--out", streets).returncode == 0
    assert all(path.read_bytes() == content for path, content in before.items())
    assert len(list(streets.rglob("*-overlay*.png"))) == 5 and not list(streets.rglob("*.part"))


def test_an_overlay_that_cannot_be_written(bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    """One line, and no half of a picture."""
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / "more").write_text("a file where a folder is wanted")
    done = kdpipe("predict", bundle.path, streets, "--out", tmp_path / "seen")
    assert_one_line(done, 2, "cannot write", "a-overlay.png")
    assert not list((tmp_path / "seen").rglob("*.part"))


def test_images_that_cannot_be_read_are_named(bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    (streets / "broken.png").write_bytes((streets / "a.png").read_bytes()[:90])
    done = kdpipe("predict", bundle.path, streets, "--out", tmp_path / "seen")
    assert_one_line(done, 2, "1 of 6 images cannot be read", "broken.png")
    assert len({row["overlay"] for row in rows(done.stdout)}) == 5 == len(list((tmp_path / "seen").rglob("*.png")))


def test_labels_are_not_drawn(packed: Bundle, trained: Trained, tmp_path: Path) -> None:
    image = trained.dataset.samples("test")[0].path
    done = kdpipe("predict", packed.path, image, "--out", tmp_path / "seen")
    assert_one_line(done, 2, "for classification, which draws nothing over an image: leave --out out")
    assert not (tmp_path / "seen").exists()


def test_a_name_that_is_too_long_for_more(bundle: Bundle, streets: Path, tmp_path: Path) -> None:
    long = streets / f"b{'ä' * 124}.png"  # 249 bytes without its suffix, the 220th in the middle of a character
    shutil.copy(next(streets.glob("a.*")), long)
    for _ in range(2):
        done = kdpipe("predict", bundle.path, streets, "--out", tmp_path / "seen")
        assert done.returncode == 0, done.stderr
        assert len({row["overlay"] for row in rows(done.stdout)}) == 6 == len(list((tmp_path / "seen").rglob("*.png")))
        assert (tmp_path / "seen" / f"b{'ä' * 109}-overlay.png").is_file()


def test_names_that_differ_in_case_alone(tmp_path: Path) -> None:
    """A disk may take them for one."""
    files = [tmp_path / "A.png", tmp_path / "a.png"]
    assert overlays.place(files, files, tmp_path / "seen") == [
        tmp_path / "seen" / "A-overlay.png", tmp_path / "seen" / "a-overlay-2.png",
    ]  # fmt: skip


# ---- the report -----------------------------------------------------------------------------------------------------


def pictures(page: str) -> list[np.ndarray]:
    found = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', page)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")) for each in found]


def drawn(made: Made) -> Masks:
    sources = made.chain._sources([made.measurement])
    return masks(made.report.numbers, made.measurement, bundles_of(made.measurement), sources)


def test_the_page_shows_masks(masked: Made) -> None:
    """Image, label, float32, INT8 and their difference; a legend with every class in its colour."""
    numbers, page = masked.report.numbers, masked.report.file(masked.report.PAGE).read_text()
    found = drawn(masked)
    assert list(found.legend) == masked.dataset.classes
    assert list(found.legend.values()) == ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours(11)]
    for colour in found.legend.values():
        assert f"background: {colour}" in page
    assert numbers["flips"] and len(found.flips) == len(numbers["flips"])
    for strip, flip in zip(found.flips, numbers["flips"], strict=True):
        assert [tile.caption for tile in strip.tiles] == [
            "image", "label", flip["against"], flip["bundle"], "what changed",
        ]  # fmt: skip
        assert flip["against"].endswith("float32") and 0 < flip["changed"] <= 1
        assert f"{words.percent(flip['changed'], 1)} % of its pixels changed" in strip.text
        assert all(tile.uri in page for tile in strip.tiles)
    assert "what is wrong" in page and len(pictures(page)) > 5 * len(found.flips)
    assert {tile.shape for tile in pictures(page)} >= {(96, 144, 3)}, "32x48, drawn three times as large"


def test_the_most_changed_come_first(masked: Made) -> None:
    flips = [row for row in masked.report.numbers["flips"] if row["bundle"] == INT8]
    shares = [row["changed"] for row in flips]
    assert len(shares) > 1 and shares == sorted(shares, reverse=True)
    first, second = (masked.measurement.outputs(name) for name in ("onnxruntime-float32", INT8))
    at = flips[0]["position"]
    assert shares[0] == pytest.approx((TASK.decide(first)[at] != TASK.decide(second)[at]).mean())


def test_a_tile_is_the_mask(masked: Made) -> None:
    """The label of the first image, pixel by pixel in the colours of the legend."""
    flip, strip = masked.report.numbers["flips"][0], drawn(masked).flips[0]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(strip.tiles[1].uri.partition(",")[2]))))
    label = masked.measurement.labels[flip["position"]]
    assert (shown[1::3, 1::3] == colours(11)[label]).all()


def test_answers_by_class(masked: Made) -> None:
    """IoU of every class by hand, and what is taken for what, in pixels."""
    numbers = masked.report.numbers
    answers, labels = numbers["answers"], masked.measurement.labels
    maps = TASK.decide_at(masked.measurement.outputs(answers["bundle"]), labels.shape[1:])
    for at, row in enumerate(answers["classes"]):
        assert row["class"] == masked.dataset.classes[at] and row["training_images"] is None
        assert row["answers"] == (labels == at).sum()
        assert row["test_images"] == (labels == at).any((1, 2)).sum()
        if row["answers"]:
            both, either = ((maps == at) & (labels == at)).sum(), ((maps == at) | (labels == at))[labels >= 0].sum()
            assert row["accuracy"]["value"] == pytest.approx(both / either)
    assert numbers["task"]["counted"] == "pixels" and answers["confusions"]
    for each in answers["confusions"]:
        label, said = each["classes"]
        assert each["pixels"] == ((labels == label) & (maps == said)).sum() > 0
        assert each["share"] == pytest.approx(each["pixels"] / (labels == label).sum())
    accuracy = {row["name"]: row["accuracy"]["value"] for row in numbers["devices"][0]["bundles"]}
    known = [row["accuracy"]["value"] for row in answers["classes"] if row["accuracy"]]
    assert accuracy[answers["bundle"]] == pytest.approx(np.mean(known)), "their mean is the figure itself"
    [line, *_] = words.answers_lines(numbers)
    assert "% of its pixels)" in line


def test_the_worst_answers_are_those_with_the_lowest_figure(masked: Made) -> None:
    answers, labels = masked.report.numbers["answers"], masked.measurement.labels
    scores = TASK.scores(masked.measurement.outputs(answers["bundle"]), labels)
    own = [TASK.summary(scores[at : at + 1]).value for at in range(len(labels))]
    assert [each["score"] for each in answers["mistakes"]] == pytest.approx(sorted(own)[: len(answers["mistakes"])])
    assert len(answers["mistakes"]) == min(16, len(labels))


def test_in_a_terminal(masked: Made) -> None:
    from io import StringIO

    from kdpipe.terminal import console

    stream = StringIO()
    print_summary(console(stream, width=3000), masked.report.numbers)
    told = stream.getvalue()
    assert "mIoU %" in told and "a whole frame of 64x96 pixels" in told and "colours" in told


def test_a_page_of_names_that_are_markup(masked: Made) -> None:
    """Classes and files are called what somebody called them."""
    numbers = json.loads(json.dumps(masked.report.numbers).replace('"ground"', '"<script>alert(1)</script>"'))
    found = drawn(masked)
    strange = Masks(found.flips, found.mistakes, {"<script>alert(1)</script>": "#000000"}, found.changes)
    page = render(numbers, {}, masks=strange)
    assert "<script" not in page and "&lt;script&gt;" in page


# ---- a bundle -------------------------------------------------------------------------------------------------------


def test_the_kit_has_the_mask(bundle: Bundle) -> None:
    kit, spec = bundle.path / bundle.CONFORMANCE, bundle.facts.input.model_dump()
    expected = json.loads((kit / "expected.json").read_text())
    mask = np.asarray(Image.open(kit / "mask.png"))
    outputs = outputs_of(
        open_session(bundle.path, bundle.facts.for_runtime()), fit(decode(kit / "image.jpg"), spec)[None]
    )
    assert (mask == TASK.decide_at(outputs, bundle.facts.input.sides)[0]).mean() > 0.999
    assert expected["class"] is None and expected["says"] == TASK.tell(mask, bundle.labels)
    assert expected["outputs_shape"] == list(outputs.shape)


@pytest.mark.parametrize("name", ["onnxruntime-float32", "onnxruntime-int8", "openvino-float32", "openvino-int8"])
def test_the_documents_python_draws_the_mask(
    masked: Made, workdir: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """docs/integrate.md, from the kit's bytes to the mask: no pixel is another class."""
    (workdir / "live").symlink_to(masked.bundles[name].path)
    exec("".join([SHARED, PYTHON[name.partition("-")[0]], MASKS]), {})
    assert float(capsys.readouterr().out.split()[0]) <= 0.001
