"""What the report claims: which bundles tie, which control belongs to whom, and accuracies of the same images."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import SMALL_RECIPE, Made

from kdpipe.chain import Chain
from kdpipe.core.artifact import Order, drafting
from kdpipe.core.config import (
    BenchPlan,
    DistillPlan,
    ExportConfig,
    ModelSettings,
    PackageConfig,
    ReportConfig,
    TrainConfig,
    validated,
)
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Checkpoint, CheckpointFacts, Comparison
from kdpipe.core.stats import Interval
from kdpipe.pipeline import student_runs
from kdpipe.report import words
from kdpipe.report.tables import device_lines, distillation_gains, pareto_front, surely_better, surely_faster

Numbers = dict[str, Any]


# ---- ties ---------------------------------------------------------------------------------------------------


def rows(**latency_ms: float) -> list[Numbers]:
    """Trusted rows; one whose latency is negative is noisy."""
    return [
        {
            "name": name,
            "trust": {"word": "trusted" if value > 0 else "noisy", "reason": ""},
            "accuracy": {"value": 0.9},
            "latency_p50_ms": {"value": abs(value)},
        }
        for name, value in latency_ms.items()
    ]


def shown(*orders: str) -> Any:
    """Of names in order, such as "ab": each is shown to be ahead of all that follow it."""
    found = {pair for order in orders for pair in itertools.combinations(order, 2)}
    return lambda first, second: (first, second) in found


@pytest.mark.parametrize(
    ("latency", "faster", "better", "wanted"),
    [
        # All the same: one place for all.
        ({"a": 1.0, "b": 1.1, "c": 1.2}, shown(), shown(), [["a", "b", "c"]]),
        # The slower one is no more accurate, as far as can be told.
        ({"a": 1.0, "b": 2.0}, shown("ab"), shown(), [["a"]]),
        # Slower and more accurate: both stand.
        ({"a": 1.0, "b": 2.0}, shown("ab"), shown("ba"), [["a"], ["b"]]),
        # More accurate, and not told apart in speed: the fastest by the point value is beaten.
        ({"a": 1.0, "b": 1.01}, shown(), shown("ba"), [["b"]]),
        # b ties with a and with c, who do not tie: it stands beside the first.
        ({"a": 1.0, "b": 1.5, "c": 2.0}, shown("ac"), shown("ca"), [["a", "b"], ["c"]]),
        # What is noisy takes no part, however fast.
        ({"a": 1.0, "b": -0.1}, shown(), shown(), [["a"]]),
        ({"a": -1.0}, shown(), shown(), []),
    ],
)
def test_bundles_that_cannot_be_told_apart_share_a_place(
    latency: dict[str, float], faster: Any, better: Any, wanted: list[list[str]]
) -> None:
    assert pareto_front(rows(**latency), faster, better) == wanted


def test_only_shown_differences_count_as_faster() -> None:
    def pair(first: str, second: str, ratio: float, differ: bool) -> Comparison:
        return Comparison(
            first=first, second=second, ratio=Interval(ratio, None, None, 6), differ=differ, left_open=0.01
        )

    faster = surely_faster([pair("a", "b", 0.5, True), pair("a", "c", 2.0, True), pair("b", "c", 0.5, False)])
    assert faster("a", "b") and not faster("b", "a")
    assert faster("c", "a") and not faster("a", "c")
    assert not faster("b", "c") and not faster("c", "b")


def test_accuracies_are_told_apart_by_the_images(made: Made) -> None:
    names = [name for name in made.bundles if made.measurement.facts.results[name].accuracy is not None]
    better = surely_better(made.measurement, names)
    for first, second in itertools.permutations(names, 2):
        if better(first, second):
            results = made.measurement.facts.results
            assert results[first].accuracy.value > results[second].accuracy.value
    whole = [name for name in names if name.endswith("float32")]
    assert not any(better(*pair) for pair in itertools.permutations(whole, 2)), "one network in four files"


# ---- hops ---------------------------------------------------------------------------------------------------


def test_accuracies_on_one_line_are_of_the_same_images(made: Made) -> None:
    [numbers] = json.loads(made.report.file(made.report.NUMBERS).read_text())["devices"]
    images = numbers["hops"][0]["steps"][0]["accuracy"]["n"]
    assert images == len(made.dataset.samples("test")) > 256, "the graph's hops are tested on 256"
    page = made.report.file(made.report.PAGE).read_text()
    partial = [(hop, step) for hop in numbers["hops"] for step in hop["steps"] if step["accuracy"]["n"] != images]
    assert {step["at"] for _, step in partial} == {"exported", "simplified"}
    for hop, step in partial:
        line = words.hop_lines(hop)[0]
        assert f"{step['at']} 0.00 points on 256 of {images} images (no flips)" in line
        assert f"{step['at']} {words.percent(step['accuracy']['value'])}" not in line
    assert page.count(f"on 256 of {images} images") == len(partial)


def test_lines_of_several_students_are_told_apart(made: Made, tmp_path: Path) -> None:
    """Of two students for one target each line says whose it is, on the page and in the terminal."""
    names = ("student-kd-seed0", "student-kd-seed1")
    paths = {step.name: step.path for step in made.chain.steps}
    checkpoints = {name: Checkpoint.open(paths[name]) for name in names}
    chain = Chain(tmp_path / "artifacts")
    config = ExportConfig(target="onnxruntime", parity_images=8, hop_images=8)
    model = chain.export(config, checkpoints[names[1]], made.dataset)
    second = chain.package(PackageConfig(golden_images=2), model, made.dataset)
    bundles = dict(zip(names, (made.bundles["onnxruntime-float32"], second), strict=True))
    quick = {**SMALL_RECIPE["bench"], "seconds": 0.02, "max_seconds": 0.02, "min_samples": 5, "warm_up_seconds": 0.02}
    benched = chain.bench(validated(BenchPlan, {**quick, "cold_starts": 0}, "test"), bundles, made.dataset)
    report = chain.report(ReportConfig(title="two"), benched.one_of_each, checkpoints)
    [device] = report.numbers["devices"]
    assert [hop["student"] for hop in device["hops"]] == list(names)
    page, told = report.page.read_text(), list(device_lines(device))
    for hop, name in zip(device["hops"], names, strict=True):
        [line] = [line for line in told if line.startswith(f"onnxruntime of {name}: torch ")]
        assert line == words.hop_lines(hop)[0]
        assert page.count(f"<span>onnxruntime of {name}</span>") == len(hop["steps"])
    assert not [line for line in told if line.startswith("onnxruntime: ")]
    [alone] = made.report.numbers["devices"]
    assert {hop["student"] for hop in alone["hops"]} == {""}, "of one student alone nothing more is said"


# ---- gains --------------------------------------------------------------------------------------------------


def checkpoint(folder: Path, name: str, config: TrainConfig, accuracy: float) -> Checkpoint:
    """A sealed training run of that configuration, which reached that accuracy."""
    spec = InputSpec(size=32, mean=(0.5,) * 3, std=(0.2,) * 3, crop_fraction=1.0, interpolation="bicubic")
    with drafting(Checkpoint, Order("train", config, {}), folder / name) as draft:
        draft.facts = CheckpointFacts(
            task="classification", model=config.model, model_args={}, classes=2, input=spec, parameters=1,
            test_accuracy=accuracy, test_images=100, method=config.method, training_images=10, epochs=1,
            selected="last",
        )  # fmt: skip
    return draft.artifact


def gains_of(folder: Path, students: dict[str, object], accuracies: Sequence[float]) -> dict[str, float | None]:
    """Gain in points by student, of runs as a recipe has them; their accuracies in the order of the plan."""
    student = ModelSettings(model="test_resnet")
    runs = student_runs(student, validated(DistillPlan, {"students": students}, "test"))
    assert len(runs) == len(accuracies), runs.keys()
    made = {
        name: checkpoint(folder, name, config, accuracy)
        for (name, config), accuracy in zip(runs.items(), accuracies, strict=True)
    }
    gains = distillation_gains(made)
    return {gain["method"]: gain["gain_points"] and round(gain["gain_points"]["value"], 6) for gain in gains}


@pytest.mark.parametrize(
    "change", [{"label_loss": "bce"}, {"cache_views": 4}, {"view_seed": 7}], ids=lambda change: next(iter(change))
)
def test_each_student_is_told_against_its_own_control(tmp_path: Path, change: dict[str, object]) -> None:
    """Two students whose controls differ in one thing that a control shares with its student."""
    found = gains_of(tmp_path, {"other": change}, [0.50, 0.60, 0.70, 0.90])
    assert found == {"kd": 10, "other": 20}


def test_students_of_one_control_share_it(tmp_path: Path) -> None:
    found = gains_of(tmp_path, {"hotter": {"temperature": 20}}, [0.50, 0.60, 0.70])
    assert found == {"kd": 10, "hotter": 20}


def test_a_named_seed_of_the_views_is_the_same_as_the_one_that_is_meant(tmp_path: Path) -> None:
    taught = validated(TrainConfig, {"model": "test_resnet", "cache_views": 4, "view_seed": 0}, "test")
    alone = validated(TrainConfig, {"model": "test_resnet", "cache_views": 4, "method": "labels"}, "test")
    runs = {"student": checkpoint(tmp_path, "a", taught, 0.6), "control": checkpoint(tmp_path, "b", alone, 0.5)}
    [gain] = distillation_gains(runs)
    assert gain["gain_points"]["value"] == pytest.approx(10)


# ---- words --------------------------------------------------------------------------------------------------


def trust(**change: object) -> Numbers:
    return {
        "device": "local", "emulated": False, "word": "noisy", "timed": 3, "resolution": 0.1, "rounds": 6,
        "threads": [1], "effort": "default", "cold_starts": 10, "page_cache": "warm",
        "attempt": 1, "attempts": 1, "sessions": 1,
        "controls": {"a": {"value": 1.0, "low": 0.99, "high": 1.02, "n": 6}},
        "untrusted": [{"name": "b", "word": "noisy", "reason": "p50 is known within 12 %, wanted 10 %"}],
        **change,
    }  # fmt: skip


def test_trust_is_told_with_its_numbers() -> None:
    found = words.trust_sentence(trust())
    assert found.startswith("2 of 3 latencies are trusted (known within 10 %, as was asked for).")
    assert "A/A controls (a bundle over itself, 6 rounds): a 1.00 [0.990, 1.02]." in found and "ttempt" not in found
    assert found.endswith("This holds for this session only: of the next one `--again` tells.")
    pooled = words.trust_sentence(trust(sessions=3, attempts=4))
    assert "Pooled over up to 3 trusted sessions of 4" in pooled and "this session only" not in pooled
    assert "Shown: attempt 2 of 3" in words.trust_sentence(trust(attempt=2, attempts=3))
    assert "no latencies" in words.trust_sentence(trust(word=None))
    assert [words.verdict(trust(word=word)) for word in ("trusted", "invalid", None)] == [
        "Trusted.", "Invalid.", "Not timed.",
    ]  # fmt: skip


def test_reasons_are_told_once() -> None:
    why = {"word": "noisy", "reason": "2 rounds are too few"}
    rows = [{"name": "a", **why}, {"name": "b", "word": "invalid", "reason": "emulated"}, {"name": "c", **why}]
    assert words.untrusted_lines(rows) == ["a and c are noisy: 2 rounds are too few", "b is invalid: emulated"]


def test_the_page_calls_a_row_noisy_where_it_stands(made: Made) -> None:
    page = made.report.file(made.report.PAGE).read_text()
    [numbers] = json.loads(made.report.file(made.report.NUMBERS).read_text())["devices"]
    noisy = [row["name"] for row in numbers["bundles"] if row["trust"] and row["trust"]["word"] == "noisy"]
    assert noisy and len(re.findall(r'class="tag bad"[^>]*>noisy<', page)) == len(noisy)
    assert numbers["front"] == [] and "Pareto</span>" not in page


def test_every_phase_is_on_the_page(made: Made) -> None:
    page = made.report.file(made.report.PAGE).read_text()
    [device] = made.report.numbers["devices"]
    timed = [row for row in device["bundles"] if row["latency_p50_ms"]]
    assert "<summary>Every phase</summary>" in page
    for row in timed:
        assert row["start_ms"]["value"] > row["import_ms"] + row["load_ms"] + row["first_inference_ms"]
        assert row["end_to_end_ms"]["value"] > 0 and row["prepare_ms"] > 0 and row["memory_growth_bytes"] > 0
        assert words.executed(row) in page


def test_how_a_row_was_timed_in_words() -> None:
    row = {"warm_up_settled": False, "stable": False, "slowed_after_seconds": 90.0, "cpus": [2, 3], "executed": None}
    assert words.timing_remarks(row) == "; warm-up did not settle; UNSTABLE; slower by 5 % after 90 s of a long run"
    assert words.timing_remarks({"warm_up_settled": None, "stable": None, "slowed_after_seconds": None}) == ""
    assert (words.cpus(row), words.executed(row)) == ("2, 3", "unavailable")
    assert words.executed({"executed": {"int8": 3, "float32": 1}}) == "1 in float32, 3 in int8"
    p50 = {"value": 1.0, "low": None, "high": None, "n": 2}
    assert (words.percentile(None, p50), words.percentile(None, None)) == ("n too small", words.NOTHING)
    assert words.threads_sentence({"threads": [0]}).startswith("a thread on every core")
    assert words.threads_sentence({"threads": [1, 2]}).startswith("the threads in each row's name")
    told = {"cold_starts": 3, "page_cache": "dropped"}
    assert words.starts(told) == "3 (few) that did nothing else, the bundle's files on the disk"
