"""Images as people have them: every format, every oddity, and what is said of them."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from conftest import Made, assert_one_line, kdpipe, listening, replace_file

from kdpipe.chain import Chain, Wants
from kdpipe.core.config import DataPlan, read_recipe
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.progress import Silence
from kdpipe.data.dataset import Dataset
from kdpipe.data.formats import decode
from kdpipe.data.leaks import find_copies, find_look_alikes
from kdpipe.data.looks import look, perceptual_hashes
from kdpipe.data.survey import findings
from kdpipe.report.images import contact_sheet, image_numbers
from kdpipe.runtime.preprocess import FORMATS

WIDTH, HEIGHT = 48, 40


def picture(seed: int, width: int = WIDTH, height: int = HEIGHT, shapes: int = 5) -> Any:
    """A smooth picture in colours that no other seed has."""
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(40, 216, (shapes - 1, shapes, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


SEEN = picture(7)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder: two classes, three pictures of each to learn from and two to test on; no two look alike."""
    return filled(tmp_path / "photos")


def filled(root: Path, parts: dict[str, int] | None = None, classes: tuple[str, ...] = ("cat", "dog")) -> Path:
    seed = 100
    for part, count in (parts or {"train": 3, "val": 2}).items():
        for label in classes:
            (root / part / label).mkdir(parents=True)
            for at in range(count):
                seed += 1
                picture(seed).save(root / part / label / f"{at}.png")
    return root


class Heard(Silence):
    """What a person was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def prepared(root: Path, artifacts: Path, **config: Any) -> tuple[Dataset, list[str]]:
    """The data set of a folder, and what was told."""
    heard = Heard()
    with listening(heard):
        dataset = Chain(artifacts).data(DataPlan.model_validate({"source": str(root), "val_fraction": 0, **config}))
    return dataset, heard.lines


def names(dataset: Dataset, *parts: str) -> list[str]:
    samples = [sample for part in parts or ("train", "val", "test") for sample in dataset.samples(part)]
    return [f"{sample.path.parent.name}/{sample.path.name}" for sample in samples]


# ---- formats and oddities ------------------------------------------------------------------------------------


def saved(**settings: Any) -> Callable[[Path], object]:
    """Writes the picture as Pillow does for the file's name, or for ``format``."""
    return lambda path: SEEN.save(path, **settings)


