"""The networks of the distillation literature on CIFAR, under their usual names in timm's registry.

ResNets for 32x32 images (He et al. 2016, section 4.2; depth 6n+2) and wide ResNets (Zagoruyko and Komodakis 2016;
depth 6n+4), as the results of the CRD protocol were got with them: shortcuts that change shape are 1x1 convolutions.
Importing this module registers them; ``timm.create_model("resnet8x4")`` then makes one. There are no weights to fetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.nn import functional as F  # noqa: N812


def _conv(inputs: int, outputs: int, size: int, stride: int = 1, **factory: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False, **factory)


class PostActivationBlock(nn.Module):
    """conv, BN, ReLU, conv, BN, plus the shortcut, ReLU: [N, C, H, W] to [N, C', H / stride, W / stride]."""

    preactivated: ClassVar[bool] = False

    def __init__(self, inputs: int, outputs: int, stride: int, drop_rate: float, **factory: Any) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride, **factory)
        self.bn1 = nn.BatchNorm2d(outputs, **factory)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = _conv(outputs, outputs, 3, **factory)
        self.bn2 = nn.BatchNorm2d(outputs, **factory)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                _conv(inputs, outputs, 1, stride, **factory), nn.BatchNorm2d(outputs, **factory)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual = self.drop(F.relu(self.bn1(self.conv1(x))))
        return F.relu(self.bn2(self.conv2(residual)) + self.downsample(x))


