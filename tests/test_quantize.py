"""How variants are made: chosen images, ranges, noise by layer, the guard; and what is refused."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, SMALL_RECIPE, VARIANTS_HERE, Made, assert_one_line, command, kdpipe, quantize
from hypothesis import given
from hypothesis import strategies as st

from kdpipe.chain import Chain
from kdpipe.core.config import CalibrateSettings, QuantizeConfig, suited, validated
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Mix, Model
from kdpipe.core.proc import quiet
from kdpipe.core.stats import NoWorse
from kdpipe.data.dataset import Dataset, Sample, Samples, load_images
from kdpipe.export import TARGETS
from kdpipe.export.lint import tensorrt_lint
from kdpipe.quantize import VARIANTS
from kdpipe.quantize.bias import Correction, correct
from kdpipe.quantize.calibrate import CalibrationInputs, choose, entropy, farthest, spread
from kdpipe.quantize.guard import enough_to_show, kept_accuracy, parted
from kdpipe.quantize.layers import Layer, noise_by_layer, own_noise
from kdpipe.quantize.qdq import OnnxActivations
from kdpipe.quantize.ranges import Histogram, estimate, observe
from kdpipe.quantize.search import Found, search
from kdpipe.quantize.tflite import TfliteActivations
from kdpipe.quantize.work import Work, open_checked
from kdpipe.runtime import predict
from kdpipe.runtime.task import TASKS


def config(**values: object) -> QuantizeConfig:
    return suited(validated(QuantizeConfig, {"calibrate": {"images": 48}, **values}, "test"), "x86_64", {})


# ---- what a CPU needs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("machine", "flags", "activations", "reduced"),
    [
        ("x86_64", {"avx2": True, "avx512_vnni": True, "avx_vnni": False}, "uint8", False),
        ("x86_64", {"avx2": True, "avx512_vnni": False, "avx_vnni": False}, "uint8", True),
        ("aarch64", {"asimddp": True}, "int8", False),
        ("arm64", {}, "int8", False),
    ],
)
def test_settings_suit_the_cpu(machine: str, flags: Mapping[str, bool], activations: str, reduced: bool) -> None:
    found = suited(QuantizeConfig(), machine, flags)
    assert (found.activations, found.reduce_range) == (activations, reduced)
    said = QuantizeConfig(activations="int8", reduce_range=True)
    assert suited(said, machine, flags) == said


def test_reduced_range_is_seven_bits(made: Made, tmp_path: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = quantize(config(reduce_range=True), made.models["onnxruntime-float32"], made.dataset, tmp_path / "q")
    tensors = [numpy_helper.to_array(t) for t in onnx.load(model.file("model.onnx")).graph.initializer]
    weights = [tensor for tensor in tensors if tensor.dtype == np.int8 and tensor.ndim == 4]
    assert weights and max(np.abs(weight.astype(int)).max() for weight in weights) <= 64


# ---- calibration images ------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["random", "balanced", "coverage", "teacher"])
def test_images_are_chosen_from_the_training_part(made: Made, tmp_path: Path, select: str) -> None:
    settings = config(calibrate={"images": 24, "select": select, "pool": 120})
    float32 = made.models["onnxruntime-float32"]
    model = quantize(settings, float32, made.dataset, tmp_path / "q", made.graph, made.teacher)
    files = json.loads(model.file("evidence/calibration.json").read_text())["files"]
    training = {sample.path.name for sample in made.dataset.samples("train")}
    assert len(files) == len(set(files)) == 24
    assert set(files) <= training


def test_the_teacher_must_be_there(made: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="teacher is not beside it"):
        quantize(
            config(calibrate={"select": "teacher"}),
            made.models["onnxruntime-float32"],
            made.dataset,
            tmp_path / "q",
        )


def test_coverage_reaches_every_corner() -> None:
    generator = np.random.default_rng(0)
    crowd = generator.normal(0, 0.1, (200, 2))
    corners = np.array([[9, 9], [-9, 9], [9, -9], [-9, -9]])
    chosen = farthest(np.concatenate([crowd, corners]), 5)
    assert set(range(200, 204)) <= set(chosen.tolist())
    assert sorted(farthest(crowd[:3], 9).tolist()) == [0, 1, 2]
    assert chosen.tolist() == farthest(np.concatenate([crowd, corners])[:, :, None], 5).tolist()


def test_spread_takes_both_ends() -> None:
    values = np.random.default_rng(1).normal(size=50)
    chosen = values[spread(values, 5)]
    assert chosen[0] == values.min() and chosen[-1] == values.max()
    assert (np.diff(chosen) > 0).all()
    assert entropy(np.zeros((1, 8)))[0] == pytest.approx(np.log(8))
    assert entropy(np.array([[1000.0, 0.0]]))[0] == pytest.approx(0)
    assert entropy(np.array([[[0.0, 1000.0], [0.0, 0.0]]])) == pytest.approx([np.log(2) / 2])  # two places of an image


def test_one_image_is_not_enough(made: Made) -> None:
    class One(Dataset):
        def samples(self, part):
            return super().samples(part)[:1]

    with pytest.raises(UserError, match="at least 2 to calibrate on"):
        choose(CalibrateSettings(), One(made.dataset.path, made.dataset.manifest), lambda _: np.zeros((1, 2)), None)


# ---- ranges ------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e4, 1e4), min_size=2, max_size=200), st.integers(1, 5))
def test_a_range_lies_within_what_was_seen(values: list[float], parts: int) -> None:
    histogram = Histogram()
    for part in np.array_split(np.array(values), parts):
        if part.size:
            histogram.add(part)
    assert histogram.low == min(values) and histogram.high == max(values)
    low, high = histogram.least_error(symmetric=False)
    assert min(*values, 0) <= low <= 0 <= high <= max(*values, 0)
    low, high = histogram.least_error(symmetric=True)
    assert low == -high


@pytest.mark.parametrize("kind", ["laplace", "normal", "uniform"])
def test_the_chosen_range_has_less_error_than_all_that_was_seen(kind: str) -> None:
    values = getattr(np.random.default_rng(0), kind)(size=10_000)
    histogram = Histogram()
    histogram.add(values)

    def error(low: float, high: float) -> float:
        step = (high - low) / 255
        return float(np.square(np.round((np.clip(values, low, high) - low) / step) * step + low - values).mean())

    ratio = error(*histogram.least_error(symmetric=False)) / error(min(values.min(), 0), values.max())
    assert ratio < {"laplace": 0.99, "normal": 0.999, "uniform": 1.01}[kind]


def test_padding_is_no_value() -> None:
    """Max pooling is padded with minus infinity, or the least float: one of them in a range leaves nothing of it."""

    class Padded:
        layers = (Layer("pad", "PADV2", ("image",), "padded"),)

        def __call__(self, image):
            return {"padded": np.array([-np.inf, np.finfo(np.float32).min, 0.5, 2.0], np.float32)}

    assert estimate(observe(Padded(), [np.zeros(1)]), "minmax", symmetric=False)["padded"] == (0.5, 2.0)


def test_memory_does_not_grow_with_the_images() -> None:
    import tracemalloc

    class Layers:
        layers = ()

        def __call__(self, image):
            return {f"tensor {at}": image for at in range(10)}

    def peak(count: int) -> int:
        images = (np.random.default_rng(at).normal(size=4096).astype(np.float32) for at in range(count))
        tracemalloc.start()
        estimate(observe(Layers(), images), "minmax", symmetric=False)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few = peak(8)
    assert peak(64) < 1.2 * few


# ---- biases ------------------------------------------------------------------------------------------------


class TwoLayers:
    """y = (x W + b) V + c in numpy; ``rounding`` is taken off every weight of W."""

    channel_axis = 1
    layers = (
        Layer("first", "Gemm", ("image",), "hidden", "b"),
        Layer("second", "Gemm", ("hidden",), "logits", "c"),
    )

    def __init__(self, rounding: float, shifts: Mapping[str, np.ndarray]) -> None:
        random = np.random.default_rng(0)
        self.first, self.second = random.normal(size=(8, 6)) - rounding, random.normal(size=(6, 4))
        self.shifts = {"first": np.zeros(6), "second": np.zeros(4), **shifts}

    def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
        hidden = image @ self.first + self.shifts["first"]
        return {"hidden": hidden, "logits": hidden @ self.second + self.shifts["second"]}


def test_biases_are_moved_where_that_helps() -> None:
    random = np.random.default_rng(1)
    images = [random.uniform(1, 2, size=(1, 8)) for _ in range(32)]
    found = correct(TwoLayers(0, {}), lambda shifts: TwoLayers(0.1, shifts), images)
    assert found.shifts.keys() == {"first", "second"}
    assert found.before_db is not None and found.after_db is not None and found.after_db > found.before_db + 10
    # Noise that has no mean cannot be moved away.
    pairs = zip(images[::2], images[1::2], strict=True)
    balanced = [sign * image for pair in pairs for sign in (1, -1) for image in pair]
    still = correct(TwoLayers(0, {}), lambda shifts: TwoLayers(0.1, shifts), balanced)
    assert still.shifts == {} and still.after_db is None
    # What comes out worse is not kept.
    worse = correct(TwoLayers(0, {}), lambda shifts: TwoLayers(0.1, {k: -v for k, v in shifts.items()}), images)
    assert worse.shifts == {} and worse.after_db is not None and worse.after_db < found.before_db


@pytest.mark.parametrize("classes", [2, 4])
def test_biases_are_judged_on_images_of_every_class(classes: int) -> None:
    """Classes take turns in what is calibrated on: every second image would be of every second class."""
    judged: set[float] = set()

    class Noting(TwoLayers):
        def __call__(self, image: np.ndarray) -> dict[str, np.ndarray]:
            judged.add(float(image[0, 0]))
            return super().__call__(image)

    images = [np.full((1, 8), float(1 + at % classes)) for at in range(32)]
    # Worth nothing, so that only the images that judge are looked at.
    assert correct(Noting(0, {}), lambda shifts: TwoLayers(0, shifts), images).after_db is None
    assert judged == {float(1 + label) for label in range(classes)}


@pytest.mark.parametrize(
    ("target", "variant"),
    [("onnxruntime", "int8"), ("openvino", "int8-qdq"), ("tensorrt", "int8"), ("tflite", "int8")],
)
def test_a_moved_bias_moves_the_output(made: Made, tmp_path: Path, target: str, variant: str) -> None:
    model = made.models[f"{target}-float32"]
    spec = model.facts.input.model_dump()
    inputs = CalibrationInputs(made.dataset.balanced("train", 16, 0), spec, "test")
    kind = VARIANTS[target][variant](Work(model, made.graph, inputs, config(), TARGETS[target].check))
    whole = TfliteActivations(model.file("model.tflite")) if target == "tflite" else OnnxActivations(kind.source)
    biased = [layer for layer in whole.layers if layer.bias is not None]
    logits = []
    classes = len(made.dataset.classes)
    for name, shift in (("plain", 0.0), ("moved", 3.0)):
        kind.__dict__["correction"] = Correction({biased[-1].name: np.full(classes, shift, np.float32)})
        (tmp_path / name).mkdir()
        kind.write((), tmp_path / name)
        with quiet():
            session = open_checked(tmp_path / name, model.facts)
        images = load_images(made.dataset.samples("test")[:16], spec)
        logits.append(predict(session, images))
    # Its range was made for what it gave before: what exceeds that is clipped.
    assert np.median(logits[1] - logits[0]) == pytest.approx(3, abs=0.2)


# ---- noise by layer ----------------------------------------------------------------------------------------


def test_ratios_are_of_energies() -> None:
    class Graph:
        layers = (Layer("a", "Conv", ("image",), "x"), Layer("b", "Relu", ("x",), "y"), Layer("c", "Conv", ("y",), "z"))

        def __init__(self, noise: dict[str, float]) -> None:
            self.noise = noise

        def __call__(self, image):
            return {name: np.full(4, 10.0) + self.noise[name] for name in ("x", "y", "z") if name in self.noise}

    whole = Graph({"x": 0.0, "y": 0.0, "z": 0.0})
    [first, merged, last] = noise_by_layer(whole, Graph({"x": 1.0, "y": 0.0, "z": 0.1}), [np.zeros(1)])
    assert (first.in_db, first.out_db) == (None, 20.0)
    assert (merged.in_db, merged.out_db) == (20.0, None)
    assert last.out_db == 40.0 and own_noise(first) > own_noise(last) > own_noise(merged) == 0
    # What was merged into its activation shows the activation's noise.
    [first, merged, _] = noise_by_layer(whole, Graph({"y": 1.0, "z": 0.1}), [np.zeros(1)])
    assert first.out_db == merged.out_db == 20.0


@pytest.mark.parametrize(
    ("target", "variant"),
    [(target, name) for target, names in VARIANTS_HERE.items() for name in names if VARIANTS[target][name].calibrated],
)
def test_every_calibrated_variant_tells_its_layers(made: Made, target: str, variant: str) -> None:
    layers = made.models[f"{target}-{variant}"].noise_by_layer
    names = [layer.name for layer in layers]
    assert len(names) == len(set(names)) > 20
    assert any("layer2.0.conv2" in name for name in names), "layers are named as torch names them"
    ratios = [layer.out_db for layer in layers if layer.out_db is not None]
    assert len(ratios) > 15 and min(ratios) > 5


# ---- the guard ---------------------------------------------------------------------------------------------


def step(kept: int, drop: float, half: float = 0.1) -> Mix:
    """A mix whose drop is known within ``half`` points."""
    bounds = {"drop_low": drop - half, "drop_high": drop + half}
    return Mix(kept=kept, drop_points=drop, **bounds, images=100, over_float32=None, size_bytes=1)


def searched(folder: Path, layers: int, drop: Callable[[int], float], half: float = 0.1, **more: Any) -> Found:
    """A search over so many layers, of which ``drop`` says what is lost with how many in float, on other images too."""

    def make(names: Sequence[str], folder: Path) -> Mix:
        folder.mkdir(parents=True)
        return step(len(names), drop(len(names)), half)

    def confirm(folder: Path) -> NoWorse:
        kept = int(folder.name.removeprefix("mix-"))
        return step(kept, drop(kept), half).verdict(0.5)

    return search(lambda: [str(at) for at in range(layers)], make, confirm, 0.5, 20, folder, **more)


@given(st.integers(0, 40), st.integers(40, 60))
def test_the_search_finds_the_fewest(tmp_path_factory: pytest.TempPathFactory, needed: int, layers: int) -> None:
    found = searched(tmp_path_factory.mktemp("guard"), layers, lambda kept: 0.0 if kept >= needed else 1.0)
    assert len(found.kept) == needed and found.folder.name == f"mix-{needed:04d}" and found.folder.is_dir()
    assert len({mix.kept for mix in found.steps}) == len(found.steps) <= 14
    assert found.confirmed.answer == "holds"


def test_a_mix_that_is_shown_goes_before_one_that_holds_by_the_point_value(tmp_path: Path) -> None:
    def drop(kept: int) -> float:
        return 0.45 - 0.01 * kept

    shown = searched(tmp_path / "shown", 32, drop, half=0.1)
    assert len(shown.kept) == 5 and shown.confirmed.answer == "holds"
    # With wider intervals no mix is shown to hold: the smallest that does by the point value is taken, and called so.
    wide = searched(tmp_path / "wide", 32, drop, half=0.5)
    assert wide.kept == [] and wide.confirmed.answer == "cannot tell" and wide.confirmed.images_needed is not None
    # Where no number of changed images could show it, that is not tried for.
    few = searched(tmp_path / "few", 32, drop, half=0.5, can_show=False)
    assert few.kept == [] and len(few.steps) == 1


def test_a_drop_that_no_mix_keeps(tmp_path: Path) -> None:
    with pytest.raises(
        GateFailed, match=r"no mix of 5 loses at most 0.5 points: the best, with 7 of 7 layers in float, lost 4.30 "
    ):
        searched(tmp_path / "surely", 7, lambda kept: 5.0 - 0.1 * kept)
    # By the point value alone it is not lost: the best mix is what there is, and nobody knows.
    found = searched(tmp_path / "perhaps", 7, lambda kept: 1.5 - 0.1 * kept, half=2)
    assert len(found.kept) == 7 and found.confirmed.answer == "cannot tell"


def test_the_images_that_confirm_decide(tmp_path: Path) -> None:
    def make(names: Sequence[str], folder: Path) -> Mix:
        folder.mkdir(parents=True)
        return step(len(names), 0.0)

    def confirm(drop: float) -> Callable[[Path], NoWorse]:
        return lambda folder: step(0, drop).verdict(0.5)

    assert search(list, make, confirm(0.45), 0.5, 10, tmp_path / "a").confirmed.answer == "cannot tell"
    with pytest.raises(GateFailed, match=r"no layer in float, lost 0.80 points by the point value, up to 0.90 poss"):
        search(list, make, confirm(0.8), 0.5, 10, tmp_path / "b")


@pytest.mark.parametrize(
    ("images", "loss", "least", "most"),
    [(500, 1.0, 0, 0.05), (5_000, 1.0, 0, 0.05), (20_000, 0.5, 0, 0.05), (40_000, 0.0, 0.9, 1.0)],
    ids=["few", "more", "at the limit", "nothing lost"],
)
def test_how_often_a_mix_is_let_through(
    tmp_path: Path, images: int, loss: float, least: float, most: float, limit: float = 0.5, runs: int = 200
) -> None:
    """The guard's own decision on simulated mixes: 3 % of the images change, and every mix truly loses ``loss``."""
    task, generator = TASKS["classification"], np.random.default_rng(images)
    samples = [Sample(None, at, Path(str(at)), at % 10) for at in range(images)]  # type: ignore[arg-type]
    searching, confirming = (np.array([int(s.path.name) for s in part]) for part in parted(samples, task))
    assert sorted([*searching, *confirming]) == list(range(images))
    lost, won = (0.03 + loss / 100) / 2, (0.03 - loss / 100) / 2
    accepted = by_point_value = 0
    for run in range(runs):
        before, after = generator.random(images) < 0.9, {}

        def make(names, folder, before=before, after=after):  # type: ignore[no-untyped-def]
            folder.mkdir(parents=True)
            drawn = generator.random(images)
            after[folder] = np.where(before, drawn >= lost / 0.9, drawn < won / 0.1)
            found = task.change(before[searching], after[folder][searching])
            ends = {"drop_low": -100 * found.high, "drop_high": -100 * found.low}
            return step(len(names), -100 * found.difference).model_copy(update={**ends, "images": found.n})

        def confirm(folder, before=before, after=after):  # type: ignore[no-untyped-def]
            return kept_accuracy(task.change(before[confirming], after[folder][confirming]), limit)

        can_show = enough_to_show(task, before[confirming], limit)
        names = [str(at) for at in range(512)]
        with contextlib.suppress(GateFailed):
            found = search(lambda: names, make, confirm, limit, 10, tmp_path / str(run), can_show)  # noqa: B023
            accepted += found.confirmed.answer == "holds"
        by_point_value += any(before.mean() - mix.mean() <= limit / 100 for mix in after.values())
    print(f"{images} images, true loss {loss}: {accepted} of {runs} accepted, {by_point_value} by the point value")
    assert least <= accepted / runs <= most
    if loss > limit:
        assert by_point_value / runs > 0.1, "nothing was to be refused: the simulation shows nothing"