def turned(path: Path) -> None:
    """As a camera held upright writes it: the pixels lie on their side, and EXIF says so."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    SEEN.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)


def as_mode(mode: str, **settings: Any) -> Callable[[Path], object]:
    return lambda path: SEEN.convert(mode).save(path, **settings)


def photoshop(path: Path) -> None:
    planes = np.moveaxis(np.asarray(SEEN), 2, 0).tobytes()
    head = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, HEIGHT, WIDTH, 8, 3)
    path.write_bytes(head + struct.pack(">IIIH", 0, 0, 0, 0) + planes)


def wide(path: Path) -> None:
    """Sixteen bits a channel: grey, as PNG has it without colours."""
    from PIL import Image

    Image.fromarray(np.asarray(SEEN.convert("L")).astype(np.uint16) * 257).save(path)


def linked(path: Path) -> None:
    real = path.parent.parent.parent.parent / "elsewhere.png"
    SEEN.save(real)
    path.symlink_to(real)


def written(content: bytes | str) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda path: path.write_bytes(data)


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    SEEN.save(stream, kind)
    return stream.getvalue()


def huge_header(path: Path) -> None:
    """A PNG that says it has 400 million pixels."""
    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    import zlib

    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def heif(path: Path, on_its_side: bool = False) -> None:
    """HEIC says by itself how it is turned, as phones write it."""
    from PIL import Image

    look(path)  # whatever is there: by it Pillow is taught HEIC
    stored = SEEN
    if on_its_side:
        exif = Image.Exif()
        exif[0x0112] = 6
        stored = SEEN.transpose(Image.Transpose.ROTATE_90)
        stored.info["exif"] = exif.tobytes()
    stored.save(path, "HEIF", quality=95)


class Oddity(NamedTuple):
    """A file of this name in a class folder, and what becomes of it."""

    name: str
    write: Callable[[Path], object]
    fate: str  # read; not read; broken
    says: str = ""  # read: its format; else a word of the line that is told
    within: float = 0.0  # mean difference of pixels


READ = [
    Oddity("a.JPG", saved(quality=95), "read", "JPEG", 5),
    Oddity("a.jpeg", saved(quality=95, progressive=True), "read", "JPEG", 5),
    Oddity("a.jfif", saved(format="JPEG", quality=95), "read", "JPEG", 5),
    Oddity("a.png", saved(), "read", "PNG"),
    Oddity("a.webp", saved(lossless=True), "read", "WEBP"),
    Oddity("a.avif", saved(quality=95), "read", "AVIF", 5),
    Oddity("a.heic", heif, "read", "HEIF", 5),
    Oddity("a.HEIF", lambda path: heif(path, on_its_side=True), "read", "HEIF", 5),
    Oddity("a.tif", saved(), "read", "TIFF"),
    Oddity("a.tiff", saved(compression="tiff_lzw"), "read", "TIFF"),
    Oddity("a.bmp", saved(), "read", "BMP"),
    Oddity("a.dib", saved(), "read", "DIB"),
    Oddity("a.gif", saved(save_all=True, append_images=[picture(8), picture(9)]), "read", "GIF", 12),
    Oddity("a.ppm", saved(), "read", "PPM"),
    Oddity("a.jp2", saved(), "read", "JPEG2000", 1),
    Oddity("a.qoi", saved(), "read", "QOI"),
    Oddity("a.dds", saved(), "read", "DDS"),
    Oddity("a.psd", photoshop, "read", "PSD"),
    Oddity("a.sgi", saved(), "read", "SGI"),
    Oddity("a.pcx", saved(), "read", "PCX"),
    Oddity("a.tga", saved(), "read", "TGA"),
    Oddity("a.ico", saved(sizes=[(WIDTH, HEIGHT)]), "read", "ICO"),
    Oddity("a.mpo", saved(save_all=True, append_images=[picture(8)], quality=95), "read", "MPO", 5),
    Oddity("IMG_0001", saved(format="JPEG", quality=95), "read", "JPEG", 5),
    Oddity("IMG_0002", heif, "read", "HEIF", 5),
    Oddity("a png.jpg", saved(format="PNG"), "read", "PNG"),
    Oddity("on its side.jpg", turned, "read", "JPEG", 5),
    Oddity("grey.png", as_mode("L"), "read", "PNG", 40),
    Oddity("sixteen.png", wide, "read", "PNG", 40),
    Oddity("cmyk.jpg", as_mode("CMYK", quality=95), "read", "JPEG", 6),
    Oddity("lab.tif", as_mode("LAB"), "read", "TIFF", 6),
    Oddity("palette.png", as_mode("P"), "read", "PNG", 25),
    Oddity("deep/er/a.png", saved(), "read", "PNG"),
    Oddity("link.png", linked, "read", "PNG"),
]
NOT_READ = [
    Oddity("notes.txt", written("not an image"), "not read", r"\.txt files: 1 \(such as train/cat/notes.txt\)"),
    Oddity("LABELS", written("cat dog"), "not read", r"files without suffix: 1 \(such as train/cat/LABELS\)"),
    Oddity(".DS_Store", written(b"\0\0\0\1Bud1"), "not read", r"files without suffix: 1"),
    Oddity("a.svg", written("<svg xmlns='http://www.w3.org/2000/svg'/>"), "not read", r"\.svg files: 1"),
    Oddity("a.eps", saved(format="EPS"), "not read", r"\.eps files: 1"),
    Oddity(".ipynb_checkpoints/a.png", saved(), "not read", r"hidden folders: 1 \(such as train/cat/.ipynb"),
    Oddity("__MACOSX/._a.png", written(b"\0\5\x16\7"), "not read", r"hidden folders: 1"),
    Oddity(
        "back", lambda path: path.symlink_to(path.parent), "not read", r"links back to a folder that they lie in: 1"
    ),
    Oddity(
        "far", lambda path: path.symlink_to(path.parents[2]), "not read", r"links back to a folder that they lie in: 1"
    ),
    Oddity("gone", lambda path: path.symlink_to("nowhere"), "not read", r"links to nowhere, pipes and the like: 1"),
]
BROKEN = [
    Oddity("cut.jpg", written(encoded("JPEG")[:-60]), "broken", "truncated"),
    Oddity("cut.png", written(encoded("PNG")[:200]), "broken", "truncated"),
    Oddity("empty.png", written(b""), "broken", "no image of a format that is read"),
    Oddity("page.jpg", written("<html>not found</html>"), "broken", "no image of a format that is read"),
    Oddity("._a.jpg", written(b"\0\5\x16\7\0\2\0\0Mac OS X"), "broken", "no image of a format that is read"),
    Oddity("post.png", saved(format="EPS"), "broken", "no image of a format that is read"),
    Oddity("dangling.jpg", lambda path: path.symlink_to("nowhere.jpg"), "broken", "a link to nowhere"),
    Oddity("circle.jpg", lambda path: path.symlink_to(path), "broken", "a link to nowhere"),
    Oddity("pipe.jpg", os.mkfifo, "broken", "neither a file nor a folder"),
    Oddity("huge.png", huge_header, "broken", "400000000 pixels"),
    Oddity("torn.heic", written(b"\0\0\0\x18ftypheic\0\0\0\0heicmif1"), "broken", "no image of a format that is read"),
]


@pytest.mark.parametrize("oddity", [*READ, *NOT_READ, *BROKEN], ids=lambda oddity: oddity.name)
def test_images_as_they_come(folder: Path, tmp_path: Path, oddity: Oddity) -> None:
    """Each alone in a good folder: read as it looks, or counted and named, or refused by name and left out if asked."""
    path = folder / "train" / "cat" / oddity.name
    path.parent.mkdir(parents=True, exist_ok=True)
    oddity.write(path)
    artifacts = tmp_path / "artifacts"
    data = ["data", folder, "--val-fraction", 0, "--artifacts", artifacts]
    done = kdpipe(*data)
    if oddity.fate == "broken":
        assert_one_line(done, 2, f"cannot read image {path}", oddity.says, "replace or remove it", "--skip-broken")
        assert done.stdout == "" and not list(artifacts.glob("data*"))
        done = kdpipe(*data, "--skip-broken")
        assert f"1 image cannot be read, left out: train/cat/{oddity.name} (" in done.stderr
    assert done.returncode == 0, done.stderr
    dataset = Dataset.open(done.stdout.splitlines()[-1])
    found = {str(sample.path): sample for sample in dataset.samples("train")}
    assert (str(path) in found) == (oddity.fate == "read") and len(found) == 6 + (oddity.fate == "read")
    told = [line for line in done.stderr.splitlines() if line.startswith("data: ")]
    if oddity.fate == "read":
        pixels = np.asarray(found[str(path)].image()).astype(int)
        assert pixels.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(pixels - np.asarray(SEEN).astype(int)).mean() <= oddity.within
        assert dataset.survey.formats[oddity.says] >= 1 and not told
    elif oddity.fate == "not read":
        assert len(told) == 1 and re.search("not read: .*" + oddity.says, told[0]), told


def test_every_format_is_in_the_table() -> None:
    assert {oddity.says for oddity in READ} == {*FORMATS, "MPO"}
    assert len([*READ, *NOT_READ, *BROKEN]) >= 30


def test_no_other_program_is_started_for_an_image(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would hand PostScript to Ghostscript, whatever the file is called."""
    commands = tmp_path / "commands"
    commands.mkdir()
    (commands / "gs").write_text(f"#!/bin/sh\necho started >> {tmp_path}/started\n")
    (commands / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(commands), prepend=os.pathsep)
    SEEN.save(folder / "train" / "cat" / "a.jpg", "EPS")
    with pytest.raises(UserError, match=r"a\.jpg \(no image of a format that is read\)"):
        prepared(folder, tmp_path / "artifacts")
    assert not (tmp_path / "started").exists()


