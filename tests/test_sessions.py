"""Several devices side by side, one that is lost, sessions pooled, one bundle against another, blocks of images."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import SMALL_RECIPE, Made, assert_one_line, command, copied_steps, interruptible, kdpipe, listening

from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.config import BenchPlan, DeviceSettings, QuantizePlan, ReportConfig
from kdpipe.core.errors import DeviceLost, KdpipeError, UserError
from kdpipe.core.kinds import (
    Bundle,
    Comparison,
    Measurement,
    MeasurementFacts,
    Result,
    Trust,
)
from kdpipe.core.stats import Interval
from kdpipe.devices import DEVICES, accuracy, bench, find_device, lock, opened
from kdpipe.devices.accuracy import Asked
from kdpipe.devices.journal import Journal
from kdpipe.devices.runner import RunnerDevice
from kdpipe.devices.session import bench_config
from kdpipe.devices.talk import Talk, together
from kdpipe.report.against import against
from kdpipe.report.pooled import Pooled, pool, pooled_comparisons, pooled_result

QUICK = BenchPlan(
    rounds=2, seconds=0.02, max_seconds=0.05, min_samples=10, warm_up_seconds=0.02, images=8, cold_starts=0
)
QUICK_OPTIONS = [
    "--rounds",
    2,
    "--seconds",
    0.02,
    "--max-seconds",
    0.05,
    "--min-samples",
    10,
    "--warm-up-seconds",
    0.02,
]
QUICK_OPTIONS += ["--images", 8, "--cold-starts", 0]
NAMES = ("onnxruntime-float32", "onnxruntime-int8")


class Cable(RunnerDevice):
    """A device behind a link that a file cuts: this machine, with a folder of its own for what is brought to it."""

    def argv(self, command: str) -> list[str]:
        return ["/bin/sh", "-c", f'test -e "$1" && exit 255; {command}', "sh", f"{self.settings.address}"]

    def send(self, source: Path, path: str) -> None:
        self._check()
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)

    def receive(self, path: str, target: Path) -> None:
        self._check()
        shutil.copyfile(path, target)

    def lost(self, returncode: int, stderr: bytes) -> str | None:
        return "the cable is cut" if returncode == 255 else None

    def _check(self) -> None:
        if Path(str(self.settings.address)).exists():
            raise DeviceLost(f"'{self.name}' cannot be reached: the cable is cut")


@pytest.fixture
def cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device called ``far``; it is lost for as long as this file is there."""
    path = tmp_path / "cut"
    monkeypatch.setitem(DEVICES, "cable", Cable)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(bench, "LINK_WAIT_SECONDS", 0.01)
    described = {"kind": "cable", "address": str(path), "python": sys.executable, "folder": str(tmp_path / "far")}
    (tmp_path / "config" / "kdpipe").mkdir(parents=True)
    (tmp_path / "config" / "kdpipe" / "devices.yaml").write_text(yaml.safe_dump({"far": described}))
    return path


class Scissors(progress.Silence):
    """Cuts the link when a step's detail has these words, and hears what is told."""

    def __init__(self, cut: Path, at: str) -> None:
        self.cut, self.at = cut, at
        self.notes: list[str] = []
        self.details: list[str] = []

    def advance(self, steps: int, detail: str) -> None:
        self.details.append(detail)
        if self.at in detail:
            self.cut.touch()

    def note(self, text: str) -> None:
        self.notes.append(text)


def bundles_of(made: Made) -> dict[str, Bundle]:
    return {name: made.bundles[name] for name in NAMES}


def unmeasured(made: Made, folder: Path) -> Path:
    """A copy of what was made, but for what was measured."""
    return copied_steps(made, folder, "measurement", "report", "tflite", "bundle", "openvino", "tensorrt")


# ---- several devices ------------------------------------------------------------------------------------------


