"""``int8-qad`` on every target, in files: the same integers and scales, its controls, what a user does wrong."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_targets
import torch
from conftest import Made, Trained, assert_one_line, build_cache, kdpipe
from test_resume import LIBRARIES

from kdpipe.chain import Chain, beside
from kdpipe.core.artifact import Order
from kdpipe.core.config import (
    ExportConfig,
    GraphConfig,
    PackageConfig,
    QadConfig,
    QuantizeConfig,
    Recipe,
    TeacherPlan,
    suited,
    validated,
)
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Checkpoint, Graph, Model, Tuned
from kdpipe.data.dataset import Dataset
from kdpipe.devices import find_device
from kdpipe.distill.cache import config_for
from kdpipe.distill.train import answers
from kdpipe.export.lint import tensorrt_lint
from kdpipe.networks import models
from kdpipe.quantize import VARIANTS, guard, stage, training
from kdpipe.quantize.search import mix_name
from kdpipe.quantize.trained import check_held
from kdpipe.quantize.training import quantized_tensors, tune
from kdpipe.quantize.work import Retrained, Training

pytestmark = pytest.mark.lab
TARGETS = ("onnxruntime", "openvino", "tflite", "tensorrt")
QAD = {"steps": 8, "batch_size": 32, "workers": 0}
SETTINGS = {"variant": "int8-qad", "calibrate": {"images": 32}, "check_images": 32, "reduce_range": False}


def config(**values: Any) -> QuantizeConfig:
    return suited(validated(QuantizeConfig, {**SETTINGS, "qad": QAD, **values}, "test"), "x86_64", {})


@dataclasses.dataclass
class Written:
    """What int8-qad made of the small student, and the float32 models it began as."""

    chain: Chain
    made: Made  # its models are the float32 ones and these

    def of(self, target: str) -> Model:
        return self.made.models[f"{target}-int8-qad"]

    def tuned(self, symmetric: bool = False, levels: int = 127, quantized: bool = True) -> Tuned:
        """What was trained, or its control."""
        wanted = {
            "quantized": quantized,
            "symmetric": symmetric,
            "weight_levels": levels,
            "learn_from": "student",
            **QAD,
        }
        wanted.pop("workers")
        [found] = [
            each
            for each in beside(self.of("onnxruntime"), Tuned, None).values()
            if each.settings.items() >= wanted.items() and each.student.key == self.made.student.key
        ]
        return found

    def graph(self, tuned: Tuned) -> Graph:
        graphs = beside(self.of("onnxruntime"), Graph, None).values()
        return next(each for each in graphs if each.manifest.inputs["student"].key == tuned.key)


@pytest.fixture(scope="module")
def written(small: tuple[Recipe, Path], trained: Trained) -> Written:
    recipe, folder = small
    chain, dataset, probe = Chain(folder), trained.dataset, find_device("local").probe()
    found: dict[str, Model] = {}
    for target in TARGETS:
        whole = chain.export(ExportConfig.of(recipe.export, target=target), trained.student, dataset)
        found[f"{target}-float32"] = whole
        found[f"{target}-int8-qad"] = chain.quantize(config(), whole, dataset, probe)
    graph = chain.graph(GraphConfig.of(recipe.export), trained.student, dataset)
    made = Made(**vars(trained), chain=chain, graph=graph, models=found, bundles={}, measurement=None, report=None)  # type: ignore[arg-type]
    return Written(chain, made)


# ---- integers and scales -----------------------------------------------------------------------------------


def onnx_integers(path: Path) -> dict[str, np.ndarray]:
    """Integers of weights [channels, rest] in a Q/DQ file, by the name of the weight."""
    import onnx
    from onnx import numpy_helper

    tensors = {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
    return {
        name.removesuffix("_quantized").removeprefix("network."): each.reshape(len(each), -1)
        for name, each in tensors.items()
        if each.dtype == np.int8 and each.ndim > 1
    }


def openvino_integers(path: Path) -> list[np.ndarray]:
    import openvino

    constants = (node for node in openvino.Core().read_model(path).get_ops() if node.get_type_name() == "Constant")
    found = [node.get_data() for node in constants if node.get_element_type() == openvino.Type.i8]
    return [each.reshape(len(each), -1) for each in found if each.ndim > 1]


def tflite_integers(path: Path) -> list[np.ndarray]:
    """The channels first, as torch has them."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path))
    made = {at for operation in interpreter._get_ops_details() for at in operation["outputs"]}
    found = []
    for each in interpreter.get_tensor_details():
        if each["dtype"] == np.int8 and each["index"] not in made and len(each["shape"]) in (2, 4):
            if (each["quantization_parameters"]["scales"] == 0).all() or not len(
                each["quantization_parameters"]["scales"]
            ):
                continue
            with contextlib.suppress(ValueError):  # the input holds nothing
                values = interpreter.get_tensor(each["index"])
                found.append(np.moveaxis(values, -1, 1).reshape(len(values), -1) if values.ndim == 4 else values)
    return found