class Ruined:
    """A real float32 model's INT8 with one layer's range torn: what a guard is for."""

    @staticmethod
    def tear(monkeypatch: pytest.MonkeyPatch, target: str, layer: str) -> None:
        variant = VARIANTS[target]["int8"]
        honest = variant.ranges.func  # type: ignore[attr-defined]

        def torn(self):
            found = dict(honest(self))
            whole = self.activations(self._work.entry)
            [output] = [each.output for each in whole.layers if each.name == layer]
            return {**found, output: (-1e4, 1e4)}

        monkeypatch.setattr(variant, "ranges", property(torn))


@pytest.mark.parametrize(
    ("target", "layer"),
    [("onnxruntime", "conv1.6"), ("tensorrt", "layer2.0.downsample.1"), ("tflite", "layer2.0.downsample.1:CONV_2D")],
)
def test_the_guilty_layer_stays_float(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, layer: str
) -> None:
    # ONNX Runtime's file has one range for a layer and its activation.
    layer_torn = "act1:Relu" if target == "onnxruntime" else layer
    Ruined.tear(monkeypatch, target, layer_torn)
    float32 = made.models[f"{target}-float32"]
    model = quantize(config(max_drop=12, guard_part="test"), float32, made.dataset, tmp_path / "q")
    guard = model.facts.guard
    assert guard.confirmed.answer != "fails"  # the other half of so few images cannot always tell
    first = guard.curve[0]
    assert first.kept == 0 and first.drop_points > 12, "the torn range does no damage: the test shows nothing"
    assert 1 <= len(guard.kept_float) <= 4
    assert {layer, layer_torn} & set(guard.kept_float)
    assert guard.curve[-1].drop_points <= 12
    held_out = len(made.dataset.samples("test"))
    assert all(mix.size_bytes > 0 and mix.images + guard.confirmed.images == held_out for mix in guard.curve)
    assert not (model.path / "resume").exists()


