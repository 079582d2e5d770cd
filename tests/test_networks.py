"""Networks with what converters stumble over: merged branches, absent biases, odd resizing, deep damage."""

from __future__ import annotations

import copy
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import Made, Told, assert_one_line, kdpipe, listening, quantize
from test_quantize import config
from timm.models import register_model
from timm.models.csatv2 import SpatialTransformerBlock
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d, interpolate, scaled_dot_product_attention

from kdpipe.chain import Chain
from kdpipe.core.config import ExportConfig, InputSettings, ParitySettings, QuantizePlan, TeacherPlan, validated
from kdpipe.core.errors import GateFailed, UserError
from kdpipe.core.kinds import Checkpoint, Model
from kdpipe.devices import find_device
from kdpipe.export.parity import Parity, check, compare, float32_error, torch_outputs
from kdpipe.export.rewrites import FOR_TFLITE, AsTorchComputes, for_tflite
from kdpipe.networks import models
from kdpipe.quantize import VARIANTS
from kdpipe.quantize.layers import signal_to_noise_db
from kdpipe.quantize.qdq import OnnxActivations, write_qdq
from kdpipe.quantize.tflite import TfliteActivations
from kdpipe.runtime.task import TASKS


class Branches(nn.Module):
    """A convolution of 3x3 and one of 1x1, summed; one alone when it is deployed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Conv2d(width, width, 3, padding=1)
        self.narrow = nn.Conv2d(width, width, 1, bias=False)
        self.merged: nn.Conv2d | None = None

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        if self.merged is not None:
            return self.merged(image)
        return self.wide(image) + self.narrow(image)

    def reparameterize(self) -> None:
        merged = copy.deepcopy(self.wide)
        merged.weight.data[:, :, 1:2, 1:2] += self.narrow.weight.data
        del self.wide, self.narrow
        self.merged = merged


class Awkward(nn.Module):
    """Branches, a head without bias, nearest at a ratio that is not whole, a resized position embedding.

    And two heads that attend to the keys of one, as many tokens as it has dimensions.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.branches = Branches(8)
        self.position = nn.Parameter(torch.randn(1, 8, 5, 5))
        self.query = nn.Linear(8, 2 * 9, bias=False)
        self.key = nn.Linear(8, 9, bias=False)
        self.squeeze = nn.Linear(8 + 2 * 9, 12, bias=False)
        self.head = nn.Linear(12, classes, bias=False)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = self.stem(image)
        position = interpolate(self.position, found.shape[-2:], mode="bicubic", antialias=True)
        found = self.branches(found + position).relu()
        found = found + adaptive_avg_pool2d(found, 3).mean((2, 3), keepdim=True)  # windows overlap
        gate = avg_pool2d(found, 3, 2)  # 8 to 3 pixels, and back
        found = found * interpolate(gate, found.shape[-2:], mode="nearest").sigmoid()
        tokens = gate.flatten(2).transpose(1, 2)  # 9 of them
        query = self.query(tokens).view(-1, 9, 2, 9).transpose(1, 2)
        key = 3 * self.key(tokens).unsqueeze(1)
        attended = scaled_dot_product_attention(query, key, key).transpose(1, 2).flatten(2)
        return self.head(self.squeeze(torch.cat((found.mean((2, 3)), attended[:, 0]), 1)).relu())


class Stream(nn.Module):
    """LayerNorm in the branches, and sums that it does not bound: one channel is far larger than the others.

    A token joins the others late and is small beside them.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.position = nn.Parameter(torch.eye(16)[3].mul(300).view(1, 1, 16))
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(4))
        self.wide = nn.ModuleList(nn.Linear(16, 32) for _ in range(4))
        self.narrow = nn.ModuleList(nn.Linear(32, 16) for _ in range(4))
        self.head = nn.Linear(16, classes)
        nn.init.normal_(self.head.weight)
        with torch.no_grad():
            self.head.weight[:, 3] = 0
            for norm in self.norms:
                norm.weight.fill_(20)[3] = 0.05

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        found = 3 * self.stem(image).flatten(2).transpose(1, 2) + self.position
        found = torch.cat((0.01 * found.mean(1, keepdim=True), found), 1)
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=True):
            found = found + narrow(wide(norm(found)).relu())
        return self.head(found.mean(1))


class Counted(nn.Module):
    """What is easily written, and makes a constant of the number of images."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 8, stride=8), nn.Linear(16, classes)
        self.token = nn.Parameter(torch.ones(1, 16))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.stem(image).mean((2, 3)) + self.token.expand(len(image), -1))