class PreActivationBlock(nn.Module):
    """BN, ReLU, conv, BN, ReLU, conv, plus the shortcut: [N, C, H, W] to [N, C', H / stride, W / stride].

    A shortcut that changes shape starts behind the first ReLU, any other at the input.
    """

    preactivated: ClassVar[bool] = True

    def __init__(self, inputs: int, outputs: int, stride: int, drop_rate: float, **factory: Any) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, **factory)
        self.conv1 = _conv(inputs, outputs, 3, stride, **factory)
        self.bn2 = nn.BatchNorm2d(outputs, **factory)
        self.drop = nn.Dropout(drop_rate)
        self.conv2 = _conv(outputs, outputs, 3, **factory)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = _conv(inputs, outputs, 1, stride, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(activated)
        residual: torch.Tensor = self.conv2(self.drop(F.relu(self.bn2(self.conv1(activated)))))
        return residual + shortcut


class CifarResNet(nn.Module):
    """A 3x3 stem and three stages of residual blocks, the second and third at half the size of the one before.

    Args:
        block: what the stages are made of; with pre-activation, BN and ReLU follow the last stage and not the stem.
        blocks: in every stage.
        widths: channels of the stem and of the three stages.
        global_pool: a pooling of timm, "" for none.
        drop_rate: dropout in front of the classifier.
        block_drop_rate: dropout between the two convolutions of every block.
        device, dtype: where and as what the weights are made.
    """

    def __init__(
        self,
        block: type[PostActivationBlock] | type[PreActivationBlock],
        blocks: int,
        widths: tuple[int, int, int, int],
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        block_drop_rate: float = 0.0,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.num_features = widths[-1]
        self.preactivated = block.preactivated

        self.conv1 = _conv(in_chans, widths[0], 3, **factory)
        self.feature_info: list[dict[str, Any]] = []
        # Modules stand in the order they run in: timm's feature extractors run them one after the other.
        if not self.preactivated:
            self._add_norm(widths[0], **factory)
        for at in range(3):
            stride = 1 if at == 0 else 2
            stage = [block(widths[at], widths[at + 1], stride, block_drop_rate, **factory)]
            stage += [block(widths[at + 1], widths[at + 1], 1, block_drop_rate, **factory) for _ in range(blocks - 1)]
            self.add_module(f"layer{at + 1}", nn.Sequential(*stage))
            self.feature_info.append({"num_chs": widths[at + 1], "reduction": 2**at, "module": f"layer{at + 1}"})
        if self.preactivated:
            self._add_norm(widths[-1], **factory)
        self._set_head(global_pool, **factory)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _add_norm(self, channels: int, **factory: Any) -> None:
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.act1 = nn.ReLU()

    def _set_head(self, global_pool: str, **factory: Any) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, **factory
        )
        self.head_hidden_size: int = self.num_features * self.global_pool.feat_mult()

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        activated: torch.Tensor = self.act1(self.bn1(x))
        return activated

    def _stem(self, x: torch.Tensor) -> torch.Tensor:
        stem: torch.Tensor = self.conv1(x)
        return stem if self.preactivated else self._norm(stem)

    def _stages(self) -> list[nn.Module]:
        return [self.get_submodule(info["module"]) for info in self.feature_info]

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_chans, H, W] to [N, num_features, H / 4, W / 4]."""
        x = self._stem(x)
        for stage in self._stages():
            x = stage(x)
        return self._norm(x) if self.preactivated else x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Features to logits [N, num_classes], or to the pooled vector in front of the classifier."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, in_chans, H, W] to logits [N, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The features together with the outputs of the stages, as timm's networks give them.

        Args:
            indices: the last n stages, these stages, or all of them.
            norm: put the last stage of a pre-activated network through the BN and ReLU behind it.
            stop_early: don't run the stages behind the last one that is wanted; the features are then its output.
            output_fmt: "NCHW" and nothing else.
            intermediates_only: leave the features out.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is '{output_fmt}': wanted 'NCHW'")
        stages = self._stages()
        wanted, last = feature_take_indices(len(stages), indices)
        intermediates: list[torch.Tensor] = []
        x = self._stem(x)
        for at, stage in enumerate(stages[: last + 1] if stop_early else stages):
            x = stage(x)
            normed = self._norm(x) if self.preactivated and at == len(stages) - 1 else x
            if at in wanted:
                intermediates.append(normed if norm else x)
            x = normed
        return intermediates if intermediates_only else (x, intermediates)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The last layer, or its name."""
        return "fc" if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one (none for 0 classes), and the pooling where one is named."""
        self.num_classes = num_classes
        self._set_head(self.global_pool.pool_type if global_pool is None else global_pool, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put the parameters into groups from the input to the output, for learning rates by layer."""
        blocks: list[tuple[str, Any]] = [(r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)", None)]
        if self.preactivated:
            return {"stem": r"^conv1", "blocks": [*blocks, (r"^bn1", (99999,))]}
        return {"stem": r"^conv1|^bn1", "blocks": blocks}


def _resnet(depth: int, widths: tuple[int, int, int, int] = (16, 16, 32, 64)) -> dict[str, Any]:
    return {"block": PostActivationBlock, "blocks": (depth - 2) // 6, "widths": widths}


def _wide(depth: int, factor: int) -> dict[str, Any]:
    widths = (16, 16 * factor, 32 * factor, 64 * factor)
    return {"block": PreActivationBlock, "blocks": (depth - 4) // 6, "widths": widths}


CIFAR_NETWORKS: dict[str, dict[str, Any]] = {
    "resnet8": _resnet(8),
    "resnet14": _resnet(14),
    "resnet20": _resnet(20),
    "resnet32": _resnet(32),
    "resnet44": _resnet(44),
    "resnet56": _resnet(56),
    "resnet110": _resnet(110),
    "resnet8x4": _resnet(8, (32, 64, 128, 256)),
    "resnet32x4": _resnet(32, (32, 64, 128, 256)),
    "wrn_16_1": _wide(16, 1),
    "wrn_16_2": _wide(16, 2),
    "wrn_40_1": _wide(40, 1),
    "wrn_40_2": _wide(40, 2),
}

# What register_model looks for in the module of an entry point. The normalisation is CIFAR-100's.
default_cfgs = generate_default_cfgs(
    {
        name: {
            "num_classes": 100,
            "input_size": (3, 32, 32),
            "pool_size": (8, 8),
            "crop_pct": 1.0,
            "mean": (0.5071, 0.4867, 0.4408),
            "std": (0.2675, 0.2565, 0.2761),
            "first_conv": "conv1",
            "classifier": "fc",
        }
        for name in CIFAR_NETWORKS
    }
)


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        arguments = {**CIFAR_NETWORKS[name], **kwargs}
        network: nn.Module = build_model_with_cfg(
            CifarResNet, name, pretrained, feature_cfg={"out_indices": (0, 1, 2)}, **arguments
        )
        return network

    entrypoint.__name__ = entrypoint.__qualname__ = name
    globals()[name] = register_model(entrypoint)  # register_model puts the name into __all__


for _name in CIFAR_NETWORKS:
    _register(_name)