def test_a_lost_device_leaves_the_others_whole_and_is_gone_on_with(made: Made, cut: Path, tmp_path: Path) -> None:
    chain, plan = Chain(tmp_path / "artifacts"), QUICK.model_copy(update={"devices": ("local", "far")})
    scissors = Scissors(cut, "far: round 2")
    with listening(scissors):
        benched = chain.bench(plan, bundles_of(made), made.dataset)
    assert list(benched.measured) == ["local"] and "the cable is cut" in benched.told_lost
    assert benched.told_lost.startswith("'far' was not measured: ")
    assert any("local: " in detail and " | far: " in detail for detail in scissors.details), "both are seen at once"
    assert any("local: done" in detail for detail in scissors.details) and "far: given up" in scissors.details[-1]
    assert any(note.startswith("far: ") and "trying again" in note for note in scissors.notes)
    [local] = benched.measured["local"]
    (kept,) = (tmp_path / "artifacts").glob("measurement-*.part")
    lines = (kept / "resume" / "processes.jsonl").read_text().splitlines()
    before = [json.loads(line.partition(" ")[2]) for line in lines]  # after its hash
    assert len(before) >= 3, "the first round of far is kept"

    cut.unlink()
    again = chain.bench(plan, bundles_of(made), made.dataset, resume=True)
    assert [each.path for each in again.measured["local"]] == [local.path], "as it was"
    [far] = again.measured["far"]
    assert not again.lost and far.settings["attempt"] == 1 and len(far.facts.pauses_seconds) == 1
    for process in before:
        samples = json.loads(far.file(Measurement.samples_name(process["name"])).read_text())
        assert samples[process["round"]]["latency_ns"] == process["samples"]["latency_ns"], "to the nanosecond"
    # The same bundles on the same processor, brought over by content: nothing is called something else.
    for name in NAMES:
        found = far.facts.results[name].against_host
        assert found.mismatches == found.lost == found.won == 0 and found.max_difference < 1e-4
        assert far.mismatches(name) == [] and local.facts.results[name].against_host is None
    assert far.facts.results[NAMES[0]].conditions.others_cores != "unavailable", "it was watched from outside"
    assert len(list((tmp_path / "far" / "work").iterdir())) <= 1, "what could not be removed when the link was cut"

    # A report of both: each for itself.
    report = chain.report(ReportConfig(), again.one_of_each, {})
    numbers, page = report.numbers, report.page.read_text()
    assert [device["device"] for device in numbers["devices"]] == ["local", "far"]
    assert {row["name"] for device in numbers["devices"] for row in device["bundles"]} == set(NAMES)
    assert "Bundles on local" in page and "Bundles on far" in page
    assert "no row is ranked against another device" in page and "says the same of every image as on the host" in page
    with pytest.raises(UserError, match="another session of 'far'"):
        other = chain.bench(QUICK.model_copy(update={"devices": ("far",), "images": 4}), bundles_of(made), made.dataset)
        chain.report(ReportConfig(), [*again.one_of_each, *other.one_of_each], {})