@register_model
def counted(num_classes: int = 10, **_: Any) -> nn.Module:
    return Counted(num_classes)


@register_model
def stream(num_classes: int = 10, **_: Any) -> nn.Module:
    return Stream(num_classes)


@register_model
def awkward(num_classes: int = 10, **_: Any) -> nn.Module:
    return Awkward(num_classes)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return Chain(tmp_path_factory.mktemp("awkward") / "artifacts")


@pytest.fixture(scope="module")
def network(chain: Chain, made: Made, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    torch.manual_seed(0)
    weights = tmp_path_factory.mktemp("weights") / "awkward.safetensors"
    models.save_weights(Awkward(10), weights)
    plan = TeacherPlan(model="awkward", checkpoint=weights, input=InputSettings(size=32))
    return chain.teacher(plan, made.dataset)


@pytest.fixture(scope="module")
def tflite(chain: Chain, network: Checkpoint, made: Made) -> Model:
    return chain.export(ExportConfig(target="tflite"), network, made.dataset)


# ---- the form that is deployed -------------------------------------------------------------------------------


def test_branches_are_merged_before_export(chain: Chain, network: Checkpoint, made: Made, tflite: Model) -> None:
    onnx = chain.export(ExportConfig(target="onnxruntime"), network, made.dataset)
    assert onnx.facts.nodes_by_kind["Conv"] == 2  # the stem's and the merged one
    assert onnx.facts.nodes_by_kind.get("GatherND", 0) == 0  # of overlapping windows
    assert tflite.facts.nodes_by_kind["CONV_2D"] == 2
    for model in (onnx, tflite):  # against the network as it was trained
        assert model.facts.parity is not None and model.facts.parity.relative_difference < 1e-4


def test_a_wrong_merging_is_refused(
    chain: Chain, network: Checkpoint, made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest = Branches.reparameterize

    def forgetful(self: Branches) -> None:
        self.narrow.weight.data.zero_()
        honest(self)

    monkeypatch.setattr(Branches, "reparameterize", forgetful)
    with pytest.raises(GateFailed, match="differs from torch by"):
        Chain(tmp_path / "artifacts").export(ExportConfig(target="onnxruntime"), network, made.dataset)


class Cancelling(nn.Module):
    """What it says is a small difference of large numbers."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.offset = offset

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        small = image.flatten(1)[:, :10] / 255
        return (small + self.offset) - self.offset


def test_a_network_that_magnifies_rounding_is_held_to_its_own() -> None:
    """A file may be as far from torch as torch's float32 is from its double precision; within a limit."""
    images = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), np.uint8)
    paths, task = [Path("a.png")] * 16, TASKS["classification"]

    def checked(offset: float, share: float) -> Parity:
        """Of a file that is off by ``share`` of the outputs' spread."""
        network = Cancelling(offset)
        expected = torch_outputs(network, images, "it")
        actual = expected + np.float32(share * expected.std(axis=0).max())
        found = compare(task, expected, actual, paths)
        return check(found, ParitySettings(), "file", lambda: float32_error(network, images, expected))

    assert checked(0.0, 1e-5).float32_error is None, "it was in no question"
    assert checked(0.0, 9e-4).float32_error < 1e-6
    with pytest.raises(GateFailed, match="torch's own float32 is off by"):
        checked(0.0, 2e-3)
    listener = Told()
    with listening(listener):
        assert 1e-3 < checked(30_000.0, 3e-3).float32_error < 1e-2
    assert any("magnifies rounding" in line for line in listener.notes)
    with pytest.raises(GateFailed):
        checked(30_000.0, 3e-2)
    with pytest.raises(GateFailed):  # nothing could be told from a fault
        checked(1_000_000.0, 3e-2)


