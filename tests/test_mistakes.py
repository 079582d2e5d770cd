"""What people get wrong, as one table: the exit code, one line that says what to do, and nothing half-written."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Made, Trained, assert_one_line, command, flip_a_byte, interruptible, kdpipe, kdpipe_process
from PIL import Image
from test_cli import HEAVY, run_and_list_modules

from kdpipe.core.config import BenchPlan, DistillPlan, ExportPlan, QuantizePlan, TrainSettings
from kdpipe.core.errors import did_you_mean
from kdpipe.core.kinds import Bundle
from kdpipe.export import TARGETS
from kdpipe.terminal import Bars

Change = Callable[[Path], object]  # of the folder in which the command is given


@dataclass(frozen=True)
class Mistake:
    """A command, in whose words {teacher}, {model} and the like stand for folders; and words of the line it ends with.

    ``change`` is made before to the folder, in which are ``photos`` and ``empty``.
    """

    call: str
    words: tuple[str, ...]
    change: Change = lambda folder: None
    exit_code: int = 2


def written(name: str, text: str | bytes) -> Change:
    """A file of that content."""
    return lambda folder: (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)


def recipe(**more: str) -> Change:
    """``my.yaml``, right but for what differs: a line of YAML a section."""
    lines = {
        "name": "mine",
        "data": "{source: photos}",
        "teacher": "{model: test_resnet, input: {size: 32}}",
        "student": "{model: test_resnet, input: {size: 32}}",
    }
    return written("my.yaml", "".join(f"{name}: {value}\n" for name, value in {**lines, **more}.items()))


def photo(name: str, content: bytes) -> Change:
    """A training image replaced, or added."""
    return written(f"photos/train/dark/{name}", content)


def truncated(folder: Path) -> None:
    path = folder / "photos/train/dark/01.png"
    path.write_bytes(path.read_bytes()[:-100])


def huge(folder: Path) -> None:
    """A picture of 200 megapixels, in a few kilobytes."""
    Image.new("1", (20_000, 10_000)).save(folder / "photos/train/dark/huge.png")


def dangling(folder: Path) -> None:
    (folder / "photos/train/dark/gone.jpg").symlink_to("nowhere.jpg")


def damaged(name: str) -> Change:
    """The bundle as ``damaged``, with another byte in one file."""
    return lambda folder: flip_a_byte(folder / "damaged" / name)


TEACHER = "teacher {dataset} --model test_resnet"
DISTILL = "distill {teacher} --model test_resnet"

MISTAKES = {
    # ---- the line itself
    "a command that is none": Mistake("exprot x", ("exprot", "--help")),
    "no recipe": Mistake("run", ("Missing argument", "--help")),
    "a recipe that is not there": Mistake("run none.yaml", ("no recipe at none.yaml",)),
    "a folder for a recipe": Mistake("run photos", ("cannot read photos", "wanted a YAML file")),
    "an option without its value": Mistake("doctor --target", ("--target", "--help")),
    "an option that is none": Mistake("data photos --sede 3", ("--sede", "--help")),
    "a word for a number": Mistake("bench {bundle} --rounds three", ("'rounds'", "found 'three'")),
    "an odd number of rounds": Mistake("bench {bundle} --rounds 3", ("'rounds'", "multiple of 2", "found 3")),
    "threads twice": Mistake("bench {bundle} --threads 1,1", ("'threads'", "every number of threads once")),
    "an effort that is none": Mistake("bench {bundle} --effort fast", ("'effort'", "'thorough'", "found 'fast'")),
    "a unit that is none": Mistake("bench {bundle} --rate 5mph", ("'rate'", "5fps", "found '5mph'")),
    "two wishes at once": Mistake("bench {bundle} --resume --again", ("choose one of them",)),
    "a bundle named twice": Mistake("bench {bundle} {bundle}", ("a bundle is named twice",)),
    "an input for a bundle": Mistake("bench {bundle} --input {size:32}", ("a bundle says by itself",)),
    "a model that is not there": Mistake("bench no.onnx", ("no file at no.onnx",)),
    "a device that nobody described": Mistake("bench {bundle} --device pi5", ("unknown device 'pi5'",)),
    # ---- artifacts
    "nothing there": Mistake("verify nowhere", ("no artifact at nowhere",)),
    "a folder that is no artifact": Mistake("verify photos", ("photos", "not an artifact")),
    "a dataset for a bundle": Mistake("verify {dataset}", ("is a dataset, wanted a bundle",)),
    "a bundle for a checkpoint": Mistake("export {bundle}", ("is a bundle, wanted a checkpoint",)),
    "a dataset for a model": Mistake("package {dataset}", ("is a dataset, wanted a model",)),
    "a bundle for a measurement": Mistake("report {bundle}", ("is no measurement",)),
    "a damaged model": Mistake("verify damaged", ("model.onnx", "differs from its manifest"), damaged("model.onnx")),
    "a damaged manifest": Mistake("verify damaged", ("manifest.json",), damaged("manifest.json")),
    "a file too many": Mistake("verify damaged", ("more.txt",), written("damaged/more.txt", "x")),
    "a target that is nearly one": Mistake(
        "export {student} --target onnx", ("unknown target 'onnx'", "did you mean 'onnxruntime'")
    ),
    "a target in capitals": Mistake("export {student} --target TFLite", ("did you mean 'tflite'",)),
    "a variant that is none": Mistake("quantize {model} --variant int9", ("unknown variant", "'int9'", "'int8'")),
    "several into one": Mistake("quantize {model} --variant auto --out x", ("leave --out away",)),
    "a loss below nothing": Mistake("quantize {model} --max-drop -1", ("'max_drop'", "greater than 0", "found -1")),
    "one image for parity": Mistake("export {student} --parity-images 1", ("'parity_images'", "found 1")),
    "no golden image": Mistake("package {model} --golden-images 0", ("'golden_images'", "found 0")),
    # ---- networks
    "a network that is none": Mistake(
        "teacher {dataset} --model resnet19", ("unknown model 'resnet19'", "did you mean")
    ),
    "no network": Mistake("teacher {dataset}", ("'model'", "field required")),
    "no checkpoint": Mistake(f"{TEACHER} --checkpoint no.pth", ("teacher.checkpoint: no file at no.pth",)),
    "a checkpoint that is none": Mistake(
        f"{TEACHER} --checkpoint junk.pth --input.size 32", ("junk.pth",), written("junk.pth", "x" * 99)
    ),
    "a tiny input": Mistake(f"{TEACHER} --input.size 4", ("'input.size'", "at least 8 pixels", "found 4")),
    "half a size": Mistake(f"{TEACHER} --input.size [24]", ("'input.size'", "[height, width]", "found [24]")),
    "one mean for three": Mistake(f"{TEACHER} --input.mean 0.5", ("'input.mean'", "list", "found 0.5")),
    "a method that is none": Mistake(f"{DISTILL} --method kdd", ("'method'", "'kd'", "found 'kdd'")),
    "more than all labels": Mistake(f"{DISTILL} --label-fraction 2", ("'label_fraction'", "found 2")),
    "no teacher": Mistake(
        "distill {dataset} --model test_resnet --input.size 32", ("method 'kd' needs a teacher", "give the folder")
    ),
    "an argument that the network lacks": Mistake(
        f"{DISTILL} --input.size 32 --model-args {{nonsense:1}}", ("'test_resnet'", "nonsense")
    ),
    "no views": Mistake("cache {teacher} --model test_resnet --views 0", ("'views'", "found 0")),
    "a share that is none": Mistake("cache {teacher} --model test_resnet --verify lots", ("--verify", "found 'lots'")),
    # ---- devices
    "a device and a way back": Mistake("deploy {bundle} --rollback", ("and not both",)),
    "nothing to deploy": Mistake("deploy", ("wanted the folder of a bundle",)),
    "deployed to nobody": Mistake("deploy {bundle} --device null", ("nothing lies on 'null'",)),
    "a kind of device that is none": Mistake("devices add pi5 shh pi@pi5", ("'shh'", "did you mean 'ssh'")),
    "a device without its address": Mistake("devices add pi5 ssh", ("'pi5' needs an address",)),
    "a name that is a path": Mistake("devices add ../pi5 ssh pi@pi5", ("'name'", "found '../pi5'")),
    "a name that is taken": Mistake("devices add local ssh pi@pi5", ("'local' is there by itself",)),
    "a device to forget": Mistake("devices remove pi5", ("unknown device 'pi5'",)),
    "an accelerator that is none": Mistake(
        "devices benchmark local {bundle} --accelerator tpu", ("unknown accelerator 'tpu'", "nnapi")
    ),
    "a key of devices.yaml": Mistake(
        "devices list", ("devices.yaml", "'adress'", "did you mean 'address'"),
        written("devices.yaml", "pi5: {kind: ssh, adress: pi}"),
    ),
    "a list of devices": Mistake(
        "devices list", ("devices.yaml", "wanted a mapping"), written("devices.yaml", "- pi5")
    ),
    "doctor of a target that is nearly one": Mistake("doctor --target onnx", ("did you mean 'onnxruntime'",)),
    # ---- predict
    "no image": Mistake("predict {bundle}", ("Missing argument",)),
    "an image that is not there": Mistake("predict {bundle} no.jpg", ("no image at no.jpg",)),
    "a folder without images": Mistake("predict {bundle} empty", ("no images below empty",)),
    "no label": Mistake("predict {bundle} photos --top 0", ("--top", "--help")),
    "images for a bundle": Mistake("predict photos photos", ("photos", "not an artifact")),
    "asked of nobody": Mistake("predict {bundle} photos --device null", ("nothing lies on 'null'",)),
    # ---- images
    "no data": Mistake("data nowhere", ("no data at 'nowhere'", "wanted 'digits', a folder")),
    "an empty folder": Mistake("data empty", ("empty/train: wanted",)),
    "a part that is not there": Mistake("data photos --test-split held", ("photos/held: wanted", "test_split")),
    "a training part that is not there": Mistake("data photos --train-split all", ("photos/all: wanted",)),
    "the digits' test part": Mistake("data digits", ("the digits have no test split",)),
    "a task that is none": Mistake("data photos --task clasification", ("did you mean 'classification'",)),
    "all for validation": Mistake("data photos --val-fraction 1", ("'val_fraction'", "less than 1", "found 1")),
    "a check that is none": Mistake("data photos --check some", ("'check'", "'sample'", "found 'some'")),
    "no list of classes": Mistake("data photos --classes no.txt", ("data.classes: no file at no.txt",)),
    "a class twice": Mistake(
        "data photos --classes c.txt", ("lists 'dark' twice",), written("c.txt", "dark\nlight\ndark\n")
    ),
    "nothing unlabelled": Mistake("data photos --unlabeled nowhere", ("data.unlabeled: no folder", "/nowhere")),
    "one class": Mistake(
        "data photos", ("at least two classes",),
        lambda folder: [shutil.rmtree(folder / "photos" / split / "light") for split in ("train", "val")],
    ),
    "a truncated image": Mistake("data photos", ("01.png",), truncated),
    "a text for an image": Mistake("data photos", ("notes.jpg",), photo("notes.jpg", b"no image at all")),
    "an image of 200 megapixels": Mistake("data photos", ("huge.png",), huge),
    "a dangling link": Mistake("data photos", ("gone.jpg",), dangling),
    # ---- recipes
    "a key twice": Mistake("run my.yaml", ("'name' is given twice",), written("my.yaml", "name: a\nname: b\n")),
    "a tab": Mistake("run my.yaml", ("my.yaml, line 2", "not YAML"), written("my.yaml", "data:\n\tsource: digits\n")),
    "bytes that are no text": Mistake("run my.yaml", ("cannot read my.yaml",), written("my.yaml", b"\xff\xfe\x00")),
    "a list for a recipe": Mistake("run my.yaml", ("wanted a mapping of name",), written("my.yaml", "- a\n")),
    "nothing but a name": Mistake("run my.yaml", ("'data'", "field required"), written("my.yaml", "name: a\n")),
    "a name that escapes": Mistake("run my.yaml", ("'name'", "found '../a'"), recipe(name="../a")),
    "a wrong key": Mistake(
        "run my.yaml", ("unknown key 'distill.temprature'", "did you mean 'temperature'"),
        recipe(distill="{temprature: 3}"),
    ),
    "a mapping for a list": Mistake(
        "run my.yaml", ("'export.targets'", "valid list", "found {'a': 1}"), recipe(export="{targets: {a: 1}}")
    ),
    "no seeds": Mistake("run my.yaml", ("'distill.seeds'", "list", "found []"), recipe(distill="{seeds: []}")),
    "a seed that is none": Mistake("run my.yaml", ("'distill.seeds.0'", "found 'x'"), recipe(distill="{seeds: x}")),
    "a target as a word": Mistake(
        "run my.yaml", ("unknown target 'onnx'", "did you mean 'onnxruntime'"), recipe(export="{targets: onnx}")
    ),
    "a variant as a word": Mistake("run my.yaml", ("unknown variant 'int9'",), recipe(quantize="{variants: int9}")),
    "a device as a word": Mistake("run my.yaml", ("unknown device 'pi5'",), recipe(bench="{devices: pi5}")),
    "a student of that name": Mistake(
        "run my.yaml", ("the name 'labels' is taken",), recipe(distill="{students: {labels: {temperature: 2}}}")
    ),
    "a student's network": Mistake(
        "run my.yaml", ("unknown model 'resnet19'",), recipe(student="{model: resnet19}")
    ),
    "a recipe's checkpoint": Mistake(
        "run my.yaml", ("teacher.checkpoint", "no.pth"), recipe(teacher="{model: test_resnet, checkpoint: no.pth}")
    ),
    "a recipe's images": Mistake("run my.yaml", ("no data at 'nowhere'",), recipe(data="{source: nowhere}")),
}  # fmt: skip


def everything_in(*folders: Path) -> dict[Path, int]:
    """Every file by its size, but the memory of hashes, which holds no result."""
    files = [path for folder in folders for path in folder.rglob("*") if ".fingerprints" not in path.parts]
    return {path: path.lstat().st_size for path in files if not path.is_dir()}


def model_in(packed: Bundle) -> Path:
    """What was packed, which lies beside it."""
    return packed.path.parent / f"onnxruntime-float32-{packed.manifest.inputs['model'].key[:12]}"


@pytest.fixture(scope="module")
def known(trained: Trained, packed: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What mistakes are made with, by role: copies in a folder in which nobody else works."""
    folders = {"bundle": packed.path, "model": model_in(packed), "dataset": trained.dataset.path}
    folders |= {"teacher": trained.teacher.path, "student": trained.student.path}
    place = tmp_path_factory.mktemp("known")
    return {role: shutil.copytree(path, place / path.name) for role, path in folders.items()}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(known: dict[str, Path], photos: Path, workdir: Path, name: str) -> None:
    mistake = MISTAKES[name]
    photos.rename(workdir / "photos")
    (workdir / "empty").mkdir()
    if "damaged" in mistake.call:
        shutil.copytree(known["bundle"], workdir / "damaged")
    mistake.change(workdir)
    before = everything_in(workdir, known["bundle"].parent)
    done = kdpipe(*words_of(mistake.call, known))
    assert_one_line(done, mistake.exit_code, *mistake.words)
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert done.stdout == ""
    assert everything_in(workdir, known["bundle"].parent) == before