def test_the_command_names_the_lost_device_and_resumes(made: Made, cut: Path, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts"
    paths = [shutil.copytree(made.bundles[name].path, folder / name) for name in NAMES[:1]]
    call = ["bench", *paths, "--data", made.dataset.path, *QUICK_OPTIONS, "--device", "null,far", "--json"]
    cut.touch()
    done = kdpipe(*call)
    assert_one_line(done, 2, "'far' was not measured", "the cable is cut", "--resume")
    answer = json.loads(done.stdout)
    assert [each["facts"]["device"] for each in answer["measurements"]] == ["null"] and list(answer["lost"]) == ["far"]
    cut.unlink()
    done = kdpipe(*call, "--resume")
    assert done.returncode == 75
    answer = json.loads(done.stdout)
    assert {each["facts"]["device"] for each in answer["measurements"]} == {"null", "far"} and not answer["lost"]
    assert len(list(folder.glob("measurement-*-1"))) == 2 and not list(folder.glob("measurement-*-2"))
    assert_one_line(kdpipe(*call, "--resume", "--again"), 2, "choose one of them")
    assert_one_line(kdpipe(*call, "--out", tmp_path / "out"), 2, "--out names one measurement")
    # Every call is an attempt; a report takes one of each device.
    done = kdpipe(*call, "--device", "null", "--sessions", 2)
    assert [each["facts"]["device"] for each in json.loads(done.stdout)["measurements"]] == ["null", "null"]
    taken = sorted(folder.glob("measurement-*-1"))
    done = kdpipe("report", *taken, "--json")
    assert done.returncode == 0, done.stderr
    devices = json.loads(done.stdout)["facts"]["devices"]
    assert {device["device"] for device in devices} == {"null", "far"}
    [null] = [device for device in devices if device["device"] == "null"]
    assert null["pareto"] == [] and null["trust"] == "invalid", "emulated, so never ranked"


def test_devices_are_measured_side_by_side_however_often_each_was_before(made: Made, cut: Path, tmp_path: Path) -> None:
    chain, one = Chain(tmp_path), {NAMES[0]: made.bundles[NAMES[0]]}
    plan = QUICK.model_copy(update={"devices": ("far",)})
    chain.bench(plan, one, made.dataset)
    watching = Scissors(cut, "nothing is cut")
    with listening(watching):
        both = chain.bench(plan.model_copy(update={"devices": ("local", "far")}), one, made.dataset)
    assert {device: found.settings["attempt"] for device, [found] in both.measured.items()} == {"local": 1, "far": 2}
    assert any("local: " in detail and " | far: " in detail for detail in watching.details), "both are seen at once"


def test_if_no_device_is_left_it_says_so(made: Made, cut: Path, tmp_path: Path) -> None:
    cut.touch()
    with pytest.raises(DeviceLost, match="the cable is cut"):
        Chain(tmp_path).bench(QUICK.model_copy(update={"devices": ("far",)}), bundles_of(made), made.dataset)


def test_each_device_measures_what_suits_it(made: Made, tmp_path: Path) -> None:
    """One wants unsigned activations, one signed: both are made, once, and each is told under the same name."""
    chain = Chain(unmeasured(made, tmp_path / "artifacts"))
    here = find_device("local").probe()
    arm = here.model_copy(update={"machine": "aarch64", "flags": {"asimddp": True}})
    plan = QuantizePlan(variants=("int8",), calibrate={"images": 64}, check_images=32)
    found = chain.variants_of(plan, made.models["onnxruntime-float32"], made.dataset, {"a": here, "b": arm, "c": here})
    [a], [b], [c] = found["a"], found["b"], found["c"]
    assert a.key == c.key == made.models["onnxruntime-int8"].key != b.key
    assert (a.settings["activations"], b.settings["activations"]) == ("uint8", "int8")
    assert [step.name for step in chain.steps].count("onnxruntime-int8") == 2


RECIPE = {**SMALL_RECIPE, "export": {"targets": ["onnxruntime"]}, "quantize": None}


def test_a_run_over_several_devices_ends_in_one_report(made: Made, cut: Path, tmp_path: Path) -> None:
    settings = {**QUICK.model_dump(mode="json"), "devices": ["null", "far"]}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump({**RECIPE, "bench": settings}))
    call = ["run", tmp_path / "two.yaml", "--artifacts", unmeasured(made, tmp_path / "artifacts"), "--json"]
    cut.touch()
    done = kdpipe(*call)
    assert_one_line(done, 2, "'far' was not measured", "the cable is cut", "the others are reported")
    assert "'far' may be lost when it is to be measured" in done.stderr, "told before any work"
    assert [device["device"] for device in json.loads(done.stdout)["numbers"]["devices"]] == ["null"]
    cut.unlink()
    done = kdpipe(*call)
    assert_one_line(done, 75, "on far onnxruntime-float32 is noisy")
    null, far = json.loads(done.stdout)["numbers"]["devices"]
    assert (
        [row["name"] for row in far["bundles"]] == [row["name"] for row in null["bundles"]] == ["onnxruntime-float32"]
    )
    assert null["trust"]["attempts"] == far["trust"]["attempts"] == 1, "null was not measured again"
    assert null["front"] == [] and null["trust"]["emulated"] and not far["trust"]["emulated"]


