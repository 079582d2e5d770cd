"""What the report says of smaller variants: the one to ship, the images they changed, where accuracy went."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conftest import Made

from kdpipe.core.stats import Interval, no_worse
from kdpipe.report.compression import FLIPS, Sources, advice, flips, guards, noise_by_layer
from kdpipe.report.tables import bundles_of
from kdpipe.report.words import advice_sentence, guard_sentence

Numbers = dict[str, Any]


def row(variant: str, ratio: tuple[float, float | None] | None, target: str = "openvino") -> Numbers:
    """A bundle; ``ratio`` is its latency over float32's and the interval's upper end."""
    over = None if ratio is None else {"value": ratio[0], "low": 0.0, "high": ratio[1]}
    return {
        "name": f"{target}-{variant}",
        "target": target,
        "variant": variant,
        "latency_p50_ms": {"value": 1.0},
        "latency_over_float32": over,
    }


def hops(half: float, **drops: float) -> list[Numbers]:
    """Steps to the variants of openvino, that lose so many points, known within ``half``."""

    def difference(drop: float) -> Numbers:
        return {"value": -drop / 100, "low": -(drop + half) / 100, "high": -(drop - half) / 100, "n": 539}

    steps = [
        {"variant": name, "bundle": f"openvino-{name}", "difference": difference(drop)} for name, drop in drops.items()
    ]
    return [{"steps": steps}]


@pytest.mark.parametrize(
    ("rows", "drops", "wanted"),
    [
        ([row("int8", (0.5, 0.6)), row("bf16", (0.7, 0.8))], {"int8": 0.2, "bf16": 0.0}, "int8"),
        # The faster one loses too much.
        ([row("int8", (0.5, 0.6)), row("bf16", (0.7, 0.8))], {"int8": 0.6, "bf16": 0.0}, "bf16"),
        # Not surely faster than float32, or of too few rounds to tell.
        ([row("int8", (0.9, 1.1))], {"int8": 0.0}, "float32"),
        ([row("int8", (0.5, None))], {"int8": 0.0}, "float32"),
        # A gain of accuracy is no loss.
        ([row("int8", (0.5, 0.6))], {"int8": -2.0}, "int8"),
        # Its accuracy was not measured.
        ([row("int8", (0.5, 0.6))], {}, "float32"),
    ],
)
def test_the_fastest_that_keeps_its_accuracy_is_advised(
    rows: list[Numbers], drops: dict[str, float], wanted: str
) -> None:
    [found] = advice([row("float32", None), *rows], hops(0.1, **drops), max_drop=0.5)
    assert found["variant"] == wanted
    assert found["max_drop_points"] == 0.5
    assert found["may_do"] is None


def test_what_is_not_shown_is_not_to_be_shipped() -> None:
    """Few images: the fastest by the point value may do, and what it may lose is said beside it."""
    rows = [row("float32", None), row("int8", (0.5, 0.6)), row("bf16", (0.7, 0.8))]
    [few] = advice(rows, hops(1.7, int8=0.2, bf16=0.0), max_drop=0.5)
    assert few["variant"] == "float32" and few["may_do"]["variant"] == "int8"
    sentence = advice_sentence(few)
    assert sentence == (
        "openvino: no variant is shown to be faster and to lose at most 0.5 points; fastest that may do: int8, "
        "0.500 [0, 0.600] of float32's latency, lost 0.20 points by the point value, up to 1.90 possible, "
        "about 6,300 images would tell"
    )
    # A slower one that is shown is shipped; the faster one is still told.
    shown = hops(0.1, bf16=0.0)
    shown[0]["steps"] += hops(1.7, int8=0.2)[0]["steps"]
    [both] = advice(rows, shown, max_drop=0.5)
    assert (both["variant"], both["may_do"]["variant"]) == ("bf16", "int8")
    assert advice_sentence(both).startswith(
        "openvino: ship bf16, "
    ) and "; fastest that may do: int8" in advice_sentence(both)
    # What loses more by the point value does not even do perhaps, and what is slower than a shown one is not told.
    [lossy] = advice(rows, hops(1.7, int8=0.8, bf16=-0.1), max_drop=0.5)
    assert (lossy["variant"], lossy["may_do"]["variant"]) == ("float32", "bf16")
    shown = hops(0.1, int8=0.0)
    shown[0]["steps"] += hops(1.7, bf16=0.0)[0]["steps"]
    [fast] = advice(rows, shown, max_drop=0.5)
    assert (fast["variant"], fast["may_do"]) == ("int8", None)
    nothing = {**few, "may_do": None}
    assert advice_sentence(nothing) == (
        "openvino: ship float32; no variant is surely faster and loses at most 0.5 points"
    )


def test_the_guard_says_how_sure_it_is() -> None:
    confirmed = no_worse(Interval(-0.002, -0.019, 0.015, 250), 0.5)
    told = guard_sentence({"shown": False, "confirmed": confirmed.as_dict()})
    assert told.startswith(
        "Not shown on 250 images that the search did not use, which can tell a drop of 1.70: lost 0.20 "
    )
    assert told.endswith("up to 1.90 possible, about 2,900 images would tell.")


def test_nothing_is_advised_without_a_clock() -> None:
    untimed = {**row("float32", None, "tensorrt"), "latency_p50_ms": None}
    assert advice([untimed], [], max_drop=0.5) == []


def test_flips_are_images_that_changed(made: Made) -> None:
    labels = made.measurement.labels
    pairs = [(f"{target}-float32", f"{target}-int8") for target in ("onnxruntime", "tflite")]
    found = flips(made.measurement, pairs, labels, Sources(dataset=made.dataset))
    logits = {name: made.measurement.outputs(name).argmax(1) for pair in pairs for name in pair}
    changed = sum(int((logits[before] != logits[after]).sum()) for before, after in pairs)
    assert 0 < len(found) == min(changed, FLIPS)
    for each in found:
        before, after = next(pair for pair in pairs if pair[1] == each["bundle"])
        assert each["float32"] == made.dataset.classes[logits[before][each["position"]]]
        assert each["variant"] == made.dataset.classes[logits[after][each["position"]]] != each["float32"]
        assert each["label"] == made.dataset.classes[labels[each["position"]]]
        assert (made.dataset.samples("test")[each["position"]].path).name == each["image"]
    assert flips(made.measurement, pairs, labels, Sources()) == [], "without the dataset there are no images"


def test_the_report_has_every_hop_and_layer(made: Made) -> None:
    numbers = json.loads(made.report.file("report.json").read_text())
    at = {hop["target"]: [step["at"] for step in hop["steps"]] for hop in numbers["hops"]}
    assert at["onnxruntime"][:4] == at["openvino"][:4] == ["torch", "exported", "simplified", "float32"]
    assert at["tflite"][:2] == ["torch", "float32"], "it does not come from the graph"
    for hop in numbers["hops"]:
        assert {step["bundle"] for step in hop["steps"]} - {None} <= set(made.bundles)
        assert hop["steps"][0]["lost"] is None and all(step["lost"] is not None for step in hop["steps"][1:])
        exact = [step for step in hop["steps"] if step["at"] in ("exported", "simplified", "float32")]
        assert all(step["difference"]["value"] == 0 for step in exact)
    told = {each["bundle"] for each in numbers["noise_by_layer"]}
    assert {"onnxruntime-int8", "openvino-int8", "tensorrt-int8", "tflite-int8"} <= told
    assert "onnxruntime-float32" not in told and "tflite-float16" not in told


def test_layers_come_from_the_models_that_were_found(made: Made) -> None:
    bundles = bundles_of(made.measurement)
    assert bundles.keys() == made.bundles.keys()
    assert noise_by_layer(bundles, Sources()) == []
    int8 = made.models["onnxruntime-int8"]
    [found] = noise_by_layer(bundles, Sources(models={int8.key: int8}))
    assert found["bundle"] == "onnxruntime-int8"
    assert found["layers"] == [layer.model_dump() for layer in int8.noise_by_layer]
    assert guards(bundles) == [], "no variant of the small recipe was guarded"
