"""The command line as a user meets it: fast help, JSON, one-line errors, Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import (
    SMALL_RECIPE,
    Made,
    Trained,
    assert_one_line,
    command,
    copied_steps,
    flip_a_byte,
    interruptible,
    kdpipe,
    kdpipe_process,
    rewrite_manifest,
)

from kdpipe import cli
from kdpipe.core.errors import ExitCode

HEAVY = (
    "torch",
    "timm",
    "onnx",
    "onnxruntime",
    "openvino",
    "nncf",
    "litert_torch",
    "numpy",
    "matplotlib",
    "jinja2",
    "sklearn",
)


# Runs the command line and then tells which modules it loaded.
LOADED = """
import sys
from kdpipe.cli import main
try:
    main()
finally:
    print("LOADED", *sys.modules)
"""


def run_and_list_modules(*arguments: object) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return done, set(done.stdout.partition("LOADED")[2].split())


def test_help_is_fast_and_imports_nothing_heavy(tmp_path: Path) -> None:
    """0.4 s where what it stands on takes 0.15 s by itself: told by the time of the processor, a busy or slow machine's
    seconds say little."""
    written = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}  # as for any user
    stands_on = [sys.executable, "-c", "import pydantic, typer.rich_utils; pydantic.BaseModel"]
    seconds: dict[str, list[float]] = {"help": [], "what it stands on": []}
    for _ in range(6):
        for words, spent in zip((command("--help"), stands_on), seconds.values(), strict=True):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(words, env=written, capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds["help"]) < 0.4 / 0.15 * min(seconds["what it stands on"]), seconds
    assert not run_and_list_modules("--help")[1] & set(HEAVY)


def test_sealed_runs_import_nothing_heavy(made: Made, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    done, loaded = run_and_list_modules("run", tmp_path / "small.yaml", "--artifacts", made.chain.folder)
    assert done.returncode == ExitCode.UNTRUSTED, "of two rounds no latency can be trusted"
    assert not loaded & (set(HEAVY) - {"numpy"})
    assert "0 done now" in done.stdout
    assert done.stderr.count(" sealed ") == len(made.chain.steps)


def test_run_as_json(made: Made, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    done = kdpipe("run", tmp_path / "small.yaml", "--artifacts", made.chain.folder, "--json")
    answer = json.loads(done.stdout)
    assert answer["schema_version"] == 1
    assert Path(answer["report"]).is_file()
    assert set(answer["bundles"]) == set(made.bundles)
    assert {row["name"] for row in answer["numbers"]["devices"][0]["bundles"]} == set(made.bundles)


def test_a_run_measures_once_and_again_when_it_is_told_to(made: Made, tmp_path: Path) -> None:
    """Untrusted, it says so with the cure and exits 75; the page counts the attempts."""
    folder = made.chain.folder
    small = {"rounds": 2, "seconds": 0.011, "max_seconds": 0.05, "min_samples": 5, "warm_up_seconds": 0.02, "images": 8}
    small["cold_starts"] = 0
    path = recipe(tmp_path, export={"targets": ["onnxruntime"]}, quantize=None, bench=small)
    seen: list[Path] = []
    for arguments in ([], [], ["--again", "bench"]):
        done = kdpipe("run", path, "--artifacts", folder, "--json", *arguments)
        assert_one_line(done, 75, "onnxruntime-float32 is noisy;", f"{path} --again bench")
        [line] = [line for line in done.stderr.splitlines() if re.match(r"\d+/\d+ measurement ", line)]
        assert ("sealed" in line) == (len(seen) == 1)
        seen.append(Path(line.split()[-1]))
        trust = json.loads(done.stdout)["numbers"]["devices"][0]["trust"]
        assert (trust["attempt"], trust["attempts"]) == (len(set(seen)), len(set(seen)))
    assert seen[0] == seen[1] and [each.name[-2:] for each in seen] == ["-1", "-1", "-2"]
    done = kdpipe("run", path, "--artifacts", folder, "--again", "bnch")
    assert_one_line(done, 2, "unknown stage", "'bnch'", "did you mean 'bench'?")


def test_the_demo_says_what_cannot_be_trusted_and_exits_0(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo command with the small recipe in the place of its own: of two rounds nothing can be trusted."""
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text(yaml.safe_dump(SMALL_RECIPE))
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cli.py"))
    done = kdpipe("demo", "--artifacts", made.chain.folder)
    assert done.returncode == 0 and "0 done now" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert "tflite-float32" in last and last.endswith("measure again on a quiet machine: kdpipe demo --again bench")


