"""The teacher: frozen, in eval mode, with its own normalisation and size, whatever the student's are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.data import InputSpec
from .features import maps_and_logits
from .losses import shuffle_non_maximal


@dataclass(frozen=True)
class Lesson:
    """What the teacher says of a batch: logits [B, K] and, if asked, feature maps [B, C, H, W]."""

    logits: Tensor
    maps: list[Tensor] = field(default_factory=list)


class Teacher(nn.Module):
    """Sees the student's view, normalised and sized as it was trained."""

    student_mean: Tensor
    student_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: InputSpec, student_spec: InputSpec, shuffled: bool = False) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.indices: list[int] = []  # of the feature maps that the method asks for
        self.size = spec.size
        self._resizes = spec.size != student_spec.size
        self._same_colours = (spec.mean, spec.std) == (student_spec.mean, student_spec.std)
        self._shuffled = shuffled
        for name, values in (
            ("student_mean", student_spec.mean),
            ("student_std", student_spec.std),
            ("mean", spec.mean),
            ("std", spec.std),
        ):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, view: Tensor) -> Lesson:
        """The student's normalised view [B, 3, H, W] to a Lesson."""
        if not self._same_colours:
            view = (view * self.student_std + self.student_mean - self.mean) / self.std
        if self._resizes:
            view = functional.interpolate(view, (self.size, self.size), mode="bicubic", antialias=True)
        if self.indices:
            maps, logits = maps_and_logits(self.network, view, self.indices)
        else:
            maps, logits = [], self.network(view)
        if self._shuffled:
            # Drawn from torch's own generator, whose state a resumed run gets back.
            logits = shuffle_non_maximal(logits, torch.default_generator)
        return Lesson(logits, maps)
