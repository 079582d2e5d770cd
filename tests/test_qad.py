"""Training for 8 bits: folding, grids and their gradients, places, what is refused. All of it in files: the lab."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Trained
from torch import nn
from torch.nn import functional

from kdpipe.chain import Chain
from kdpipe.core.artifact import Order
from kdpipe.core.config import (
    ExportConfig,
    GraphConfig,
    ModelSettings,
    QadConfig,
    QuantizeConfig,
    QuantizePlan,
    Recipe,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Graph, Tuned
from kdpipe.data.dataset import Dataset
from kdpipe.networks import models
from kdpipe.networks.drawn import draw_scales
from kdpipe.networks.narrow import narrow_as
from kdpipe.networks.weights import load_weights
from kdpipe.quantize.fake import (
    Quantized,
    Ranges,
    Shared,
    fold,
    matched,
    put_on_grids,
    signature,
    signatures,
    weight_scale,
)
from kdpipe.quantize.training import tune

SHORT = {"steps": 6, "workers": 0, "batch_size": 16}
ASYMMETRIC = {"quantized": True, "symmetric": False, "weight_levels": 127}


def images(count: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, 32, 32))).float()


def network(name: str = "test_resnet") -> nn.Module:
    """Of random weights, with statistics and scales that are not what they begin as."""
    torch.manual_seed(0)
    made, spec = models.create(ModelSettings(model=name, input={"size": 32}), 10)
    draw_scales(made, spec, np.random.default_rng(0).integers(0, 256, (16, 32, 32, 3)).astype(np.uint8))
    return models.Normalise(made, spec).eval()


# ---- folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "repvit_m0_9"])
def test_folding_changes_no_answer_and_no_name(name: str) -> None:
    whole = network(name)
    whole.network = models.deployed(whole.network)
    shown = images()
    with torch.no_grad():
        before, names = whole(shown), whole.state_dict().keys()
        fold(whole, shown, name)
        after = whole(shown)
    assert (after - before).abs().max() < 1e-3 * before.std()
    assert whole.state_dict().keys() == names
    for module in whole.modules():
        if isinstance(module, nn.BatchNorm2d):
            gain = module.weight / (module.running_var + module.eps).sqrt()
            assert (gain - 1).abs().max() < 1e-6 and not module.running_mean.any(), "all that is left is a bias"


class Small(nn.Module):
    """Two convolutions and a BatchNorm, put together wrongly in one way or another."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first = kind, nn.Conv2d(3, 8, 3, bias=kind == "bias")
        self.norm, self.second = nn.BatchNorm2d(8, affine=kind != "bare"), nn.Conv2d(8, 8, 3)
        self.norm.running_mean.uniform_()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        made = self.first(image / 255)
        match self.kind:
            case "pooled":
                return self.second(self.norm(functional.avg_pool2d(made, 2)))
            case "passed":
                return self.second(self.norm(made) + made)
            case "twice":
                return self.second(self.norm(made)) + self.second(self.norm(self.first(image / 100)))
            case "never":
                return self.second(made)
        return self.second(self.norm(made))


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("pooled", "it follows no convolution"),
        ("passed", "others take what comes before it"),
        ("twice", "used more than once"),
        ("bare", "no bias of its own"),
        ("never", "it follows no convolution"),
    ],
)
def test_what_cannot_be_folded_is_told_in_one_line(kind: str, why: str) -> None:
    with pytest.raises(
        UserError, match=f"BatchNorm 'norm' of small cannot be folded .*{why}.*take variant int8"
    ) as told:
        fold(Small(kind).eval(), images(), "small")
    assert "\n" not in str(told.value)


def test_a_bias_before_it_is_folded_too() -> None:
    whole, shown = Small("bias").eval(), images()
    with torch.no_grad():
        before = whole(shown)
        fold(whole, shown, "small")
        torch.testing.assert_close(whole(shown), before, rtol=1e-4, atol=1e-5)
    assert not whole.first.bias.any() and not whole.first.bias.requires_grad


# ---- grids -------------------------------------------------------------------------------------------------