def test_every_measurement_is_an_attempt_and_the_last_trusted_one_is_reported(made: Made, tmp_path: Path) -> None:
    bundles = [made.bundles[name].path for name in ("onnxruntime-float32", "onnxruntime-int8")]
    folder, data = tmp_path / "attempts", made.dataset.path
    settings = ["--device", "null", "--effort", "quick", "--rounds", 2, "--max-seconds", 0.5]
    settings += ["--seconds", 0.01, "--min-samples", 5, "--warm-up-seconds", 0.02, "--cold-starts", 0, "--data", data]
    (folder / "of-something-else").mkdir(parents=True)
    (folder / "of-something-else" / "manifest.json").write_text("[]")
    for number in (1, 2, 3):
        done = kdpipe("bench", *bundles, *settings, "--out", folder / str(number), "--json")
        assert_one_line(done, 75, "are invalid: an emulated device says nothing about the hardware")
        manifest = json.loads((folder / str(number) / "manifest.json").read_text())
        assert manifest["config"]["attempt"] == number
    shutil.rmtree(folder / "of-something-else")
    assert_one_line(kdpipe("bench", *bundles, *settings, "--out", folder / "3"), 2, "exists already")

    def reported(number: object) -> dict[str, object]:
        out = tmp_path / f"report-{len(list(tmp_path.iterdir()))}"
        done = kdpipe("report", folder / str(number), "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        report = Path(json.loads(done.stdout)["artifact"])
        return json.loads((report / "report.json").read_text())["devices"][0]["trust"]

    trust = reported(1)
    assert (trust["attempt"], trust["attempts"], trust["word"]) == (3, 3, "invalid")

    def believe(value: dict) -> None:
        for result in value["facts"]["results"].values():
            result["trust"] = {"word": "trusted", "reason": ""}

    rewrite_manifest(folder / "2", believe)
    trust = reported(3)
    assert (trust["attempt"], trust["attempts"], trust["word"]) == (2, 3, "trusted")
    # Another setting is another session.
    kdpipe("bench", *bundles, *settings, "--threads", 1, "--out", folder / "other")
    trust = reported("other")
    assert (trust["attempt"], trust["attempts"]) == (1, 1)


@pytest.fixture(scope="session")
def by_hand(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each stage alone, through the command line, each fed with the folder that the one before printed."""
    folder = tmp_path_factory.mktemp("by-hand")
    made_here: dict[str, Path] = {}

    def call(name: str, *arguments: object) -> None:
        done = kdpipe(*arguments, cwd=folder)
        assert done.returncode in ((0, 75) if name == "measurement" else (0,)), done.stderr
        made_here[name] = folder / done.stdout.strip().splitlines()[-1]
        assert (made_here[name] / "manifest.json").is_file()

    train = ["--train.epochs", 2, "--train.workers", 0, "--train.augment.crop", "pad", "--input.size", 32]
    call("data", "data", "digits", "--test-split", "null", "--val_fraction", "0.05")
    call("teacher", "teacher", made_here["data"], "--model", "test_resnet", *train)
    call("student", "distill", made_here["teacher"], "--model", "test_resnet", "--label-fraction", 0.2, *train)
    call("model", "export", made_here["student"], "--target", "openvino")
    call("int8", "quantize", made_here["model"], "--calibrate.images", 32)
    call("bundle", "package", made_here["model"])
    call("bundle-int8", "package", made_here["int8"])
    call(
        "measurement",
        "bench",
        made_here["bundle"],
        made_here["bundle-int8"],
        "--rounds",
        2,
        "--effort",
        "quick",
        "--seconds",
        0.1,
        "--max-seconds",
        0.1,
        "--cold-starts",
        1,
        "--warm-up-seconds",
        0.1,
        "--threads",
        1,
    )
    call("report", "report", made_here["measurement"], "--title", "by hand")
    return made_here


def test_stages_alone(by_hand: dict[str, Path]) -> None:
    page = (by_hand["report"] / "report.html").read_text()
    assert "by hand" in page
    manifest = json.loads((by_hand["student"] / "manifest.json").read_text())
    assert manifest["config"]["train"]["epochs"] == 2
    assert manifest["inputs"]["data"]["config"]["val_fraction"] == 0.05


def test_same_command_again_is_sealed(by_hand: dict[str, Path]) -> None:
    done = kdpipe("export", by_hand["student"], "--target", "openvino", "--json")
    assert "sealed" in done.stderr
    assert Path(json.loads(done.stdout)["artifact"]) == by_hand["model"]


def test_out_is_taken(by_hand: dict[str, Path], tmp_path: Path) -> None:
    done = kdpipe("package", by_hand["int8"], "--out", tmp_path / "mine")
    assert done.stdout.strip() == str(tmp_path / "mine")
    assert_one_line(kdpipe("package", by_hand["model"], "--out", tmp_path / "mine"), 2, "other settings or inputs")


def test_verify_and_doctor_as_json(by_hand: dict[str, Path]) -> None:
    found = json.loads(kdpipe("verify", by_hand["bundle"], "--json").stdout)
    assert found["golden_images"] == 8 and found["schema_version"] == 1
    found = json.loads(kdpipe("doctor", "--json").stdout)
    assert {state["target"] for state in found["targets"]} == {"onnxruntime", "openvino", "tensorrt", "tflite"}
    tensorrt = next(state for state in found["targets"] if state["target"] == "tensorrt")
    assert tensorrt["exports"] and not tensorrt["runs"]
    assert "pip install" not in tensorrt["cure"]  # nothing to install here: it runs on a device


def test_doctor_asks_the_device() -> None:
    """What can be made is this host's affair, what can be run and how fast is the device's."""
    found = json.loads(kdpipe("doctor", "--device", "null", "--json").stdout)
    assert found["device"] == found["machine"]["machine"] == "null"
    assert all(state["runs"] and not state["cure"] for state in found["targets"])
    assert found["advice"] == ["CPU flags are unavailable: INT8 may or may not be fast there, measure it"]
    assert "run on null" in kdpipe("doctor", "--device", "null").stdout


def test_doctor_says_what_is_missing() -> None:
    script = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name in ('openvino', 'nncf') else real(name, *a)\n"
        "sys.argv = ['kdpipe', 'doctor', '--target', 'openvino']\nfrom kdpipe.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert_one_line(done, 1, "cannot be made here", "lacks openvino, nncf", "pip install 'kdpipe[openvino]'")


def test_doctor_shows_the_extra_in_its_brackets() -> None:
    script = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'ai_edge_quantizer' else real(name, *a)\n"
        "sys.argv = ['kdpipe', 'doctor']\nfrom kdpipe.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'kdpipe[tflite]'" in done.stdout


def recipe(folder: Path, **change: object) -> Path:
    path = folder / "my.yaml"
    path.write_text(yaml.safe_dump({**SMALL_RECIPE, **change}))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"distill": {"temprature": 3}}, ["unknown key 'distill.temprature'", "did you mean 'temperature'"]),
        ({"export": {"targets": ["tflit"]}}, ["unknown target 'tflit'", "did you mean 'tflite'"]),
        ({"data": {"source": "nowhere"}}, ["no data at 'nowhere'"]),
        ({"teacher": {"model": "resnet19", "input": {"size": 32}}}, ["unknown model 'resnet19'", "did you mean"]),
        ({"student": {"model": "resnet19"}}, ["unknown model 'resnet19'"]),
        ({"teacher": {"model": "test_resnet", "checkpoint": "no.pth"}}, ["teacher.checkpoint", "no.pth"]),
        ({"distill": {"train": {"optimizer": "adamm"}}}, ["unknown optimiser 'adamm'", "did you mean"]),
        ({"bench": {"device": "pi5"}}, ["unknown key 'bench.device'; did you mean 'devices'?"]),
        ({"bench": {"devices": ["local", "pi5"]}}, ["unknown device 'pi5'"]),
        ({"bench": {"devices": ["local", "local"]}}, ["each device can be named once"]),
        ({"data": {"source": "~nosuchuser/photos"}}, ["~nosuchuser/photos", "home directory"]),
        ({"teacher": {"model": "x", "checkpoint": "~nosuchuser/a.pth"}}, ["~nosuchuser/a.pth", "home directory"]),
        ({"data": {"source": "x" * 5000}}, ["File name too long"]),
        (
            {"distill": {"train": {"augment": {"auto_augment": "nonsense"}}}},
            ["train.augment.auto_augment", "'nonsense'"],
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[0][:30],
)
def test_mistakes_in_a_recipe(workdir: Path, change: dict[str, object], words: list[str]) -> None:
    done = kdpipe("run", recipe(workdir, **change))
    assert_one_line(done, 2, *words)
    assert not list(workdir.glob("artifacts/*.part"))


def laughs(levels: int) -> str:
    """Ten lines that stand for 9^levels values: aliases of aliases."""
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"- &a{at} [{', '.join([f'*a{at - 1}'] * 9)}]" for at in range(1, levels)])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (laughs(12), ["more than 100000 values"]),
        ("&a [*a]", ["more than 100000 values"]),
        (laughs(4), ["wanted a mapping"]),
        ("name: 2026-99-99", ["not YAML", "month must be in 1..12"]),
        ("name: " + "9" * 6000, ["6000 digits"]),
        ("name: " + "[" * 5_000, ["too many levels"]),
        ("name: \x07", ["not YAML"]),
        ("#" * 2**21, ["larger than"]),
        ("", ["wanted a mapping"]),
    ],
    ids=lambda value: value[:12] if isinstance(value, str) else None,
)
def test_recipes_of_strangers(workdir: Path, text: str, words: list[str]) -> None:
    (workdir / "my.yaml").write_text(text)
    begun = time.monotonic()
    done = kdpipe("run", "my.yaml")
    assert_one_line(done, 2, "my.yaml", *words)
    assert len(done.stderr) < 2100
    assert time.monotonic() - begun < 200, "of 9^12 values not even the first million"


def test_a_value_is_shown_by_its_beginning(workdir: Path) -> None:
    """Within the limit of values, but 59,049 words long: the message is not."""
    done = kdpipe("run", recipe(workdir, name=yaml.safe_load(laughs(4))))
    assert_one_line(done, 2, "'name'", "...")
    assert len(done.stderr) < 400


def test_mistakes_before_any_work(workdir: Path) -> None:
    """A wrong target, student or device at the end of a recipe is told before the teacher is trained."""
    for change in ({"export": {"targets": ["nope"]}}, {"student": {"model": "nope"}}, {"bench": {"devices": ["nope"]}}):
        kdpipe("run", recipe(workdir, **change))
        assert not list(workdir.glob("artifacts/teacher-*"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run"], ["Missing argument", "--help"]),
        (["run", "none.yaml"], ["no recipe at none.yaml"]),
        (["exprot"], ["exprot"]),
        (["export", "nowhere", "--target", "tflite"], ["no artifact at nowhere"]),
        (["distill", ".", "--model", "x"], ["not an artifact"]),
        (["data", "digits", "--test-split", "null", "--val-fraction", "2"], ["val_fraction", "found 2"]),
        (["data", "digits", "--val-fracton", "2"], ["--val-fracton"]),
        (["data", "digits"], ["the digits have no test split"]),
        (["data", "digits", "--task", "clasification"], ["unknown task", "did you mean 'classification'"]),
        (["verify", "/tmp"], ["not an artifact"]),
        (["bench"], ["Missing argument"]),
        (["doctor", "--target", "tflit"], ["unknown target 'tflit'", "did you mean 'tflite'"]),
        (["doctor", "--device", "lokal"], ["unknown device 'lokal'", "did you mean 'local'"]),
        (["data", "digits", "--seed", "2026-99-99"], ["--seed: not YAML", "month must be in 1..12"]),
        (["data", "digits", "--seed", "9" * 6000], ["--seed: not YAML", "6000 digits"]),
        (["data", "digits", "--val-fraction", ".inf"], ["--val_fraction: not YAML", "not finite"]),
        (["data", "digits", "--val-fraction", "1e999"], ["val_fraction", "finite number"]),
        (["data", "digits", "--seed", "[" * 5_000], ["--seed: not YAML", "too many levels"]),
        (["verify", "x" * 5000], ["File name too long"]),
        (["verify", "a\x1b]0;owned\x07b"], ["no artifact at a\\x1b]0;owned\\x07b"]),
        (["data", "a\x1b[2Jb"], ["no data at 'a\\x1b[2Jb'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes_on_the_command_line(workdir: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_line(kdpipe(*arguments), 2, *words)


def test_edited_artifact_in_the_chain(made: Made, tmp_path: Path) -> None:
    copied_steps(made, tmp_path / "artifacts")
    flip_a_byte(tmp_path / "artifacts" / made.teacher.path.name / "model.safetensors")
    done = kdpipe("run", recipe(tmp_path), "--artifacts", tmp_path / "artifacts")
    assert_one_line(done, 2, "model.safetensors", "differs from its manifest")


def test_images_that_were_replaced_are_not_learned_from(photos: Path, workdir: Path) -> None:
    """Also by a single command, which does not read the folder first as a run does; put back, it goes on."""
    done = kdpipe("data", photos, "--test-split", "val", "--out", "data")
    assert done.returncode == 0, done.stderr
    replaced = photos / "train" / "dark" / "00.jpg"
    before = replaced.read_bytes()
    shutil.copy(photos / "train" / "light" / "02.jpg", replaced)
    training = ["teacher", "data", "--model", "test_resnet", "--input.size", 32, "--train.epochs", 1]
    training += ["--train.workers", 0, "--train.validate-every", 1, "--out", "teacher"]
    refused = kdpipe(*training)
    assert_one_line(refused, 2, "photos holds other images than when", "data was made of it", "kdpipe data")
    replaced.write_bytes(before)
    assert kdpipe(*training).returncode == 0
    shutil.move(photos, workdir / "elsewhere")
    assert kdpipe("show", "teacher").returncode == 0
    assert "sealed" in kdpipe(*training).stderr, "what is made already does not ask"


def test_checkpoint_of_another_class_count(workdir: Path) -> None:
    import timm

    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), workdir / "seven.pth")
    teacher = {"model": "test_resnet", "checkpoint": "seven.pth", "input": {"size": 32}}
    assert_one_line(kdpipe("run", recipe(workdir, teacher=teacher)), 2, "another class count", "seven.pth")


def test_pretrained_without_a_hub(trained: Trained, workdir: Path) -> None:
    call = ["teacher", trained.dataset.path, "--model", "test_resnet", "--pretrained", "true", "--input.size", 32]
    done = kdpipe_process(*call, HF_HUB_OFFLINE="1")
    assert_one_line(done, 2, "cannot fetch the pretrained weights of 'test_resnet'")


def test_no_disk_space(made: Made, tmp_path: Path) -> None:
    """The whole command line on a file system of 2 MiB that fills while the model is packed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    package = " ".join(
        command("package", made.models["onnxruntime-float32"].path, "--data", made.dataset.path, "--out", disk / "b")
    )
    inside = f"mount -t tmpfs -o size=512k none {disk} && {package}; code=$?; ls -A {disk}; exit $code"
    done = subprocess.run(["unshare", "-rm", "sh", "-c", inside], capture_output=True, text=True, check=False)
    assert_one_line(done, 2, "no disk space left")
    assert done.stdout.strip() == ""


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if word in line:
            return
    raise AssertionError(f"{word!r} was never said")


@pytest.mark.parametrize("stage", ["data", "teacher", "onnxruntime-float32"])
def test_interrupt_in_any_stage(made: Made, tmp_path: Path, stage: str) -> None:
    """Ctrl-C shortly after ``stage`` began leaves only whole artifacts, and the same command goes on."""
    artifacts = tmp_path / "artifacts"
    artifacts.mkdir()
    before = [step.path for step in made.chain.steps[: [step.name for step in made.chain.steps].index(stage)]]
    for path in before:
        shutil.copytree(path, artifacts / path.name)
    arguments = interruptible(command("run", recipe(tmp_path), "--artifacts", artifacts))
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    if before:
        wait_for(process, before[-1].name)
    deadline = time.monotonic() + 600
    while not list(artifacts.glob("*.part")):
        assert process.poll() is None and time.monotonic() < deadline, "the stage never began"
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    talk = process.stderr.read()
    assert process.wait() == 130, talk
    assert "Traceback" not in talk
    assert talk.strip().splitlines()[-1].startswith("kdpipe: interrupted")
    assert not list(artifacts.glob("*.part"))
    assert {path.name for path in artifacts.iterdir() if "-" in path.name} >= {path.name for path in before}


def test_progress_is_plain_lines_without_a_terminal(made: Made, tmp_path: Path) -> None:
    done = kdpipe_process("package", made.models["tflite-int8"].path, "--out", tmp_path / "b")
    assert "\x1b" not in done.stderr + done.stdout


def test_progress_is_a_bar_on_a_terminal(made: Made, tmp_path: Path) -> None:
    """On a pseudo terminal the bar is drawn, also while the libraries are silenced."""
    import pty

    master, slave = pty.openpty()
    arguments = command("quantize", made.models["onnxruntime-float32"].path, "--out", tmp_path / "q")
    process = subprocess.Popen(arguments, stderr=slave, stdout=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm"})
    os.close(slave)
    seen = b""
    try:
        while chunk := os.read(master, 4096):
            seen += chunk
    except OSError:  # the other end closed
        pass
    assert process.wait() == 0
    assert b"calibrating onnxruntime" in seen
    assert b"\x1b[" in seen