def test_an_interrupt_ends_what_all_devices_do(made: Made, cut: Path, tmp_path: Path) -> None:
    """The processes of a session are no children of the terminal: Ctrl-C reaches this one alone.

    The second device is this machine by another name, so one of them measures and the other waits for it.
    """
    (tmp_path / "config" / "kdpipe" / "devices.yaml").write_text("second: {kind: local}")
    path = shutil.copytree(made.bundles[NAMES[0]].path, tmp_path / NAMES[0])
    options = ["--rounds", 2, "--seconds", 300, "--warm-up-seconds", 0.1, "--images", 8, "--cold-starts", 0]
    call = interruptible(command("bench", path, "--data", made.dataset.path, "--device", "local,second", *options))
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        end = time.monotonic() + 600
        while not _measuring(tmp_path):
            assert process.poll() is None and time.monotonic() < end, "it never began to measure"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=1800)
    finally:
        process.kill()
    assert process.returncode == 130 and "interrupted" in told and "Traceback" not in told
    assert not _measuring(tmp_path)


def _measuring(folder: Path) -> list[int]:
    """Runners that time what lies in ``folder``, whoever their parent is by now."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if "runtime" in words and "measure" in words and any(word.startswith(str(folder)) for word in words):
                found.append(int(path.name))
    return found


# ---- locks ----------------------------------------------------------------------------------------------------


def test_one_session_a_device_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called; another machine is not waited for."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    same = [DeviceSettings(name=name, kind="ssh", address="pi@pi5") for name in ("pi5", "kitchen")]
    other = DeviceSettings(name="orin", kind="ssh", address="nv@orin")
    order: list[str] = []
    notes: list[str] = []

    talk = Talk(lambda *_: None, notes.append)

    def second() -> None:
        with lock.held(same[1], talk):
            order.append("second")

    with lock.held(same[0], talk), lock.held(other, talk):
        thread = threading.Thread(target=second)
        thread.start()
        end = time.monotonic() + 300
        while not notes and time.monotonic() < end:
            time.sleep(0.01)
        order.append("first")
    thread.join(300)
    assert order == ["first", "second"]
    talk.stopped.set()
    with lock.held(other, talk), pytest.raises(KdpipeError, match="stopped"), lock.held(other, talk):
        pass  # who is to stop does not wait
    del notes[1:]
    assert len(notes) == 1 and notes[0].startswith("'kitchen' is measured by process ") and notes[0].endswith("waiting")


def test_a_device_that_another_host_measures_is_refused(made: Made, tmp_path: Path) -> None:
    device = find_device("local")
    with device.watching(), pytest.raises(UserError, match=r"measured by .* since"):
        Chain(tmp_path).bench(QUICK, bundles_of(made), made.dataset)


def test_details_of_all_devices_are_told_together() -> None:
    told: list[tuple[int, str]] = []
    talks = together(lambda steps, detail: told.append((steps, detail)), ["a", "b"], threading.Event())
    talks["a"].advance(0, "round 1, x")
    talks["b"].advance(1, "")
    assert told == [(0, "a: round 1, x | b: waits"), (1, "a: round 1, x | b: waits")]


# ---- accuracy in blocks -----------------------------------------------------------------------------------------


def test_images_go_in_blocks_and_a_cut_goes_on(
    made: Made, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "BLOCK_BYTES", 200 * 32 * 32 * 3)
    device, bundle = find_device("far"), made.bundles["onnxruntime-int8"]
    (tmp_path / "journal").mkdir()
    (tmp_path / "scratch").mkdir()
    scissors = Scissors(cut, "images 201 to 400 of")
    with opened(device, tmp_path / "scratch"):

        def asked(talk: Talk) -> Asked:
            config = bench_config(QUICK, "local")
            journal = Journal(tmp_path / "journal")
            return Asked(device, {"x": bundle}, made.dataset, journal, tmp_path / "scratch", talk, config)

        first = asked(Talk(scissors.advance, scissors.note))
        accuracy.push(first)
        with pytest.raises(DeviceLost):
            accuracy.ask(first)
        cut.unlink()
        written = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "journal/outputs/x").glob("*.npy")}
        assert "00000000.npy" in written and "00000400.npy" not in written
        second = asked(Talk(lambda *_: None))
        assert accuracy.ask(second) == {}
        after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "journal/outputs/x").glob("*.npy")}
        assert after["00000000.npy"] == written["00000000.npy"] and after["alone.npy"] == written["alone.npy"]
        outputs = accuracy.gather(second, "x", tmp_path / "all.npy")
        stored = [path for path in (tmp_path / "far" / "store").iterdir() if path.is_file()]
        assert len(stored) <= 2, "the timing images, and at most the block that the cut left behind"
    np.testing.assert_allclose(outputs, made.measurement.outputs("onnxruntime-int8"), atol=1e-4)


def test_what_another_machine_calls_something_else_is_kept_by_name(made: Made) -> None:
    """A bundle of a variant in the place of a device's: the images are named, with what each of the two says."""
    bundle, labels = made.bundles["onnxruntime-float32"], made.measurement.labels
    here, there = (made.measurement.outputs(name).copy() for name in ("onnxruntime-float32", "onnxruntime-int8"))
    there[3] = np.roll(here[3], 1)
    there[5] = np.where(np.arange(10) == labels[5], 99.0, here[5])
    here[5] = np.where(np.arange(10) == labels[5], -99.0, here[5])
    found, rows = accuracy.against_host(bundle, made.dataset, labels, there, accuracy.HostOutputs("onnxruntime", here))
    differing = np.flatnonzero(here.argmax(1) != there.argmax(1))
    assert [row.position for row in rows] == differing.tolist() and {3, 5} <= set(differing)
    samples = made.dataset.samples("test")
    assert all(row.image == samples[row.position].path.name for row in rows)
    [five] = [row for row in rows if row.position == 5]
    assert five.device == five.label != five.host
    right = [outputs.argmax(1) == labels for outputs in (here, there)]
    assert (found.lost, found.won) == ((right[0] & ~right[1]).sum(), (~right[0] & right[1]).sum())
    assert found.mismatches == len(rows) and found.difference.value == pytest.approx(right[1].mean() - right[0].mean())