def test_every_writer_finds_the_same_integers_again() -> None:
    whole, shown = network(), images()
    fold(whole, shown, "test")
    assert put_on_grids(whole, shown, 127) == 16
    for weight in (each.weight for each in whole.modules() if isinstance(each, nn.Conv2d | nn.Linear)):
        rows = weight.detach().numpy().reshape(len(weight), -1)
        scale = np.abs(rows).max(1, keepdims=True) / np.float32(127)
        integers = rows / scale
        assert np.abs(integers - np.round(integers)).max() < 1e-4, "they lie on the grid"
        # A writer that folds the identity that is left of a BatchNorm may be off by the last bit.
        nudged = rows * np.float32(1 + 1e-7)
        again = np.round(nudged / (np.abs(nudged).max(1, keepdims=True) / 127))
        assert (again == np.round(integers)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_values_are_rounded_as_torch_rounds_them(symmetric: bool) -> None:
    ranges = Ranges([Shared((0,), -1.3, 2.0)], symmetric)
    values = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0)) * 2
    found = Quantized(ranges, 127).given(0, values)
    scale, zero = ranges.grid(0)
    assert zero == (128 if symmetric else 100) and scale == pytest.approx(2 / 127 if symmetric else 3.3 / 255)
    wanted = torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 255)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_a_bad_range_is_learned_away() -> None:
    """Twenty times too wide at one end, far too narrow at the other."""
    ranges = Ranges([Shared((0,), -40.0, 0.5), Shared((1,), -40.0, 0.5, known=True)], symmetric=False)
    quantized, optimizer = Quantized(ranges, 127), torch.optim.Adam(ranges.parameters(), 0.05)
    values = torch.randn(16, 500, generator=torch.Generator().manual_seed(0))

    def error(place: int) -> torch.Tensor:
        return (quantized.given(place, values) - values).square().mean()

    before = float(error(0)), float(error(1))
    for _ in range(200):
        optimizer.zero_grad()
        (error(0) + error(1)).backward()
        optimizer.step()
    assert float(error(0)) < before[0] / 100
    assert float(error(1)) == before[1], "what is known is not learned"


def test_frozen_ranges_are_those_of_a_grid() -> None:
    ranges = Ranges([Shared((3, 5), -1.0, 2.0), Shared((4,), 0.0, 6.0)], symmetric=False)
    with torch.no_grad():
        ranges.factors += 0.1234
    before = [ranges.grid(place) for place in (3, 4, 5)]
    ranges.freeze()
    assert [ranges.grid(place)[1] for place in (3, 4, 5)] == [zero for _, zero in before]
    for (scale, _), place in zip(before, (3, 4, 5), strict=True):
        assert ranges.grid(place)[0] == pytest.approx(scale, rel=1e-6)
        low, _ = ranges.of(place)
        assert float(low) / ranges.grid(place)[0] == pytest.approx(-ranges.grid(place)[1], abs=1e-4)
    assert ranges.grid(3) == ranges.grid(5) and ranges.grid(4)[1] == 0
    assert not ranges.factors.requires_grad


def test_the_scale_of_a_weight_is_its_channels_largest() -> None:
    weight = torch.randn(8, 4, 3, 3)
    torch.testing.assert_close(weight_scale(weight, 0, 127), weight.abs().amax((1, 2, 3)) / 127)
    torch.testing.assert_close(weight_scale(weight, 1, 64), weight.abs().amax((0, 2, 3)) / 64)
    assert weight_scale(torch.zeros(2, 2), 0, 127).min() > 0, "a dead channel divides nothing by zero"


