"""What a network takes by its graph alone: products, values, parameters. No weight is made and nothing is computed."""

from __future__ import annotations

from typing import Any, NamedTuple

import timm
import torch
from timm.utils.model import reparameterize_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ..core.config import ModelSettings
from ..core.errors import KdpipeError
from . import models

_PRODUCTS = frozenset(("convolution", "_convolution", "mm", "addmm", "bmm", "baddbmm"))


class Cost(NamedTuple):
    """Of one image, in the form that is deployed: branches merged into convolutions where timm knows how.

    ``activations`` counts the values that convolutions and matrix products give, as Radosavovic et al. 2020 do.
    """

    macs: int
    activations: int
    parameters: int


class _Activations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the values that convolutions and matrix products give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in _PRODUCTS:
            self.count += found.numel()
        return found


def cost_of(config: ModelSettings, classes: int) -> Cost:
    """What a network takes. Raises UserError for an unknown one, or a size that it can't take."""
    try:
        with torch.device("meta"):  # shapes alone
            return _counted(config, classes)
    except (KdpipeError, NotImplementedError, RuntimeError):
        # One that looks at its weights while it is made, or does what has no shape alone. With real weights it is
        # counted all the same, or says itself what is wrong.
        return _counted(config, classes)


def family_of(model: str) -> str:
    """The family of a network of timm: the module that it is defined in; of any other its own name."""
    return timm.model_entrypoint(model).__module__ if timm.is_model(model) else model


def _counted(config: ModelSettings, classes: int) -> Cost:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    network, spec = models.create(config, classes)
    deployed = reparameterize_model(network).eval().requires_grad_(False)  # counting hooks need none
    activations = _Activations()
    # Attention as the matrix products that it is.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, activations:
        deployed(torch.zeros(1, *spec.shape))
    parameters = sum(parameter.numel() for parameter in deployed.parameters())
    return Cost(max(1, int(counter.get_total_flops()) // 2), max(1, activations.count), parameters)