def test_the_guard_wants_held_out_images(made: Made, tmp_path: Path) -> None:
    class NoVal(Dataset):
        def samples(self, part):
            return super().samples("unlabeled" if part == "val" else part)  # there are none of those

    with pytest.raises(UserError, match=r"no 'val' part: set data\.val_fraction above 0"):
        quantize(
            config(max_drop=1), made.models["onnxruntime-float32"], NoVal(made.dataset.path, made.dataset.manifest),
            tmp_path / "q",
        )  # fmt: skip


def test_what_cannot_be_told_is_sealed_and_marked(made: Made, tmp_path: Path) -> None:
    """A variant of which no layer can stay float, on images that cannot tell so small a drop."""
    arguments = ["quantize", made.models["tflite-float32"].path, "--variant", "float16", "--max-drop", 0.1]
    for attempt in ("made", "found again"):
        done = kdpipe(*arguments, "--guard-part", "test", "--out", tmp_path / "q")
        assert_one_line(done, 75, "tflite float16 is not shown to lose at most 0.1 points:", "images would tell")
        assert done.stdout.split()[-1] == str(tmp_path / "q"), attempt
    guard = Model.open(tmp_path / "q").facts.guard
    assert not guard.shown and guard.confirmed.answer == "cannot tell"
    assert [mix.kept for mix in guard.curve] == [0] and guard.kept_float == ()
    assert guard.confirmed.images_needed > len(made.dataset.samples("test"))
    told = json.loads((tmp_path / "q" / "manifest.json").read_text())["facts"]["guard"]
    assert told["shown"] is False and told["confirmed"]["possible_points"] > 0.1