@pytest.mark.parametrize(("name", "side"), [("mobilenetv3_small_050", 32), ("repvit_m0_9", 32)])
def test_a_pruned_student_is_built_again_as_it_is_deployed(name: str, side: int, tmp_path: Path) -> None:
    """With its branches merged, so that its weights have other names than those of the student's checkpoint."""
    from test_pruning import CLASSES, pruned, whole

    student, spec = whole(name, side)
    pruned(student, name, spec, keep=0.7)
    deployed, shown = models.deployed(student).eval(), images()
    models.save_weights(deployed, tmp_path / "model.safetensors")
    again = models.deployed(whole(name, side)[0])
    narrow_as(again, tmp_path / "model.safetensors", spec, CLASSES)
    load_weights(again, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(again.eval()(shown / 255), deployed(shown / 255))
        fold(deployed, shown / 255, name)


# ---- places ------------------------------------------------------------------------------------------------


def test_a_tensor_is_known_by_what_it_holds() -> None:
    values = np.random.default_rng(0).normal(size=(2, 1, 8, 6, 6)).astype(np.float32)
    places = {7: [signature(each) for each in values], 9: [signature(np.maximum(each, 0)) for each in values]}
    tensors = {
        "moved": [signature(each.transpose(0, 2, 3, 1) * np.float32(1 + 1e-5)) for each in values],
        "flat": [signature(np.maximum(each, 0).reshape(1, -1)) for each in values],
        "other": [signature(each**2) for each in values],
        "shorter": [signature(each[:, :4]) for each in values],
    }
    assert matched(places, tensors) == {"moved": 7, "flat": 9}


def test_attention_is_seen_in_its_parts() -> None:
    """A file has its two products and the softmax between them; torch has one call, which says the same."""
    whole, shown = network("test_vit"), images()
    with torch.no_grad():
        before = whole(shown)
        after = Quantized(Ranges([], symmetric=False), 2**20).run(whole, shown)
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    held = signatures(whole, shown.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    sums_to_one = [place for place, each in held.items() if each[0][1] >= 0 and each[0][-1] <= 1]
    assert sums_to_one, "the softmax is a place"


# ---- settings ----------------------------------------------------------------------------------------------


def test_no_key_of_another_variant_changes() -> None:
    said = {"qad": {"steps": 5}}
    assert "qad" not in QuantizeConfig().model_dump()
    assert QuantizeConfig(variant="int8", **said).model_dump() == QuantizeConfig(variant="int8").model_dump()
    assert "qad" not in QuantizeConfig(variant="int8-qad").model_dump()
    assert QuantizeConfig(variant="int8-qad", **said).model_dump()["qad"]["steps"] == 5
    assert QuantizePlan(variants=("int8-qad",), **said).model_dump()["qad"]["steps"] == 5
    often = {"qad": {"checkpoint_seconds": 1, "workers": 0}}  # which change nothing
    assert "qad" not in QuantizeConfig(variant="int8-qad", **often).model_dump()


# ---- training ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def graph(small: tuple[Recipe, Path], trained: Trained) -> Graph:
    recipe, folder = small
    config = GraphConfig.of(ExportConfig.of(recipe.export, target="onnxruntime"))
    return Chain(folder).graph(config, trained.student, trained.dataset)


def tuned(trained: Trained, graph: Graph, out: Path, dataset: Dataset | None = None, **settings: object) -> Tuned:
    values = {**SHORT, **ASYMMETRIC, "calibrate": {"images": 16}, **settings}
    order = Order("tune", validated(QadConfig, values, "test"), {"data": trained.dataset, "student": trained.student})
    return tune(order, trained.student, graph, dataset or trained.dataset, out)


def test_training_learns_weights_and_ranges(trained: Trained, graph: Graph, tmp_path: Path) -> None:
    found = tuned(trained, graph, tmp_path / "tuned", average=0.9, label_weight=0.1)
    facts = found.facts
    assert (facts.steps, facts.weights, facts.unplaced) == (6, 16, 0)
    assert facts.places == len(found.ranges) > 20
    restored, spec = models.restore(found)
    original, _ = models.restore(trained.student)
    shown = images()
    with torch.no_grad():
        said = models.Normalise(restored, spec).eval()(shown)
        wanted = models.Normalise(original, spec).eval()(shown)
    assert 0 < (said - wanted).abs().max() < wanted.std(), "still the same network, more or less"
    again = tuned(trained, graph, tmp_path / "again", average=0.9, label_weight=0.1)
    for name in (Tuned.WEIGHTS, Tuned.RANGES, Tuned.HISTORY):
        assert again.file(name).read_bytes() == found.file(name).read_bytes()


def test_its_control_has_no_grids(trained: Trained, graph: Graph, tmp_path: Path) -> None:
    found = tuned(trained, graph, tmp_path / "control", quantized=False)
    assert (found.facts.weights, found.facts.places, found.ranges) == (0, 0, [])


def test_a_loss_that_is_no_number_is_one_line(trained: Trained, graph: Graph, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the loss of int8-qad became (nan|inf) in step \d: lower quantize.qad.learn"):
        tuned(trained, graph, tmp_path / "tuned", learning_rate=1e30, quantized=False)  # grids bound all values
    assert not (tmp_path / "tuned").exists()


def test_no_images_are_one_line(trained: Trained, graph: Graph, tmp_path: Path) -> None:
    class Few(list):  # type: ignore[type-arg]
        labels: np.ndarray

    class One(Dataset):
        def samples(self, part):
            found = super().samples(part)
            if part != "train":
                return found
            few = Few(found[:1])
            few.labels = found.labels[:1]
            return few

    one = One(trained.dataset.path, trained.dataset.manifest)
    with pytest.raises(UserError, match="int8-qad wants images to learn from"):
        tuned(trained, graph, tmp_path / "tuned", one)