def words_of(call: str, known: dict[str, Path]) -> list[str]:
    """As a shell parts them; a mapping is written without its space."""
    return [
        str(known.get(word[1:-1], word.replace(":", ": "))) if word.startswith("{") else word
        for word in call.split(" ")
    ]


def test_there_are_sixty() -> None:
    assert len(MISTAKES) >= 60


# ---- at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "change", "words"),
    [
        ("data nowhere", recipe(), ("no data at",)),
        ("run my.yaml", recipe(data="{source: nowhere}"), ("no data at",)),
        ("run my.yaml", recipe(teacher="{model: resnet19}"), ("unknown model 'resnet19'", "did you mean 'resnet")),
        ("run my.yaml", recipe(student="{model: resnet19}"), ("unknown model 'resnet19'",)),
        ("run my.yaml", recipe(student="{model: resnet50x.a1_in1k}"), ("unknown model 'resnet50x.a1_in1k'",)),
        ("run my.yaml", recipe(export="{targets: [onnx]}"), ("did you mean 'onnxruntime'",)),
        ("run my.yaml", recipe(quantize="{variants: [int9]}"), ("unknown variant",)),
        ("run my.yaml", recipe(bench="{rouds: 4}"), ("did you mean 'rounds'",)),
        ("run my.yaml", recipe(teacher="{model: test_resnet, checkpoint: a.pth}"), ("no file at",)),
        ("teacher {dataset} --model resnet19", recipe(), ("unknown model",)),
        ("distill {teacher} --model resnet19", recipe(), ("unknown model",)),
        ("cache {teacher} --model resnet19", recipe(), ("unknown model",)),
        ("export {student} --target onnx", recipe(), ("did you mean 'onnxruntime'",)),
    ],
)
def test_a_wrong_name_is_told_before_anything_heavy_is_loaded(
    trained: Trained, photos: Path, workdir: Path, call: str, change: Change, words: tuple[str, ...]
) -> None:
    """So that it takes no longer than a second or two, however slow the libraries are to load."""
    photos.rename(workdir / "photos")
    change(workdir)
    known = {role: getattr(trained, role).path for role in ("dataset", "teacher", "student")}
    done, loaded = run_and_list_modules(*words_of(call, known))
    assert_one_line(done, 2, *words)
    assert not loaded & (set(HEAVY) - {"numpy"})


