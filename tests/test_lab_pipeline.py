"""A whole run that is killed, interrupted, doubled, crowded and starved of disk: it ends with the same artifacts."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import assert_one_line, command, interruptible, kdpipe, kdpipe_process, system_command
from test_commands import TINY
from test_pipeline import TWO, break_openvino

from kdpipe import diary, smoke
from kdpipe.chain import sealed
from kdpipe.core.artifact import MANIFEST
from kdpipe.core.kinds import Checkpoint, Measurement, Report

pytestmark = pytest.mark.lab
RECIPE = TINY | {
    "data": {**TINY["data"], "most_images": 128},
    "distill": {**TINY["distill"], "cache_views": 2},
    "export": {**TINY["export"], "targets": ["onnxruntime", "openvino"]},
    "bench": {**TINY["bench"], "devices": ["null"], "rounds": 2, "cold_starts": 0},
}
STAGES = ("data", "teacher", "cache", "student", "graph", "onnxruntime", "bundle", "measurement", "report")
DONE = (0, 75)  # whatever this machine's latencies are worth

Contents = dict[str, tuple[str, dict[str, str]]]


def contents(artifacts: Path) -> Contents:
    """Key and hash of every file of what is no measurement and was made from none, by folder."""
    return {
        path.name: (manifest.key, {name: file.sha256 for name, file in manifest.files.items()})
        for path, manifest in sealed(artifacts)
        if manifest.kind not in (Measurement.kind, Report.kind)
    }


class Place:
    """A folder with the recipe, in which it is run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.artifacts = folder, folder / "artifacts"
        folder.mkdir(exist_ok=True)
        (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE))

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            interruptible(command("run", "tiny.yaml", *arguments)),
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: object) -> str:
        process = self.start(*arguments)
        _, talk = process.communicate(timeout=1800)
        assert process.returncode in DONE, talk
        return talk

    def is_whole(self, wanted: Contents) -> bool:
        """Whether the same lies there as after an undisturbed run, with a report, and nothing else."""
        assert contents(self.artifacts) == wanted
        assert list(self.artifacts.glob("report-*")) and list(self.artifacts.glob("measurement-*"))
        return not list(self.artifacts.glob("*.part")) and not (self.artifacts / diary.DIARIES).exists()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a recipe for two targets and a device that costs nothing."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TWO))
    return tmp_path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, Contents]:
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    place.run()
    return place, contents(place.artifacts)


