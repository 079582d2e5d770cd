"""The CIFAR networks: as large as published, computing what the papers write, and at home in timm."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.task import LogitDistillationTask
from torch import nn
from torch.nn import functional as F  # noqa: N812

from kdpipe.networks import cifar

RESNET, RESNET_X4 = (16, 16, 32, 64), (32, 64, 128, 256)
# Depth, widths of stem and stages, pre-activated, millions of parameters for 100 classes.
LITERATURE = {
    "resnet8": (8, RESNET, False, "0.08"),
    "resnet14": (14, RESNET, False, "0.18"),
    "resnet20": (20, RESNET, False, "0.28"),
    "resnet32": (32, RESNET, False, "0.47"),
    "resnet44": (44, RESNET, False, "0.67"),
    "resnet56": (56, RESNET, False, "0.86"),
    "resnet110": (110, RESNET, False, "1.74"),
    "resnet8x4": (8, RESNET_X4, False, "1.23"),
    "resnet32x4": (32, RESNET_X4, False, "7.43"),
    "wrn_16_1": (16, (16, 16, 32, 64), True, "0.18"),
    "wrn_16_2": (16, (16, 32, 64, 128), True, "0.70"),
    "wrn_40_1": (40, (16, 16, 32, 64), True, "0.57"),
    "wrn_40_2": (40, (16, 32, 64, 128), True, "2.26"),
}
# Millions of parameters for 10 classes: He et al. (2016), table 6, without parameters in the shortcuts, and
# Zagoruyko and Komodakis (2016), table 4.
PAPERS = {"resnet20": "0.27", "resnet32": "0.46", "resnet44": "0.66", "resnet56": "0.85", "resnet110": "1.7"} | {
    "wrn_40_1": "0.6",
    "wrn_40_2": "2.2",
}
# One of each kind, small.
KINDS = ["resnet8", "resnet8x4", "wrn_16_2"]


def parameters(depth: int, widths: tuple[int, ...], preactivated: bool, classes: int) -> int:
    """Counted from the papers: 3x3 convolutions, BN with two numbers a channel, 1x1 shortcuts, one linear layer."""
    convolutions = (depth - (4 if preactivated else 2)) // 3  # in a stage
    total = 9 * 3 * widths[0] + (widths[-1] + 1) * classes
    total += 2 * (widths[-1] if preactivated else widths[0])
    for before, width in pairwise(widths):
        total += 9 * width * (before + (convolutions - 1) * width)
        total += 2 * ((before if preactivated else width) + (convolutions - 1) * width)
        if before != width:
            total += before * width + (0 if preactivated else 2 * width)
    return total


def make(name: str, **arguments: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **arguments)


def settled(name: str, **arguments: object) -> nn.Module:
    """In eval mode, with BN that does something."""
    network = make(name, **arguments)
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return network.eval()


def images(count: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(count, channels, 32, 32, generator=torch.Generator().manual_seed(2))


def test_every_network_is_registered_and_takes_no_name_of_timm():
    assert set(LITERATURE) == set(cifar.CIFAR_NETWORKS) == set(timm.list_models(module="cifar"))
    assert hasattr(timm.models, "resnet18")  # timm's entry points are attributes there, so a clash would show
    assert [name for name in LITERATURE if hasattr(timm.models, name)] == []


@pytest.mark.parametrize("name", LITERATURE)
def test_parameter_counts_follow_from_depth_and_widths(name: str):
    depth, widths, preactivated, millions = LITERATURE[name]
    network = make(name, device="meta")
    count = sum(parameter.numel() for parameter in network.parameters())
    assert count == parameters(depth, widths, preactivated, 100)
    assert f"{count / 1e6:.2f}" == millions
    convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) == depth - (3 if preactivated else 1)


@pytest.mark.parametrize("name", PAPERS)
def test_parameter_counts_are_those_of_the_papers(name: str):
    network = make(name, num_classes=10, device="meta")
    skipped = "downsample" if name.startswith("resnet") else "nothing"
    count = sum(parameter.numel() for key, parameter in network.named_parameters() if skipped not in key)
    assert f"{count / 1e6:.{len(PAPERS[name]) - 2}f}" == PAPERS[name]


def post_activation(state: dict[str, torch.Tensor], x: torch.Tensor, stride: int) -> torch.Tensor:
    out = F.conv2d(x, state["conv1.weight"], stride=stride, padding=1)
    out = F.conv2d(F.relu(norm(state, "bn1", out)), state["conv2.weight"], padding=1)
    if stride == 2:
        x = norm(state, "downsample.1", F.conv2d(x, state["downsample.0.weight"], stride=2))
    return F.relu(norm(state, "bn2", out) + x)


def pre_activation(state: dict[str, torch.Tensor], x: torch.Tensor, stride: int) -> torch.Tensor:
    first = F.relu(norm(state, "bn1", x))
    out = F.conv2d(first, state["conv1.weight"], stride=stride, padding=1)
    out = F.conv2d(F.relu(norm(state, "bn2", out)), state["conv2.weight"], padding=1)
    return out + (F.conv2d(first, state["downsample.weight"], stride=2) if stride == 2 else x)


def norm(state: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    mean, var, weight, bias = (
        state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias


@pytest.mark.parametrize(("name", "formula"), [("resnet14", post_activation), ("wrn_16_2", pre_activation)])
def test_a_block_computes_what_the_paper_writes(name: str, formula):
    stage = settled(name).layer2
    x = torch.randn(2, stage[0].conv1.in_channels, 16, 16, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for block, stride in ((stage[0], 2), (stage[1], 1)):
            expected = formula(block.state_dict(), x, stride)
            x = block(x)
            torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", KINDS)
def test_features_then_head_is_forward(name: str):
    network, batch = settled(name), images()
    width = LITERATURE[name][1][-1]
    with torch.no_grad():
        features = network.forward_features(batch)
        pooled = network.forward_head(features, pre_logits=True)
        logits = network(batch)
    assert features.shape == (2, width, 8, 8) and pooled.shape == (2, width) and logits.shape == (2, 100)
    assert features.min() == 0  # what is pooled is activated, in either kind
    torch.testing.assert_close(pooled, features.mean((2, 3)))
    torch.testing.assert_close(network.forward_head(features), logits)
    torch.testing.assert_close(network.get_classifier()(pooled), logits)
    assert network.num_features == network.head_hidden_size == width
    assert dict(network.named_modules())[network.get_classifier(name_only=True)] is network.get_classifier()


@pytest.mark.parametrize("name", KINDS)
def test_intermediates_are_the_stages(name: str):
    network, batch = settled(name), images()
    seen: list[torch.Tensor] = []
    for info in network.feature_info:
        network.get_submodule(info["module"]).register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        features = network.forward_features(batch)
        stages = list(seen)
        final, intermediates = network.forward_intermediates(batch)
        torch.testing.assert_close(final, features)
        torch.testing.assert_close(intermediates, stages)
        assert [tuple(tensor.shape[1:]) for tensor in intermediates] == [
            (info["num_chs"], 32 // info["reduction"], 32 // info["reduction"]) for info in network.feature_info
        ]
        (last,) = network.forward_intermediates(batch, indices=1, norm=True, intermediates_only=True)
        torch.testing.assert_close(last, features)
        seen.clear()
        early, (second,) = network.forward_intermediates(batch, indices=[1], stop_early=True)
        assert len(seen) == 2
        torch.testing.assert_close([early, second], [stages[1], stages[1]])
        with pytest.raises(ValueError, match="NCHW"):
            network.forward_intermediates(batch, output_fmt="NLC")


@pytest.mark.parametrize("name", KINDS)
def test_timms_feature_extractor_takes_them(name: str):
    extractor = timm.create_model(name, features_only=True).eval()
    with torch.no_grad():
        maps = extractor(images(1))
    assert [tensor.shape[1] for tensor in maps] == extractor.feature_info.channels() == list(LITERATURE[name][1][1:])
    assert extractor.feature_info.reduction() == [1, 2, 4]


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_classes_channels_pooling_and_dropout_are_arguments(name: str):
    network = make(name, num_classes=10, in_chans=1, global_pool="catavgmax", drop_rate=0.5, block_drop_rate=0.3)
    assert (network.num_classes, network.in_chans) == (10, 1)
    assert network.head_hidden_size == 2 * network.num_features
    batch = images(channels=1)
    assert network(batch).shape == (2, 10)
    assert not torch.equal(network(batch), network(batch))
    network.eval()
    assert torch.equal(network(batch), network(batch))
    assert network(torch.randn(1, 1, 40, 24)).shape == (1, 10)  # any size that can be halved twice
    network.reset_classifier(7)
    assert network(batch).shape == (2, 7) and network.num_classes == 7
    assert network.fc.in_features == network.head_hidden_size == 2 * network.num_features
    network.reset_classifier(0, "avg")
    assert network(batch).shape == (2, network.num_features) == (2, network.head_hidden_size)


@pytest.mark.parametrize("name", KINDS)
def test_the_configuration_is_that_of_cifar_100(name: str):
    network = make(name)
    config = network.pretrained_cfg
    assert config["architecture"] == name and config["num_classes"] == network.num_classes == 100
    assert (config["input_size"], config["crop_pct"]) == ((3, 32, 32), 1.0)
    assert config["mean"] == (0.5071, 0.4867, 0.4408) and config["std"] == (0.2675, 0.2565, 0.2761)
    assert network.get_submodule(config["first_conv"]) is network.conv1
    assert network.get_submodule(config["classifier"]) is network.fc
    assert not timm.models.is_model_pretrained(name)


@pytest.mark.parametrize("name", KINDS)
def test_parameters_group_from_stem_to_classifier(name: str):
    network = make(name)
    groups = group_parameters(network, network.group_matcher(), reverse=True)
    assert groups["conv1.weight"] == 0 and groups["fc.weight"] == max(groups.values())
    blocks = 3 * len(network.layer1)
    assert max(groups.values()) == blocks + 1
    assert groups["layer1.0.conv1.weight"] == 1
    assert groups[f"layer3.{len(network.layer3) - 1}.conv2.weight"] == blocks
    assert groups["bn1.weight"] == (blocks if name.startswith("wrn") else 0)
    coarse = group_parameters(network, network.group_matcher(coarse=True), reverse=True)
    assert sorted(set(coarse.values())) == [0, 1, 2, 3, 4]


def test_weights_start_as_the_papers_have_it():
    network = make("wrn_16_2")
    convolution = network.layer3[0].conv1
    assert convolution.in_channels != convolution.out_channels
    assert convolution.weight.std().item() == pytest.approx((2 / (9 * convolution.out_channels)) ** 0.5, rel=0.03)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1"])
def test_an_exported_graph_takes_any_batch(name: str):
    network = settled(name)
    shapes = {"x": {0: torch.export.Dim("batch")}}
    graph = torch.export.export(network, (images(2),), dynamic_shapes=shapes).module()
    with torch.no_grad():
        for count in (1, 3):
            torch.testing.assert_close(graph(images(count)), network(images(count)))


def test_timms_distillation_trains_a_step():
    teacher, student = settled("wrn_16_2"), make("resnet8")
    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), task_loss_weight=0.5, temperature=4.0, verbose=False
    )
    task.train()
    frozen, before = copy.deepcopy(teacher.state_dict()), copy.deepcopy(student.state_dict())
    optimizer = torch.optim.SGD(student.parameters(), 0.01)
    batch, labels = images(8), torch.arange(8)
    losses = []
    for _ in range(2):
        result = task(batch, labels)
        losses.append(result["loss"].item())
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert result["output"].shape == (8, 100) and result["kd_loss"] > 0
    assert losses[1] < losses[0]
    assert all(not torch.equal(before[key], value) for key, value in student.named_parameters())
    assert all(torch.equal(frozen[key], value) for key, value in teacher.state_dict().items())
