"""Torchvision's classifiers by name, ``torchvision/resnet18``."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.errors import UserError, did_you_mean
from ..core.proc import first_line

PREFIX = "torchvision/"
CLASSES = 1000  # of ImageNet, on which all of them were trained
OWN_ARGUMENTS = frozenset(("weights", "num_classes", "progress"))
# In training they would give three outputs; and their pretrained weights want colours of their own.
WITH_AUXILIARIES = ("googlenet", "inception_v3")


def _weights(model: str) -> Any:
    """The pretrained weights that torchvision takes for the best. Raises UserError for an unknown name."""
    from torchvision import models

    name, names = model.removeprefix(PREFIX), models.list_models(module=models)
    if name not in names:
        raise UserError(f"unknown model '{model}': wanted a classifier of torchvision{did_you_mean(name, names)}")
    return models.get_model_weights(name).DEFAULT


def input_defaults(model: str) -> dict[str, Any]:
    """What its pretrained weights take, in timm's words. Raises UserError for an unknown name."""
    shown = _weights(model).transforms()
    size = shown.crop_size[0]
    return {
        "input_size": (3, size, size),
        "mean": tuple(shown.mean),
        "std": tuple(shown.std),
        "crop_pct": size / shown.resize_size[0],
        "interpolation": shown.interpolation.value,
    }


def make(model: str, arguments: dict[str, Any], classes: int, sides: tuple[int, int], pretrained: bool) -> nn.Module:
    """A network of so many classes; with ``pretrained`` all but a head of another number is as torchvision has it.

    Raises:
        UserError: an unknown name or argument, weights out of reach or of another form.
    """
    from torchvision import models

    weights, name = _weights(model), model.removeprefix(PREFIX)
    if taken := sorted(arguments.keys() & OWN_ARGUMENTS):
        raise UserError(
            f"model_args: '{taken[0]}' is not one of the network's own: weights come by the checkpoint alone"
        )
    if pretrained and name in WITH_AUXILIARIES:
        raise UserError(f"the pretrained weights of '{model}' want colours of their own: take timm's, '{name}'")
    usual: dict[str, Any] = {}
    if name in WITH_AUXILIARIES:
        usual = {"aux_logits": False, "init_weights": True}
    elif name.startswith("vit_"):
        if sides[0] != sides[1]:
            raise UserError(f"'{model}' takes square images alone: take timm's, or a square input.size")
        usual = {"image_size": sides[0]}
    elif name.startswith("maxvit"):
        usual = {"input_size": sides}
    arguments = {**usual, **arguments}
    try:
        network: nn.Module = models.get_model(name, num_classes=classes, **arguments)
        if pretrained:
            with _tensors_only():
                given = models.get_model(name, weights=weights, progress=False, **arguments).state_dict()
            own_state = network.state_dict()
            fitting = {key: each for key, each in given.items() if each.shape == own_state[key].shape}
            network.load_state_dict(own_state | fitting)
    except OSError as error:
        raise UserError(f"cannot fetch the pretrained weights of '{model}': {first_line(error)}") from error
    except Exception as error:  # each of them raises its own
        raise UserError(f"cannot make '{model}' with {arguments or 'no arguments'}: {first_line(error)}") from error
    return network


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Nothing but tensors is unpickled in the block: torch's own switch for those who call it without saying so."""
    switch = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[switch]
        else:
            os.environ[switch] = before
