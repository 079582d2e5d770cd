"""Which floating-point format trains this network fastest on this machine."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TIMED_STEPS = 4


@dataclass(frozen=True)
class Precision:
    """A format, a memory layout, and how long a step took in each candidate if they were timed."""

    name: str
    channels_last: bool = False
    seconds_a_step: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON and the saved state."""
        return dict(vars(self))

    def context(self, device: str) -> torch.autocast:
        """Autocast to this format; weights, gradients and losses stay float32."""
        kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.name)
        return torch.autocast(device, dtype=kind, enabled=kind is not None)

    def place(self, tensor: Tensor) -> Tensor:
        """Images [B, C, H, W] in this layout."""
        return tensor.contiguous(memory_format=torch.channels_last) if self.channels_last else tensor

    def prepare(self, module: nn.Module) -> None:
        """Lay out the weights of ``module`` in this memory format."""
        if self.channels_last:
            module.to(memory_format=torch.channels_last)


def fastest(method: nn.Module, step: Callable[[nn.Module, Precision], None]) -> Precision:
    """Time ``step`` (a whole training step) on copies of ``method`` in every candidate; interleaved, medians."""
    candidates = [Precision(name, last) for name in ("float32", "bf16") for last in (False, True)]
    copies = []
    for candidate in candidates:
        clone = copy.deepcopy(method)
        candidate.prepare(clone)
        copies.append(clone)
    names = [candidate.name + (" channels-last" if candidate.channels_last else "") for candidate in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for _ in range(1 + TIMED_STEPS):
        for at, (candidate, clone) in enumerate(zip(candidates, copies, strict=True)):
            begun = time.perf_counter()
            step(clone, candidate)
            times[at].append(time.perf_counter() - begun)
    medians = [statistics.median(each[1:]) for each in times]  # the first step of each warms up
    best = min(range(len(candidates)), key=medians.__getitem__)
    return Precision(candidates[best].name, candidates[best].channels_last, dict(zip(names, medians, strict=True)))
