"""The teacher: frozen, in eval mode, with its own normalisation and size, whatever the student's are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.inputs import InputSpec, size_words
from ..core.kinds import Checkpoint
from ..core.progress import note
from ..data.dataset import Dataset
from ..networks import models
from .features import maps_and_logits

# Of the views of a batch: view numbers [B] and image numbers [B].
Address = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TeacherOutput:
    """What the teacher says of a batch: logits [B, K] and, by stage index, feature maps [B, C, H, W]."""

    logits: Tensor
    maps: dict[int, Tensor] = field(default_factory=dict)


class Teacher(nn.Module):
    """A network that is asked about the student's views, normalised and sized as it was trained."""

    student_mean: Tensor
    student_std: Tensor
    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, spec: InputSpec, student_spec: InputSpec) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.wanted: set[int] = set()  # indices of the feature maps that its output is to have
        self.sides = spec.sides
        self._resizes = spec.sides != student_spec.sides
        self._same_colours = (spec.mean, spec.std) == (student_spec.mean, student_spec.std)
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
    def forward(self, view: Tensor, address: Address | None = None) -> TeacherOutput:
        """The output for the student's normalised views [B, 3, H, W]; it looks at them, whatever their ``address``."""
        if not self._same_colours:
            view = (view * self.student_std + self.student_mean - self.mean) / self.std
        if self._resizes:
            view = functional.interpolate(view, self.sides, mode="bicubic", antialias=True)
        if not self.wanted:
            return TeacherOutput(self.network(view))
        indices = sorted(self.wanted)
        maps, logits = maps_and_logits(self.network, view, indices)
        return TeacherOutput(logits, dict(zip(indices, maps, strict=True)))


def open_teacher(teacher: Checkpoint, dataset: Dataset, spec: InputSpec) -> Teacher:
    """The teacher in ``teacher`` for students of ``spec``. Raises UserError when its classes are not the data's."""
    dataset.check_classes_of(teacher, "the teacher")
    network, teacher_spec = models.restore(teacher)
    (height, width), (its_height, its_width) = spec.sides, teacher_spec.sides
    if height * its_width != width * its_height:
        note(
            f"the teacher takes {size_words(teacher_spec.size)} pixels: views of {size_words(spec.size)} are stretched "
            "for it, so that both look at the same part of an image"
        )
    return Teacher(network, teacher_spec, spec)