# ---- sessions as the unit ---------------------------------------------------------------------------------------


def trusted(p50: float, over: float | None = None, word: str = "trusted") -> Result:
    """A result of ten processes that all took about as long."""
    interval = Interval(p50, 0.99 * p50, 1.01 * p50, 10)
    return Result(
        status="measured",
        latency_p50_ms=interval,
        latency_p50_by_process_ms=[p50] * 10,
        over_float32=None if over is None else Interval(over, 0.99 * over, 1.01 * over, 10),
        trust=Trust(word=word, reason="" if word == "trusted" else "for a reason"),
    )


@pytest.mark.parametrize("sessions", [3, 5])
def test_pooled_over_sessions_the_long_run_ratio_is_covered(sessions: int) -> None:
    """Spread of 5 % from session to session, 1 % within: one session's interval covers the truth in 41 of 100."""
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        ratios = 0.5 * np.exp(generator.normal(0, 0.05, sessions))
        found = pooled_result(trusted(1.0), [trusted(1.0, over=ratio) for ratio in ratios], 0.5).over_float32
        assert found.n == sessions
        covered += found.low <= 0.5 <= found.high
    assert covered >= 180, "a correct 95 % interval has this in all but 1 of 1,000 tries"


def test_a_pooled_number_that_is_not_known_well_enough_is_noisy() -> None:
    near, far = [trusted(value) for value in (1.0, 1.01, 0.99)], [trusted(value) for value in (1.0, 1.2, 0.8)]
    assert pooled_result(near[0], near, 0.1).trust.word == "trusted"
    found = pooled_result(far[0], far, 0.1).trust
    assert found.word == "noisy" and found.reason.startswith("over 3 sessions p50 is known within ")
    assert pooled_result(near[0], near[1:2], 0.1) is near[1] and pooled_result(near[0], [], 0.1) is near[0]


def facts(made: Made, results: Mapping[str, Result], ratio: float, left_open: float | None = 0.02) -> MeasurementFacts:
    differ = Comparison(
        first="a", second="b", ratio=Interval(ratio, ratio / 1.01, ratio * 1.01, 10), differ=True, left_open=left_open
    )
    return made.measurement.facts.model_copy(
        update={"results": dict(results), "comparisons": [differ], "device": "pi5", "order_seed": 7}
    )


