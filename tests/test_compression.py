"""What the report says of smaller variants: the one to ship, the images they changed, where accuracy went."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Made

from kdpipe.core.errors import UserError
from kdpipe.core.stats import Interval, no_worse
from kdpipe.data.dataset import UNLABELED
from kdpipe.report.compression import FLIPS, Sources, advice, flips, guards, noise_by_layer
from kdpipe.report.tables import bundles_of
from kdpipe.report.words import advice_sentence, guard_sentence

Numbers = dict[str, Any]


def row(variant: str, latency_ms: float, word: str = "trusted") -> Numbers:
    """A bundle of openvino."""
    return {
        "name": variant,
        "target": "openvino",
        "variant": variant,
        "latency_p50_ms": {"value": latency_ms},
        "latency_over_float32": None if variant == "float32" else {"value": latency_ms, "low": 0.0, "high": 0.9},
        "trust": {"word": word, "reason": "of some reason"},
    }


def faster(*orders: str) -> Callable[[str, str], bool]:
    """Of names in order: each is shown to be faster than all that follow it."""
    found = {pair for order in orders for pair in itertools.combinations(order.split(), 2)}
    return lambda first, second: (first, second) in found


def hops(half: float, **drops: float) -> list[Numbers]:
    """Steps to the variants of openvino, that lose so many points, known within ``half``."""

    def difference(drop: float) -> Numbers:
        return {"value": -drop / 100, "low": -(drop + half) / 100, "high": -(drop - half) / 100, "n": 539}

    return [
        {"steps": [{"variant": True, "bundle": name, "difference": difference(drop)} for name, drop in drops.items()]}
    ]


FLOAT32, INT8, BF16 = row("float32", 1.0), row("int8", 0.5), row("bf16", 0.7)


@pytest.mark.parametrize(
    ("rows", "shown", "drops", "wanted", "ties"),
    [
        ([FLOAT32, INT8, BF16], ["int8 bf16 float32"], {"int8": 0.2, "bf16": 0.0}, "int8", []),
        # The faster one loses too much.
        ([FLOAT32, INT8, BF16], ["int8 bf16 float32"], {"int8": 0.6, "bf16": 0.0}, "bf16", []),
        # Both are faster than float32, and cannot be told apart: one answer.
        ([FLOAT32, INT8, BF16], ["int8 float32", "bf16 float32"], {"int8": 0.2, "bf16": 0.0}, "int8", ["bf16"]),
        # Not shown to be faster than float32, whatever the point value.
        ([FLOAT32, INT8], [], {"int8": 0.0}, "float32", []),
        # A gain of accuracy is no loss.
        ([FLOAT32, INT8], ["int8 float32"], {"int8": -2.0}, "int8", []),
        # Its accuracy was not measured.
        ([FLOAT32, INT8], ["int8 float32"], {}, "float32", []),
    ],
)
def test_the_fastest_that_keeps_its_accuracy_is_advised(
    rows: list[Numbers], shown: list[str], drops: dict[str, float], wanted: str, ties: list[str]
) -> None:
    [found] = advice(rows, hops(0.1, **drops), 0.5, faster(*shown))
    assert (found["variant"], found["ties"], found["untrusted"]) == (wanted, ties, [])
    assert found["max_drop_points"] == 0.5
    assert found["may_do"] is None


@pytest.mark.parametrize(
    ("drops", "shown", "wanted", "nothing"),
    [
        ({"int8": 0.3, "int8-qad": 0.1}, "", "int8-qad", []),  # it loses less
        ({"int8": 0.9, "int8-qad": 0.1}, "", "int8-qad", []),  # and the other too much
        ({"int8": 0.1, "int8-qad": 0.3}, "", "int8", ["int8-qad"]),
        ({"int8": 0.1, "int8-qad": 0.1}, "", "int8", ["int8-qad"]),
        ({"int8": 0.1, "int8-qad": 0.3}, "int8-qad int8", "int8-qad", []),  # it is shown to be faster
        ({"int8": 0.1, "int8-qad": 0.9}, "", "int8", []),  # it loses too much by itself
    ],
)
def test_what_was_trained_is_advised_where_it_gains(
    drops: dict[str, float], shown: str, wanted: str, nothing: list[str]
) -> None:
    rows = [FLOAT32, INT8, row("int8-qad", 0.49)]
    [found] = advice(rows, hops(0.1, **drops), 0.5, faster("int8 float32", "int8-qad float32", shown))
    assert (found["variant"], found.get("gains_nothing", [])) == (wanted, nothing)
    assert ("not worth its training" in advice_sentence(found)) == bool(nothing)


def test_what_is_not_shown_is_not_to_be_shipped() -> None:
    """Few images: the fastest by the point value may do, and what it may lose is said beside it."""
    rows, shown = [FLOAT32, INT8, BF16], faster("int8 bf16 float32")
    [few] = advice(rows, hops(1.7, int8=0.2, bf16=0.0), 0.5, shown)
    assert few["variant"] == "float32" and few["may_do"]["variant"] == "int8"
    assert advice_sentence(few) == (
        "openvino: no variant is shown to be faster and to lose at most 0.5 points; fastest that may do: int8, "
        "0.500 [0, 0.900] of float32's latency, lost 0.20 points by the point value, up to 1.90 possible, "
        "about 6,300 images would tell"
    )
    # A slower one that is shown is shipped; the faster one is still told.
    known = hops(0.1, bf16=0.0)
    known[0]["steps"] += hops(1.7, int8=0.2)[0]["steps"]
    [both] = advice(rows, known, 0.5, shown)
    assert (both["variant"], both["may_do"]["variant"]) == ("bf16", "int8")
    sentence = advice_sentence(both)
    assert sentence.startswith("openvino: ship bf16, ") and "; fastest that may do: int8" in sentence
    # What loses more by the point value does not even do perhaps, and what is slower than a shown one is not told.
    [lossy] = advice(rows, hops(1.7, int8=0.8, bf16=-0.1), 0.5, shown)
    assert (lossy["variant"], lossy["may_do"]["variant"]) == ("float32", "bf16")
    known = hops(0.1, int8=0.0)
    known[0]["steps"] += hops(1.7, bf16=0.0)[0]["steps"]
    [fast] = advice(rows, known, 0.5, shown)
    assert (fast["variant"], fast["may_do"]) == ("int8", None)
    nothing = {**few, "may_do": None}
    assert advice_sentence(nothing) == (
        "openvino: ship float32; no variant is surely faster and loses at most 0.5 points"
    )


def test_what_may_do_rests_on_latencies_too() -> None:
    rows = [FLOAT32, INT8, row("bf16", 0.4, "noisy")]
    [found] = advice(rows, hops(1.7, int8=0.2, bf16=0.0), 0.5, faster("int8 float32"))
    assert [each["name"] for each in found["untrusted"]] == ["bf16"]
    assert "nothing to ship" in advice_sentence(found)


def test_the_guard_says_how_sure_it_is() -> None:
    confirmed = no_worse(Interval(-0.002, -0.019, 0.015, 250), 0.5)
    told = guard_sentence({"shown": False, "confirmed": confirmed.as_dict()})
    assert told.startswith(
        "Not shown on 250 images that the search did not use, which can tell a drop of 1.70: lost 0.20 "
    )
    assert told.endswith("up to 1.90 possible, about 2,900 images would tell.")


@pytest.mark.parametrize(
    ("rows", "shown", "drops", "doubted"),
    [
        # Everything is told against float32.
        ([row("float32", 1.0, "noisy"), INT8], ["int8 float32"], {"int8": 0.0}, ["float32"]),
        # A noisy one may be faster than the one that would be advised,
        ([FLOAT32, INT8, row("bf16", 0.6, "noisy")], ["int8 float32"], {"int8": 0.0, "bf16": 0.0}, ["bf16"]),
        # but not when it is shown to be slower, or loses too much: then nothing rests on it.
        ([FLOAT32, INT8, row("bf16", 2.0, "noisy")], ["int8 float32 bf16"], {"int8": 0.0, "bf16": 0.0}, []),
        ([FLOAT32, INT8, row("bf16", 0.6, "noisy")], ["int8 float32"], {"int8": 0.0, "bf16": 9.0}, []),
        # An emulated device advises nothing.
        (
            [row("float32", 1.0, "invalid"), row("int8", 0.5, "invalid")],
            ["int8 float32"],
            {"int8": 0.0},
            ["float32", "int8"],
        ),
    ],
)
def test_advice_names_the_untrusted_rows_that_it_rests_on(
    rows: list[Numbers], shown: list[str], drops: dict[str, float], doubted: list[str]
) -> None:
    [found] = advice(rows, hops(0.1, **drops), 0.5, faster(*shown))
    assert [each["name"] for each in found["untrusted"]] == doubted
    sentence = advice_sentence(
        {
            **found,
            "difference": {"value": 0.0, "low": 0.0, "high": 0.0},
            "over_float32": {"value": 0.5, "low": 0.4, "high": 0.6},
        }
    )
    assert ("nothing to ship" in sentence) == bool(doubted)
    assert all(name in sentence for name in doubted)


def test_nothing_is_advised_without_a_clock() -> None:
    untimed = {**FLOAT32, "latency_p50_ms": None, "trust": None}
    assert advice([untimed], [], 0.5, faster()) == []


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


@pytest.mark.parametrize("wrong", [10, -2, UNLABELED])
def test_flips_of_other_images(made: Made, wrong: int) -> None:
    pairs, labels = [("tflite-float32", "tflite-int8")], made.measurement.labels.copy()
    labels[0] = wrong
    with pytest.raises(UserError, match="measured other images than those of"):
        flips(made.measurement, pairs, labels, Sources(dataset=made.dataset))


def test_the_report_has_every_hop_and_layer(made: Made) -> None:
    numbers = json.loads(made.report.file("report.json").read_text())
    [device] = numbers["devices"]
    at = {hop["target"]: [step["at"] for step in hop["steps"]] for hop in device["hops"]}
    assert at["onnxruntime"][:4] == at["openvino"][:4] == ["torch", "exported", "simplified", "float32"]
    assert at["tflite"][:2] == ["torch", "float32"], "it does not come from the graph"
    for hop in device["hops"]:
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
