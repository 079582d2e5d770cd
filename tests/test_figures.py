"""The figures that rules are about: each with its interval, what it pairs by, and whether it is to be believed."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Made, replace_file, rewrite_manifest

from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Measurement, Samples
from kdpipe.core.stats import calibration_interval
from kdpipe.deploy.figures import LATENCIES, NAMES, figures, worst_of
from kdpipe.runtime.task import TASKS


def changed(made: Made, folder: Path, **arrays: np.ndarray) -> Measurement:
    """The measurement with other files; ``labels`` of the images, or outputs by bundle."""
    shutil.copytree(made.measurement.path, folder)
    for name, values in arrays.items():
        content = io.BytesIO()
        np.save(content, values)
        file = Measurement.LABELS if name == "labels" else Measurement.outputs_name(name.replace("_", "-"))
        replace_file(folder, file, content.getvalue())
    return Measurement.open(folder)


# ---- of images -----------------------------------------------------------------------------------------------


def test_accuracy_pairs_by_image(made: Made) -> None:
    found = figures(made.measurement, "onnxruntime-int8")
    accuracy, result = found["accuracy"], made.measurement.facts.results["onnxruntime-int8"]
    right = made.measurement.outputs("onnxruntime-int8").argmax(1) == made.measurement.labels
    np.testing.assert_array_equal(accuracy.scores, right)
    assert accuracy.interval == result.accuracy and accuracy.values == (right.mean(),)
    assert accuracy.unit == "share" and not accuracy.lower_is_better and accuracy.trusted and not accuracy.why
    drawn = np.array([0, 0, 5, 538, 17])
    assert accuracy.of_images is not None and accuracy.of_images(drawn) == right[drawn].mean()


def test_the_worst_class_is_named_and_what_a_draw_does_is_its_own(made: Made) -> None:
    labels, right = (
        made.measurement.labels,
        made.measurement.outputs("tflite-int8").argmax(1) == made.measurement.labels,
    )
    by_class = {label: right[labels == label].mean() for label in range(10)}
    names = [f"digit {label}" for label in range(10)]
    found = figures(made.measurement, "tflite-int8", names)["worst class"]
    assert found.interval is not None and found.of_images is not None
    assert found.interval.value == pytest.approx(min(by_class.values()))
    assert by_class[names.index(found.where)] == found.interval.value
    assert figures(made.measurement, "tflite-int8")["worst class"].where == f"class {names.index(found.where)}"
    few = np.flatnonzero(labels == 3)[:10]
    assert found.of_images(few) == right[few].mean(), "of those drawn, the worst class among them"


def test_a_class_without_test_images_is_not_known(made: Made, tmp_path: Path) -> None:
    labels = made.measurement.labels.copy()
    labels[labels == 7] = 1
    found = figures(
        changed(made, tmp_path / "m", labels=labels), "onnxruntime-int8", [f"digit {at}" for at in range(10)]
    )
    assert not found["worst class"].trusted and "no test image of digit 7" in found["worst class"].why
    assert found["worst class"].interval is not None and found["accuracy"].trusted


@pytest.mark.parametrize("label", [-1, 10])
def test_labels_that_are_no_class_are_one_line(made: Made, tmp_path: Path, label: int) -> None:
    labels = made.measurement.labels.copy()
    labels[0] = label
    with pytest.raises(UserError, match="labels beyond its outputs: wanted one class of 0 to 9"):
        figures(changed(made, tmp_path / "m", labels=labels), "onnxruntime-int8")


def test_one_image_has_figures_without_ends(made: Made, tmp_path: Path) -> None:
    outputs = made.measurement.outputs("onnxruntime-int8")[:1]
    found = figures(
        changed(made, tmp_path / "m", labels=made.measurement.labels[:1], onnxruntime_int8=outputs), "onnxruntime-int8"
    )
    assert found["accuracy"].interval.n == 1 and found["calibration error"].interval.low is None
    assert not found["worst class"].trusted


def test_what_another_runtime_said_is_not_this_devices(made: Made) -> None:
    found = figures(made.measurement, "tensorrt-int8")
    assert found["accuracy"].interval is not None and not found["accuracy"].trusted
    assert "by onnxruntime in the place of tensorrt" in found["accuracy"].why
    assert found["latency p50"].interval is None and found["latency p50"].why == "not built here"
    assert found["size"].trusted


def test_outputs_that_differ_alone_are_not_what_is_timed(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.measurement.path, tmp_path / "m")

    def apart(value: dict) -> None:
        value["facts"]["results"]["onnxruntime-int8"]["batch_one"] |= {"within_tolerance": False, "agreement": 0.75}

    rewrite_manifest(tmp_path / "m", apart)
    found = figures(Measurement.open(tmp_path / "m"), "onnxruntime-int8")
    for name in ("accuracy", "worst class", "calibration error"):
        assert not found[name].trusted and "something else of 25 % of 64 images" in found[name].why


# ---- of processes ----------------------------------------------------------------------------------------------


def test_latencies_pair_by_round(made: Made) -> None:
    found = figures(made.measurement, "openvino-int8")
    result = made.measurement.facts.results["openvino-int8"]
    p50 = found["latency p50"]
    assert p50.values == pytest.approx(result.latency_p50_by_process_ms) and p50.interval == result.latency_p50_ms
    assert not p50.trusted and p50.why == result.trust.reason and p50.lower_is_better and p50.unit == "ms"
    runs = made.measurement.rows(Measurement.samples_name("openvino-int8"), Samples)
    enough = min(len(run.latency_ns) for run in runs) >= 36
    assert (found["latency p90"].interval is not None) == enough
    assert found["end to end"].interval == result.end_to_end_ms
    assert len(found["cold start"].values) == 1 and found["cold start"].interval.value == result.start_ms.value
    assert found["memory"].values == (result.memory_growth_bytes,) and found["memory"].trusted
    assert found["memory"].unit == "bytes" and found["size"].values[0] == made.bundles["openvino-int8"].facts.size_bytes


def test_too_few_inferences_tell_no_p99(made: Made, tmp_path: Path) -> None:
    shutil.copytree(made.measurement.path, tmp_path / "m")
    file = Measurement.samples_name("onnxruntime-int8")
    runs = json.loads((tmp_path / "m" / file).read_text())
    for run, count in zip(runs, (400, 300), strict=True):
        run["latency_ns"] = [1_000_000 + at for at in range(count)]
    replace_file(tmp_path / "m", file, json.dumps(runs).encode())
    found = figures(Measurement.open(tmp_path / "m"), "onnxruntime-int8")
    assert found["latency p95"].values == pytest.approx((1.000379, 1.000284))
    assert (
        found["latency p99"].interval is None and "too few inferences in a process for p99" in found["latency p99"].why
    )


def test_every_figure_is_there_with_a_reason_where_it_is_not(made: Made) -> None:
    for name in made.bundles:
        found = figures(made.measurement, name)
        assert tuple(found) == NAMES
        for figure in found.values():
            assert (figure.interval is None) == (figure.values == ())
            assert figure.trusted == (not figure.why)
    assert all(found[name].unit == "ms" for name in LATENCIES)


# ---- intervals ---------------------------------------------------------------------------------------------------


def covered(
    truth: float, trial: Callable[[np.random.Generator], tuple[float | None, float | None]], trials: int
) -> int:
    """How many intervals hold the truth."""
    found = [trial(np.random.default_rng(seed)) for seed in range(trials)]
    return sum(low is not None and high is not None and low <= truth <= high for low, high in found)


@pytest.mark.parametrize("shares", [(0.9,) * 10, (0.7, *(0.95,) * 9), (0.5, 0.52, 0.99)])
def test_the_interval_of_the_worst_class_holds_the_truth(shares: tuple[float, ...]) -> None:
    """Chosen as the worst of ten equal ones its own interval would miss far more often."""
    groups = np.repeat(np.arange(len(shares)), 60)

    def trial(generator: np.random.Generator) -> tuple[float | None, float | None]:
        right = generator.random(len(groups)) < np.asarray(shares)[groups]
        found = worst_of(TASKS["classification"], TASKS["classification"].by_class(right, groups))[1]
        return found.low, found.high

    assert covered(min(shares), trial, 200) >= 184  # of a correct 95 % procedure: 98 times of 100


@pytest.mark.parametrize("gap", [0.0, 0.05, 0.2])
def test_the_interval_of_the_calibration_error_holds_the_truth(gap: float) -> None:
    """Networks that are surer than right by so much; 400 images show more by chance, or something of nothing."""

    def trial(generator: np.random.Generator) -> tuple[float | None, float | None]:
        sure = generator.uniform(0.5, 1, 400)
        found = calibration_interval(sure, generator.random(400) < sure - gap)
        return found.low, found.high

    assert covered(gap, trial, 60) >= 53  # of a correct 95 % procedure: 99 times of 100


def test_ties_of_the_worst_class_go_to_the_one_with_most_images() -> None:
    label, found = worst_of(TASKS["classification"], np.array([[4, 0], [4, 0], [2, 0], [9, 1], [9, 1]]))
    assert (label, found.value, found.n) == (4, 0.0, 2)