@pytest.mark.parametrize("name", ["repghostnet_050", "repvit_m0_9", "fastvit_t8", "test_byobnet"])
def test_what_is_deployed_computes_the_same(name: str) -> None:
    """And what is trained keeps its branches: distillation's features are those of the training form."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=10).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        before = network(image)
        small = models.deployed(network)
        torch.testing.assert_close(small(image), before, rtol=1e-3, atol=1e-4 * float(before.std()))
    convolutions = [sum(isinstance(each, nn.Conv2d) for each in form.modules()) for form in (network, small)]
    assert convolutions[0] >= convolutions[1]
    norms = [sum(isinstance(each, nn.BatchNorm2d) for each in form.modules()) for form in (network, small)]
    assert (norms[1] < norms[0]) == (name != "test_byobnet")


def test_attention_over_a_batch_of_one() -> None:
    """CSATv2's block, whose matrix products over the batch the converter fails on."""
    torch.manual_seed(0)
    block = SpatialTransformerBlock().eval()
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    image = torch.randn(1, 1, 7, 7)
    with torch.inference_mode():
        before = block(image)
        after = for_tflite(block)(image)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


# ---- resizing ------------------------------------------------------------------------------------------------

RESIZING: list[dict[str, Any]] = [
    {"size": (7, 9), "mode": "nearest"},
    {"size": 2, "mode": "nearest"},
    {"scale_factor": 2, "mode": "nearest"},
    {"scale_factor": 1.5, "mode": "nearest"},
    {"size": (3, 5), "mode": "nearest-exact"},
    {"size": (5, 9), "mode": "bilinear"},
    {"size": (5, 9), "mode": "bilinear", "align_corners": True},
    {"size": (9, 2), "mode": "bilinear", "antialias": True},
    {"size": (9, 2), "mode": "bicubic", "antialias": True},
    {"scale_factor": (0.7, 1.3), "mode": "bicubic", "recompute_scale_factor": True},
    {"size": (3, 3), "mode": "area"},
]


@pytest.mark.parametrize("settings", RESIZING, ids=str)
def test_resizing_another_way_is_the_same(settings: dict[str, Any]) -> None:
    image = torch.randn(2, 3, 3, 4)
    expected = interpolate(image, **settings)
    with AsTorchComputes(FOR_TFLITE):
        found = interpolate(image, **settings)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [3, (3, 2), (1, 3), 1, 8, (None, 3)])
def test_pooling_another_way_is_the_same(size: Any) -> None:
    image = torch.randn(2, 3, 8, 7)
    expected = adaptive_avg_pool2d(image, size)
    with AsTorchComputes(FOR_TFLITE):
        found = nn.AdaptiveAvgPool2d(size)(image)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_signal_convolved_another_way_is_the_same() -> None:
    signal = torch.randn(2, 4, 9)
    for width, settings in ((1, {}), (1, {"stride": 2}), (1, {"groups": 2}), (3, {"padding": "same"})):
        convolution = nn.Conv1d(4, 6, width, **settings)
        expected = convolution(signal)
        with AsTorchComputes(FOR_TFLITE):
            found = convolution(signal)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_resizing_to_the_same_size_vanishes() -> None:
    position = torch.randn(1, 8, 5, 5)
    with AsTorchComputes(FOR_TFLITE):
        assert interpolate(position, (5, 5), mode="bicubic", antialias=True) is position


@pytest.mark.parametrize("heads", [1, 3])
def test_one_head_of_keys_is_attended_to(heads: int) -> None:
    query, key, value = torch.randn(2, 3, 5, 4), torch.randn(2, heads, 7, 4), torch.randn(2, heads, 7, 6)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3)
    with AsTorchComputes(FOR_TFLITE):
        found = scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(found, expected)


def test_constants_are_folded(tflite: Model) -> None:
    """The position embedding lies in the file as it is added: no matrix product is left of its resizing."""
    from ai_edge_litert.interpreter import Interpreter

    operations = Interpreter(str(tflite.entry))._get_ops_details()
    made = {at for operation in operations for at in operation["outputs"]} | {0}
    assert all(made & set(operation["inputs"].tolist()) for operation in operations), "one of constants alone is left"
    assert tflite.facts.parity is not None and tflite.facts.parity.relative_difference < 1e-4