def expected_integers(tuned: Tuned, levels: int = 127) -> dict[str, np.ndarray]:
    """By a formula of the test's own, of the sealed weights."""
    network, _ = models.restore(tuned)
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            rows = module.weight.detach().double().numpy().reshape(len(module.weight), -1)
            found[f"{name}.weight"] = np.round(rows / (np.abs(rows).max(1, keepdims=True) / levels)).astype(np.int8)
    return found


def all_found(wanted: Mapping[str, np.ndarray], others: list[np.ndarray]) -> list[str]:
    """Which weights have no tensor with exactly their integers."""
    return [name for name, each in wanted.items() if not any(np.array_equal(each, other) for other in others)]


def test_all_files_have_the_same_integers(written: Written) -> None:
    wanted = expected_integers(written.tuned())
    assert len(wanted) == 16 and sum(each.size for each in wanted.values()) > 300_000
    of_onnx = onnx_integers(written.of("onnxruntime").entry)
    assert of_onnx.keys() == wanted.keys()
    assert sum(int((of_onnx[name] != wanted[name]).sum()) for name in wanted) == 0
    assert all_found(wanted, openvino_integers(written.of("openvino").entry)) == []
    assert all_found(wanted, tflite_integers(written.of("tflite").entry)) == []
    symmetric = expected_integers(written.tuned(symmetric=True))
    of_tensorrt = onnx_integers(written.of("tensorrt").entry)
    assert sum(int((of_tensorrt[name] != symmetric[name]).sum()) for name in symmetric) == 0
    assert all_found(wanted, list(of_tensorrt.values())), "from a training of its own"


def grids_of_onnx(path: Path) -> set[tuple[float, int]]:
    """Scale and zero point, unsigned, of what is between layers."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    found = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in tensors and node.input[0] != "image":
            zero = tensors[node.input[2]]
            found.add((float(tensors[node.input[1]]), int(zero) + (128 if zero.dtype == np.int8 else 0)))
    return found


def grids_of_tflite(path: Path) -> set[tuple[float, int]]:
    from kdpipe.quantize.tflite import TfliteActivations

    activations = TfliteActivations(path)
    tensors = [each for each in activations._tensors.values() if each["dtype"] == np.int8]
    return {(float(scale), int(zero) + 128) for scale, zero in (each["quantization"] for each in tensors)}


def among(grid: tuple[float, int], grids: set[tuple[float, int]]) -> bool:
    return any(grid[1] == zero and grid[0] == pytest.approx(scale, rel=1e-6) for scale, zero in grids)


def test_all_files_have_the_same_scales(written: Written) -> None:
    trained = {(each.scale, each.zero_point) for each in written.tuned().ranges}
    of_onnx = grids_of_onnx(written.of("onnxruntime").entry)
    assert len(of_onnx) > 20 and all(among(grid, trained) for grid in of_onnx)
    assert all(among(grid, of_onnx) for grid in trained)
    # The image is 0 to 255, and everything else of this file is a place.
    of_tflite = {grid for grid in grids_of_tflite(written.of("tflite").entry) if grid != (1.0, 0)}
    assert len(of_tflite) > 15 and all(among(grid, trained) for grid in of_tflite)
    symmetric = {(each.scale, each.zero_point) for each in written.tuned(symmetric=True).ranges}
    assert all(among(grid, symmetric) for grid in grids_of_onnx(written.of("tensorrt").entry))
    assert {zero for _, zero in symmetric} == {128}
    facts = written.of("onnxruntime").facts.trained
    on_grids = quantized_tensors(written.graph(written.tuned()).file("model.onnx"), written.of("onnxruntime").entry)
    assert facts.from_images == 0 < facts.placed == len(on_grids)


def test_openvino_opens_the_same_file(written: Written) -> None:
    """Its grids are ONNX Runtime's: ranges of FakeQuantize, as the converter writes them."""
    import openvino

    nodes = openvino.Core().read_model(written.of("openvino").entry).get_ops()
    found = set()
    for node in nodes:
        if node.get_type_name() == "FakeQuantize":
            low, high = (float(node.input_value(at).get_node().get_data().ravel()[0]) for at in (3, 4))
            found.add(((high - low) / 255, round(-low / ((high - low) / 255))))
    of_onnx = grids_of_onnx(written.of("onnxruntime").entry)
    assert found and all(
        any(zero == its and scale == pytest.approx(other, rel=1e-4) for other, its in of_onnx)
        for scale, zero in found
        if (scale, zero) != (1.0, 0)
    )


