"""Which network some weights are of: names and shapes of all their tensors, against those of timm's networks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import timm
import torch

from ..core.progress import progress
from . import cifar  # noqa: F401 (registers its networks with timm)

Shapes = Mapping[str, tuple[int, ...]]


class Recognised(NamedTuple):
    """A network of timm that has exactly these tensors."""

    model: str
    classes: int
    size: int | None  # side of its input where the network can take no other


def shapes_of(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict."""
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def recognise(shapes: Shapes, hint: str = "") -> Recognised | None:
    """The network of timm whose state dict has these names and shapes, whatever its number of classes; or None.

    Several networks can have the same tensors and differ in what has none (an activation, a padding): those whose names
    stand in ``hint``, such as a file's name, come first, then the shortest name.
    """
    words = re.sub(r"[^a-z0-9]+", "_", hint.lower())
    found = sorted(_candidates(shapes), key=lambda name: _order(name, words))
    with progress("recognising the network", len(found)) as advance:
        for name in found:
            advance(1, name)
            base = timm.models.get_pretrained_cfg(name)
            classes = shapes[f"{_first(base.classifier if base else None)}.weight"][0]
            if _shapes_made(name, classes) == dict(shapes):
                size = base.input_size[-1] if base and base.fixed_input_size else None
                return Recognised(name, classes, size)
    return None


def _order(name: str, words: str) -> tuple[int, int, str]:
    """Names that are among ``words`` first, the longest of them; then the others, the shortest first."""
    return (0, -len(name), name) if name in words else (1, len(name), name)


def _candidates(shapes: Shapes) -> Iterator[str]:
    """Names of networks whose first convolution and classifier are called as two of these tensors are."""
    for name in timm.list_models():
        base = timm.models.get_pretrained_cfg(name)
        if base is None:
            continue
        ends = _first(base.first_conv), _first(base.classifier)
        if all(end is not None and f"{end}.weight" in shapes for end in ends):
            yield name


def _first(names: str | Sequence[str] | None) -> str | None:
    """Of a layer that may be several."""
    return names if isinstance(names, str) or not names else names[0]


def _shapes_made(name: str, classes: int) -> dict[str, tuple[int, ...]] | None:
    """Names and shapes of a network that is made without its values; None where it cannot be."""
    try:
        with torch.device("meta"):
            return shapes_of(timm.create_model(name, num_classes=classes).state_dict())
    except Exception:  # every network raises its own where it wants values of its tensors
        return None
