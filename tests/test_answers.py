"""What the report decides, and what it says of the answers: by class, confused, how sure; and how that is drawn."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import timm
import torch
from conftest import Made, kdpipe
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn

from kdpipe.core.config import ReportConfig, TrainConfig
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Checkpoint, CheckpointFacts
from kdpipe.core.stats import CALIBRATION_BINS, lost_or_won, no_worse
from kdpipe.networks.models import multiply_accumulates
from kdpipe.report import plots, words
from kdpipe.report.answers import MISTAKES, answers, judged
from kdpipe.report.compression import Sources, advice
from kdpipe.report.decision import decision
from kdpipe.report.page import render
from kdpipe.report.settings import SETTINGS, chosen
from kdpipe.report.tables import file_of, print_summary
from kdpipe.report.terms import TERMS
from kdpipe.runtime.task import TASKS

TASK = TASKS["classification"]
Numbers = dict[str, Any]

# ---- the decision -------------------------------------------------------------------------------------------


def row(name: str, latency_ms: float, word: str = "trusted") -> Numbers:
    target, _, variant = name.partition("-")
    ratio = {"value": 0.27, "low": 0.25, "high": 0.29, "n": 6}
    return {
        "name": name,
        "target": target,
        "variant": variant,
        "student": "",
        "latency_p50_ms": {"value": latency_ms, "low": 0.9 * latency_ms, "high": 1.1 * latency_ms, "n": 6},
        "latency_over_float32": None if variant == "float32" else ratio,
        "trust": {"word": word, "reason": "of some reason"},
        "accuracy": {"value": 0.97, "low": 0.95, "high": 0.98, "n": 539},
        "size_bytes": 5 * 2**20,
        "parameters": 4_900_000,
        "macs": 880_000_000,
    }


def faster(*orders: str) -> Callable[[str, str], bool]:
    """Of names in order: each is shown to be faster than all that follow it."""
    found = {pair for order in orders for pair in itertools.combinations(order.split(), 2)}
    return lambda first, second: (first, second) in found


def decided(
    rows: list[Numbers], shown: Callable[[str, str], bool], drops: Mapping[str, tuple[float, float]], **more: Any
) -> Numbers:
    """The decision, where bundles lose so many points, known within so many."""
    steps = [
        {
            "variant": True,
            "bundle": name,
            "difference": {"value": -drop / 100, "low": -(drop + half) / 100, "high": -(drop - half) / 100, "n": 539},
        }
        for name, (drop, half) in drops.items()
    ]
    advised = advice(rows, [{"steps": steps}], 0.5, shown)
    return decision(advised, rows, 0.5, shown, faster(), **{"emulated": False, **more})


def test_the_fastest_of_all_targets_is_shipped() -> None:
    rows = [row("a-float32", 1.0), row("a-int8", 0.5), row("b-float32", 0.9), row("b-int8", 0.3)]
    shown = faster("b-int8 a-int8 b-float32 a-float32")
    found = decided(rows, shown, {"a-int8": (0.0, 0.3), "b-int8": (0.0, 0.3)})
    assert (found["answer"], found["bundle"], found["ties"], found["faster"]) == ("shown", "b-int8", [], None)
    assert words.decision_sentence(found) == (
        "Ship b-int8: 3.70 times as fast as its float32, loses nothing that 539 images could show, 0.30 points at most."
    )
    reasons = words.decision_reasons(found, rows, {"metric": "top-1", "unit": "%"})
    assert reasons[0].startswith("One image takes 0.300 [0.270, 0.330] ms")
    assert "against its float32 0.00 points [−0.30, +0.30] where a loss of 0.5 is allowed." in reasons[1]
    assert reasons[2] == "5.00 MiB on disk, 4.90 million parameters and 880 million multiply-accumulates for one image."
    # What the session cannot tell from it is a tie, whatever the target.
    tied = decided(
        rows, faster("b-int8 b-float32 a-float32", "a-int8 a-float32"), {"a-int8": (0, 0.3), "b-int8": (0, 0.3)}
    )
    assert tied["ties"] == ["a-int8"] and "cannot tell" not in words.decision_sentence(tied)
    assert words.decision_reasons(tied, rows, {"metric": "top-1", "unit": "%"})[-1].endswith("tell: a-int8.")


def test_of_several_students_a_worse_one_is_not_shipped_for_its_speed() -> None:
    rows = [row("a-float32", 1.0), row("a-int8", 0.5), row("b-float32", 0.4), row("b-int8", 0.2)]
    named = [{**each, "target": "openvino", "student": each["name"][0]} for each in rows]
    shown = faster("b-int8 b-float32 a-int8 a-float32")
    drops = [
        {"variant": True, "bundle": name, "difference": {"value": 0.0, "low": -0.001, "high": 0.001, "n": 9000}}
        for name in ("a-int8", "b-int8")
    ]
    advised = [
        each
        for student in "ab"
        for each in advice([row for row in named if row["student"] == student], [{"steps": drops}], 0.5, shown, student)
    ]
    assert [words.advice_sentence(each).split(",")[0] for each in advised] == [
        "openvino of a: ship int8", "openvino of b: ship int8",
    ]  # fmt: skip
    task = {"metric": "top-1", "unit": "%"}
    known = decision(advised, named, 0.5, shown, lambda first, second: (first[0], second[0]) == ("a", "b"), False)
    assert (known["bundle"], known["worse"]) == ("a-int8", ["b-int8"])
    assert words.decision_reasons(known, named, task)[-1] == (
        "Left out, since another student is surely more accurate: b-int8."
    )
    assert decision(advised, named, 0.5, shown, faster(), False)["bundle"] == "b-int8", "as accurate as can be told"


def test_what_images_cannot_prove_is_shipped_with_how_many_would() -> None:
    rows, shown = [row("a-float32", 1.0), row("a-int8", 0.3)], faster("a-int8 a-float32")
    found = decided(rows, shown, {"a-int8": (0.2, 1.45)})
    assert (found["answer"], found["bundle"]) == ("likely", "a-int8")
    assert words.decision_sentence(found) == (
        "Ship a-int8: 3.70 times as fast as its float32, loses nothing that 539 images could show; "
        "to prove that it loses at most 0.5 points takes about 4,600."
    )
    # A faster one of which that is not known is named beside one of which it is.
    rows += [row("b-float32", 1.0), row("b-int8", 0.1)]
    both = decided(rows, faster("b-int8 a-int8 a-float32 b-float32"), {"a-int8": (0.0, 0.1), "b-int8": (0.0, 2.0)})
    assert (both["answer"], both["bundle"], both["faster"]) == ("shown", "a-int8", "b-int8")
    assert words.decision_reasons(both, rows, {"metric": "top-1", "unit": "%"})[-1] == (
        "Faster, but not shown to lose so little: b-int8."
    )


@pytest.mark.parametrize(
    ("rows", "more", "answer", "words_"),
    [
        ([row("a-float32", 1.0), row("a-int8", 0.9)], {}, "float32", "Ship a-float32: nothing smaller"),
        ([row("a-float32", 1.0, "noisy")], {}, "untrusted", "not trusted (a-float32). Measure again."),
        ([row("a-float32", 1.0, "invalid")], {"emulated": True}, "emulated", "No decision: this device is emulated"),
        ([], {}, "not timed", "No decision: none of these bundles was timed"),
        # One target is in doubt, the other is not.
        ([row("a-float32", 1.0, "noisy"), row("b-float32", 2.0)], {}, "float32", "Ship b-float32"),
    ],
)
def test_nothing_is_decided_by_what_is_not_known(rows: list[Numbers], more: Any, answer: str, words_: str) -> None:
    found = decided(rows, faster(), {}, **more)
    assert found["answer"] == answer and words_ in words.decision_sentence(found)
    told = words.decision_reasons(found, rows, {"metric": "top-1", "unit": "%"})
    assert bool(told) == (answer == "float32")
    if found["doubted"] and told:
        assert told[-1] == "Left out, since what they take is not trusted: a-float32."


def test_what_guesses_is_not_shipped() -> None:
    rows, shown = [row("a-float32", 1.0), row("a-int8", 0.3), row("b-float32", 2.0)], faster("a-int8 a-float32")
    steps = [{"variant": True, "bundle": "a-int8", "difference": {"value": 0.0, "low": -1e-3, "high": 1e-3, "n": 9000}}]
    guessing = {"share": 0.104, "metric": "top-1", "unit": "%"}
    advised = [{**each, "guessing": guessing} for each in advice(rows, [{"steps": steps}], 0.5, shown)]
    found = decision(advised, rows, 0.5, shown, faster(), emulated=False)
    assert (found["answer"], found["bundle"]) == ("guessing", None)
    assert words.decision_sentence(found).startswith(
        "Ship none of these: they are not shown to be better than guessing (top-1 10.40 %"
    )
    advised[1]["guessing"] = None
    assert decision(advised, rows, 0.5, shown, faster(), emulated=False)["bundle"] == "b-float32"


def test_a_headline_names_the_first_of_many() -> None:
    rows = [row(f"{target}-float32", 1.0, "noisy") for target in "abcde"]
    assert "(a-float32, b-float32, c-float32 and 2 more)" in words.decision_sentence(decided(rows, faster(), {}))
    assert "a-float32, b-float32, c-float32 and d-float32)" in words.decision_sentence(decided(rows[:4], faster(), {}))


@pytest.mark.parametrize(
    ("drop", "half", "text"),
    [
        (0.3, 0.1, "loses 0.30 points on 539 images, 0.40 points at most"),
        (-1.39, 0.5, "wins 1.39 points on 539 images"),
        (-0.2, 0.5, "loses nothing that 539 images could show, 0.30 points at most"),
        (0.45, 0.1, "loses 0.45 points on 539 images; to prove that it loses at most 0.5 points takes about 540"),
    ],
)
def test_what_becomes_of_accuracy_in_words(drop: float, half: float, text: str) -> None:
    from kdpipe.core.stats import Interval

    difference = Interval(-drop / 100, -(drop + half) / 100, -(drop - half) / 100, 539)
    assert words.kept_clause(no_worse(difference, 0.5).as_dict()) == text
    few = words.kept_clause(no_worse(Interval(-drop / 100, None, None, 3), 0.5).as_dict())
    assert few.startswith("wins" if drop < 0 else "loses") and few.endswith("too few for an interval")


def test_signs() -> None:
    """What is lost is positive, what is won is called so."""
    assert [lost_or_won(drop) for drop in (1.39, -1.39, -0.001)] == [
        "lost 1.39 points", "won 1.39 points", "lost 0.00 points",
    ]  # fmt: skip
    assert [words.lost(drop) for drop in (1.39, -1.39, 0.0, None)] == ["1.39", "1.39 won", "0.00", words.NOTHING]
    assert words.lost_bounds(-0.2, 1.9) == "[0.20 won, 1.90]" and words.lost_bounds(None, 1) == "n too small"
    gain = {
        "method": "kd", "model": "m", "training_images": 10, "label_fraction": 1.0, "steps": 5, "control_steps": 5,
        "gain_points": {"value": -2.3, "low": -3.5, "high": -1.1, "n": 5},
    }  # fmt: skip
    assert words.gain_sentence(gain).startswith("Loss: kd lost 2.30 points [1.10, 3.50] against labels alone over 5")


def test_the_file_to_take_is_there(made: Made) -> None:
    sources = made.chain._sources([made.measurement])
    for name in ("openvino-int8", "tflite-float32"):
        found = file_of(name, made.measurement, sources)
        assert Path(found["folder"]) == made.bundles[name].path.absolute()
        assert (Path(found["folder"]) / found["entry"]).is_file()
    assert file_of("openvino-int8", made.measurement, Sources()) is None, "it is not beside the measurement"
    assert file_of(None, made.measurement, sources) is None


# ---- answers ------------------------------------------------------------------------------------------------


def test_answers_by_class_are_scikit_learns(made: Made) -> None:
    labels, outputs = made.measurement.labels, made.measurement.outputs("tflite-int8")
    said = TASK.decide(outputs)
    found = judged(TASK, outputs, labels)
    assert found["balanced"]["value"] == pytest.approx(metrics.balanced_accuracy_score(labels, said))
    assert found["balanced"]["low"] < found["balanced"]["value"] < found["balanced"]["high"]
    of_bundle = answers(TASK, made.measurement, "tflite-int8", "tflite-float32", Sources(dataset=made.dataset))
    recalls = metrics.recall_score(labels, said, average=None)
    assert [each["accuracy"]["value"] for each in of_bundle["classes"]] == pytest.approx(recalls.tolist())
    known = metrics.recall_score(labels, TASK.decide(made.measurement.outputs("tflite-float32")), average=None)
    assert [each["float32"]["value"] for each in of_bundle["classes"]] == pytest.approx(known.tolist())
    matrix = metrics.confusion_matrix(labels, said)
    for each in of_bundle["confusions"]:
        assert matrix[tuple(each["classes"])] == each["images"] > 0
    assert sum(each["images"] for each in of_bundle["confusions"]) == int((labels != said).sum()) > 0
    images = [each["images"] for each in of_bundle["confusions"]]
    assert images == sorted(images, reverse=True) and of_bundle["confusions_left_out"] == 0
    trained = [sample.label for sample in made.dataset.samples("train")]
    assert [each["training_images"] for each in of_bundle["classes"]] == np.bincount(trained).tolist()
    assert [each["test_images"] for each in of_bundle["classes"]] == np.bincount(labels).tolist()


def test_the_worst_mistakes_are_those_it_is_surest_of(made: Made) -> None:
    labels, outputs = made.measurement.labels, made.measurement.outputs("tflite-int8")
    found = answers(TASK, made.measurement, "tflite-int8", None, Sources(dataset=made.dataset))["mistakes"]
    wrong = np.flatnonzero(TASK.decide(outputs) != labels)
    assert 0 < len(found) == min(len(wrong), MISTAKES)
    sure = TASK.surety(outputs, labels, CALIBRATION_BINS).confidence
    assert [each["confidence"] for each in found] == pytest.approx(sorted(sure[wrong], reverse=True)[: len(found)])
    for each in found:
        at = each["position"]
        assert each["label"] == made.dataset.classes[labels[at]] != each["said"]
        assert each["said"] == made.dataset.classes[TASK.decide(outputs)[at]]
        assert made.dataset.samples("test")[at].path.name == each["image"]
    without = answers(TASK, made.measurement, "tflite-int8", None, Sources())
    assert without["mistakes"] == [] and without["classes"][3]["class"] == "3", "without the dataset: numbers"
    assert without["classes"][3]["training_images"] is None and without["classes"][3]["float32"] is None


def test_answers_of_other_images_are_refused(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    measurement, sources = made.measurement, Sources(dataset=made.dataset)
    outputs = np.array(measurement.outputs("tflite-int8"))
    monkeypatch.setattr(type(measurement), "outputs", lambda self, name: outputs[:, :9])
    with pytest.raises(UserError, match="labels beyond its outputs: wanted one class of 0 to 8"):
        answers(TASK, measurement, "tflite-int8", None, sources)
    monkeypatch.setattr(type(measurement), "outputs", lambda self, name: np.c_[outputs, outputs[:, :1]])
    with pytest.raises(UserError, match="measured other images or classes than those of"):
        answers(TASK, measurement, "tflite-int8", None, sources)


def test_classes_without_images_and_outputs_without_a_value() -> None:
    outputs, labels = np.eye(4)[[0, 1, 1, 3]] * 5, np.array([0, 1, 3, 3])
    assert set(TASK.of_classes(TASK.by_class(TASK.scores(outputs, labels), labels))) == {0, 1, 3}
    assert judged(TASK, outputs, labels)["balanced"]["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    outputs[2, 0] = np.nan
    found = judged(TASK, outputs, labels)
    assert found["calibration"] is None
    json.dumps(found, allow_nan=False)


def test_the_terminal_says_it_in_short(made: Made) -> None:
    from io import StringIO

    from kdpipe.terminal import console

    numbers = made.report.numbers
    stream = StringIO()
    print_summary(console(stream, width=3000), numbers)
    told = stream.getvalue()
    [device] = numbers["devices"]
    bundle = numbers["answers"]["bundle"]
    assert words.decision_sentence(device["decision"]) in told
    for text in ("by class: top-1", "on average; lowest '", "calibration error", "may be chance on", "parameters, "):
        assert f"{bundle}" in told and text in told
    rows = {each["name"]: each for each in device["bundles"]}
    assert f"{words.count(rows[bundle]['macs'])} multiply-accumulates for one image" in told


# ---- how large a network is -----------------------------------------------------------------------------------

SPEC = InputSpec(size=224, mean=(0.5,) * 3, std=(0.2,) * 3, crop_fraction=1.0, interpolation="bicubic")


def test_multiply_accumulates_by_hand() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    spec = SPEC.model_copy(update={"size": 32})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert multiply_accumulates(network, spec) == 16 * 16 * (3 * 9 * 8) + 16 * 16 * (9 * 8) + 8 * 5
    assert network.training, "it is as it was"
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in before.items())


def test_multiply_accumulates_of_the_papers() -> None:
    """He et al. (2016) have 1.8 billion, Vasu et al. (2023) 275 million once branches are merged; attention by hand."""
    assert f"{multiply_accumulates(timm.create_model('resnet18'), SPEC) / 1e9:.1f}" == "1.8"
    assert f"{multiply_accumulates(timm.create_model('mobileone_s0'), SPEC) / 1e6:.0f}" in ("274", "275", "276")
    tokens, width = 197, 192
    block = tokens * width * 12 * width + 2 * tokens * tokens * width
    known = 12 * block + 196 * 768 * width + width * 1000
    assert multiply_accumulates(timm.create_model("vit_tiny_patch16_224"), SPEC) == known


def test_no_training_is_lost_for_a_count() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3, 5))
            self.scaled = 2 * self.weight  # computed: torch makes no copy of it

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean((2, 3)) @ self.scaled

    assert Own()(torch.zeros(1, 3, 8, 8)).shape == (1, 5)
    assert multiply_accumulates(Own(), SPEC) is None


def test_a_checkpoint_knows_its_size(made: Made) -> None:
    facts = made.student.facts
    assert facts.macs is not None and facts.macs > 10**6
    # One that was sealed before has none, and opens.
    older = {name: value for name, value in facts.model_dump().items() if name != "macs"}
    assert CheckpointFacts.model_validate(older).macs is None
    assert [words.count(number) for number in (None, 950, 4_900_000, 1_820_000_000)] == [
        words.NOTHING, "950", "4.90 million", "1.82 billion",
    ]  # fmt: skip
    assert Checkpoint.open(made.student.path).facts.macs == facts.macs
    [student] = [each for each in made.report.numbers["networks"] if each["shipped"]]
    assert student["macs"] == facts.macs and student["parameters"] == facts.parameters
    assert all(each["macs"] == facts.macs for each in made.report.numbers["devices"][0]["bundles"])


# ---- figures --------------------------------------------------------------------------------------------------


def overlap(first: plots.Box, second: plots.Box) -> bool:
    return first[0] < second[2] and second[0] < first[2] and first[1] < second[3] and second[1] < first[3]


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 10**6), st.integers(1, plots.LONGEST_NAME), st.booleans())
def test_labels_of_points_never_overlap(count: int, seed: int, length: int, crowded: bool) -> None:
    """However many, however long, and all in one spot."""
    generator = np.random.default_rng(seed)
    names = ["n" * length] * count
    width, height = plots.FRAME_WIDTH, plots.room(names)
    centres = [(300.0, 100.0)] * count if crowded else list(zip(
        generator.uniform(0, width, count), generator.uniform(0, height, count), strict=True
    ))  # fmt: skip
    boxes = plots.place(names, centres, [(0, 90, width, 110)], (0, 0, width, height))
    assert not any(overlap(*pair) for pair in itertools.combinations(boxes, 2))
    assert all(box[0] >= -1 and box[1] >= -1 and box[2] <= width + 1 and box[3] <= height + 1 for box in boxes)


def test_long_names_are_shortened() -> None:
    assert plots.shortened("openvino-int8") == "openvino-int8"
    assert plots.shortened("n" * 60) == "n" * 43 + "…"
    assert plots.shortened("漢" * 60) == "漢" * 21 + "…" and plots.extent("漢") == 2 * plots.extent("n")


def many(numbers: Numbers, count: int) -> Numbers:
    """The same report with so many more bundles, of latencies over two decades."""
    changed = json.loads(json.dumps(numbers))
    device = changed["devices"][0]
    timed = next(each for each in device["bundles"] if each["latency_p50_ms"])
    for at in range(count):
        factor = 1.13**at
        p50 = {
            end: value * factor for end, value in timed["latency_p50_ms"].items() if end != "n" and value is not None
        }
        latency = {**timed["latency_p50_ms"], **p50}
        device["bundles"].append({**timed, "name": f"openvino-int8-student-{at}@{at % 4}", "latency_p50_ms": latency})
    return changed


def test_every_point_tells_what_it_is(made: Made) -> None:
    numbers = many(made.report.numbers, 40)
    figures = plots.figures(numbers)
    pareto = figures["pareto"].svg
    ElementTree.fromstring(pareto)
    timed = [each for each in numbers["devices"][0]["bundles"] if each["latency_p50_ms"] and each["accuracy"]]
    titles = re.findall(r"<title>([^<]*)</title>", pareto)
    assert len(titles) == len(timed) and all(title.endswith(("trusted", "noisy", "invalid")) for title in titles)
    assert "mathdefault" not in pareto, "ticks of a logarithmic axis are plain numbers"
    compared = figures["accuracy"].svg
    for name in ("teacher", "student-kd-seed1", "student-labels-seed0", "tensorrt-int8"):
        assert f">{name}</text>" in compared
    ElementTree.fromstring(compared)


def test_a_confusion_matrix_counts_every_image(made: Made) -> None:
    answers_ = made.report.numbers["answers"]
    svg = plots.figures(made.report.numbers)["confusion"].svg
    ElementTree.fromstring(svg)
    told = re.findall(r"<title>&#x27;(.*?)&#x27; called &#x27;(.*?)&#x27;: ([\d,]+) of", svg)
    assert sum(int(count.replace(",", "")) for *_, count in told) == len(made.measurement.labels)
    wrong = {(label, said): int(count) for label, said, count in told if label != said}
    assert wrong == {(each["label"], each["said"]): each["images"] for each in answers_["confusions"]}
    # Names as strangers have them.
    strange = json.loads(json.dumps(answers_))
    for at, each in enumerate(strange["classes"]):
        each["class"] = f"<b>&{'漢' * at}$x$"
    ElementTree.fromstring(plots.figures({**made.report.numbers, "answers": strange})["confusion"].svg)
    none = {**made.report.numbers, "answers": {**answers_, "classes": answers_["classes"] * 5}}
    assert "confusion" not in plots.figures(none), "fifty classes are a table"


# ---- settings -------------------------------------------------------------------------------------------------


def test_defaults_are_told_once() -> None:
    one = TrainConfig(model="resnet18", seed=3, train={"epochs": 7}).model_dump(mode="json")
    two = TrainConfig(model="resnet18", method="labels").model_dump(mode="json")
    lineage = [
        {"name": "a", "stage": "train", "config": one},
        {"name": "b", "stage": "train", "config": two},
        {"name": "c", "stage": "something", "config": {"own": {"thing": 1}, "list": []}},
    ]
    rows, defaults = chosen(lineage)
    assert rows[0]["chosen"] == {"model": "resnet18", "seed": 3, "train.epochs": 7}
    assert rows[1]["chosen"] == {"model": "resnet18", "method": "labels"}
    assert rows[2]["chosen"] == {"own": {"thing": 1}, "list": []} and "something" not in defaults
    assert defaults["train"]["method"] == "kd"
    assert defaults["train"]["train.learning_rate"] == one["train"]["learning_rate"]
    assert {"model"}.isdisjoint(defaults["train"])


def test_every_stage_of_the_lineage_has_its_settings(made: Made) -> None:
    numbers = made.report.numbers
    assert {each["stage"] for each in numbers["lineage"]} <= set(SETTINGS)
    rows, defaults = chosen(numbers["lineage"])
    for each in rows:
        told = each["chosen"] | defaults.get(each["stage"], {}) | each["chosen"]
        assert told.items() >= dict(each["chosen"]).items()
        assert len(each["chosen"]) < 30, "nearly all stand at their defaults"


# ---- the page -------------------------------------------------------------------------------------------------


def test_every_word_is_explained_somewhere(made: Made) -> None:
    page = made.report.page.read_text()
    for name in TERMS:
        assert f"<dt>{name}</dt>" in page, name


class Cells(html.parser.HTMLParser):
    """Cells that hold something and do not say what; explained words without an explanation."""

    def __init__(self) -> None:
        super().__init__()
        self.unnamed: list[str] = []
        self.cells = self.explained = 0
        self._open: str | None = None

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given_ = dict(attributes)
        if tag == "td":
            self.cells += 1
            self._open = given_.get("data-label")
            if self._open is None:
                self._open = ""
        if tag == "dfn":
            self.explained += 1
            assert given_["data-means"] in TERMS.values() and given_["tabindex"] == "0"

    def handle_endtag(self, tag: str) -> None:
        if tag == "td":
            self._open = None

    def handle_data(self, data: str) -> None:
        if self._open == "" and data.strip():
            self.unnamed.append(data)


def with_decision(numbers: Numbers, path: str = "artifacts/bundle-openvino-int8-1a2b") -> Numbers:
    """The report as it would be if its latencies were trusted and told apart."""
    changed = json.loads(json.dumps(numbers))
    [device] = changed["devices"]
    order = sorted(
        (each for each in device["bundles"] if each["latency_p50_ms"]), key=lambda each: each["variant"] == "float32"
    )
    for at, each in enumerate(order):
        each["trust"] = {"word": "trusted", "reason": ""}
        each["latency_p50_ms"]["value"] = 1.0 + at
    shown = faster(" ".join(each["name"] for each in order))
    device["advice"] = advice(device["bundles"], device["hops"], 50.0, shown)
    found = decision(device["advice"], device["bundles"], 50.0, shown, faster(), emulated=False)
    device["decision"] = {**found, "file": {"folder": path, "entry": "model.xml"}}
    return changed


def pictures(made: Made) -> dict[int, str]:
    return dict.fromkeys(range(len(made.dataset.samples("test"))), "data:,")


def test_the_page_says_the_decision_first_and_what_every_cell_is(made: Made) -> None:
    numbers = with_decision(made.report.numbers)
    page = render(numbers, pictures(made))
    [device] = numbers["devices"]
    assert device["decision"]["answer"] == "shown"
    sentence = words.decision_sentence(device["decision"])
    body = page[page.index("<body>") :]
    places = [
        body.index(text) for text in (sentence, device["decision"]["file"]["folder"], 'class="verdict', "<table>")
    ]
    assert places == sorted(places)
    cells = Cells()
    cells.feed(page)
    assert not cells.unnamed and cells.cells > 200 and cells.explained > 15


def test_the_page_shows_the_mistakes_and_the_defaults_once(made: Made) -> None:
    page = made.report.page.read_text()
    numbers = made.report.numbers
    pictures_ = len(re.findall(r'<img src="data:image/jpeg;base64,[^"]+" alt="[^"]+\.(?:png|jpg)">', page))
    assert pictures_ == len(numbers["flips"]) + len(numbers["answers"]["mistakes"]) > 2
    assert len(re.findall(r"&#34;train\.learning_rate&#34;: ", page)) <= 1, "told by every run"
    assert "<script" not in page
    assert numbers["schema_version"] == ReportConfig().version


def test_the_terminal_names_the_folder_to_take(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from io import StringIO

    from kdpipe.terminal import console

    def told(folder: Path) -> list[str]:
        stream = StringIO()
        print_summary(console(stream, width=60), with_decision(made.report.numbers, str(folder)))
        return stream.getvalue().splitlines()

    monkeypatch.chdir(tmp_path)
    long = "n" * 90
    assert f"take: artifacts/{long}" in told(tmp_path / "artifacts" / long), "from here, in one line"
    assert f"take: /elsewhere/{long}" in told(Path("/elsewhere") / long)


def test_a_report_of_what_is_not_trusted_names_no_file(made: Made, tmp_path: Path) -> None:
    """By the command, of a measurement whose latencies are no session's: told, and where nothing is decided no file."""
    done = kdpipe("report", made.measurement.path, "--out", tmp_path / "report", "--title", "again")
    assert done.returncode == 0, done.stderr
    assert "No decision yet: the latencies that would decide are not trusted" in done.stdout
    assert "\ntake: " not in done.stdout
