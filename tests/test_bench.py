"""Measuring: raw samples kept, interleaved, with a control; contract over every device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, replace_file

from kdpipe.core.artifact import Order
from kdpipe.core.config import BenchPlan
from kdpipe.core.errors import KdpipeError, UserError
from kdpipe.core.kinds import Bundle
from kdpipe.devices import DEVICES
from kdpipe.devices.bench import CONTROL, bench, comparisons, turns
from kdpipe.devices.session import bench_config
from kdpipe.runtime.measure import warm_up
from kdpipe.runtime.probe import UNAVAILABLE, probe, read

TIMED = [
    f"{target}-{precision}" for target in ("onnxruntime", "openvino", "tflite") for precision in ("float32", "int8")
]


def test_order_is_shuffled_and_then_backwards() -> None:
    rounds = turns(["a", "b", "c"], 5)
    assert len(rounds) == 5
    assert all(sorted(each) == sorted(["a", "b", "c", CONTROL]) for each in rounds)
    assert rounds[1] == rounds[0][::-1] and rounds[3] == rounds[2][::-1]
    assert len({tuple(each) for each in rounds}) > 2
    assert rounds == turns(["a", "b", "c"], 5)
    assert turns([], 3) == []


@pytest.mark.parametrize("name", TIMED)
def test_numbers_come_from_raw_samples(made: Made, name: str) -> None:
    found = made.measurement.facts.results[name]
    runs = json.loads(made.measurement.file(f"latency_ns/{name}.json").read_text())
    assert len(runs) == 2
    assert found["inferences"] == sum(len(run["latency_ns"]) for run in runs)
    assert all(len(run["latency_ns"]) >= 40 and min(run["latency_ns"]) > 0 for run in runs)
    medians = [np.sort(run["latency_ns"])[int(np.ceil(len(run["latency_ns"]) / 2)) - 1] / 1e6 for run in runs]
    assert found["latency_p50_by_process_ms"] == pytest.approx(medians)
    # Two processes bound nothing: no interval is claimed.
    assert found["latency_p50_ms"]["low"] is None
    # The runner's memory is its own, not that of the process that started it.
    assert 10e6 < found["memory_before_open_bytes"] < found["peak_memory_bytes"] < 400e6
    assert all(load > 0 for load in found["load_ms"])


@pytest.mark.parametrize("name", [*TIMED, "tensorrt-float32", "tensorrt-int8"])
def test_accuracy_is_of_the_stored_logits(made: Made, name: str) -> None:
    logits = np.load(made.measurement.file(f"logits/{name}.npy"))
    labels = np.load(made.measurement.file("labels.npy"))
    assert labels.tolist() == [sample.label for sample in made.dataset.samples("test")]
    found = made.measurement.facts.results[name]
    assert found["accuracy"]["value"] == (logits.argmax(1) == labels).mean()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt", "tflite"])
def test_float32_has_torchs_accuracy(made: Made, target: str) -> None:
    accuracy = made.measurement.facts.results[f"{target}-float32"].accuracy.value
    assert accuracy == made.student.facts.test_accuracy


def test_what_cannot_run_has_no_latency(made: Made) -> None:
    found = made.measurement.facts.results["tensorrt-int8"]
    assert found["status"] == "not built here"
    assert found["accuracy_by"] == "onnxruntime"
    assert "latency_p50_ms" not in found
    assert "latency_ns/tensorrt-int8.json" not in made.measurement.manifest.files


def runs(*medians: float) -> list[dict[str, list[float]]]:
    return [{"latency_ns": [median * 1e6] * 5} for median in medians]


def test_control_decides_about_trust() -> None:
    base = runs(1.0, 1.1, 0.9, 1.0)
    quiet = comparisons({"a": base, "b": runs(2.0, 2.2, 1.8, 2.0), CONTROL: runs(1.01, 1.1, 0.89, 1.0)}, ["a", "b"])
    assert quiet["trusted"] is True
    assert quiet["ratios"]["b"]["value"] == pytest.approx(2)
    drifted = comparisons({"a": base, CONTROL: runs(1.2, 1.32, 1.08, 1.2)}, ["a"])
    assert drifted["trusted"] is False  # narrow, but not 1
    noisy = comparisons({"a": base, CONTROL: runs(3.0, 0.3, 2.0, 0.5)}, ["a"])
    assert noisy["trusted"] is False  # holds 1 only because it is wide
    assert comparisons({}, [])["trusted"] is None


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
    """Push, run, pull, fail, probe: what the bench needs of any device."""
    import kdpipe.runtime

    device = DEVICES[name]()
    device.open(tmp_path)
    try:
        device.push(Path(kdpipe.runtime.__file__).parent, "runtime")
        device.push(made.bundles["onnxruntime-int8"].path, "bundle")
        np.save(tmp_path / "images.npy", np.zeros((3, 32, 32, 3), np.uint8))
        device.push(tmp_path / "images.npy", "images.npy")
        answer = device.run(["predict", "bundle", "--images", "images.npy", "--logits", "logits.npy"], 60)
        assert answer["images"] == 3
        device.pull("logits.npy", tmp_path / "logits.npy")
        assert np.load(tmp_path / "logits.npy").shape == (3, 10)
        with pytest.raises(UserError, match="nowhere"):
            device.run(["verify", "nowhere"], 60)
        with pytest.raises(KdpipeError, match="did not end"):
            device.run(["measure", "bundle", "--images", "images.npy", "--seconds", "60"], 2)
        fingerprint = device.probe()
        assert fingerprint["usable_cores"] >= 1
    finally:
        device.close()
    assert (made.bundles["onnxruntime-int8"].path / "model.onnx").is_file()  # closing removes no original


def test_unreadable_is_unavailable_never_zero() -> None:
    assert read("/no/such/file") == UNAVAILABLE
    found = probe()
    assert 0 not in [value for value in found.values() if not isinstance(value, bool)]
    assert found["memory_bytes"] > 0


def test_unknown_device() -> None:
    with pytest.raises(UserError, match="unknown device 'loca', wanted local; did you mean 'local'"):
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
