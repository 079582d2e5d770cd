"""Which network some weights are of: names and shapes of all their tensors, against those of timm and torchvision."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import timm
import torch
from torch import nn

from ..core.progress import progress
from . import cifar  # noqa: F401 (registers its networks with timm)
from .torchvision import PREFIX
from .weights import COUNTER, USUAL

Shapes = Mapping[str, tuple[int, ...]]
FEWEST_TENSORS = 10  # of any network: torchvision's AlexNet has 16


class Recognised(NamedTuple):
    """A network that has exactly these tensors, by its name here."""

    model: str
    classes: int
    size: int | None  # side of its input where the network can take no other


def recognise(states: Mapping[str, Mapping[str, torch.Tensor]], hint: str = "") -> Recognised | None:
    """The network whose state dict has the names and shapes of one of these, whatever its number of classes, or None.

    A prefix that all names share is left off. Several networks can have the same tensors and differ in what has none
    (an activation, a padding): those whose names stand in ``hint``, such as a file's name, come first, then timm's
    before torchvision's, then the shortest name.

    Args:
        states: by their places in a file, as ``read_state_dicts`` has them.
    """
    words = re.sub(r"[^a-z0-9]+", "_", hint.lower())
    for place in sorted(states, key=lambda place: (place not in USUAL, len(place))):
        shapes = _without_prefix(shapes_of(states[place]))
        if len(shapes) < FEWEST_TENSORS:
            continue
        makers = [*_candidates(shapes), *_torchvisions()]
        makers.sort(key=lambda maker: _order(maker.model, words))
        with progress("recognising the network", len(makers)) as advance:
            for maker in makers:
                advance(1, maker.model)
                if _made(maker, shapes, really=maker.model.removeprefix(PREFIX) in words):
                    return Recognised(maker.model, maker.classes(shapes), maker.size)
    return None


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict, but for counters that no output depends on."""
    return {name: tuple(tensor.shape) for name, tensor in state.items() if not name.endswith(COUNTER)}


def _without_prefix(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """With the names as they are behind ``module.``, ``model.`` and the like, if all of them begin so."""
    while len(shapes) > 1 and all("." in name for name in shapes) and len({name.split(".")[0] for name in shapes}) == 1:
        shapes = {name.partition(".")[2]: shape for name, shape in shapes.items()}
    return shapes


def _order(model: str, words: str) -> tuple[int, int, str]:
    """Names among ``words`` first, the longest of them; then timm's, then torchvision's, the shortest first."""
    name = model.removeprefix(PREFIX)
    return (0, -len(name), model) if name in words else (1 + (name != model), len(name), model)


class _Maker(NamedTuple):
    """A network that could be the one."""

    model: str
    make: Callable[[int], nn.Module]  # for so many classes
    classifier: str | None  # None: whatever layer stands last
    size: int | None

    def classes(self, shapes: Shapes) -> int:
        """How many outputs the weights have."""
        return shapes[f"{self.classifier}.weight" if self.classifier else next(reversed(list(shapes)))][0]


def _candidates(shapes: Shapes) -> Iterator[_Maker]:
    """Networks of timm whose first convolution and classifier are called as two of these tensors are."""
    for name in timm.list_models():
        base = timm.models.get_pretrained_cfg(name)
        if base is None:
            continue
        first, classifier = _first(base.first_conv), _first(base.classifier)
        if first and classifier and {f"{first}.weight", f"{classifier}.weight"} <= shapes.keys():
            size = base.input_size[-1] if base.fixed_input_size else None
            yield _Maker(name, _of_timm(name), classifier, size)


def _torchvisions() -> Iterator[_Maker]:
    from torchvision import models

    for name in models.list_models(module=models):
        size = models.get_model_weights(name).DEFAULT.transforms().crop_size[0] if name.startswith("vit_") else None
        yield _Maker(PREFIX + name, _of_torchvision(name), None, size)


def _of_timm(name: str) -> Callable[[int], nn.Module]:
    return lambda classes: timm.create_model(name, num_classes=classes)


def _of_torchvision(name: str) -> Callable[[int], nn.Module]:
    from torchvision import models

    more = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return lambda classes: models.get_model(name, weights=None, num_classes=classes, **more)


def _first(names: str | Sequence[str] | None) -> str | None:
    """Of a layer that may be several."""
    if names is None or isinstance(names, str):
        return names
    return names[0] if names else None


def _made(maker: _Maker, shapes: Shapes, really: bool) -> bool:
    """Whether the network has these tensors; made without its values, or ``really`` where it wants some."""
    if not (last := shapes.get(f"{maker.classifier}.weight", next(reversed(list(shapes.values()))))):
        return False
    for device in ("meta", *(("cpu",) if really else ())):
        try:
            with torch.device(device):
                return shapes_of(maker.make(last[0]).state_dict()) == shapes
        except Exception:  # each of them raises its own where it wants values of its tensors
            continue
    return False