# ---- absent biases -------------------------------------------------------------------------------------------


def test_an_absent_bias(made: Made, tflite: Model, tmp_path: Path) -> None:
    layers = TfliteActivations(tflite.entry).layers
    biased = Counter((layer.kind, layer.bias is not None) for layer in layers)
    assert biased["FULLY_CONNECTED", False] >= 2 and biased["CONV_2D", True] == 2
    model = quantize(config(allow_damage=True), tflite, made.dataset, tmp_path / "q")
    assert model.facts.against_float32 is not None and model.facts.against_float32.signal_to_noise_db > 10


# ---- residual sums -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_sums_that_nothing_bounds_stay_float(chain: Chain, made: Made, tmp_path: Path, target: str) -> None:
    import onnx

    torch.manual_seed(0)
    models.save_weights(Stream(10), tmp_path / "stream.safetensors")
    plan = TeacherPlan(model="stream", checkpoint=tmp_path / "stream.safetensors", input=InputSettings(size=32))
    whole = chain.export(ExportConfig(target=target), chain.teacher(plan, made.dataset), made.dataset)
    small = quantize(config(allow_damage=True), whole, made.dataset, tmp_path / "q")
    graph = onnx.load(small.entry).graph
    makers = {output: node.op_type for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 9 and all(makers[node.input[0]] == "DequantizeLinear" for node in products)
    sums = [node for node in graph.node if node.op_type in ("Add", "LayerNormalization")]
    joined = [node for node in graph.node if node.op_type == "Concat" and "cat" in node.output]
    assert sums and len(joined) == 1
    assert not any(makers.get(name) == "DequantizeLinear" for node in sums for name in node.input[:1])
    assert not any(makers.get(name) == "DequantizeLinear" for name in joined[0].input)
    assert small.facts.against_float32 is not None and small.facts.against_float32.signal_to_noise_db > 12


def test_sums_stay_float_in_tflite(chain: Chain, made: Made, tmp_path: Path) -> None:
    torch.manual_seed(0)
    models.save_weights(Stream(10), tmp_path / "stream.safetensors")
    plan = TeacherPlan(model="stream", checkpoint=tmp_path / "stream.safetensors", input=InputSettings(size=32))
    whole = chain.export(ExportConfig(target="tflite"), chain.teacher(plan, made.dataset), made.dataset)
    small = quantize(config(allow_damage=True), whole, made.dataset, tmp_path / "q")
    before, after = (Counter(layer.kind for layer in TfliteActivations(model.entry).layers) for model in (whole, small))
    assert before == after
    assert small.facts.against_float32 is not None and small.facts.against_float32.signal_to_noise_db > 12
    assert small.size_bytes < whole.size_bytes


# ---- batches -------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """What it says of an image depends on the mean of the batch, as batch attention by mistake does."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        colours = image.mean((2, 3))
        return self.head(colours - colours.mean(0))


def test_outputs_that_depend_on_the_batch_are_refused() -> None:
    images = np.random.default_rng(0).integers(0, 255, (8, 4, 4, 3), np.uint8)
    with pytest.raises(UserError, match="depends on the other images of the batch"):
        torch_outputs(Mixing(10), images, "mixing")
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 10))
    assert torch_outputs(network, images, "plain").shape == (8, 10)
    network[1].weight.data.fill_(np.nan)
    with pytest.raises(UserError, match="not finite"):
        torch_outputs(network, images, "broken")


def test_a_network_that_fixes_the_number_of_images_is_refused(chain: Chain, made: Made, tmp_path: Path) -> None:
    models.save_weights(Counted(10), tmp_path / "counted.safetensors")
    plan = TeacherPlan(model="counted", checkpoint=tmp_path / "counted.safetensors", input=InputSettings(size=32))
    with pytest.raises(UserError, match=r"counted cannot be exported to ONNX: its forward makes .*image\.shape\[0\]"):
        chain.export(ExportConfig(target="onnxruntime"), chain.teacher(plan, made.dataset), made.dataset)


# ---- damage --------------------------------------------------------------------------------------------------