@pytest.mark.lab
def test_every_network_passes_the_look_at_the_sources() -> None:
    """Names that timm or this package know, deprecated ones among them; in a process that has not loaded timm."""
    code = (
        "from kdpipe.networks import names\n"
        "registered, others = names._names()\n"
        "import json, timm, timm.models._registry as registry, kdpipe.networks.cifar\n"
        "known = {name.partition('.')[0] for name in [*timm.list_models(), *registry._deprecated_models]}\n"
        "print(json.dumps([sorted(known - registered - others), sorted(registered - known), len(known)]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lacking, too_many, count = json.loads(done.stdout)
    assert (lacking, too_many) == ([], []) and count > 1000


# ---- one for a list ----------------------------------------------------------------------------------------------


def test_a_single_value_is_a_list_of_one() -> None:
    assert ExportPlan.model_validate({"targets": "tflite"}) == ExportPlan(targets=("tflite",))
    assert QuantizePlan.model_validate({"variants": "int8"}).variants == ("int8",)
    assert QuantizePlan.model_validate({"variants": "auto"}).variants == "auto"
    assert BenchPlan.model_validate({"devices": "pi5", "threads": "1,2,all"}).threads == (1, 2, 0)
    assert BenchPlan.model_validate({"threads": 4}).threads == (4,)
    assert BenchPlan.model_validate({"threads": "all"}) == BenchPlan()
    assert DistillPlan.model_validate({"seeds": 3}).seeds == (3,)
    assert TrainSettings.model_validate({"milestones": 30}).milestones == (30,)


@pytest.mark.parametrize(
    ("word", "meant"),
    [("onnx", "onnxruntime"), ("TFLite", "tflite"), ("tensor", "tensorrt"), ("openvno", "openvino"), ("x", None)],
)
def test_near_words(word: str, meant: str | None) -> None:
    told = did_you_mean(word, ("onnxruntime", "openvino", "tensorrt", "tflite"))
    assert told == ("" if meant is None else f"; did you mean '{meant}'?")


# ---- streams -----------------------------------------------------------------------------------------------------


def in_shell(line: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command line as a shell has it, in which "$@" is the command."""
    return subprocess.run(
        ["/bin/bash", "-c", line, "bash", *command(*arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("arguments", [("--help",), ("doctor", "--json"), ("devices", "list"), ("doctor",)])
def test_a_full_disk_under_the_output(arguments: tuple[str, ...]) -> None:
    done = in_shell('"$@" >/dev/full', *arguments)
    assert_one_line(done, 2, "cannot write to standard output", "No space left on device")
    assert len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("doctor", "--json"), ("verify", "nowhere")])
def test_a_closed_output(arguments: tuple[str, ...]) -> None:
    done = in_shell('"$@" >&-', *arguments)
    assert_one_line(done, 2, "standard output is closed", "/dev/null")
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_nobody_reads_to_the_end() -> None:
    done = in_shell('"$@" | true; exit ${PIPESTATUS[0]}', "doctor", "--json")
    assert (done.returncode, done.stderr) == (141, "")


def test_no_streams_but_the_output(packed: Bundle, tmp_path: Path) -> None:
    """Their numbers go to no file: what is packed is whole, whatever libraries print."""
    model = model_in(packed)
    done = in_shell('"$@" <&- 2>&-', "package", model, "--golden-images", 2, "--out", tmp_path / "bundle")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, str(tmp_path / "bundle"), "")
    assert kdpipe("verify", tmp_path / "bundle").returncode == 0


@pytest.mark.parametrize("kind", ["full", "gone"])
def test_talk_that_nobody_can_hear(kind: str, photos: Path, workdir: Path) -> None:
    """The work goes on; its results and exit codes are what they are, whatever libraries and progress say meanwhile."""
    if kind == "full":
        deaf = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, deaf = os.pipe()
        os.close(reader)
    with pytest.raises(OSError, match=r"No space left|Broken pipe"):
        os.write(deaf, b"x")

    def ended(*arguments: object) -> tuple[int, str]:
        done = subprocess.run(command(*arguments), stdout=subprocess.PIPE, stderr=deaf, text=True, check=False)
        return done.returncode, done.stdout

    code, printed = ended("data", photos, "--json")
    assert code == 0 and kdpipe("show", json.loads(printed)["artifact"]).returncode == 0
    assert ended("verify", "nowhere") == (2, "")
    assert ended("nonsense") == (2, "")
    os.close(deaf)


def test_a_bar_on_a_terminal_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody closed the window: neither what we say nor what moves by itself ends anything."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        bars = Bars()
        bars.begin("one", 3)
        os.close(master)
        with pytest.raises(OSError, match="Input/output error"):
            os.write(slave, b"x")
        bars.advance(1, "detail")
        bars.begin("inside", None)
        bars.note("a line")
        time.sleep(0.3)  # so that it was drawn anew by itself
        bars.end()
        bars.end()
    assert not failed


def test_words_that_the_output_cannot_spell(packed: Bundle, photos: Path, workdir: Path) -> None:
    image = workdir / "kü.png"
    shutil.copyfile(photos / "val/dark/01.png", image)
    done = kdpipe_process("predict", packed.path, image, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "k\\xfc.png," in done.stdout, done.stderr


# ---- Ctrl-C ------------------------------------------------------------------------------------------------------


def importing(process: subprocess.Popen[str], name: str) -> bool:
    """Whether the process has opened a file of that library."""
    try:
        return name in Path(f"/proc/{process.pid}/maps").read_text()
    except OSError:
        return False


@pytest.mark.parametrize("library", ["pydantic_core", "numpy", pytest.param("torch", marks=pytest.mark.lab)])
def test_interrupted_while_libraries_load(trained: Trained, library: str, workdir: Path) -> None:
    """Early, in the middle, and late; one line, and no traceback of anybody's."""
    ends = set()
    training = ["teacher", trained.dataset.path, "--model", "test_resnet", "--input.size", 32, "--out", workdir / "t"]
    for pause in (0.0, 0.05, 0.3):
        arguments = interruptible(command(*training))
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        end = time.monotonic() + 60
        while not importing(process, library) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=1800)
        assert "Traceback" not in said and "Error" not in said, said
        ends.add(process.returncode)
        if process.returncode == 130:
            last = said.strip().splitlines()[-1]
            assert last.startswith("kdpipe: interrupted") and "the same command goes on from there" in last
        assert not list(workdir.rglob("*.part"))
    assert ends <= {130, 0, -signal.SIGINT} and 130 in ends  # the last: when it was done already


@pytest.mark.lab
def test_interrupted_before_anything_is_known(workdir: Path) -> None:
    """From the first line of ours on: whenever it comes, what is said is one line."""
    for pause in (0.02, 0.05, 0.1, 0.15, 0.2, 0.3):
        arguments = interruptible(command("--help"))
        process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        end = time.monotonic() + 60
        while b"kdpipe" not in Path(f"/proc/{process.pid}/cmdline").read_bytes() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(pause)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=1800)
        # Python itself, before it reads a line of ours, says it in its own words.
        assert process.returncode in (0, 130, 1, -signal.SIGINT), said
        assert not {"__main__.py", "cli.py", "config.py"} & set(re.findall(r"\w+\.py", said)), said


