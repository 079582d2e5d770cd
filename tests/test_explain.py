"""Where networks see what they say: class activation against autograd and closed forms, occlusion, the pages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SMALL_MASKS, Made, Trained, assert_one_line, kdpipe, rewrite_manifest
from PIL import Image
from torch import Tensor, nn

from kdpipe.core.config import Recipe, ReportConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Bundle
from kdpipe.deploy import explain as explaining
from kdpipe.networks.models import Normalise
from kdpipe.networks.onnx import OnnxNetwork
from kdpipe.pipeline import check_names
from kdpipe.report import compression, maps
from kdpipe.report.tables import bundles_of

SPEC = InputSpec(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3), crop_fraction=1.0, interpolation="bicubic")
CLASSES = 5


def network_of(name: str, **arguments: Any) -> nn.Module:
    """Random weights, none of them zero: some heads and scales begin so that nothing is said."""
    torch.manual_seed(0)
    import timm

    network: nn.Module = timm.create_model(name, num_classes=CLASSES, **arguments)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return network.eval()


def activation(network: nn.Module, images: list[np.ndarray], spec: InputSpec = SPEC) -> list[maps.Map]:
    return list(maps.activation_maps(network, spec, "classification")(images, None))


def some_images(count: int, sides: tuple[int, int] = (32, 32)) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, *sides, 3), dtype=np.uint8))


def by_autograd(network: nn.Module, name: str, image: np.ndarray, to_map: Any, spec: InputSpec = SPEC) -> np.ndarray:
    """Grad-CAM written out: the mean gradient of the largest logit by channel, times what the layer says."""
    kept: list[Tensor] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, __, output: kept.append(output))
    logits = Normalise(network, spec)(torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32)))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits.max(), kept[0])
    values, slopes = (to_map(each.detach().double().numpy()) for each in (kept[0], gradient))  # [C, h, w]
    return np.maximum(np.einsum("c,chw->hw", slopes.mean((1, 2)), values), 0)


FAMILIES = {
    "test_resnet": ("layer2", lambda found: found[0]),
    "resnet8": ("layer3", lambda found: found[0]),
    "test_convnext2": ("stages.1", lambda found: found[0]),
    "test_vit": ("blocks.4", lambda found: found[0, 1:].T.reshape(64, 2, 2)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_class_activation(name: str) -> None:
    """Of CNNs and of tokens, against the formula on a layer that is looked at in another way."""
    network = network_of(name, **({"img_size": 32} if "vit" in name else {}))
    images = some_images(3)
    layer, to_map = FAMILIES[name]
    wanted = [by_autograd(network, layer, image, to_map) for image in images]
    found = activation(network, images)
    assert all(each.how == "class activation" for each in found) and any(each.max() > 0 for each in wanted)
    for each, evidence in zip(found, wanted, strict=True):
        np.testing.assert_allclose(each.evidence, evidence, rtol=1e-4, atol=1e-6 * max(1.0, evidence.max()))


@pytest.mark.parametrize(
    ("name", "size", "grid"),
    [
        ("test_resnet", 128, (4, 4)),  # the last stage, where that is fine enough
        ("test_efficientnet", 64, (4, 4)),
        ("test_mambaout", 64, (4, 4)),  # channels last
        ("test_vit_relpos", 96, (6, 6)),  # no class token
        ("test_vit3", 96, (6, 6)),
    ],
)
def test_every_kind_of_layer(name: str, size: int, grid: tuple[int, int]) -> None:
    """What it says is what the network says, whatever was put between its layers."""
    network = network_of(name, **({"img_size": size} if "vit" in name else {}))
    spec, images = SPEC.model_copy(update={"size": size}), some_images(2, (size, size))
    with torch.no_grad():
        said = Normalise(network, spec)(torch.from_numpy(np.stack(images).transpose(0, 3, 1, 2).astype(np.float32)))
    found = activation(network, images, spec)
    assert {each.how for each in found} == {"class activation"}
    assert {each.evidence.shape for each in found} == {grid} and all(each.evidence.max() > 0 for each in found)
    assert [each.label for each in found] == said.argmax(1).tolist()
    assert [each.probability for each in found] == pytest.approx(said.softmax(1).max(1)[0].tolist(), rel=1e-4)


def test_of_another_class() -> None:
    """A closed form: behind pooling and a linear head the map is the class's weights times what the layer says."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True))
            self.head = nn.Linear(4, CLASSES)

        def forward(self, image: Tensor) -> Tensor:
            found: Tensor = self.head(self.layer(image).mean((2, 3)))
            return found

    torch.manual_seed(0)
    network, images = Pooled().requires_grad_(False), some_images(2)  # frozen, as own code may give it
    found = list(maps.activation_maps(network, SPEC, "classification")(images, [3, 1]))
    assert [each.label for each in found] == [3, 1]
    for each, image in zip(found, images, strict=True):
        pixels = torch.from_numpy(image.transpose(2, 0, 1)[None].astype(np.float32))
        normal = (pixels / 255 - torch.tensor(SPEC.mean).view(3, 1, 1)) / torch.tensor(SPEC.std).view(3, 1, 1)
        values = network.layer(normal)[0].detach().double().numpy()
        weights = network.head.weight[each.label].detach().double().numpy()
        wanted = np.maximum(np.einsum("c,chw->hw", weights, values), 0) / 32**2
        np.testing.assert_allclose(each.evidence, wanted, rtol=1e-4, atol=1e-9)


