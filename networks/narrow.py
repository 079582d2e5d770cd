"""Networks as wide as their weights: how one that was pruned is built again, by its name and the shapes of its tensors.

A checkpoint needs no pickle for it, no record of what went, and nothing of the library that pruned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.proc import first_line
from ..core.sealed import printable
from .weights import head_layers

Shapes = Mapping[str, tuple[int, ...]]


def narrow(network: nn.Module, shapes: Shapes) -> None:
    """Make the layers of ``network`` as wide as tensors of ``shapes`` say. What it keeps of its values means nothing.

    Args:
        shapes: of its state dict by name, as a stranger gives them; what is not there stays as it is.

    Raises:
        UserError: a tensor that is wider than the network's, or of another kind.
    """
    for name, module in network.named_modules():
        own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
        for key, tensor in own.items():
            place = f"{name}.{key}" if name else key
            shape = tuple(shapes.get(place, tensor.shape))
            if shape == tensor.shape:
                continue
            if not _is_narrower(shape, tuple(tensor.shape)):
                raise UserError(
                    printable(f"'{place}' has shape {shape}, wanted {tuple(tensor.shape)} with fewer channels", 300)
                )
            value = tensor.detach()[tuple(map(slice, shape))].clone()
            is_learned = isinstance(tensor, nn.Parameter)
            setattr(module, key, nn.Parameter(value, tensor.requires_grad) if is_learned else value)
        _follow(module)


def narrow_as(network: nn.Module, path: Path, spec: InputSpec, classes: int) -> None:
    """Make the layers of ``network`` as wide as those of the weights in a .safetensors file.

    The outputs stay as many as ``classes``, whatever the file's are.

    Raises:
        UserError: unreadable, or widths that are no narrower network's.
    """
    try:
        with safe_open(path, "pt") as weights:
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # of the format
        raise UserError(f"cannot read weights from {path} ({first_line(error)}): wanted .safetensors") from None
    for layer in head_layers(network):
        for name, tensor in network.state_dict().items():
            if name.rpartition(".")[0] == layer and name in shapes:
                shapes[name] = (tensor.shape[0], *shapes[name][1:])
    try:
        narrow(network, shapes)
        _check_runs(network, spec, classes)
    except UserError as error:
        raise UserError(
            f"{path} holds no pruned '{type(network).__name__}': {first_line(error)}; make the checkpoint again"
        ) from None


def _is_narrower(shape: Sequence[int], whole: Sequence[int]) -> bool:
    """Whether one has as many dimensions and no more of any; a kernel's sides, the third on, are as they were."""
    if len(shape) != len(whole) or (len(whole) == 4 and tuple(shape[2:]) != tuple(whole[2:])):
        return False
    return all(1 <= part <= of for part, of in zip(shape, whole, strict=True))


def _follow(module: nn.Module) -> None:
    """Let what a layer says of itself follow its tensors."""
    match module:
        case nn.Conv2d():
            if module.groups == module.in_channels == module.out_channels:  # each channel by itself
                module.groups = module.weight.shape[0]
            module.out_channels = module.weight.shape[0]
            module.in_channels = module.weight.shape[1] * module.groups
        case nn.ConvTranspose2d():
            module.in_channels = module.weight.shape[0]
            module.out_channels = module.weight.shape[1] * module.groups
        case nn.Linear():
            module.out_features, module.in_features = module.weight.shape
        case nn.modules.batchnorm._BatchNorm():
            known = module.weight if module.weight is not None else module.running_mean
            module.num_features = module.num_features if known is None else known.shape[0]
        case nn.PReLU():
            module.num_parameters = module.weight.shape[0]


def _check_runs(network: nn.Module, spec: InputSpec, classes: int) -> None:
    """Run a network once. Raises UserError where its layers do not fit, or it gives other outputs than ``classes``."""
    try:
        with torch.no_grad():
            outputs = network.eval()(torch.zeros(1, *spec.shape))
    except Exception as error:  # of any of its layers
        raise UserError(f"its layers do not fit together ({first_line(error)})") from None
    if tuple(outputs.shape[:2]) != (1, classes):
        raise UserError(f"it gives {tuple(outputs.shape)} for an image, wanted {(1, classes)}")