# ---- pictures ----------------------------------------------------------------------------------------------------


@pytest.mark.lab
def test_a_picture_of_a_hundred_megapixels_is_no_mistake(packed: Bundle, tmp_path: Path) -> None:
    """Phones make them: it is read, and nobody is warned."""
    Image.new("1", (10_000, 9_500)).save(tmp_path / "large.png")
    done = subprocess.run(
        command("predict", packed.path, tmp_path / "large.png"), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert len(done.stdout.splitlines()) == 2


def test_a_library_that_turns_an_interrupt_into_an_error(workdir: Path) -> None:
    """As extension modules do while they load."""
    code = (
        "import os, signal, sys, kdpipe.chain\n"
        "from kdpipe.cli import main\n"
        "def broken(*_):\n"
        "    try: os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(5)\n"
        "    except KeyboardInterrupt: raise ImportError('numpy.core failed to import') from None\n"
        "kdpipe.chain.fingerprint_folder = broken\n"
        "sys.argv = ['kdpipe', 'data', '.']\n"
        "main()"
    )
    arguments = interruptible([sys.executable, "-c", code])
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=workdir, check=False)
    assert_one_line(done, 130, "interrupted")


@pytest.mark.parametrize("target", TARGETS)
def test_signals_are_heard_after_converters_and_runtimes(made: Made, target: str, tmp_path: Path) -> None:
    """Ctrl-C, and the end of a loader's workers: a library that takes the stack of signals with it ends the process."""
    code = (
        "import gc, os, signal, sys\n"
        "from kdpipe.cli import main\n"
        "try: main()\n"
        "except SystemExit as ended: assert not ended.code, ended\n"
        "gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    model = made.models[f"{target}-float32"]
    words = ["quantize", model.path, "--calibrate.images", 32, "--allow-damage", "true", "--out", tmp_path / "q"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "heard", (done.returncode, done.stderr)


def test_native_code_that_crashes_says_where(workdir: Path) -> None:
    """Also while what libraries print goes nowhere."""
    code = (
        "import ctypes, kdpipe.cli, kdpipe.__main__\n"
        "from kdpipe.core.proc import quiet\n"
        "def converter():\n"
        "    with quiet(): ctypes.string_at(0)\n"
        "kdpipe.cli.main = converter\n"
        "kdpipe.__main__.main()"
    )
    arguments = [sys.executable, "-c", code]
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=workdir, check=False)
    assert done.returncode == -signal.SIGSEGV
    assert "Segmentation fault" in done.stderr and "in converter" in done.stderr
