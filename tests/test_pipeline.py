"""Runs beside each other, in part, and made small: what fails, what waits, what is told of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, Told, assert_one_line, kdpipe, listening
from test_commands import TINY

from kdpipe import diary, jobs, pipeline, smoke
from kdpipe.chain import Chain, sealed
from kdpipe.core.artifact import Busy, Order, drafting
from kdpipe.core.config import DeviceSettings, PackageConfig, Recipe, ReportConfig, read_recipe, validated
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Checkpoint, Measurement, Report, ReportFacts
from kdpipe.data.dataset import Dataset
from kdpipe.devices.lock import held, making
from kdpipe.devices.talk import Talk
from kdpipe.export import TARGETS

TWO = TINY | {
    "export": {**TINY["export"], "targets": ["onnxruntime", "openvino"]},
    "bench": {**TINY["bench"], "devices": ["null"], "cold_starts": 0, "rounds": 2},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the small recipe, for two targets and a device that costs nothing."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TWO))
    return tmp_path


def break_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    def write(*arguments: object) -> None:
        raise RuntimeError("this converter is broken")

    monkeypatch.setattr(TARGETS["openvino"], "write", write)


# ---- a smoke run -----------------------------------------------------------------------------------------


def test_a_smoke_run_sees_every_stage_and_is_no_result(folder: Path) -> None:
    assert kdpipe("run", "tiny.yaml", "--smoke", "--until", "data", cwd=folder).returncode == 0
    # The next begins anew, and the first is gone.
    done = kdpipe("run", "tiny.yaml", "--smoke", "--set", "bench.devices=[local]", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "no number of it is a result" in done.stdout and "accuracy" not in done.stdout
    assert not list((folder / "artifacts").glob("*-*")), "nothing lies among the results"
    assert "0 artifacts" in kdpipe("list", cwd=folder).stdout
    [place] = (folder / "artifacts" / smoke.SMOKE).iterdir()
    made = {path.name.rpartition("-")[0] for path, _ in sealed(place)}
    assert made > {"data", "teacher", "graph", "openvino-int8", "bundle-openvino-int8", "bundle-onnxruntime-float32"}
    [data], [teacher], [page], [measurement] = (
        list(place.glob(f"{name}-*")) for name in ("data", "teacher", "report", "measurement")
    )
    assert Dataset.open(data).facts.images["train"] == 2 * 64
    assert Checkpoint.open(teacher).facts.steps == 2
    assert all(result.session is not None for result in Measurement.open(measurement).facts.results.values())
    assert "A smoke run" in (page / "report.html").read_text() and Report.open(page).numbers["smoke"]


def test_clean_takes_a_smoke_run_and_waits_for_a_run(folder: Path) -> None:
    done = kdpipe("run", "tiny.yaml", "--smoke", "--until", "data", cwd=folder)
    assert done.returncode == 0, done.stderr
    [place] = (folder / "artifacts" / smoke.SMOKE).iterdir()
    with diary.Diary(folder / "artifacts", ["kdpipe", "run"]) as written:
        written.begin("data-0", {"data-0": None}, 0)
        assert_one_line(kdpipe("clean", "--yes", cwd=folder), 2, f"process {os.getpid()} runs in artifacts")
    assert place.exists() and kdpipe("clean", "--yes", cwd=folder).returncode == 0
    assert not (folder / "artifacts" / smoke.SMOKE).exists()


def test_a_smoke_run_changes_what_takes_time_and_nothing_else() -> None:
    """Every recipe: networks, inputs, methods, targets, devices and batches are as they were; its keys are others."""
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        whole = read_recipe(path)
        small = smoke.smoke(whole)
        kept = ("model", "method", "batch_size", "input", "targets", "devices", "variants", "source", "optimizer")
        assert [line for line in _flat(small) if line[0].split(".")[-1] in kept] == [
            line for line in _flat(whole) if line[0].split(".")[-1] in kept
        ], path
        runs = pipeline.student_runs(small.student, small.distill, small.data.unlabeled is not None)
        assert all(run.train.epochs <= smoke.PHASE_EPOCHS for run in runs.values())
        assert {name.rpartition("-seed")[0] for name in runs} == {
            name.rpartition("-seed")[0]
            for name in pipeline.student_runs(whole.student, whole.distill, whole.data.unlabeled is not None)
        }
        assert validated(Recipe, small.model_dump(), "small").model_dump() == small.model_dump(), "still a recipe"


def _flat(recipe: Recipe) -> list[tuple[str, Any]]:
    from kdpipe.inventory import flat

    return list(flat(recipe.model_dump(mode="json")).items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "export.targets=[openvin]"], ["unknown target 'openvin'"]),
        (["--set", "bench.devices=[nowhere]"], ["unknown device 'nowhere'"]),
        (["--from", "export"], ["--smoke begins anew"]),
        (["--again", "bench"], ["--smoke begins anew"]),
        (["--memory-limit", "much"], ["--memory-limit", "8GB"]),
        (["--set", "student.model=resnet10"], ["resnet10"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_a_smoke_run_refuses_what_cannot_be(folder: Path, arguments: list[str], words: list[str]) -> None:
    assert_one_line(kdpipe("run", "tiny.yaml", "--smoke", *arguments, cwd=folder), 2, *words)


# ---- parts that fail -------------------------------------------------------------------------------------


def test_a_part_that_fails_leaves_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What there is is reported, and what is missing is named; the same command makes it once it can."""
    with monkeypatch.context() as broken:
        break_openvino(broken)
        done = kdpipe("run", "tiny.yaml", "--json", cwd=folder)
        assert_one_line(done, 2, "openvino: ", "this converter is broken", "the same command tries again")
    told = json.loads(done.stdout[done.stdout.index('{\n "schema_version"') :])
    assert sorted(told["bundles"]) == ["onnxruntime-float32", "onnxruntime-int8"]
    assert list(told["failed"]) == ["openvino"] and told["numbers"]["missing"] == ["openvino"]
    assert "Missing, since making it failed: openvino." in (folder / told["report"]).read_text()
    found = json.loads(kdpipe("status", "--json", cwd=folder).stdout)
    [failure] = found["failed"]
    assert failure["leg"].startswith("openvino-float32-") and failure["exit_code"] == 2 and not found["runs"]
    assert "this converter is broken" in kdpipe("status", cwd=folder).stdout

    done = kdpipe("run", "tiny.yaml", "--json", cwd=folder)
    assert done.returncode in (0, 75), done.stderr
    whole = json.loads(done.stdout[done.stdout.index('{\n "schema_version"') :])  # libraries print into this process
    assert len(whole["bundles"]) == 4 and not whole["failed"] and not whole["numbers"]["missing"]
    assert kdpipe("status", cwd=folder).stdout.strip() == "nothing runs in artifacts"
    assert not (folder / "artifacts" / diary.DIARIES).exists()