def tree(process: int) -> list[int]:
    """A process and every one below it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [process, *(pid for child in children for pid in tree(int(child)))]


def kill(process: subprocess.Popen[Any]) -> None:
    """Everything at once, as when the power fails."""
    for pid in tree(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def test_killed_in_every_stage_it_ends_the_same(undisturbed: tuple[Place, Contents], tmp_path: Path) -> None:
    """Once in each stage, shortly after it began to write; the same command goes on each time."""
    place, moments = Place(tmp_path), random.Random(0)
    for stage in STAGES:
        process = place.start()
        while process.poll() is None and not list(place.artifacts.glob(f"{stage}*.part")):
            time.sleep(0.002)
        if process.poll() is not None:  # it had ended before it was seen
            assert stage in ("bundle", "measurement", "report") and process.returncode in DONE
            break
        time.sleep(moments.uniform(0, 0.2))
        kill(process)
        [gone] = diary.status(place.artifacts).runs
        assert not gone.lives and gone.command == ("kdpipe", "run", "tiny.yaml")
    place.run()
    assert place.is_whole(undisturbed[1])


def test_runs_in_one_folder_do_not_harm_each_other(undisturbed: tuple[Place, Contents], tmp_path: Path) -> None:
    """Three begin at once; two are killed at random, and started again."""
    place, moments = Place(tmp_path), random.Random(0)
    runs = [place.start() for _ in range(3)]
    for _ in range(4):
        time.sleep(moments.uniform(1, 4))
        at = moments.randrange(2)
        kill(runs[at])
        runs[at] = place.start()
    ends = [(run.communicate(timeout=1800)[1], run.returncode) for run in runs]
    assert all(code in DONE for _, code in ends), ends
    assert any("is being made by another process: waiting" in talk or " sealed " in talk for talk, _ in ends)
    place.run()
    assert place.is_whole(undisturbed[1])


def test_side_by_side_as_one_after_another(undisturbed: tuple[Place, Contents], tmp_path: Path) -> None:
    """Also where so little memory is allowed that most are stopped and made again."""
    place = Place(tmp_path)
    place.artifacts.mkdir()
    for path, manifest in sealed(undisturbed[0].artifacts):  # what is not made side by side is there
        if manifest.kind in ("dataset", "checkpoint", "cache"):
            shutil.copytree(path, place.artifacts / path.name)
    talk = place.run("--jobs", 4, "--memory-limit", "300MB")
    assert place.is_whole(undisturbed[1])
    assert "took more memory than --memory-limit allows" in talk


def test_interrupted_side_by_side_nothing_is_left(undisturbed: tuple[Place, Contents], tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.artifacts.mkdir()
    for path, manifest in sealed(undisturbed[0].artifacts):
        if manifest.kind in ("dataset", "checkpoint", "cache"):
            shutil.copytree(path, place.artifacts / path.name)
    process = place.start("--jobs", 3)
    while process.poll() is None and len(tree(process.pid)) < 3:
        time.sleep(0.01)
    time.sleep(1)
    jobs = tree(process.pid)[1:]
    process.send_signal(signal.SIGINT)
    _, talk = process.communicate(timeout=1800)
    assert process.returncode == 130, talk
    assert not any(Path(f"/proc/{pid}").exists() for pid in jobs) and not list(place.artifacts.glob("*.part"))
    place.run()
    assert place.is_whole(undisturbed[1])


@contextlib.contextmanager
def disk(place: Path, size: int) -> Iterator[None]:
    """A file system in memory of so many bytes."""
    place.mkdir()
    subprocess.run([system_command("mount"), "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(
    undisturbed: tuple[Place, Contents], tmp_path: Path
) -> None:
    """Wherever it gets full: with a little more room each time, down to the end."""
    whole = sum(path.stat().st_size for path in undisturbed[0].artifacts.rglob("*") if path.is_file())
    place, reached = Place(tmp_path), set()
    with disk(place.artifacts, whole // 20):
        for twentieths in (1, 8, 16, 60):
            subprocess.run(["mount", "-o", f"remount,size={whole * twentieths // 20}", place.artifacts], check=True)
            process = place.start()
            _, talk = process.communicate(timeout=1800)
            if process.returncode in DONE:
                break
            last = talk.strip().splitlines()[-1]
            assert process.returncode == 2 and "Traceback" not in talk, talk
            assert "no disk space left" in last or "disk" in last, last
            assert all((path / MANIFEST).is_file() for path, _ in sealed(place.artifacts))
            reached.add(len(list(place.artifacts.glob("*-*"))))
        assert len(reached) > 1, "it was full in several stages"
        assert place.is_whole(undisturbed[1])


def test_status_beside_a_run_and_after_it_is_killed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    process = place.start()
    seen = set()
    begun = time.monotonic()
    while process.poll() is None and "student" not in seen:  # read all the time, whatever is half-written
        found = diary.status(place.artifacts)
        seen |= {run.now.partition("-")[0] for run in found.runs if run.lives and run.now}
        assert time.monotonic() - begun < 300
    assert seen >= {"data", "teacher", "student"}
    kill(process)
    told = subprocess.run(command("status"), cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"gone: process {process.pid} was ended while it made student-")
    assert told.rstrip().endswith("nothing runs in artifacts")


def test_a_folder_that_may_only_be_read(undisturbed: tuple[Place, Contents], tmp_path: Path) -> None:
    """What is sealed is found and told; what is to be made is one line."""
    place, folder = undisturbed[0], tmp_path / "read"
    shutil.copytree(place.folder, folder)
    subprocess.run(["mount", "--bind", "-o", "ro", folder, folder], check=True)
    try:
        again = Place.__new__(Place)
        again.folder, again.artifacts = folder, folder / "artifacts"
        assert " sealed " in again.run()
        for words in (["status"], ["list"], ["run", "tiny.yaml", "--dry-run"]):
            done = subprocess.run(command(*words), cwd=folder, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
        for more in (["--set", "teacher.seed=7"], ["--smoke"]):
            process = again.start(*more)
            _, talk = process.communicate(timeout=1800)
            assert process.returncode == 2 and "Traceback" not in talk, talk
            assert "Read-only file system" in talk.strip().splitlines()[-1]
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_smoke_run_of_phases_and_students(folder: Path) -> None:
    students = {"staged": {"method": "stagewise", "train": {"epochs": 50}}, "hot": {"temperature": 9, "cache_views": 7}}
    changes = ["--set", f"distill.students={json.dumps(students)}", "--until", "distill"]
    done = kdpipe_process("run", "tiny.yaml", "--smoke", *changes, cwd=folder)
    assert done.returncode == 0, done.stderr
    [place] = (folder / "artifacts" / smoke.SMOKE).iterdir()
    steps = {path.name.rpartition("-")[0]: Checkpoint.open(path).facts.steps for path in place.glob("student-*")}
    assert set(steps.values()) == {8}, "for as many as phases want, so that controls are shared"


def test_a_smoke_run_fails_where_something_does_not_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A converter that is broken, and a device without a runtime: the others are made and measured."""
    break_openvino(monkeypatch)
    bare = folder / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    import numpy

    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    (bare / "lib" / version / "site-packages" / "numpy").symlink_to(Path(numpy.__file__).parent)
    (folder / "devices.yaml").write_text(
        f"board: {{kind: local, python: {bare}/bin/python3, folder: {folder}/board}}\n"
    )
    done = kdpipe("run", "tiny.yaml", "--smoke", "--set", 'bench.devices=["null", board]', cwd=folder)
    assert_one_line(done, 2, "failed: openvino")
    lines = done.stderr.splitlines()
    assert any(re.match("kdpipe: openvino: .*this converter is broken", line) for line in lines), done.stderr
    assert any("board" in line for line in lines if line.startswith("kdpipe: ")), done.stderr


def test_a_student_that_fails_leaves_the_others(folder: Path) -> None:
    students = {"wild": {"train": {"optimizer": "sgd", "learning_rate": 1e12}}, "mild": {"temperature": 2}}
    changes = [f"distill.students={json.dumps(students)}", "export.students=all"]
    changes += ["export.targets=[onnxruntime]", "quantize=null"]
    words = [word for change in changes for word in ("--set", change)]
    done = kdpipe_process("run", "tiny.yaml", "--json", *words, cwd=folder)
    assert done.returncode == 2, done.stderr
    assert "student-wild-seed0: " in done.stderr and "loss became" in done.stderr
    told = json.loads(done.stdout)
    assert {name.split("-")[0] for name in told["bundles"]} == {"kd", "mild"}
    assert "student-wild-seed0" in told["numbers"]["missing"]