WITHOUT_HEIF = """
import sys
sys.modules["pillow_heif"] = None  # as if it were not installed
from kdpipe.cli import main
main()
"""


@pytest.mark.parametrize("name", ["a.heic", "renamed.jpg"])
def test_heic_without_its_package_is_one_line_with_the_cure(folder: Path, tmp_path: Path, name: str) -> None:
    heif(folder / "train" / "cat" / name)
    arguments = ["data", str(folder), "--artifacts", str(tmp_path / "artifacts"), "--skip-broken"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_HEIF, *arguments], capture_output=True, text=True, check=False, timeout=1800
    )
    assert_one_line(done, 2, f"cat/{name} is HEIC", "pip install 'kdpipe[heic]'")
    assert not list((tmp_path / "artifacts").glob("data*"))


# ---- broken images -------------------------------------------------------------------------------------------


def break_three(folder: Path) -> list[str]:
    broken = ["train/cat/0.png", "train/dog/._1.png", "val/dog/1.png"]
    for name in broken:
        (folder / name).write_bytes(b"broken")
    (folder / "val/cat/gone.jpg").symlink_to("nowhere")
    return [*broken, "val/cat/gone.jpg"]


@pytest.mark.parametrize("settings", [{}, {"store": "resized", "store_side": 24}], ids=["as they are", "in copies"])
def test_broken_images_are_named_all_at_once(folder: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    broken = break_three(folder)
    with pytest.raises(UserError, match=r"cannot read 4 images below .*photos: ") as caught:
        prepared(folder, tmp_path / "artifacts", **settings)
    assert all(name in str(caught.value) for name in broken) and "--skip-broken" in str(caught.value)
    assert not list((tmp_path / "artifacts").glob("data*"))
    dataset, told = prepared(folder, tmp_path / "artifacts", skip_broken=True, **settings)
    assert dataset.facts.images == {"train": 5, "val": 0, "test": 3}
    assert dataset.survey.left_out == 4 and {each.image for each in dataset.survey.broken} == set(broken)
    assert [line for line in told if line.startswith("data: ")] == [line for line in told if "cannot be read" in line]
    assert any("data: 4 images cannot be read, left out" in line for line in told)
    for part in ("train", "test"):
        for sample in dataset.samples(part):
            assert np.abs(np.asarray(sample.image().resize((8, 8))).astype(int)
                          - np.asarray(decode(sample.path).resize((8, 8)))).mean() < 25  # fmt: skip
    again, told = prepared(folder, tmp_path / "artifacts", **settings)
    assert again.path == dataset.path and told == ["data: images that cannot be read were left out when it was made: 4"]


def test_broken_photographs_are_named_before_anything_is_sealed(tmp_path: Path) -> None:
    """Also those that are held out, which are decoded for the networks later."""
    for seed, (part, label, at) in enumerate(itertools.product(("train", "val"), ("cat", "dog"), range(3))):
        path = tmp_path / "photos" / part / label / f"{at}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed, 800, 600).save(path)
    spec = InputSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=0.875, interpolation="bilinear")
    for name in ("train/cat/1.jpg", "val/dog/2.jpg"):
        content = (tmp_path / "photos" / name).read_bytes()
        (tmp_path / "photos" / name).write_bytes(content[: len(content) // 2])
    plan = DataPlan(source=str(tmp_path / "photos"), val_fraction=0)
    chain = Chain(tmp_path / "artifacts")
    with pytest.raises(UserError, match=r"cannot read 2 images .*train/cat/1.jpg \(.*val/dog/2.jpg \("):
        chain.data(plan, wants=lambda: Wants((spec,), 64))
    assert not list((tmp_path / "artifacts").glob("*-*"))
    dataset = chain.data(plan.model_copy(update={"skip_broken": True}), wants=lambda: Wants((spec,), 64))
    assert dataset.facts.images == {"train": 5, "val": 0, "test": 5} and dataset.facts.copies.resized == 5
    assert len(dataset.fitted) == 1 and dataset.survey.seen == 10


def test_very_many_broken_images_are_still_one_line(folder: Path, tmp_path: Path) -> None:
    for at in range(1500):
        (folder / "train" / "cat" / f"broken-{at:04d}.jpg").write_bytes(b"")
    done = kdpipe("data", folder, "--artifacts", tmp_path / "artifacts")
    assert_one_line(done, 2, "cannot read 1500 images", "train/cat/broken-0000.jpg", "more: replace", "in a recipe)")
    dataset, told = prepared(folder, tmp_path / "artifacts", skip_broken=True)
    assert dataset.survey.left_out == 1500 and len(dataset.survey.broken) == 1000
    assert "and 1497 more" in told[0]


def test_what_is_not_looked_at_cannot_be_left_out(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.skip_broken wants data\.check all"):
        prepared(folder, tmp_path / "artifacts", skip_broken=True, check="none")
    (folder / "train/cat/0.png").write_bytes(b"broken")
    unchecked, _ = prepared(folder, tmp_path / "artifacts", check="none")
    assert unchecked.facts.images["train"] == 6 and unchecked.survey.seen == 0
    with pytest.raises(UserError, match=r"was made with data\.check none, .*: remove it"):
        prepared(folder, tmp_path / "artifacts", skip_broken=True)
    shutil.rmtree(unchecked.path)
    made, _ = prepared(folder, tmp_path / "artifacts", skip_broken=True)
    assert made.facts.images["train"] == 5 and made.key == unchecked.key


# ---- keys ----------------------------------------------------------------------------------------------------


def test_the_key_changes_only_with_what_is_read(folder: Path, tmp_path: Path) -> None:
    artifacts = tmp_path / "artifacts"
    first, _ = prepared(folder, artifacts)
    (folder / "train/cat/notes.txt").write_text("new")
    (folder / "train/cat/.ipynb_checkpoints").mkdir()
    shutil.copy(folder / "train/cat/0.png", folder / "train/cat/.ipynb_checkpoints/0-checkpoint.png")
    (folder / "README").write_text("new")
    (folder / "raw/cat").mkdir(parents=True)
    picture(1).save(folder / "raw/cat/1.png")
    picture(2).save(folder / "train/stray.png")
    for settings in ({}, {"duplicates": "refuse"}, {"duplicates": "allow"}, {"skip_broken": True}, {"check": "none"}):
        again, _ = prepared(folder, artifacts, **settings)
        assert again.path == first.path
    picture(3).save(folder / "train/cat/new.gif")
    assert prepared(folder, artifacts)[0].key != first.key
    (folder / "train/cat/new.gif").unlink()
    assert prepared(folder, artifacts)[0].key == first.key
    others = {each.kind: each.count for each in prepared(folder, tmp_path / "other")[0].survey.not_read}
    outside = {"files that lie in no class folder": 2, "folders that no part is read from": 1}
    assert others == {".txt files": 1, "hidden folders": 1, **outside}


# ---- the same image twice ------------------------------------------------------------------------------------


def test_copies_of_held_out_images_are_left_out_of_what_is_learned_from(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "val/cat/0.png", folder / "train/cat/leaked.png")
    shutil.copy(folder / "train/dog/0.png", folder / "train/dog/again.png")  # twice in one part: told nobody
    dropped, told = prepared(folder, tmp_path / "artifacts")
    assert "cat/leaked.png" not in names(dropped, "train") and "dog/again.png" in names(dropped, "train")
    assert told == [
        "data: 1 image to learn from left out, the same as validation or test images: "
        "such as train/cat/leaked.png (train) and val/cat/0.png (test)"
    ]
    assert dropped.survey.copies_left_out == 1 and dropped.survey.repeated == 1
    kept, told = prepared(folder, tmp_path / "artifacts", duplicates="allow")
    assert "cat/leaked.png" in names(kept, "train") and kept.key != dropped.key
    [line] = told
    assert line.startswith("data: 1 image held out and in another part too: such as train/cat/leaked.png (train) and")
    with pytest.raises(
        UserError, match=r"1 image to learn from found among .* test images too, such as train/cat/leaked"
    ):
        prepared(folder, tmp_path / "fresh", duplicates="refuse")
    assert not list((tmp_path / "fresh").glob("data*"))


def test_copies_are_left_out_of_cut_parts_too(folder: Path, tmp_path: Path) -> None:
    """Copies within one folder end up on both sides when it is cut."""
    for at in range(12):
        for copy in range(2):
            picture(at).save(folder / "train" / ("cat", "dog")[at % 2] / f"{at}-{copy}.png")
    dataset, _ = prepared(folder, tmp_path / "artifacts", test_split=None, test_fraction=0.3, val_fraction=0.3)
    contents = {
        part: {sample.path.read_bytes() for sample in dataset.samples(part)} for part in ("train", "val", "test")
    }
    assert not contents["train"] & contents["test"] and not contents["train"] & contents["val"]
    assert not contents["val"] & contents["test"]
    assert dataset.survey.copies_left_out > 0


def test_an_image_under_two_labels_is_told_and_not_judged(folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "train/cat/0.png", folder / "train/dog/what.png")
    dataset, told = prepared(folder, tmp_path / "artifacts")
    assert len(names(dataset, "train")) == 7
    assert told == [
        "data: 2 images under two labels, the same contents: such as train/cat/0.png (cat) and train/dog/what.png (dog)"
    ]


def test_images_that_look_alike_are_told(folder: Path, tmp_path: Path) -> None:
    """Saved again, smaller and in another format: other contents, the same picture."""
    for seed, (part, label) in enumerate((("val", "cat"), ("train", "cat"))):
        seen = picture(seed, 120, 100, shapes=16)
        seen.save(folder / part / label / "seen.png")
        seen.resize((90, 75)).save(folder / "train" / ("cat", "dog")[seed] / f"again-{seed}.jpg", quality=75)
    dataset, told = prepared(folder, tmp_path / "artifacts")
    assert len(names(dataset, "train")) == 9, "told, not judged"
    assert told == [
        "data: 1 image held out and like one of another part by the looks (judge by eye): "
        "such as train/cat/again-0.jpg (train) and val/cat/seen.png (test)",
        "data: 2 images like one of another label by the looks (judge by eye): "
        "such as train/cat/seen.png (cat) and train/dog/again-1.jpg (dog)",
    ]
    assert dataset.survey.hashed == 14


def hashed(*pictures: Any) -> list[int]:
    """The perceptual hashes of pictures, as files are hashed."""
    with tempfile.TemporaryDirectory() as name:
        found = []
        for at, each in enumerate(pictures):
            each.save(Path(name) / f"{at}.png")
            found.append(look(Path(name) / f"{at}.png")[1])
    return perceptual_hashes(found)


def test_small_and_flat_pictures_say_nothing_of_each_other() -> None:
    from PIL import Image

    small, large = hashed(picture(1, 31, 40), picture(1, 32, 40))
    assert small == 0 and large != 0
    flat = [Image.new("RGB", (64, 64), colour) for colour in ((0, 0, 0), (255, 255, 255), (90, 10, 200))]
    assert hashed(*flat) == [0, 0, 0]


def test_hashes_are_those_of_the_library_for_them() -> None:
    import imagehash

    pictures = [picture(seed, 60 + seed, 50, shapes=12) for seed in range(40)]
    assert hashed(*pictures) == [int(str(imagehash.phash(each)), 16) for each in pictures]


def test_the_digits_do_not_drown_in_warnings(made: Made) -> None:
    survey = made.dataset.survey
    assert findings(survey, made.dataset.classes) == []
    assert survey.seen == 1797 and survey.hashed == 0 and survey.copies_left_out == 0


def test_look_alikes_are_found_among_many_in_bounded_time() -> None:
    generator = np.random.default_rng(0)
    hashes = generator.integers(1, 2**64, 20_000, np.uint64)
    hashes[1000:1003] = hashes[0] ^ np.array([0, 1 << 63, 0b111 << 20], np.uint64)
    hashes[2000] = hashes[0] ^ np.uint64(0b1111 << 20)  # four bits
    sides = np.zeros(20_000, int)
    sides[1000:2001] = 2
    found = find_look_alikes(hashes, np.zeros(20_000, np.uint64), sides, np.zeros(20_000, int))
    assert np.flatnonzero(found.in_two_parts).tolist() == [1000, 1001, 1002]
    assert not found.under_two_labels.any()
    # All the same: no more pairs are kept than are named.
    found = find_look_alikes(np.full(20_000, 5, np.uint64), np.zeros(20_000, np.uint64), sides, np.arange(20_000))
    assert len(found.pairs_in_two_parts) <= 20 and len(found.pairs_under_two_labels) <= 20
    assert found.under_two_labels.all()


def test_copies_in_several_parts_are_all_counted() -> None:
    digests = np.array([5, 5, 5, 5, 7, 0, 0, 9, 9], np.uint64)  # 0: not known
    sides = np.array([2, 0, 0, 1, 0, 0, 2, 0, 0])
    labels = np.array([1, 1, 0, 1, 2, 2, 2, -1, 3])
    found, repeated = find_copies(digests, sides, labels)
    assert np.flatnonzero(found.in_two_parts).tolist() == [0, 3]
    assert {1, 2} <= set(np.flatnonzero(found.under_two_labels)) and 8 not in np.flatnonzero(found.under_two_labels)
    assert repeated == 0


# ---- parts and classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names_of_parts", [("train", "valid"), ("training", "validation"), ("Train", "TEST"), ("train", "testing")]
)
def test_parts_are_found_by_their_usual_names(tmp_path: Path, names_of_parts: tuple[str, str]) -> None:
    train, test = names_of_parts
    root = filled(tmp_path / "photos", {train: 3, test: 2})
    dataset, told = prepared(root, tmp_path / "artifacts")
    assert dataset.facts.images == {"train": 6, "val": 0, "test": 4}
    renamed = [name for name in names_of_parts if name != "train"]
    assert [line for line in told if "is taken" in line] == told and len(told) == len(renamed)
    assert all(any(f"'{name}' is taken" in line for line in told) for name in renamed)
    named, told = prepared(root, tmp_path / "artifacts", train_split=train, test_split=test)
    assert named.path == dataset.path and told == []


def test_a_folder_of_classes_needs_no_parts(tmp_path: Path) -> None:
    root = tmp_path / "photos"
    for at, label in enumerate(("cat", "dog", "val d'or")):
        (root / label).mkdir(parents=True)
        for number in range(10):
            picture(100 * at + number).save(root / label / f"{number}.png")
    dataset, told = prepared(root, tmp_path / "artifacts")
    assert dataset.classes == ["cat", "dog", "val d'or"] and dataset.facts.images == {"train": 24, "val": 0, "test": 6}
    assert told == [f"{root} has no parts: its 3 folders are the classes, and test images are cut from them"]
    named, _ = prepared(root, tmp_path / "artifacts", train_split=".", test_split=None)
    assert named.path == dataset.path
    (root / "val").mkdir()  # a folder that is called as a part is no class
    with pytest.raises(UserError, match=r"no folder .*train: wanted"):
        prepared(root, tmp_path / "artifacts")


def test_artifacts_among_the_images_are_no_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started in the folder of the images, twice, with the classes right there and in parts."""
    for root, parts in ((tmp_path / "flat", {".": 5}), (tmp_path / "parts", {"train": 3, "val": 2})):
        monkeypatch.chdir(filled(root, parts))
        lines = []
        for _ in range(2):
            done = kdpipe("data", ".", "--val-fraction", 0)
            assert done.returncode == 0, done.stderr
            assert "not read" not in done.stderr + done.stdout
            lines.append(done.stdout.splitlines()[-1])
        assert lines[0] == lines[1] and Dataset.open(lines[0]).classes == ["cat", "dog"]


def test_one_part_cannot_be_both(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train_split and data\.test_split are both 'train'"):
        prepared(folder, tmp_path / "artifacts", test_split="train")


def test_what_was_found_instead_of_images_is_named(folder: Path, tmp_path: Path) -> None:
    for path in (folder / "val").rglob("*.png"):
        path.rename(path.with_suffix(".cr2"))
    with pytest.raises(
        UserError, match=r"no images in .*val: wanted .*, found \.cr2 files: 4 \(such as val/cat/0.cr2\)"
    ):
        prepared(folder, tmp_path / "artifacts")


def test_parts_that_are_not_read_are_named(tmp_path: Path) -> None:
    root = filled(tmp_path / "photos", {"train": 3, "val": 2, "more": 2})
    dataset, told = prepared(root, tmp_path / "artifacts")
    assert dataset.facts.images["test"] == 4
    assert told == ["data: not read: folders that no part is read from: 1 (such as more)"]


def test_the_test_part_is_held_out_and_the_validation_part_chosen_on(tmp_path: Path) -> None:
    """Where both are there, by any of their names; what is named is taken as it is named, and init says the same."""
    root = filled(tmp_path / "photos", {"train": 3, "Validation": 2, "testing": 1})
    dataset, told = prepared(root, tmp_path / "artifacts", val_fraction=0.1)
    assert dataset.facts.images == {"train": 6, "val": 4, "test": 2}
    assert [line for line in told if "is taken" in line] == [
        f"{root}: 'testing' is taken as the held-out part",
        f"{root}: 'Validation' is taken as the part for selection, so that none is cut from 'train'",
    ]
    assert all("/Validation/" in str(sample.path) for sample in dataset.samples("val"))
    done = kdpipe("init", root, "--model", "resnet18", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = read_recipe(tmp_path / "photos.yaml").data
    assert (plan.test_split, plan.val_split) == ("testing", "Validation")
    chain = Chain(tmp_path / "artifacts")
    assert chain.data(plan).path == dataset.path and chain.steps[-1].sealed_before

    for settings, images in (
        ({"val_fraction": 0.0}, {"train": 6, "val": 0, "test": 2}),  # none is wanted
        ({"val_fraction": 0.4, "val_split": None}, {"train": 4, "val": 2, "test": 2}),
        ({"val_fraction": 0.4, "test_split": "Validation"}, {"train": 4, "val": 2, "test": 4}),
        ({"val_fraction": 0.4, "test_split": "Validation", "val_split": "testing"}, {"train": 6, "val": 2, "test": 4}),
    ):
        found, _ = prepared(root, tmp_path / "artifacts", **settings)
        assert found.facts.images == images, settings
    with pytest.raises(UserError, match=r"data\.test_split and data\.val_split are both 'testing'"):
        prepared(root, tmp_path / "artifacts", test_split="testing", val_split="testing")
    with pytest.raises(UserError, match=r"no folder .*chosen: wanted .* or data\.val_split: null to cut one"):
        prepared(root, tmp_path / "artifacts", val_split="chosen")
    picture(1).save(root / "Validation/cat/0.png")
    changed, _ = prepared(root, tmp_path / "artifacts", val_fraction=0.1)
    assert changed.path != dataset.path, "a changed image of any part makes another data set"


def test_a_test_part_without_labels_is_none(tmp_path: Path) -> None:
    """As competitions ship it: images in no class's folder."""
    root = filled(tmp_path / "photos", {"train": 3, "val": 2})
    (root / "test" / "images").mkdir(parents=True)
    picture(0).save(root / "test" / "images" / "0.png")
    dataset, _ = prepared(root, tmp_path / "artifacts", val_fraction=0.4)
    assert dataset.facts.images == {"train": 4, "val": 2, "test": 4}
    kdpipe("init", root, "--model", "resnet18", "--yes", cwd=tmp_path)
    plan = read_recipe(tmp_path / "photos.yaml").data
    assert (plan.test_split, plan.val_split) == ("val", "auto")


def test_a_class_with_one_image_is_told_for_what_it_is(folder: Path, tmp_path: Path) -> None:
    for name in ("1.png", "2.png"):
        (folder / "train/cat" / name).unlink()
    for settings, wanted in (
        (
            {"val_fraction": 0.1},
            r"class 'cat' has 1 training image, of which validation \(data\.val_fraction 0\.1\) takes one",
        ),
        (
            {"val_fraction": 0.1, "test_split": None},
            r"take one each: wanted at least 3; add some or remove the class, or set",
        ),
        (
            {"val_fraction": 0, "test_split": None},
            r"of which test \(data\.test_fraction 0\.2\) takes one: wanted at least 2; add some or remove the class$",
        ),
    ):
        with pytest.raises(UserError, match=wanted) as caught:
            prepared(folder, tmp_path / "artifacts", **settings)
        assert "\n" not in str(caught.value)
    dataset, told = prepared(folder, tmp_path / "artifacts")
    assert told == ["data: a single training image: cat"]
    assert dataset.survey.by_class == {"train": (1, 3), "val": (0, 0), "test": (2, 2)}


def test_a_class_that_copies_and_broken_images_leave_empty(folder: Path, tmp_path: Path) -> None:
    for at in range(3):
        shutil.copy(folder / "val/cat/0.png", folder / f"train/cat/{at}.png")
    with pytest.raises(UserError, match=r"class 'cat' has 3 training images, and none is left \(3 copies of held-out"):
        prepared(folder, tmp_path / "artifacts")


def test_a_handful_of_images_for_many_classes_is_not_all_held_out(folder: Path, tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("cat\ndog\nhorse\n")
    for label in ("cat", "dog"):
        for name in ("1.png", "2.png"):
            (folder / "train" / label / name).unlink()
    with pytest.raises(UserError, match=r"set data\.val_fraction to 0"):
        prepared(folder, tmp_path / "artifacts", classes=listed, val_fraction=0.1)
    assert prepared(folder, tmp_path / "artifacts", classes=listed)[0].facts.images["train"] == 2


def test_classes_that_a_part_lacks_are_named(tmp_path: Path) -> None:
    root = filled(tmp_path / "photos", classes=("cat", "dog", "fox"))
    shutil.rmtree(root / "val" / "dog")
    assert prepared(root, tmp_path / "artifacts")[1] == ["data: 'test' has no image of dog"]


# ---- the report ----------------------------------------------------------------------------------------------


def test_the_data_report(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    picture(1, 100, 60).save(folder / "train/cat/large.jpg")
    done = kdpipe("data", folder, "--val-fraction", 0, "--artifacts", tmp_path / "artifacts")
    lines = done.stdout.splitlines()
    assert lines[:4] == [
        "11 images of 2 classes: train 7, val 0, test 4",
        "training images a class: 3 (dog) to 4 (cat), 1.3 times as many",
        "pixels: shorter side 40 to 60 (median 40), longer side 48 to 100 (median 48)",
        "formats: PNG 10, JPEG 1",
    ]
    dataset = Dataset.open(lines[-1])
    assert lines[4:-1] == [f"contact sheet: {dataset.path / 'contact-sheet.jpg'}"]
    with Image.open(dataset.path / dataset.SHEET) as sheet:
        sheet.load()
        assert sheet.format == "JPEG" and sheet.width > 12 * 72 and sheet.height > 72
        assert np.asarray(sheet).std() > 20, "there is something on it"
    found = json.loads(
        kdpipe("data", folder, "--val-fraction", 0, "--artifacts", tmp_path / "artifacts", "--json").stdout
    )
    assert found["survey"]["by_class"] == {"train": [4, 3], "val": [0, 0], "test": [2, 2]}
    assert found["survey"] == dataset.survey.model_dump(mode="json")


def test_the_data_report_says_what_it_knows_when_nothing_was_looked_at(folder: Path, tmp_path: Path) -> None:
    done = kdpipe("data", folder, "--check", "none", "--val-fraction", 0, "--artifacts", tmp_path / "artifacts")
    assert done.stdout.splitlines()[1:3] == [
        "3 training images of each class", "no image was looked at (data.check: none)",
    ]  # fmt: skip


def test_findings_are_told_again_with_the_report_of_a_sealed_data_set(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat/notes.txt").write_text("x")
    data = ["data", folder, "--val-fraction", 0, "--artifacts", tmp_path / "artifacts"]
    first, second = kdpipe(*data), kdpipe(*data)
    line = "not read: .txt files: 1 (such as train/cat/notes.txt)"
    assert f"data: {line}" in first.stderr and line not in first.stdout
    assert line not in second.stderr and line in second.stdout.splitlines()


def test_the_report_of_many_classes_stays_small(tmp_path: Path) -> None:
    root = filled(
        tmp_path / "photos", {"train": 1, "val": 1}, tuple(f"class {at:03d} \N{GRINNING FACE}" for at in range(60))
    )
    dataset, told = prepared(root, tmp_path / "artifacts")
    assert told == ["data: a single training image: " + ", ".join(dataset.classes[:3]) + " and 57 more"]
    assert (dataset.path / dataset.SHEET).stat().st_size < 300_000


def test_tiny_images_are_shown_pixel_by_pixel(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / "photos"
    for part, label in itertools.product(("train", "val"), ("black", "white")):
        (root / part / label).mkdir(parents=True)
        Image.new("L", (8, 8), 255 * (label == "white")).save(root / part / label / "a.png")
    dataset, _ = prepared(root, tmp_path / "artifacts", duplicates="allow")
    with Image.open(dataset.path / dataset.SHEET) as sheet:
        pixels = np.asarray(sheet.convert("L"))
    assert abs(int((pixels < 20).sum()) - 72 * 72) < 72 * 8, "nine times as large, and the letters"


def test_the_page_shows_the_images(folder: Path, tmp_path: Path) -> None:
    (folder / "train/cat/<b>.txt").write_text("x")
    dataset, _ = prepared(folder, tmp_path / "artifacts")
    numbers = image_numbers(dataset)
    assert numbers["classes"] == [{"name": "cat", "images": [3, 0, 2]}, {"name": "dog", "images": [3, 0, 2]}]
    assert numbers["parts"] == ["train", "val", "test"] and "<b>" in numbers["findings"][0]
    assert contact_sheet(dataset).startswith("data:image/jpeg;base64,/9j/")
    assert image_numbers(None) is None and contact_sheet(None) == ""


def test_the_made_page_has_the_data_report(made: Made) -> None:
    page = made.report.file(made.report.PAGE).read_text()
    section = page.partition("<h2>The images</h2>")[2].partition("<h2>")[0]
    images = made.dataset.facts.images
    assert f"1797 images of 10 classes: train {images['train']}, val {images['val']}, test {images['test']}" in section
    assert section.count('<img src="data:image/jpeg;base64,') == 1
    assert made.report.numbers["images"]["classes"][0]["images"][2] == made.dataset.survey.by_class["test"][0]


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["by_class"].update(train=[1]),
        lambda value: value["by_class"].pop("train"),
        lambda value: value.update(check="perhaps"),
        lambda value: value.update(more=1),
    ],
)
def test_a_strangers_survey_is_one_line(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    dataset, _ = prepared(folder, tmp_path / "artifacts")
    value = json.loads((dataset.path / dataset.SURVEY).read_text())
    change(value)
    replace_file(dataset.path, dataset.SURVEY, json.dumps(value).encode())
    with pytest.raises(UserError, match="make the data again"):
        _ = Dataset.open(dataset.path).survey
    replace_file(dataset.path, dataset.SHEET, b"<svg onload='x'>")
    with pytest.raises(UserError, match="make the data again"):
        contact_sheet(Dataset.open(dataset.path))