def test_without_a_layer_it_is_by_occlusion() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, CLASSES))
    [found] = activation(network, some_images(1))
    assert found.how == "occlusion" and found.evidence.shape == (8, 8)


def test_what_is_not_finite() -> None:
    network = network_of("resnet8")
    with torch.no_grad():
        network.fc.weight[:] = 1e38
    with pytest.raises(UserError, match="not finite"):
        activation(network, some_images(1))


def test_an_onnx_file(tmp_path: Path) -> None:
    """It has no gradients: the same map as of its network by occlusion."""
    network, path = network_of("resnet8"), tmp_path / "net.onnx"
    torch.onnx.export(network, (torch.zeros(1, 3, 32, 32),), path, dynamo=False, dynamic_axes={"input": {0: "n"}},
                      input_names=["input"])  # fmt: skip
    images = some_images(2)

    def ask(shown: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            pixels = torch.from_numpy(shown.transpose(0, 3, 1, 2).astype(np.float32))
            return np.asarray(Normalise(network, SPEC)(pixels).numpy())

    wanted = maps.occlusion_maps(ask, SPEC, "classification")(images, None)
    for each, other in zip(activation(OnnxNetwork(path, SPEC), images), wanted, strict=True):
        assert (each.how, each.label) == ("occlusion", other.label)
        np.testing.assert_allclose(each.evidence, other.evidence, atol=1e-3)


@pytest.mark.parametrize("scale", [1.0, 40.0])  # the larger one is sure beyond what a probability can tell
@pytest.mark.parametrize("sides", [(32, 32), (24, 40)])
def test_occlusion(sides: tuple[int, int], scale: float) -> None:
    """One whose log odds are the mean brightness of one place: what hides none of it changes nothing, by hand."""
    height, width = sides
    rows, columns = slice(0, height // 8), slice(width - width // 8, width)  # one cell of the map, upper right

    def ask(images: np.ndarray) -> np.ndarray:
        bright = images[:, rows, columns].mean((1, 2, 3)) / 255
        return np.stack([scale * bright + 3, np.full(len(images), 3.0)], 1)

    image = np.full((height, width, 3), 10, np.uint8)
    image[rows, columns] = 255
    spec = SPEC.model_copy(update={"size": sides, "mean": (0.2, 0.2, 0.2)})
    [found] = maps.occlusion_maps(ask, spec, "classification")([image], None)
    assert found.how == "occlusion" and found.label == 0
    assert found.probability == pytest.approx(1 / (1 + np.exp(-scale)))
    # Patches of two by two cells in steps of one: at the corner one patch hides it, and three hide its neighbours too.
    wanted = np.zeros((8, 8))
    wanted[0, 7] = scale * (1 - 0.2)
    wanted[0, 6] = wanted[0, 7] / 2  # two patches, of which one hides the place
    wanted[1, 7], wanted[1, 6] = wanted[0, 7] / 2, wanted[0, 7] / 4
    np.testing.assert_allclose(found.evidence, wanted, atol=1e-5 * scale)


def test_occlusion_of_probabilities() -> None:
    """A model whose outputs are probabilities already has the same map as its logits."""
    generator = np.random.default_rng(1)
    weights, images = generator.normal(0, 1e-3, (32 * 32 * 3, 3)), some_images(2)

    def logits(shown: np.ndarray) -> np.ndarray:
        return np.asarray(shown.reshape(len(shown), -1) @ weights)

    def probabilities(shown: np.ndarray) -> np.ndarray:
        shares = np.exp(logits(shown))
        return shares / shares.sum(1, keepdims=True)

    first, second = (
        list(maps.occlusion_maps(ask, SPEC, "classification")(images, None)) for ask in (logits, probabilities)
    )
    for one, other in zip(first, second, strict=True):
        assert (one.label, one.probability) == (other.label, pytest.approx(other.probability))
        np.testing.assert_allclose(one.evidence, other.evidence, atol=1e-5)


def test_drawn() -> None:
    """Colour where something speaks for the answer, grey where nothing does, and no fault where nothing does at all."""
    pixels = np.full((16, 24, 3), (200, 40, 40), np.uint8)
    evidence = np.zeros((2, 3))
    evidence[0, 0], evidence[1, 2] = 5, -7
    picture = maps.drawn(pixels, evidence).astype(int)
    assert picture.shape == pixels.shape
    spread = picture.max(2) - picture.min(2)
    assert spread[0, 0] > 40 and spread[-1, -1] <= spread[0, 0] / 4
    nothing = maps.drawn(pixels, -evidence.clip(0)).astype(int)
    assert np.ptp(nothing) == 0


# ---- the command -----------------------------------------------------------------------------------------


@pytest.fixture
def pictures(trained: Trained, tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for at, sample in enumerate(trained.dataset.balanced("test", 3, seed=0)):
        Image.open(sample.path).save(folder / f"{at}<b>.png")
    return folder


def test_checkpoints_and_a_bundle(packed: Bundle, trained: Trained, pictures: Path, workdir: Path) -> None:
    """They say what they say elsewhere; the student and its bundle agree, and a script gets the maps."""
    (pictures / "3.png").write_bytes(b"no image")
    done = kdpipe("explain", trained.teacher.path, trained.student.path, packed.path, pictures, "--json")
    assert_one_line(done, 2, "1 of 4 images cannot be read", "3.png")
    told = json.loads(done.stdout)
    assert [Path(each["image"]).name for each in told["unreadable"]] == ["3.png"]
    rows = {(each["network"], Path(each["image"]).name): each for each in told["explained"]}
    assert {name for name, _ in rows} == {"teacher", "student-kd-seed0", "bundle-onnxruntime-float32"} and len(
        rows
    ) == 9
    said = trained.student.tested[0][trained.dataset.positions("test", 3, seed=0)].argmax(1)
    for at, label in enumerate(said):
        student, bundle = (rows[name, f"{at}<b>.png"] for name in ("student-kd-seed0", "bundle-onnxruntime-float32"))
        assert student["label"] == bundle["label"] == trained.dataset.classes[label]
        assert student["probability"] == pytest.approx(bundle["probability"], abs=1e-3)
        assert (student["how"], bundle["how"]) == ("class activation", "occlusion")
        assert np.shape(student["map"]) == (4, 4) and np.shape(bundle["map"]) == (8, 8)
    page = (workdir / "explained.html").read_text()
    assert page.count("<img") == 3 * 4 and "0&lt;b&gt;.png" in page and "<b>.png" not in page
    assert "no gradients" in page and "asked on &#39;local&#39;" in page
    shutil.copytree(pictures, pictures / "more")  # the same names once more
    mine, same = shutil.copytree(trained.teacher.path, workdir / "my-teacher"), pictures / "0<b>.png"
    several = kdpipe("explain", mine, same, same, pictures / "more" / same.name)
    assert several.returncode == 0, several.stderr
    page = (workdir / "explained.html").read_text()
    assert "more/0&lt;b&gt;.png" in page and "Bundles were asked" not in page
    assert page.count("<img") == 2 * 2 and "rest on: my-teacher" in page
    again = kdpipe("explain", trained.student.path, pictures / "0<b>.png", "--class", "7", "--json")  # over its own
    assert again.returncode == 0, again.stderr
    assert [each["label"] for each in json.loads(again.stdout)["explained"]] == ["7"]


def test_mistakes(packed: Bundle, trained: Trained, pictures: Path, workdir: Path) -> None:
    """A line each, and nothing is written."""
    (workdir / "mine.html").write_text("mine")
    image, later = pictures / "0<b>.png", pictures.parent / "later"
    shutil.copytree(trained.student.path, later)
    rewrite_manifest(later, lambda value: value["facts"].update(task="detection"))
    for arguments, words in (
        ((image,), ("wanted CHECKPOINT|BUNDLE",)),
        ((packed.path,), ("nothing says images",)),
        ((trained.dataset.path, image), ("is a dataset", "wanted checkpoints and bundles")),
        ((packed.path, image, "--class", "seven"), ("seven", "known")),
        ((packed.path, image, "--out", "mine.html"), ("mine.html is there already",)),
        ((packed.path, image, "--out", pictures), ("is a folder",)),
        ((packed.path, "no.png"), ("no image at no.png",)),
        ((later, image), ("detection", "segmentation")),
    ):
        assert_one_line(kdpipe("explain", *arguments), 2, *words)
    assert (workdir / "mine.html").read_text() == "mine" and len(list(workdir.iterdir())) == 1


def test_masks_are_refused(masked: Made, pictures: Path, workdir: Path) -> None:
    """By the command, by the page and by a recipe, before anything is made."""
    done = kdpipe("explain", masked.student.path, pictures)
    assert_one_line(done, 2, "something of every pixel", "kdpipe predict --out")
    assert_one_line(kdpipe("report", masked.measurement.path, "--explain", "true"), 2, "something of every pixel")
    recipe = validated(Recipe, {**SMALL_MASKS, "report": {"explain": True}}, "test")
    with pytest.raises(UserError, match="something of every pixel"):
        check_names(recipe)


# ---- the report's page -----------------------------------------------------------------------------------


def test_on_the_page(made: Made, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A row for an image that changed: teacher, student, and the two bundles that say different things."""
    monkeypatch.setattr(compression, "FLIPS", 1)
    config = validated(ReportConfig, {"title": "small", "explain": True}, "test")
    checkpoints = {"teacher": made.teacher, "student-kd-seed0": made.student}
    report = made.chain.report(config, [made.measurement], checkpoints, tmp_path / "page")
    flips = report.numbers["flips"]
    assert flips
    page = (report.path / report.PAGE).read_text()
    assert "what the answers rest on" in page and "is left out" not in page
    for flip in flips:
        # Asked here, where it was measured: the same words.
        for name, said in ((flip["against"], flip["float32"]), (flip["bundle"], flip["variant"])):
            assert f"<small>{name}: {said}, " in page
    assert page.count("class activation, 4×4") >= 2 * len(flips)


def test_what_is_not_there_is_left_out(made: Made) -> None:
    """A bundle that was moved away costs its map, not the page."""
    numbers = {"position": 0, "bundle": "openvino-int8", "against": "openvino-float32", "image": "a.png", "label": "0"}
    row = {**numbers, "float32": "1", "variant": "2"}
    sources = compression.Sources(dataset=made.dataset)
    found = explaining.explain_flips([row], bundles_of(made.measurement), {"student": made.student}, sources)
    [strip] = found.flips
    assert [tile.caption.partition(":")[0] for tile in strip.tiles] == ["image", "student"]
    assert len(found.lines) == 2 and all("does not lie beside" in line for line in found.lines)


def test_unsaid_it_is_in_no_key() -> None:
    assert "explain" not in ReportConfig().model_dump(mode="json")
    assert ReportConfig(explain=True).model_dump(mode="json")["explain"] is True
