"""Decoders over encoders of timm: what they give on the way, whose weights they begin with, and mistakes about them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import Trained, assert_one_line, kdpipe, rewrite_manifest, train
from safetensors.torch import load_file, save_file
from torch import nn

from kdpipe.chain import Chain, train_order
from kdpipe.core.artifact import find_ancestors
from kdpipe.core.code import allowing
from kdpipe.core.config import (
    DataPlan,
    ExportConfig,
    ExportPlan,
    GraphConfig,
    InputSettings,
    ModelSettings,
    TeacherPlan,
    TrainConfig,
    read_recipe,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.networks import models
from kdpipe.networks.names import DECODERS, check_network
from kdpipe.networks.segmenters import BLOCKS, Segmenter
from kdpipe.networks.weights import load_encoder
from kdpipe.report.tables import teacher_names
from kdpipe.runtime.task import Segmentation

SIDES = (64, 96)  # which every stride divides
STRIDES = dict.fromkeys(DECODERS, 4) | dict.fromkeys(("unet", "unetplusplus", "manet", "linknet"), 1)
STRIDES |= {"deeplabv3": 8, "pspnet": 8}
# One of each way in which timm makes features: a list, the network itself, four stages, channels last.
ENCODERS = ("test_resnet", "test_efficientnet", "test_convnext", "test_byobnet", "test_nfnet")


def settings(model: str, encoder: str | None = "test_resnet", sides: tuple[int, int] = SIDES, **more) -> ModelSettings:
    return ModelSettings(model=model, encoder=encoder, input=InputSettings(size=sides), **more)


def segmenter(model: str, encoder: str = "test_resnet", sides: tuple[int, int] = SIDES, **more) -> Segmenter:
    network, _ = models.create(settings(model, encoder, sides, **more), 5)
    assert isinstance(network, Segmenter)
    return network.eval()


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    plan = DataPlan(task="segmentation", source="masks", most_images=12)
    return Chain(tmp_path_factory.mktemp("masks")).data(plan)


# ---- features on the way -----------------------------------------------------------------------------------------


def test_every_decoder_of_ours_is_known_in_both_places() -> None:
    assert BLOCKS.keys() == DECODERS.keys()


@pytest.mark.parametrize("model", DECODERS)
def test_a_decoder_gives_logits_at_its_stride_and_its_features(model: str) -> None:
    sides = (128, 192) if model == "pan" else SIDES  # which pools three times behind its encoder
    network, image = segmenter(model, sides=sides), torch.randn(2, 3, *sides)
    with torch.inference_mode():
        logits, final = network(image), network.forward_features(image)
        given, maps = network.forward_intermediates(image)
        alone = network.forward_intermediates(image, [0, -1], stop_early=True, intermediates_only=True)
        decided = network.forward_head(final)
    assert logits.shape == (2, 5, *(side // STRIDES[model] for side in sides))
    torch.testing.assert_close(decided, logits, rtol=0, atol=0)
    torch.testing.assert_close(given, final, rtol=0, atol=0)
    assert len(maps) == len(network.feature_info) >= 4
    for info, features in zip(network.feature_info, maps, strict=True):
        assert info["module"] in dict(network.named_modules())
        assert features.shape[:2] == (2, info["num_chs"])
        assert info["reduction"] == round(sides[1] / features.shape[3])
    encoder = [info["reduction"] for info in network.feature_info if info["module"].startswith("encoder.")]
    assert encoder == sorted(encoder) and encoder[0] == 2
    assert not any(info["module"].startswith("encoder.") for info in network.feature_info[len(encoder) :])
    for one, among in zip(alone, (maps[0], maps[-1]), strict=True):
        torch.testing.assert_close(one, among, rtol=0, atol=0)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_what_lies_behind_the_last_feature_is_not_run(encoder: str) -> None:
    """A stage that is trained alone moves the statistics of nothing above it."""
    network = segmenter("unet", encoder)
    image = torch.randn(2, 3, *SIDES)
    whole = network.forward_intermediates(image, intermediates_only=True)
    for at, info in enumerate(network.feature_info):
        ran: list[str] = []
        hooks = [
            module.register_forward_hook(lambda *_, name=name, ran=ran: ran.append(name))
            for name, module in network.named_modules()
            if isinstance(module, nn.Conv2d)
        ]
        final, [features] = network.forward_intermediates(image, [at], stop_early=True)
        for hook in hooks:
            hook.remove()
        assert final is features
        torch.testing.assert_close(features, whole[at], rtol=0, atol=0)
        if info["module"] != "encoder.model":
            later = [name for name in ran if name.startswith("decoder.")]
            assert not later or info["module"].startswith("decoder.")
            if at + 1 < len(network.feature_info):
                total = sum(isinstance(module, nn.Conv2d) for module in network.modules())
                assert len(ran) < total


def test_features_do_not_leave_hooks_behind() -> None:
    network = segmenter("fpn")
    network.forward_intermediates(torch.randn(1, 3, *SIDES), [0], stop_early=True)
    assert not any(module._forward_hooks for module in network.modules())


def test_weights_are_called_as_the_library_calls_them() -> None:
    import segmentation_models_pytorch as library

    theirs = library.FPN("tu-test_resnet", encoder_weights=None, classes=5)
    network = segmenter("fpn")
    assert network.state_dict().keys() == theirs.state_dict().keys()
    network.load_state_dict(theirs.state_dict())
    theirs.segmentation_head[1] = nn.Identity()  # which enlarges
    image = torch.randn(1, 3, *SIDES)
    with torch.inference_mode():
        torch.testing.assert_close(network(image), theirs.eval()(image), rtol=0, atol=0)


def test_an_input_is_the_whole_image_stretched() -> None:
    spec = models.input_spec(settings("unet", "mobilenetv4_conv_small"))
    assert (spec.sides, spec.crop_fraction, spec.resize) == (SIDES, 1.0, "stretch")
    base = timm.models.get_pretrained_cfg("mobilenetv4_conv_small")
    assert (spec.mean, spec.std) == (tuple(base.mean), tuple(base.std))


@pytest.mark.parametrize("output", ["logits", "logits-full", "classes"])
def test_outputs_are_enlarged_as_the_task_enlarges_them(output: str) -> None:
    network, spec = models.create(settings("fpn"), 5)
    image = torch.randint(0, 256, (2, 3, *SIDES)).float()
    with torch.inference_mode():
        logits = models.Normalise(network, spec).eval()(image).numpy()
        found = models.Normalise(network, spec, output).eval()(image).numpy()
    if output == "logits":
        assert np.array_equal(found, logits) and found.shape == (2, 5, 16, 24)
        return
    whole = Segmentation.enlarged(logits, SIDES)
    if output == "logits-full":
        np.testing.assert_allclose(found, whole, atol=1e-5 * logits.std())
    else:
        assert found.dtype == np.uint8
        assert (found == whole.argmax(1)).mean() > 0.999


# ---- a classifier's weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", [*ENCODERS, "mambaout_femto", "dla46_c"])
def test_every_tensor_of_an_encoder_is_found_in_the_classifier(encoder: str, tmp_path: Path) -> None:
    """timm's names differ between a network and what it makes of it for its features."""
    torch.manual_seed(1)
    classifier = timm.create_model(encoder, num_classes=7)
    state = {f"module.{name}": tensor for name, tensor in classifier.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    sides = (224, 224) if "window" in encoder else SIDES
    network, _ = models.create(settings("unet", encoder, sides, encoder_checkpoint=tmp_path / "weights.pth"), 5)
    image = torch.randn(1, 3, *sides)
    with torch.inference_mode():
        own = network.eval().encoder(image)[-1]
        theirs = classifier.eval().forward_intermediates(image, indices=1, intermediates_only=True)[-1]
    if own.shape == theirs.shape:
        torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    values = {tuple(tensor.flatten()[:4].tolist()) for tensor in classifier.state_dict().values() if tensor.numel() > 8}
    mine = network.encoder.model.state_dict()
    assert all(tuple(each.flatten()[:4].tolist()) in values for each in mine.values() if each.numel() > 8)


def test_a_distilled_classifier_becomes_the_encoder(trained: Trained, masks: Dataset, tmp_path: Path) -> None:
    """Its weights are where the segmenter begins, its colours are the segmenter's, its key is in the lineage."""
    config = TrainConfig(
        **settings("unet", sides=(32, 48)).model_dump(),
        encoder_checkpoint=trained.student.path,
        method="labels",
        train={"epochs": 1, "workers": 0, "learning_rate": 1e-9, "augment": {"crop": "none", "flip": 0}},
    )
    given = load_file(trained.student.file(Checkpoint.WEIGHTS))
    network, spec = models.create(config, len(masks.classes), "segmentation")
    for name, tensor in network.encoder.model.state_dict().items():
        assert torch.equal(tensor, given[name]), name
    assert (spec.mean, spec.std) == (trained.student.facts.input.mean, trained.student.facts.input.std)

    student = train(config, masks, None, tmp_path / "student")
    assert student.manifest.inputs["encoder"].key == trained.student.key
    assert trained.student.key in {each.key for each in find_ancestors(student.manifest.provenance(), Checkpoint)}
    assert student.facts.model == "unet-test_resnet" and student.facts.task == "segmentation"
    shown = {"encoder": trained.student, "student": student, "wise": trained.teacher}
    assert teacher_names(shown) == {"wise"}, "who gave an encoder taught nobody"
    assert "encoder_checkpoint" not in student.manifest.config  # no path of this machine
    again, _ = models.restore(student)
    moved = [
        (tensor - given[name]).abs().max()
        for name, tensor in again.encoder.model.state_dict().items()
        if name.endswith("conv1.weight")
    ]
    assert max(moved) < 1e-3

    from_scratch = config.model_copy(update={"encoder_checkpoint": None})
    other = train_order(from_scratch, masks, None)
    assert other.key != train_order(config, masks, None).key == student.key


def test_weights_as_a_file_are_known_by_their_hash(masks: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    config = TrainConfig(**settings("unet").model_dump(), encoder_checkpoint=path, method="labels")
    order = train_order(config, masks, None)
    assert "encoder" not in order.inputs and len(order.config.encoder_checkpoint_sha256) == 64
    pinned = config.model_copy(update={"encoder_checkpoint_sha256": "0" * 64})
    with pytest.raises(UserError, match=r"encoder_checkpoint: .* has sha256 .*, wanted 000"):
        train_order(pinned, masks, None)


def test_an_encoder_lacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    state = timm.create_model("test_resnet", num_classes=3).state_dict()
    save_file({name: tensor for name, tensor in state.items() if name != "layer2.0.conv1.weight"}, path)
    config = settings("unet", encoder_checkpoint=path)
    with pytest.raises(UserError, match=r"it lacks 1 of the \d+ tensors of that encoder, such as 'layer2.0.conv1"):
        models.create(config, 5)
    save_file(timm.create_model("test_efficientnet").state_dict(), path)
    with pytest.raises(UserError, match="is not of 'test_resnet'"):
        models.create(config, 5)
    state["layer1.0.conv1.weight"][0] = torch.nan
    save_file(state, path)
    with pytest.raises(UserError, match="has values that are not finite"):
        models.create(config, 5)
    with pytest.raises(UserError, match="no checkpoint at"):
        load_encoder(segmenter("unet").encoder.model, tmp_path / "nowhere.pth", "test_resnet")


# ---- mistakes ----------------------------------------------------------------------------------------------------


def test_mistakes_are_one_line(trained: Trained, tmp_path: Path) -> None:
    for config, words in (
        (settings("unet", None), ["model 'unet' is a decoder", "encoder: mobilenetv4_conv_small"]),
        (settings("resnet18", "resnet18"), ["encoder 'resnet18' has no decoder in model 'resnet18'", "unet"]),
        (settings("unett", "resnet18"), ["did you mean 'unet'?"]),
        (settings("unet", "resnet81"), ["unknown encoder 'resnet81'", "did you mean 'resnet8'?"]),
        (settings("fpn", sides=(64, 100)), ["takes sides that are multiples of 32", "64x100", "[64, 96]"]),
        (settings("unet", "test_vit"), ["cannot make 'unet' over 'test_vit'"]),
        (settings("unet", model_args={"depth": 3}), ["cannot make 'unet' over 'test_resnet' with {'depth': 3}"]),
        (settings("unet", model_args={"classes": 3}), ["model_args: 'classes' is not one of the network's own"]),
        (settings("unet", pretrained=True, encoder_checkpoint=tmp_path), ["both say where"]),
        (settings("resnet18", None, encoder_checkpoint=tmp_path), ["'resnet18' has no encoder"]),
        (settings("unet", encoder_checkpoint=tmp_path / "nowhere"), ["nothing at", "checkpoint's folder"]),
        (settings("unet", "test_convnext", encoder_checkpoint=trained.student.path), ["is of 'test_resnet'"]),
    ):
        with pytest.raises(UserError) as refused:
            models.create(config, 5)
        assert "\n" not in str(refused.value)
        for word in words:
            assert word in str(refused.value), (word, str(refused.value))


def test_unet_takes_any_sides() -> None:
    assert segmenter("unet", sides=(30, 50))(torch.randn(1, 3, 30, 50)).shape == (1, 5, 30, 50)


def test_a_network_of_another_task_is_refused(trained: Trained, masks: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'test_resnet' gives \(1, 5\) .* segmentation: wanted .*decoder"):
        models.create(settings("test_resnet", None), 5, "segmentation")
    with pytest.raises(UserError, match=r"'unet' gives \(1, 5, 64, 96\) for an image, the data's task is class"):
        models.create(settings("unet"), 5, "classification")
    config = TrainConfig(model="test_resnet", input=InputSettings(size=32), method="labels")
    with pytest.raises(UserError, match="the data's task is segmentation"):
        train(config, masks, None, tmp_path / "student")
    config = TrainConfig(**settings("unet", sides=(32, 32)).model_dump(), method="labels")
    with pytest.raises(UserError, match="the data's task is classification"):
        train(config, trained.dataset, None, tmp_path / "student")


def test_somebodys_own_code_may_draw_masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "drawing.py").write_text(
        "from torch import nn\n"
        "def make(num_classes):\n"
        "    return nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, num_classes, 1))\n"
    )
    monkeypatch.chdir(tmp_path)
    with allowing(["drawing:make"]):
        network, _ = models.create(settings("drawing:make", None), 5, "segmentation")
        assert network(torch.zeros(1, 3, *SIDES)).shape == (1, 5, 16, 24)
        with pytest.raises(UserError, match="the data's task is classification"):
            models.create(settings("drawing:make", None), 5, "classification")


def test_names_are_told_without_pytorch() -> None:
    """What is wrong with a recipe's networks is said in a second."""
    for config, words in (
        (settings("unet", None), "is a decoder"),
        (settings("resnet18", "unet"), "has no decoder"),
    ):
        with pytest.raises(UserError, match=words):
            check_network(config)
    done = kdpipe("cache", "nowhere", "--model", "unet")
    assert_one_line(done, 2, "model 'unet' is a decoder")


def test_a_strangers_checkpoint_names_no_other_encoder(masks: Dataset, tmp_path: Path) -> None:
    """What a manifest says of a network is as it was made, or it is refused in a line."""
    config = TrainConfig(
        **settings("unet", sides=(32, 48)).model_dump(), method="labels", train={"epochs": 1, "workers": 0}
    )
    student = train(config, masks, None, tmp_path / "student")
    rewrite_manifest(student.path, lambda value: value["config"].update(encoder="test_convnext"))
    with pytest.raises(UserError, match=r"of another architecture|another key"):
        models.restore(Checkpoint.open(student.path))


# ---- settings ----------------------------------------------------------------------------------------------------


def test_what_is_unsaid_is_in_no_key() -> None:
    """Keys of what was made before there were segmenters stand."""
    later = {"encoder", "encoder_checkpoint", "encoder_checkpoint_sha256"}
    for config in (ModelSettings(model="resnet18"), TrainConfig(model="resnet18"), TeacherPlan(model="resnet18")):
        assert not config.model_dump().keys() & later
    for kind in (GraphConfig, ExportConfig, ExportPlan):
        assert "output" not in kind().model_dump()
        assert kind(output="classes").model_dump()["output"] == "classes"
    assert TrainConfig(model="unet", encoder="resnet18").model_dump()["encoder"] == "resnet18"


def test_pretrained_says_the_encoders_weights_alone() -> None:
    """The decoder is still to be trained, so such a teacher is trained here."""
    assert TeacherPlan(model="unet", encoder="resnet18", pretrained=True).is_trained
    assert not TeacherPlan(model="resnet18", pretrained=True).is_trained


def test_an_encoder_lies_beside_its_recipe(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: r\ndata: {source: masks, task: segmentation}\n"
        "teacher: {model: unet, encoder: resnet18, encoder_checkpoint: a.pth}\n"
        "student: {model: fpn, encoder: resnet10t, encoder_checkpoint: b}\n"
        "distill: {students: {other: {encoder_checkpoint: c}}}\n"
    )
    recipe = read_recipe(path)
    assert recipe.teacher.encoder_checkpoint == tmp_path / "a.pth"
    assert recipe.student.encoder_checkpoint == tmp_path / "b"
    assert recipe.distill.students["other"]["encoder_checkpoint"] == str(tmp_path / "c")
    assert validated(TrainConfig, {"model": "unet", "encoder": "resnet18"}, "x").encoder == "resnet18"


def test_a_segmenter_is_counted() -> None:
    network, spec = models.create(settings("unet"), 5)
    counted = models.multiply_accumulates(network, spec)
    encoder = timm.create_model("test_resnet", num_classes=0)
    alone = models.multiply_accumulates(encoder, spec)
    assert counted is not None and alone is not None and counted > alone > 0