# ---- as any other variant ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "contract",
    [test_targets.test_raw_images_go_in, test_targets.test_every_variant_and_torch_agree_on_most_images],
    ids=lambda contract: contract.__name__,
)
def test_it_keeps_the_contract(written: Written, target: str, contract: Callable[..., None]) -> None:
    contract(written.made, target, "int8-qad")


@pytest.mark.parametrize("target", TARGETS)
def test_it_is_packed_and_told(written: Written, target: str) -> None:
    model = written.of(target)
    bundle = written.chain.package(PackageConfig(), model, written.made.dataset)
    facts = bundle.facts
    assert (facts.variant, facts.precision) == ("int8-qad", "int8")
    assert facts.size_bytes < 0.6 * written.made.models[f"{target}-float32"].size_bytes
    layers = [layer.name for layer in model.noise_by_layer]
    assert len(layers) == len(set(layers)) > 20 and any("layer2.0.conv2" in name for name in layers)
    for told in (facts.trained.own, facts.trained.untrained, facts.trained.float32_steps):
        assert told.against_float32.images == 32 and told.against_float32.signal_to_noise_db > 5
        assert told.accuracy.n == len(written.made.dataset.samples("val"))
    assert facts.trained.own.against_float32 == facts.against_float32
    others = facts.trained.untrained, facts.trained.float32_steps
    assert others[0] != others[1] != facts.trained.own, "three different files"
    assert facts.settings["trained"] == facts.trained.tuned[:12]


def test_tensorrt_would_take_it(written: Written) -> None:
    assert tensorrt_lint(written.of("tensorrt").entry) == []


def test_it_is_trained_once(written: Written) -> None:
    """For three targets; the symmetric one is of its own, the control is everybody's."""
    keys = {written.of(target).facts.trained.tuned for target in TARGETS}
    assert keys == {written.tuned().key, written.tuned(symmetric=True).key}


def test_layers_may_stay_float(written: Written, tmp_path: Path) -> None:
    whole = written.made.models["onnxruntime-float32"]
    model = written.chain.quantize(
        config(max_drop=12, guard_part="test"),
        whole,
        written.made.dataset,
        find_device("local").probe(),
        tmp_path / "q",
    )
    assert model.facts.guard.confirmed.answer != "fails" and model.facts.trained is not None