def test_a_run_goes_on_with_what_cannot_be_told_and_says_so(made: Made, tmp_path: Path) -> None:
    quantization = {"variants": ["int8"], "calibrate": {"images": 48}, "max_drop": 0.1, "guard_steps": 1}
    recipe = {**SMALL_RECIPE, "export": {"targets": ["onnxruntime"]}, "quantize": quantization}
    (tmp_path / "guarded.yaml").write_text(yaml.safe_dump(recipe))
    done = kdpipe("run", tmp_path / "guarded.yaml", "--artifacts", made.chain.folder, "--json")
    assert done.returncode in (0, 75), done.stderr  # of two rounds no latency is trusted
    assert "onnxruntime int8 is not shown to lose at most 0.1 points: " in done.stderr
    [guard] = json.loads(done.stdout[done.stdout.index("{") :])["numbers"]["guards"]
    assert guard["shown"] is False and guard["confirmed"]["images_needed"] > 1000


def test_what_surely_loses_more_is_not_sealed(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Ruined.tear(monkeypatch, "onnxruntime", "act1:Relu")
    settings = config(max_drop=0.5, guard_part="test", guard_steps=1)
    with pytest.raises(GateFailed, match=r"no mix of 1 loses at most 0.5 points: .* no layer in float, lost .* surely"):
        quantize(settings, made.models["onnxruntime-float32"], made.dataset, tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_images_of_many_classes_are_halved() -> None:
    """The rarest class that an image shows is no reason to search on it: each half has half of the images."""
    rarest = np.random.default_rng(0).zipf(1.3, 100).clip(max=149)
    samples = [Sample(None, at, Path(str(at)), int(label)) for at, label in enumerate(rarest)]  # type: ignore[arg-type]
    searching, confirming = parted(samples, TASKS["segmentation"])
    assert len(searching) == len(confirming) == 50
    assert len(parted(samples, TASKS["classification"])[1]) < 45
    with pytest.raises(UserError, match=r"wanted two at least, .* found 1 images"):
        parted(samples[:1], TASKS["segmentation"])


def test_images_that_cannot_be_parted(made: Made, tmp_path: Path) -> None:
    class OneOfEach(Dataset):
        def samples(self, part):
            found = super().samples(part)
            first = [int(np.flatnonzero(found.labels == label)[0]) for label in np.unique(found.labels)]
            return Samples("classification", self.path, found._records[first])

    few = OneOfEach(made.dataset.path, made.dataset.manifest)
    with pytest.raises(UserError, match=r"searches on one half .* wanted two at least, .* found 10 images"):
        quantize(config(max_drop=1), made.models["onnxruntime-float32"], few, tmp_path / "q")


def test_a_killed_guard_goes_on(made: Made, tmp_path: Path) -> None:
    out = tmp_path / "q"
    arguments = command(
        *("quantize", made.models["tensorrt-float32"].path, "--out", out, "--max-drop", 0.01, "--guard-part", "test"),
        *("--calibrate.images", 48),
    )
    first = out.with_name("q.part") / "resume" / "mix-0000.json"
    killed = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    begun = time.monotonic()
    while not first.is_file() and killed.poll() is None and time.monotonic() - begun < 900:
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    assert first.is_file() and not out.exists()
    before = first.stat().st_mtime_ns
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    # So few images cannot tell a hundredth of a point, unless it wins; the mixes that were there are not made again.
    guard = Model.open(out).facts.guard
    assert done.returncode == (0 if guard.shown else 75), done.stderr
    assert guard.curve[0].kept == 0
    assert not first.exists() or first.stat().st_mtime_ns == before


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [["cat", "dog"], list("9876543210")])
def test_images_of_other_classes(made: Made, tmp_path: Path, classes: list[str]) -> None:
    class Others(Dataset):
        @property
        def classes(self) -> list[str]:
            return classes

    others = Others(made.dataset.path, made.dataset.manifest)
    with pytest.raises(UserError, match=r"knows (10 other classes than the data|the same classes in another order)"):
        quantize(config(), made.models["onnxruntime-float32"], others, tmp_path / "q")
    assert not list(tmp_path.iterdir())


def test_an_unknown_variant(made: Made) -> None:
    done = kdpipe("quantize", made.models["onnxruntime-float32"].path, "--variant", "int8-dynamc")
    assert_one_line(done, 2, "unknown variant of onnxruntime", "did you mean 'int8-dynamic'?")


def test_auto_makes_what_suits(made: Made) -> None:
    model = made.models["openvino-float32"].path
    done = kdpipe("quantize", model, "--variant", "auto", "--calibrate.images", 64, "--check-images", 32)
    made_now = {Model.open(path).facts.variant for path in done.stdout.split()}
    assert made_now == set(VARIANTS_HERE["openvino"]) - {"float16"}  # which no CPU runs faster
    assert_one_line(kdpipe("quantize", model, "--variant", "auto", "--out", "x"), 2, "leave --out away")


FALLBACK = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from conftest import quantize
from kdpipe.core.config import QuantizeConfig
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Model
from kdpipe.data.dataset import Dataset, load_images
from kdpipe.quantize import VARIANTS
class Half(VARIANTS["openvino"]["bf16"]):
    def quantize(self, keep_float, folder):
        return super().quantize(keep_float, folder)._replace(runtime={"inference_precision": "f16"})
VARIANTS["openvino"]["bf16"] = Half
try:
    quantize(QuantizeConfig(variant="bf16"), Model.open(sys.argv[2]), Dataset.open(sys.argv[3]), Path(sys.argv[4]))
except UserError as error:
    print(error)
"""


def test_a_silent_fallback_is_seen(made: Made, tmp_path: Path) -> None:
    """A CPU asked for f16 that it does not have: OpenVINO runs something else and says nothing.

    Newer CPUs have it, so oneDNN is told to take this one for an older.
    """
    model, dataset = made.models["openvino-float32"].path, made.dataset.path
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK, ROOT / "tests", model, dataset, tmp_path / "q"],
        env={**os.environ, "DNNL_MAX_CPU_ISA": "AVX512_CORE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "asked for f16 and silently runs" in done.stdout, done.stdout
    assert not (tmp_path / "q").exists()


def test_weights_that_are_not_finite(made: Made, tmp_path: Path) -> None:
    import shutil

    from conftest import replace_file
    from safetensors.numpy import load_file, save

    folder = Path(shutil.copytree(made.student.path, tmp_path / "student"))
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][0, 0] = np.nan
    replace_file(folder, "model.safetensors", save(weights))
    done = kdpipe("export", folder, "--data", made.dataset.path)
    assert_one_line(done, 2, "not finite")
    assert not list(tmp_path.glob("*graph*"))


def test_control_flow_is_one_line(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kdpipe.networks import models

    forward = models.Normalise.forward

    def branching(self, image):
        logits = forward(self, image)
        return logits if logits.sum() > 0 else -logits

    monkeypatch.setattr(models.Normalise, "forward", branching)
    chain = Chain(tmp_path / "artifacts")
    from kdpipe.core.config import ExportConfig

    for target in ("onnxruntime", "tflite"):
        with pytest.raises(
            UserError, match=f"cannot be exported to {'ONNX' if target == 'onnxruntime' else 'tflite'}: "
        ):
            chain.export(ExportConfig(target=target), made.student, made.dataset)
    assert not [path for path in (tmp_path / "artifacts").iterdir() if not path.name.startswith(".")]


# ---- TensorRT's lint ---------------------------------------------------------------------------------------


def graph_of(*nodes, initializers=()):
    from onnx import TensorProto, helper

    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in ("image", "logits")]
    return helper.make_model(helper.make_graph(list(nodes), "g", ends[:1], ends[1:], list(initializers)))


def test_lint_names_every_refused_node(tmp_path: Path) -> None:
    import onnx
    from onnx import helper, numpy_helper

    constants = [
        numpy_helper.from_array(np.float32(0.1), "scale"),
        numpy_helper.from_array(np.uint8(3), "zero"),
        numpy_helper.from_array(np.zeros(4, np.int32), "bias"),
        numpy_helper.from_array(np.int32(0), "bias_zero"),
    ]
    model = graph_of(
        helper.make_node("Unique", ["image"], ["a"], "odd"),
        helper.make_node("QuantizeLinear", ["a", "scale", "zero"], ["b"], "asymmetric"),
        helper.make_node("DequantizeLinear", ["b", "scale", "zero"], ["c"], "back"),
        helper.make_node("DequantizeLinear", ["bias", "scale", "bias_zero"], ["d"], "bias of ints"),
        helper.make_node("Gelu", ["c"], ["e"], "contrib", domain="com.microsoft"),
        helper.make_node("Add", ["e", "d"], ["logits"], "fine"),
        initializers=constants,
    )
    onnx.save(model, tmp_path / "m.onnx")
    found = tensorrt_lint(tmp_path / "m.onnx")
    for name, why in {
        "odd": "without an importer",
        "asymmetric": "zero point that is not 0",
        "back": "zero point that is not 0",
        "bias of ints": "INT32 bias",
        "contrib": "com.microsoft",
    }.items():
        assert any(line.startswith(f"'{name}' ") and why in line for line in found), found
    assert not any("'fine'" in line for line in found)


@pytest.mark.parametrize("variant", ["float32", "int8", "float16"])
def test_what_is_written_for_tensorrt_passes(made: Made, variant: str) -> None:
    assert tensorrt_lint(made.models[f"tensorrt-{variant}"].file("model.onnx")) == []


def test_the_portable_file_would_be_refused(made: Made) -> None:
    """The lint sees what it is there for: ONNX Runtime's own INT8 is asymmetric and has INT32 biases."""
    found = " ".join(tensorrt_lint(made.models["onnxruntime-int8"].file("model.onnx")))
    assert "zero point that is not 0" in found or "uint8" in found
    assert "INT32 bias" in found


def test_float16_is_float16(made: Made) -> None:
    import onnx

    model = onnx.load(made.models["tensorrt-float16"].file("model.onnx"))
    kinds = {tensor.data_type for tensor in model.graph.initializer if len(tensor.dims) == 4}
    assert kinds == {onnx.TensorProto.FLOAT16}
    onnx.checker.check_model(model, full_check=True)  # no operator mixes types, which strong typing refuses
