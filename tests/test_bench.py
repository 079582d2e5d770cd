"""Measuring: raw samples kept, interleaved, with a control; contract over every device."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, replace_file

from kdpipe.core.artifact import Order
from kdpipe.core.config import BenchPlan, DeviceSettings, MeasureSettings, QuantizeConfig, suited
from kdpipe.core.errors import KdpipeError, UserError
from kdpipe.core.kinds import Bundle, Probe
from kdpipe.devices import DEVICES, find_device, opened
from kdpipe.devices.bench import bench, turns
from kdpipe.devices.local import LocalDevice
from kdpipe.devices.session import bench_config
from kdpipe.quantize import VARIANTS
from kdpipe.runtime.measure import warm_up
from kdpipe.runtime.probe import UNAVAILABLE, probe, read

TIMED = [
    f"{target}-{precision}" for target in ("onnxruntime", "openvino", "tflite") for precision in ("float32", "int8")
]


def test_order_is_shuffled_and_then_backwards() -> None:
    rounds = turns(["a", "b", "c", "d"], 5)
    assert len(rounds) == 5
    assert all(sorted(each) == ["a", "b", "c", "d"] for each in rounds)
    assert rounds[1] == rounds[0][::-1] and rounds[3] == rounds[2][::-1]
    assert len({tuple(each) for each in rounds}) > 2
    assert rounds == turns(["a", "b", "c", "d"], 5)


@pytest.mark.parametrize("name", TIMED)
def test_numbers_come_from_raw_samples(made: Made, name: str) -> None:
    found = made.measurement.facts.results[name]
    runs = json.loads(made.measurement.file(f"latency_ns/{name}.json").read_text())
    assert len(runs) == 2
    assert found.inferences == sum(len(run["latency_ns"]) for run in runs)
    assert all(len(run["latency_ns"]) >= 40 and min(run["latency_ns"]) > 0 for run in runs)
    medians = [np.sort(run["latency_ns"])[int(np.ceil(len(run["latency_ns"]) / 2)) - 1] / 1e6 for run in runs]
    assert found.latency_p50_by_process_ms == pytest.approx(medians)
    # Two processes bound nothing: no interval is claimed.
    assert found.latency_p50_ms.low is None
    # The runner's memory is its own, not that of the process that started it.
    assert 10e6 < found.memory_before_open_bytes < found.peak_memory_bytes < 400e6
    assert all(load > 0 for load in found.load_ms)


@pytest.mark.parametrize("name", [*TIMED, "tensorrt-float32", "tensorrt-int8"])
def test_accuracy_is_of_the_stored_logits(made: Made, name: str) -> None:
    logits = np.load(made.measurement.file(f"logits/{name}.npy"))
    labels = np.load(made.measurement.file("labels.npy"))
    assert labels.tolist() == [sample.label for sample in made.dataset.samples("test")]
    found = made.measurement.facts.results[name]
    assert found.accuracy.value == (logits.argmax(1) == labels).mean()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "tflite"])
def test_float32_has_torchs_accuracy(made: Made, target: str) -> None:
    accuracy = made.measurement.facts.results[f"{target}-float32"].accuracy.value
    assert accuracy == made.student.facts.test_accuracy


def test_what_cannot_run_has_no_latency(made: Made) -> None:
    found = made.measurement.facts.results["tensorrt-int8"]
    assert found.status == "not built here"
    assert found.accuracy_by == "onnxruntime"
    assert found.latency_p50_ms is None
    assert "latency_ns/tensorrt-int8.json" not in made.measurement.manifest.files


def test_every_targets_float32_is_measured_twice_a_round(made: Made) -> None:
    facts = made.measurement.facts
    assert list(facts.controls) == ["onnxruntime-float32", "openvino-float32", "tflite-float32"]
    for name, control in facts.controls.items():
        first, second = (
            [
                np.median(run["latency_ns"])
                for run in json.loads(made.measurement.file(f"latency_ns/{file}.json").read_text())
            ]
            for file in (name, f"control-{name}")
        )
        assert control.n == 2 and control.value == pytest.approx(np.sqrt(np.prod(second) / np.prod(first)))


def test_two_rounds_bound_nothing_and_are_called_noisy(made: Made) -> None:
    facts = made.measurement.facts
    assert facts.trust == "noisy" and set(facts.untrusted) == {name for name in made.bundles if "tensorrt" not in name}
    assert "2 rounds are too few" in facts.untrusted["openvino-int8"].reason
    assert facts.results["tensorrt-int8"].trust is None


def test_warm_up_ends_when_it_is_steady() -> None:
    import time

    calls = []

    def run(turn: int) -> None:
        calls.append(turn)
        time.sleep(0.01 if turn < 20 else 0.002)

    found = warm_up(run)
    assert found["settled"]
    assert len(found["window_median_ns"]) >= 5
    assert calls == list(range(len(calls)))


@pytest.mark.parametrize("name", DEVICES)
def test_device_contract(made: Made, tmp_path: Path, name: str) -> None:
    """Probe, push, predict, measure, refuse: what the bench needs of any device."""
    bundle, device = made.bundles["onnxruntime-int8"], find_device(name)
    probe = device.probe()
    assert probe.machine and probe == device.probe().model_copy(update=_moving(probe))
    assert device.runs("onnxruntime") and (name == "null" or not device.runs("tensorrt"))
    np.save(tmp_path / "images.npy", np.zeros((3, 32, 32, 3), np.uint8))
    settings = MeasureSettings(seconds=0.05, min_samples=10, images=2)
    with opened(device, tmp_path):
        device.push(bundle.path, "bundle")
        device.push(tmp_path / "images.npy", "images.npy")
        answer = device.predict("bundle", "images.npy", tmp_path / "outputs.npy")
        assert answer.images == 3
        assert np.load(tmp_path / "outputs.npy").shape == (3, 10)
        samples = device.measure("bundle", "images.npy", settings)
        assert len(samples.latency_ns) >= 10 and min(samples.latency_ns) > 0
        assert samples.session.runtime == ("null" if name == "null" else "onnxruntime")
        for wrong in (("nowhere", "images.npy"), ("bundle", "nowhere")):
            if name == "null" and wrong[0] == "bundle":
                continue  # it looks at no image to measure nothing
            with pytest.raises(UserError, match="nowhere"):
                device.measure(*wrong, settings)
    assert (bundle.path / "model.onnx").is_file()  # closing removes no original


def _moving(probe: Probe) -> dict[str, object]:
    """What another look may find changed."""
    return {name: getattr(probe, name) for name in ("current_khz", "load_average", "temperatures_millicelsius")}


def test_a_runner_that_does_not_end_is_stopped(made: Made, tmp_path: Path) -> None:
    device = LocalDevice(DeviceSettings())
    np.save(tmp_path / "images.npy", np.zeros((3, 32, 32, 3), np.uint8))
    with opened(device, tmp_path):
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        device.push(tmp_path / "images.npy", "images.npy")
        with pytest.raises(KdpipeError, match="did not end"):
            device.run(["measure", "bundle", "--images", "images.npy", "--seconds", "60"], 2)


def test_a_runner_that_answers_rubbish_is_refused(made: Made, tmp_path: Path) -> None:
    """Another program where the runner ought to be: what a broken or hostile device prints is checked."""
    device = LocalDevice(DeviceSettings())
    with opened(device, tmp_path):
        (tmp_path / "device" / "runtime").unlink()
        for printed in ("hello", "[1]", "{}", '{"images": "three"}', ""):
            (tmp_path / "device" / "runtime.py").write_text(f"print({printed!r})")
            with pytest.raises(UserError, match="answered something else than wanted to 'predict'"):
                device.predict("bundle", "images.npy", tmp_path / "outputs.npy")


def test_the_null_device_goes_through_the_bench(made: Made, tmp_path: Path) -> None:
    """Emulated, so never ranked; its latency is what measuring costs."""
    bundles = {name: made.bundles[name] for name in ("onnxruntime-float32", "onnxruntime-int8")}
    plan = BenchPlan(device="null", rounds=2, seconds=0.02, min_samples=10)
    order = Order("bench", bench_config(plan), {**bundles, "data": made.dataset})
    facts = bench(order, bundles, made.dataset, tmp_path / "out").facts
    assert facts.emulated and facts.device == "null"
    assert {result.trust.word for result in facts.results.values() if result.trust} == {"invalid"}
    found = facts.results["onnxruntime-int8"]
    assert found.accuracy is not None and 0.05 < found.accuracy.value < 0.2, "it always says the first class"
    assert found.latency_p50_ms is not None and found.latency_p50_ms.value < 0.05


def test_variants_are_decided_by_the_device_they_are_for(made: Made) -> None:
    """Not by this machine: an ARM board takes signed activations, an old x86 7-bit weights, bf16 units bf16."""
    here = find_device("local").probe()
    arm = here.model_copy(update={"machine": "aarch64", "flags": {"asimddp": True}})
    old = here.model_copy(update={"machine": "x86_64", "flags": {"avx2": True}})
    new = here.model_copy(update={"machine": "x86_64", "flags": {"avx2": True, "avx512_vnni": True, "amx_bf16": True}})
    chosen = {
        name: suited(QuantizeConfig(), probe.machine, probe.known_flags)
        for name, probe in (("arm", arm), ("old", old), ("new", new))
    }
    assert (chosen["arm"].activations, chosen["arm"].reduce_range) == ("int8", False)
    assert (chosen["old"].activations, chosen["old"].reduce_range) == ("uint8", True)
    assert (chosen["new"].activations, chosen["new"].reduce_range) == ("uint8", False)
    facts = made.models["openvino-float32"].facts
    assert VARIANTS["openvino"]["bf16"].suits(facts, new.known_flags)
    assert not VARIANTS["openvino"]["bf16"].suits(facts, arm.known_flags)


def test_unreadable_is_unavailable_never_zero() -> None:
    assert read("/no/such/file") == UNAVAILABLE
    found = probe()
    assert 0 not in [value for value in found.values() if not isinstance(value, bool)]
    assert found["memory_bytes"] > 0


def test_versions_kernel_and_governor_name_the_session() -> None:
    """An update of a runtime or a kernel is another machine to measure on."""
    here = find_device("local").probe()
    assert here.runtimes["onnxruntime"] == importlib.metadata.version("onnxruntime")
    named = bench_config(BenchPlan()).device_fingerprint
    assert (named["system"], named["governor"], named["runtimes"]) == (here.system, here.governor, here.runtimes)
    assert not {"current_khz", "load_average", "temperatures_millicelsius"} & named.keys(), "what moves names nothing"
    updated = here.model_copy(update={"runtimes": {**here.runtimes, "onnxruntime": "99"}})
    assert updated.fingerprint != here.fingerprint


def test_unknown_device() -> None:
    with pytest.raises(UserError, match="unknown device 'loca', wanted local, null; did you mean 'local'"):
        bench_config(BenchPlan(device="loca"))


def test_a_failing_runner_is_named(made: Made, tmp_path: Path) -> None:
    """A bundle whose model is no model (and whose hashes say so truthfully)."""
    folder = tmp_path / "bundle"
    shutil.copytree(made.bundles["onnxruntime-float32"].path, folder)
    replace_file(folder, "model.onnx", b"nothing")
    with pytest.raises(UserError, match="the runner failed on 'local'"):
        bundles = {"x": Bundle.open(folder)}
        order = Order("bench", bench_config(BenchPlan(rounds=2)), {**bundles, "data": made.dataset})
        bench(order, bundles, made.dataset, tmp_path / "out")
    assert not (tmp_path / "out").exists()