def test_what_float_layers_gain_is_not_the_trainings(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A guard that leaves layers in float at once: trained and controls are compared as if it had not."""

    def keeping(ranked, make, confirm, max_drop, limit, resume, can_show):  # type: ignore[no-untyped-def]
        make((), resume / mix_name(0))
        kept = ranked()[:3]
        mix = make(kept, resume / mix_name(3))
        return [mix], resume / mix_name(3), kept, confirm(resume / mix_name(3))

    monkeypatch.setattr(guard, "search", keeping)
    mixed = written.chain.quantize(
        config(max_drop=12, guard_part="test"),
        written.made.models["onnxruntime-float32"],
        written.made.dataset,
        find_device("local").probe(),
        tmp_path / "q",
    ).facts
    whole = written.of("onnxruntime").facts
    assert len(mixed.guard.kept_float) == 3
    assert mixed.against_float32 != whole.against_float32, "three layers are another file"
    for name in ("own", "untrained", "float32_steps"):
        assert getattr(mixed.trained, name).against_float32 == getattr(whole.trained, name).against_float32


def test_seven_bits_are_a_case_of_their_own(written: Written, tmp_path: Path) -> None:
    whole = written.made.models["onnxruntime-float32"]
    probe = find_device("local").probe()
    model = written.chain.quantize(config(reduce_range=True), whole, written.made.dataset, probe, tmp_path / "q")
    tuned = written.tuned(levels=64)
    wanted, found = expected_integers(tuned, 64), onnx_integers(model.entry)
    assert max(int(np.abs(each.astype(int)).max()) for each in found.values()) == 64
    assert sum(int((found[name] != wanted[name]).sum()) for name in wanted) == 0


# ---- where it gains, and where it must not be shipped ------------------------------------------------------


def test_it_gains_where_ranges_are_unequal(written: Written, tmp_path: Path) -> None:
    """The same network, channel by channel up to 8 times larger or smaller between two layers: float32 says the same,
    one grid for all channels loses the small ones. Measured at 400 steps of 64: 19.0 dB, 15.9 without training."""
    network, _ = models.restore(written.made.student)
    generator = torch.Generator().manual_seed(0)
    pairs = [("conv1.1", "conv1.3"), ("conv1.4", "conv1.6")]
    pairs += [(f"layer{at}.0.bn1", f"layer{at}.0.conv2") for at in (1, 2, 3, 4)]
    with torch.no_grad():
        for norm, after in ((network.get_submodule(one), network.get_submodule(two)) for one, two in pairs):
            factor = 2 ** ((torch.rand(len(norm.weight), generator=generator) * 2 - 1) * 3)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            after.weight.div_(factor[None, :, None, None])
    models.save_weights(network, tmp_path / "unequal.safetensors")
    chain, dataset = Chain(tmp_path / "artifacts"), written.made.dataset
    plan = validated(
        TeacherPlan,
        {"model": "test_resnet", "input": {"size": 32}, "checkpoint": tmp_path / "unequal.safetensors"},
        "test",
    )
    unequal = chain.teacher(plan, dataset, name="unequal")
    whole = chain.export(ExportConfig(target="onnxruntime"), unequal, dataset)
    long = {"steps": 200, "batch_size": 32, "workers": 0, "learning_rate": 2e-4, "range_learning_rate": 3e-3}
    found = chain.quantize(
        config(qad=long, allow_damage=True), whole, dataset, find_device("local").probe()
    ).facts.trained
    own, untrained = found.own.against_float32, found.untrained.against_float32
    assert own.signal_to_noise_db > untrained.signal_to_noise_db + 0.5
    assert own.signal_to_noise_db > found.float32_steps.against_float32.signal_to_noise_db + 0.5


def training_of(written: Written) -> Training:
    own, control = written.tuned(), written.tuned(quantized=False)
    return Training(Retrained(own, written.graph(own)), Retrained(control, written.graph(control)))


def quantize(written: Written, out: Path, training: Training | None, settings: QuantizeConfig | None = None) -> Model:
    model, dataset = written.made.models["onnxruntime-float32"], written.made.dataset
    order = Order("quantize", settings or config(), {"model": model, "data": dataset})
    return stage.quantize(order, model, dataset, out, lambda _: None, written.made.graph, None, training)


def test_what_is_worse_than_without_training_is_refused(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trained file with ranges of it torn, so that much of its accuracy is gone."""
    kind = VARIANTS["onnxruntime"]["int8-qad"]
    honest = kind.ranges.func  # type: ignore[attr-defined]

    def torn(self: Any) -> Mapping[str, Any]:
        found = dict(honest(self))
        return {
            name: (low * 40, high * 40) if name.startswith("relu") else (low, high)
            for name, (low, high) in found.items()
        }

    monkeypatch.setattr(kind, "ranges", property(torn))
    with pytest.raises(GateFailed, match=r"int8-qad of .* lost .* points of accuracy to the same without"):
        quantize(written, tmp_path / "q", training_of(written), config(check_images=4))  # too few to judge otherwise
    assert not (tmp_path / "q").exists()


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_scales_that_a_target_cannot_hold(written: Written) -> None:
    onnxruntime, tensorrt = (VARIANTS[target]["int8-qad"] for target in ("onnxruntime", "tensorrt"))
    with pytest.raises(UserError, match="has asymmetric ones, which this file cannot hold: wanted symmetric ranges"):
        check_held(tensorrt, config(), written.tuned())
    with pytest.raises(UserError, match="has symmetric ranges of activations, which this file cannot hold"):
        check_held(onnxruntime, config(), written.tuned(symmetric=True))
    with pytest.raises(UserError, match="weights up to 127, wanted 64"):
        check_held(onnxruntime, config(reduce_range=True), written.tuned())
    with pytest.raises(UserError, match="was trained in float32, as a control"):
        check_held(onnxruntime, config(), written.tuned(quantized=False))
    check_held(onnxruntime, config(activations="int8"), written.tuned(symmetric=True))  # as ARM has them


def test_training_of_another_student(written: Written, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"int8-qad trains the student of .*: wanted what it became, found nothing"):
        quantize(written, tmp_path / "q", None)
    own = written.tuned()
    inputs = {**own.manifest.inputs, "student": own.student.model_copy(update={"key": "f" * 64})}
    other = Tuned(own.path, own.manifest.model_copy(update={"inputs": inputs}))
    with pytest.raises(UserError, match="was trained of another student"):
        quantize(written, tmp_path / "q", Training(Retrained(other), Retrained(other)))


def test_an_onnx_file_has_no_student(written: Written, tmp_path: Path) -> None:
    file, data = written.made.graph.file("model.onnx"), written.made.dataset.path
    adopted = kdpipe("adopt", file, "--data", data, "--out", tmp_path / "adopted")
    assert adopted.returncode == 0, adopted.stderr
    done = kdpipe("quantize", adopted.stdout.split()[-1], "--data", data, "--variant", "int8-qad")
    assert_one_line(done, 2, "came as an ONNX file: wanted a model that was exported from a checkpoint")


# ---- a teacher ---------------------------------------------------------------------------------------------


def test_the_teacher_may_be_learned_from(written: Written, tmp_path: Path) -> None:
    whole, dataset = written.made.models["onnxruntime-float32"], written.made.dataset
    taught = config(qad={**QAD, "steps": 3, "learn_from": "teacher"}, allow_damage=True)
    model = written.chain.quantize(taught, whole, dataset, find_device("local").probe(), tmp_path / "q")
    [tuned] = beside(whole, Tuned, {model.facts.trained.tuned}).values()
    assert tuned.manifest.inputs["teacher"].key == written.made.teacher.key
    assert tuned.facts.training_images < len(dataset.samples("train")), "the images that the student learned from"


def test_a_cache_of_other_views_is_refused(written: Written, tmp_path: Path) -> None:
    student, dataset, teacher = written.made.student, written.made.dataset, written.made.teacher
    run = training.trained_as(student)
    assert run is not None
    run = run.model_copy(update={"cache_views": 1})
    asked = config_for(run, student.facts.input).model_copy(update={"view_seed": 5})
    cache = build_cache(asked, dataset, teacher, tmp_path / "cache")
    numbers = training.learned_images(tuning(learn_from="teacher"), student, dataset).numbers
    with pytest.raises(UserError, match=r"was made for another view_seed \(5, not 0\): build one for this run"):
        answers(teacher, run, student.facts.input, numbers, dataset, cache)


# ---- killed ------------------------------------------------------------------------------------------------


def tune_telling(config: QadConfig, student: Path, graph: Path, data: Path, out: Path, told: Connection) -> None:
    """In a process of its own: train, and say where it is; that changes nothing."""
    step = training._Learner._learn

    def telling(self: Any, view: Any) -> None:
        told.send("step")
        step(self, view)

    training._Learner._learn = telling  # type: ignore[method-assign]
    _tune(config, Checkpoint.open(student), Graph.open(graph), Dataset.open(data), out)


def _tune(config: QadConfig, student: Checkpoint, graph: Graph, dataset: Dataset, out: Path) -> Tuned:
    return tune(Order("tune", config, {"data": dataset, "student": student}), student, graph, dataset, out)


def tuning(**values: Any) -> QadConfig:
    usual = {"calibrate": {"images": 16}, "quantized": True, "symmetric": False, "weight_levels": 127}
    return validated(QadConfig, {**usual, **values}, "test")


def test_killed_training_ends_the_same(written: Written, tmp_path: Path) -> None:
    made, graph = written.made, written.made.graph
    values = {"steps": 15, "batch_size": 16, "workers": 0, "average": 0.9, "checkpoint_seconds": 0.0}
    settings = tuning(**values)
    whole = _tune(settings, made.student, graph, made.dataset, tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*LIBRARIES, "kdpipe.quantize.training"])
    out, moments = tmp_path / "killed", random.Random(0)
    for steps in (5, 8):  # before ranges freeze, and after
        told, telling = context.Pipe(duplex=False)
        places = (made.student.path, graph.path, made.dataset.path)
        process = context.Process(target=tune_telling, args=(settings, *places, out, telling))
        process.start()
        telling.close()
        for _ in range(steps):
            told.recv()
        time.sleep(moments.random() * 0.05)
        process.kill()
        process.join()
        assert not out.exists() and (tmp_path / "killed.part" / "resume" / "state.pt").is_file()
    again = _tune(settings, made.student, graph, made.dataset, out)
    for name in (Tuned.WEIGHTS, Tuned.RANGES, Tuned.HISTORY):
        assert again.file(name).read_bytes() == whole.file(name).read_bytes()