def torn(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Every range of ONNX Runtime's INT8 so much too wide: honest arithmetic with hardly any steps."""
    honest: Callable[..., Any] = VARIANTS["onnxruntime"]["int8"].ranges.func  # type: ignore[attr-defined]

    def wide(self: Any) -> dict[str, tuple[float, float]]:
        return {name: (factor * low, factor * high) for name, (low, high) in honest(self).items()}

    monkeypatch.setattr(VARIANTS["onnxruntime"]["int8"], "ranges", property(wide))


def test_what_came_out_useless_is_refused(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn(monkeypatch, 100)
    arguments = ("quantize", made.models["onnxruntime-float32"].path, "--out", tmp_path / "q", "--calibrate.images", 16)
    done = kdpipe(*arguments)
    assert_one_line(done, 1, "agrees with float32 on", "wanted 50%", "--allow-damage")
    assert not list(tmp_path.iterdir())
    few = kdpipe(*arguments, "--check-images", 4)  # which judge nobody
    assert few.returncode == 0, few.stderr
    shutil.rmtree(tmp_path / "q")
    done = kdpipe(*arguments, "--allow-damage", "true")
    assert done.returncode == 0, done.stderr
    found = Model.open(tmp_path / "q").facts.against_float32
    assert found is not None and found.agreement < 0.5


def test_a_run_goes_without_what_nobody_named(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torn(monkeypatch, 100)
    chain, model, device = Chain(tmp_path), made.models["onnxruntime-float32"], find_device("local").probe()
    auto = validated(QuantizePlan, {"calibrate": {"images": 16}}, "test")
    assert "int8" not in [each.facts.variant for each in chain.variants(auto, model, made.dataset, device)]
    named = auto.model_copy(update={"variants": ("int8",)})
    with pytest.raises(GateFailed, match="agrees with float32 on"):
        chain.variants(named, model, made.dataset, device)


def test_one_definition_of_noise() -> None:
    """What all classes share is no noise; noise is relative to each image's own signal."""
    outputs = np.random.default_rng(0).normal(size=(64, 10))
    noise = 0.1 * np.random.default_rng(1).normal(size=outputs.shape)
    found = signal_to_noise_db(outputs, noise)
    assert found == pytest.approx(20, abs=0.7)
    assert signal_to_noise_db(outputs, noise + 5) == pytest.approx(found, abs=0.01)
    loud = np.arange(1.0, 65)[:, None]
    assert signal_to_noise_db(loud * outputs, loud * noise) == pytest.approx(found, abs=0.01)


def test_a_manifest_has_one_figure(made: Made) -> None:
    """Both of its decibels are of the same thing: they differ by the images alone."""
    for name in ("onnxruntime-int8", "tensorrt-int8", "tflite-int8"):
        facts = made.models[name].facts
        corrected = facts.settings["bias_correction"]
        last = corrected["before_db"] if corrected["layers"] == 0 else corrected["after_db"]
        assert facts.against_float32 is not None
        assert facts.against_float32.signal_to_noise_db == pytest.approx(last, abs=2.5)


def test_a_bias_that_nodes_share_is_each_ones_own(tmp_path: Path) -> None:
    """The library's copy of ``val_1`` is ``val_10``, and torch's exporter gives such names to outputs of nodes."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = np.random.default_rng(0)
    bias = generator.normal(size=3).astype(np.float32)
    weights = {"scale": np.ones(3, np.float32), "val_1": bias}
    norms = [("image", "val_10"), ("val_10", "val_11"), ("val_11", "logits")]
    graph = helper.make_graph(
        [
            helper.make_node("InstanceNormalization", [at, "scale", "val_1"], [to], name=f"norm-{to}")
            for at, to in norms
        ],
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 3, 8, 8])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    source, out = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), source)
    image = generator.uniform(0, 255, (1, 3, 8, 8)).astype(np.float32)
    before = OnnxActivations(source)(image)
    ranges = {name: (float(value.min()), float(value.max())) for name, value in before.items() if name != "image"}
    write_qdq(source, ranges, {}, out, "uint8", (), False, {})
    after = OnnxActivations(out)(image)["logits"]
    assert signal_to_noise_db(before["logits"], after - before["logits"]) > 20