class Session:
    """Facts alone, as a sealed measurement has them."""

    def __init__(self, facts: MeasurementFacts) -> None:
        self.facts = facts


def test_only_trusted_sessions_count_and_all_of_them(made: Made) -> None:
    def session(p50: float, word: str) -> MeasurementFacts:
        return facts(made, {"a": trusted(p50, word=word), "b": trusted(2 * p50)}, 0.5 * p50)

    sessions = [session(1.0, "trusted"), session(9.0, "noisy"), session(1.02, "trusted"), session(7.0, "noisy")]
    found = pool([Session(each) for each in sessions])  # type: ignore[list-item]
    assert found.shown.facts is sessions[2], "the last that is trusted as a whole"
    assert found.sessions == {"a": 2, "b": 4}, "trust is a number's, not a session's"
    assert found.facts.results["a"].latency_p50_ms.value == pytest.approx(math.sqrt(1.02))
    [pair] = found.facts.comparisons
    assert pair.ratio.n == 2 and pair.ratio.value == pytest.approx(0.5 * math.sqrt(1.02)) and pair.left_open == 0.02
    [alone] = pooled_comparisons(sessions[0], sessions[:2])
    assert alone == sessions[0].comparisons[0], "one session: its own"


def test_one_bundle_against_another_in_a_sentence(made: Made) -> None:
    noise = np.exp(np.random.default_rng(0).normal(0, 0.01, 10))

    def pair(ratio: float, word: str = "trusted") -> Pooled:
        a = trusted(ratio, word=word).model_copy(update={"latency_p50_by_process_ms": list(ratio * noise)})
        return pool([Session(facts(made, {"a": a, "b": trusted(1.0)}, ratio))])  # type: ignore[list-item]

    faster = against(pair(0.5), "a", "b")
    assert faster.resolved and faster.ratio.n == 5 and 0.49 < faster.ratio.low < faster.ratio.high < 0.52
    told = faster.sentence()
    assert told.startswith("a takes 0.5") and "of the time of b on pi5 (5 blocks of this session only)" in told
    assert told.endswith("resolved, it is faster")
    tie = against(pair(1.01), "a", "b")
    assert not tie.resolved and "not resolved, a tie (the A/A controls leave 2 % open)" in tie.sentence()
    doubted = against(pair(0.5, "noisy"), "a", "b")
    assert doubted.sessions == 0 and doubted.sentence().endswith("not to be trusted: a is noisy: for a reason")
    assert json.loads(json.dumps(faster.as_dict()))["sentence"] == told
    several = [Session(facts(made, {"a": trusted(ratio), "b": trusted(1.0)}, ratio)) for ratio in (0.5, 0.51, 0.49)]
    pooled = against(pool(several), "a", "b")  # type: ignore[arg-type]
    assert pooled.sessions == 3 and pooled.resolved and "(3 sessions)" in pooled.sentence()
    bare = Result(status="not built here")
    with pytest.raises(UserError, match="'a' was not timed on 'pi5': not built here"):
        against(pool([Session(facts(made, {"a": bare, "b": bare}, 1.0))]), "a", "b")  # type: ignore[list-item]


def test_against_from_the_command_line(made: Made, tmp_path: Path) -> None:
    first, second = (shutil.copytree(made.bundles[name].path, tmp_path / name) for name in NAMES)
    call = ["bench", second, "--against", first, "--data", made.dataset.path, *QUICK_OPTIONS, "--device", "local"]
    done = kdpipe(*call)
    assert done.returncode == 75, "two rounds bound nothing"
    measurement, sentence = done.stdout.strip().splitlines()
    assert Path(measurement).is_dir() and sentence.startswith("onnxruntime-int8 takes ")
    assert "of the time of onnxruntime-float32 on local (1 block of this session only): not resolved" in sentence
    done = kdpipe(*call[:-1], "null", "--threads", "1,2")
    told = [line.partition(" takes ")[0] for line in done.stdout.strip().splitlines()[1:]]
    assert told == ["onnxruntime-int8@1", "onnxruntime-int8@2"]
    assert_one_line(kdpipe("bench", first, "--against", first), 2, "named twice")