def test_what_is_refused_exits_1_and_a_mistake_2() -> None:
    from kdpipe.cli import _failure

    assert _failure({"a": GateFailed("x")}).exit_code == 1
    assert _failure({"a": GateFailed("x"), "b": GateFailed("y")}).exit_code == 1
    assert _failure({"a": GateFailed("x"), "b": UserError("y")}).exit_code == 2
    assert _failure({"a": GateFailed("x")}, "'pi5' was not measured: gone").exit_code == 2


# ---- several students ------------------------------------------------------------------------------------


def test_students_fan_out(tmp_path: Path) -> None:
    """Each is exported, made smaller, packed and measured; the page and the lines say whose is whose."""
    values = TWO | {
        "distill": {**TINY["distill"], "students": {"wide": {"model": "resnet10t"}}},
        "export": {**TINY["export"], "students": ["kd", "wide"]},
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    recipe, chain = read_recipe(tmp_path / "two.yaml"), Chain(tmp_path / "artifacts")
    legs = pipeline.plan(recipe, chain)
    outcome = pipeline.run(recipe, chain)
    assert not outcome.failed
    assert [leg.path for leg in legs] == [step.path for step in chain.steps]
    names = [f"{name}-onnxruntime-{variant}" for name in ("kd", "wide") for variant in ("float32", "int8")]
    assert list(outcome.bundles) == names
    assert {step.name for step in chain.steps} >= {"kd graph", "wide bundle-onnxruntime-int8"}
    numbers = outcome.report.numbers
    assert {hop["student"] for hop in numbers["devices"][0]["hops"]} == {"student-kd-seed0", "student-wide-seed0"}
    assert "onnxruntime of student-wide-seed0" in outcome.report.page.read_text()
    assert "onnxruntime of student-kd-seed0" in str(outcome.table)
    models = {bundle.facts.model for bundle in outcome.bundles.values()}
    assert models == {"test_resnet", "resnet10t"}
    alone = validated(Recipe, {**values, "export": TINY["export"]}, "alone")
    assert all(leg.sealed for leg in pipeline.plan(alone, chain, until="package")), "one alone has the same keys"


@pytest.mark.parametrize(
    ("students", "words"),
    [
        ("[]", ["export.students: wanted at least one of kd, small"]),
        ("[kd, smal]", ["unknown student 'smal'", "did you mean 'small'"]),
        ("[kd, a/b]", ["'a/b' names files"]),
        ("labels", ["unknown student 'labels'"]),
    ],
)
def test_mistakes_in_students(folder: Path, students: str, words: list[str]) -> None:
    known = "distill.students={small: {temperature: 2}, a/b: {temperature: 3}}"
    done = kdpipe("run", "tiny.yaml", "--dry-run", "--set", known, "--set", f"export.students={students}", cwd=folder)
    assert_one_line(done, 2, *words)


# ---- beside each other -----------------------------------------------------------------------------------

SEALER = """
import sys, time
from pathlib import Path
from kdpipe.core.artifact import Busy, Order, drafting
from kdpipe.core.config import PackageConfig
from kdpipe.core.kinds import Report, ReportFacts
folder, sealed = Path(sys.argv[1]), 0
print("ready", flush=True)
sys.stdin.read(1)
for at in range(int(sys.argv[2])):
    try:
        with drafting(Report, Order("test", PackageConfig(), {}), folder / str(at)) as draft:
            (draft.path / "who").write_text(sys.argv[3])
            draft.facts = ReportFacts(devices=[], gains=[])
        sealed += 1
    except Busy:
        pass
print(sealed)
"""


def test_of_many_that_write_the_same_one_seals(tmp_path: Path) -> None:
    """Whatever the moment at which another one begins, renames or gives up: never two, never half, no other error."""
    count = 60
    line = [sys.executable, "-c", SEALER, str(tmp_path), str(count)]
    writers = [
        subprocess.Popen([*line, str(at)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for at in range(4)
    ]
    for writer in writers:
        assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"x")
        writer.stdin.flush()
    ends = [writer.communicate() for writer in writers]
    assert all(writer.returncode == 0 for writer in writers), [error.decode()[-500:] for _, error in ends]
    made = [int(out) for out, _ in ends]
    assert sum(made) == count and sorted(path.name for path in tmp_path.iterdir()) == sorted(map(str, range(count)))
    assert sum(made > 0 for made in made) > 1, "they met"
    for at in range(count):
        Report.open(tmp_path / str(at))


def test_what_another_process_makes_is_waited_for(tmp_path: Path) -> None:
    """The other one is killed: then it is made here."""
    order = Order("test", PackageConfig(), {})
    chain = Chain(tmp_path)
    path = chain.path("a", order)
    code = SEALER.replace('(draft.path / "who").write_text(sys.argv[3])', 'print("in", flush=True); time.sleep(60)')
    code = code.replace("folder / str(at)", "folder")
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(path), "1", "other"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdin is not None and other.stdout is not None
    other.stdin.write(b"x")
    other.stdin.flush()
    assert [other.stdout.readline() for _ in range(2)] == [b"ready\n", b"in\n"]

    def make(out: Path) -> Report:
        with drafting(Report, order, out) as draft:
            draft.facts = ReportFacts(devices=[], gains=[])
        return draft.artifact

    class Killer(Told):
        def note(self, text: str) -> None:
            super().note(text)
            other.kill()

    heard = Killer()
    with listening(heard):
        made = chain.step("a", Report, order, make)
    other.wait()
    assert heard.notes == [f"{path.name} is being made by another process: waiting"]
    assert made.path == path and [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_part_that_was_renamed_meanwhile_is_not_taken_for_the_lock(tmp_path: Path) -> None:
    order = Order("test", PackageConfig(), {})
    with drafting(Report, order, tmp_path / "a") as draft:
        draft.facts = ReportFacts(devices=[], gains=[])
    with pytest.raises(Busy, match="exists already"), drafting(Report, order, tmp_path / "a"):
        pass
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


MEASURER = """
import sys
from kdpipe.core.config import DeviceSettings
from kdpipe.devices.lock import held
from kdpipe.devices.talk import Talk
with held(DeviceSettings(), Talk(lambda *_: None, lambda text: print(text, flush=True))):
    print("measuring", flush=True)
    sys.stdin.readline()
"""


def test_nothing_is_made_on_a_host_that_is_measured() -> None:
    """And it is not measured while something is made."""

    class Ends(Told):
        def note(self, text: str) -> None:
            super().note(text)
            assert measurer.stdin is not None
            measurer.stdin.close()

    with making():
        with making():  # a step inside another one
            pass
        measurer = subprocess.Popen([sys.executable, "-c", MEASURER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert measurer.stdout is not None
        assert measurer.stdout.readline() == b"'local' is at work, which would be measured too: waiting\n"
    assert measurer.stdout.readline() == b"measuring\n"
    heard = Ends()
    with listening(heard), making():
        measurer.stdout.close()
        assert measurer.wait(600) == 0, "it is through before something is made"
    assert len(heard.notes) == 1 and re.match(rf"this host is measured by process {measurer.pid} since", heard.notes[0])


def test_a_step_that_measures_does_not_wait_for_itself() -> None:
    with making(), held(DeviceSettings(), Talk(lambda *_: None)):
        pass


# ---- side by side ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("500 MiB", 500 * 2**20), ("1.5gib", 3 * 2**29), ("2TB", 2 * 10**12)]
)
def test_sizes(text: str, size: int) -> None:
    assert jobs.read_bytes(text, "--memory-limit") == size


@pytest.mark.parametrize("text", ["", "8", "GB", "-1GB", "0GB", "1e3GB", "8 XB", "9" * 40 + "GB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="wanted a size such as 8GB"):
        jobs.read_bytes(text, "--memory-limit")


def test_memory_of_all_that_a_process_started() -> None:
    code = "import subprocess, sys; x = bytearray(1) * 10**8; print('ready', flush=True); subprocess.run(sys.argv[1:])"
    inner = [sys.executable, "-c", code, sys.executable, "-c", code.replace("subprocess.run(sys.argv[1:])", "input()")]
    with subprocess.Popen(inner, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == [b"ready\n"] * 2
        assert 2e8 < jobs.memory_of({process.pid}) < 4e8
        assert not jobs.memory_of({os.getpid() + 10**6})


# ---- what is told ----------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path: Path) -> Iterator[tuple[diary.Diary, Path]]:
    with diary.Diary(tmp_path, ["kdpipe", "run", "a b.yaml"]) as written:
        yield written, tmp_path


def test_status_of_a_run(page: tuple[diary.Diary, Path]) -> None:
    written, folder = page
    assert not diary.status(folder).runs
    written.begin("teacher-0", {"teacher-0": 60.0, "student-1": 30.0, "report-2": None}, 1)
    [run] = diary.status(folder).runs
    assert run.lives and run.now == "teacher-0" and run.waiting == ("student-1", "report-2") and run.done == 1
    assert 20 < run.left_seconds <= 90 and run.unknown == 1
    lines = kdpipe("status", "--artifacts", folder).stdout.splitlines()
    assert lines[0].startswith("running: kdpipe run 'a b.yaml' (process ")
    assert re.fullmatch(r"  1 of 4 done; now teacher-0 for [\d.]+ s; at least \d+ s left", lines[1]), lines
    assert lines[2] == "  waiting: student-1 and report-2" and len(lines) == 3
    written.end("teacher-0")
    written.fail("student-1", "no\x1b[31m memory", 2)
    lines = kdpipe("status", "--artifacts", folder).stdout.splitlines()
    assert "2 of 3 done; now between two steps" in lines[1]
    assert "failed" in lines[-1] and "student-1: no" in lines[-1] and "\x1b" not in lines[-1]
    written.end("student-1")
    assert not diary.status(folder).failed


def test_status_of_what_is_gone_half_written_or_nonsense(tmp_path: Path) -> None:
    """Killed runs leave pages and parts, stopped machines half a file, and strangers anything."""
    runs = tmp_path / diary.DIARIES
    (runs / diary.FAILURES).mkdir(parents=True)
    record = {"command": ["kdpipe", "run", "x.yaml"], "folder": "", "process": 1, "begun_unix": 1.0, "done": 3,
              "now": "teacher-0", "now_unix": 2.0, "waiting": {"teacher-0": 5.0}}  # fmt: skip
    (runs / "1-a.json").write_text(json.dumps(record))
    (runs / "1-a.lock").touch()
    (runs / "2-b.json").write_text(json.dumps(record)[:40])
    (runs / "3-c.json").write_text("[" * 100_000)
    (runs / "4-d.json").write_text(json.dumps(record | {"process": "x"}))
    (runs / diary.FAILURES / "z.json").write_text(
        '{"leg": "../../etc", "message": "m", "exit_code": 1, "failed_unix": 0}'
    )
    for name in ("student-0.part/resume", "graph-0.part", "half-0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "student-0.part" / "resume" / "state.pt").touch()
    (tmp_path / "half-0" / "manifest.json").write_text('{"kind": ')
    done = kdpipe("status", "--artifacts", tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == (
        "gone: process 1 was ended while it made teacher-0, 3 of 4 were done; the same command goes on: "
        "kdpipe run x.yaml"
    )
    assert "left behind by a process that is gone: graph-0; the same command begins it anew" in lines
    assert "left behind by a process that is gone: student-0; the same command goes on with it" in lines
    assert lines[-1] == f"nothing runs in {tmp_path}"
    shutil.copytree(tmp_path / "half-0", tmp_path / "teacher-0")
    assert "gone: process" not in kdpipe("status", "--artifacts", tmp_path).stdout, "it was made since"
    with diary.Diary(tmp_path, ["kdpipe", "run", "x.yaml"]):
        pass
    assert not (runs / "1-a.json").exists(), "the same command has gone on"


def test_status_where_there_is_no_folder(tmp_path: Path) -> None:
    assert_one_line(kdpipe("status", "--artifacts", tmp_path / "none"), 2, "no folder", "--artifacts")


def test_a_diary_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / diary.DIARIES).write_text("in the way")
    with diary.Diary(tmp_path, ["kdpipe"]) as written:
        written.begin("a", {"a": None}, 0)
        written.fail("a", "no", 2)
        written.end("a")
    assert (tmp_path / diary.DIARIES).read_text() == "in the way"


def test_reports_say_what_is_missing_only_where_something_is() -> None:
    """As long as nothing is, keys are what they were."""
    assert set(ReportConfig().model_dump()) == {"version", "title", "max_drop"}
    assert ReportConfig(missing=("a",)).model_dump()["missing"] == ("a",)
    assert "most_images" not in validated(Recipe, TINY, "x").data.model_copy().model_dump(exclude_none=True)


def test_status_changes_nothing(folder: Path) -> None:
    (folder / "artifacts").mkdir()
    before = time.time_ns()
    assert kdpipe("status", cwd=folder).stdout == "nothing runs in artifacts\n"
    assert not list((folder / "artifacts").iterdir()) and (folder / "artifacts").stat().st_mtime_ns <= before
