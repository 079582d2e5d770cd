"""The methods: each is one of timm's training tasks, a forward that returns a dict with 'loss'.

``loss = label_weight * label loss + kd_weight * the method's loss``; both are computed in float32. The teacher is
asked by the training loop, and its output handed to the method.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from ..core import config as configuration
from ..core.config import DistillSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec, size_words
from ..data.dataset import UNLABELED
from . import losses
from .cache import CachedTeacher
from .features import (
    STAGES,
    Adapter,
    AuxiliaryHead,
    Contrast,
    Painter,
    PlacesHead,
    Review,
    SideBySide,
    block_indices,
    by_place,
    in_places,
    map_shapes,
    maps_alone,
    maps_and_logits,
    output_grid,
    paired,
    resized,
    same_size,
    stage_indices,
    stage_parameters,
    thinned,
)
from .teacher import Teacher, TeacherOutput

HAND_MADE_CONFIDENCE = 0.9  # of the teacher that is made by hand


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own optimiser and schedule."""

    name: str
    steps: int
    learning_rate: float
    has_accuracy: bool = True  # whether the network's logits mean something yet
    handover: str = "last"


class StudentOutput(NamedTuple):
    """What the student says of a batch.

    Logits [B, K, ...] (None where the deepest stages were left out), feature maps [B, C, H, W] of the stages that the
    method looks at, and what the auxiliary modules make of those maps.
    """

    logits: Any  # a Tensor wherever it is looked at
    maps: list[Tensor]
    auxiliary: list[Tensor]


class StudentWithAuxiliaries(nn.Module):
    """The student with what a method trains beside it (adapters, heads) and drops afterwards.

    ``auxiliaries``: a module for each of the student's maps, or one that takes the list of them and gives a list.
    """

    def __init__(
        self, student: nn.Module, indices: Sequence[int] = (), auxiliaries: Iterable[nn.Module] | nn.Module = ()
    ) -> None:
        super().__init__()
        self.student = student
        self.auxiliaries: nn.Module = SideBySide(auxiliaries) if isinstance(auxiliaries, Iterable) else auxiliaries
        self.indices: list[int] = list(indices)

    def forward(self, image: Tensor, deepest: int | None = None) -> StudentOutput:
        """Everything for images [B, 3, H, W]; or the maps up to number ``deepest`` alone, without logits."""
        if not self.indices:
            return StudentOutput(self.student(image), [], [])
        if deepest is None:
            maps, logits = maps_and_logits(self.student, image, self.indices)
        else:
            maps, logits = maps_alone(self.student, image, self.indices[: deepest + 1]), None
        return StudentOutput(logits, maps, self.auxiliaries(maps))


def label_loss(config: DistillSettings, all_labeled: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy or BCE (mean over B * K, as timm), smoothed if asked, in float32.

    The target is a class [B], or a distribution [B, K] after mixing. An image without label, whose class is
    ``UNLABELED`` or whose distribution is nothing, adds nothing to the sum over the batch's images. Looking for
    such images waits for the device: with ``all_labeled`` nobody looks.
    """
    smoothing = config.train.label_smoothing
    if config.label_loss == "bce":
        hard: nn.Module = BinaryCrossEntropy(smoothing)
        soft: nn.Module = BinaryCrossEntropy(0.0)
    else:
        hard = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
        soft = SoftTargetCrossEntropy()

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        criterion, known = (hard, target >= 0) if target.ndim == 1 else (soft, target.sum(1) > 0)
        if all_labeled or known.all():
            return cast("Tensor", criterion(logits.float(), target))
        if not known.any():
            return 0 * logits.float().sum()
        return cast("Tensor", criterion(logits[known].float(), target[known])) * known.float().mean()

    return loss


def places_label_loss(config: DistillSettings, _all_labeled: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    """As ``label_loss`` at every place of an image: a mean over all places of the batch, known or not.

    Logits [B, K, h, w] are enlarged to the labels' height and width first, bilinear and in float32. The target is
    classes [B, H, W], or distributions [B, K, H, W] after mixing; a place whose class is ``UNLABELED``, or whose
    distribution is nothing, adds nothing to the sum over the batch's places. Nobody has to look for such places.
    """
    smoothing = config.train.label_smoothing

    def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():  # smoothed already, and nothing where nothing is known
            return functional.cross_entropy(logits, target, reduction="sum")
        return functional.cross_entropy(
            logits, target, ignore_index=UNLABELED, reduction="sum", label_smoothing=smoothing
        )

    def binary(logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        if target.is_floating_point():
            known, wanted = target.sum(1) > 0, (target * logits).sum(1)
        else:  # without the targets [B, K, H, W] that it would take
            known = target != UNLABELED
            own = logits.gather(1, target.clamp(min=0)[:, None]).squeeze(1)
            wanted = (1 - smoothing) * own + smoothing / classes * logits.sum(1)
        # Of every class log(1 + exp(z)) - t * z, which is the binary cross-entropy of logit z and target t.
        return (functional.softplus(logits).sum(1) - wanted).where(known, 0).sum() / classes

    criterion = binary if config.label_loss == "bce" else cross_entropy

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        sides = target.shape[-2:]
        return criterion(resized(logits.float(), sides), target) / (len(logits) * sides.numel())

    return loss


# By task: the loss between outputs [B, K, ...] and targets, labels or distributions, as a configuration wants it; told
# whether every image has a label.
LABEL_LOSSES: dict[str, Callable[[DistillSettings, bool], Callable[[Tensor, Tensor], Tensor]]] = {
    "classification": label_loss,
    "segmentation": places_label_loss,
}


class Method(TrainingTask):  # type: ignore[misc]
    """A way to train the student; this one by the labels alone: the control of all others, and their frame."""

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True  # and so learns nothing from images that have none
    learns_outputs: ClassVar[bool] = True  # so that the network's answers mean something afterwards
    teaches_outputs: ClassVar[bool] = False  # rather than features alone
    default_weight: ClassVar[float] = 0.0  # of the method's loss, where the configuration names none

    @classmethod
    def weight_in(cls, config: DistillSettings) -> float:
        """The weight of the method's loss."""
        return cls.default_weight if config.kd_weight is None else config.kd_weight

    def __init__(
        self,
        config: DistillSettings,
        student: nn.Module,
        spec: InputSpec,
        teacher: Teacher | CachedTeacher | None,
        name: str = "student",
        *,
        task: str,
        all_labeled: bool = False,
    ) -> None:
        """Prepare ``student``, a network of ``spec`` for that task; ``teacher`` is looked at here and not kept.

        ``all_labeled``: no image is without a label, so that none has to be looked for.

        Raises:
            UserError: no teacher where the method needs one, or a network that the method cannot take.
        """
        super().__init__(verbose=False)
        if self.needs_teacher and teacher is None:
            raise UserError(f"method '{config.method}' needs a teacher: give the folder of a trained one")
        self.check(config)
        self.config, self.spec, self.name = config, spec, name
        self.kd_weight = self.weight_in(config)
        self.epoch = 0  # the trainer's, for losses that grow
        self.teacher_indices: list[int] = []  # of the teacher's maps that the method looks at
        # Of its outputs, where they say something of every place: height and width. Both sides are compared there.
        self.grid = output_grid(student, spec.sides)
        self._label_loss = LABEL_LOSSES[task](config, all_labeled)
        self.trainable_module: nn.Module = self.with_auxiliaries(student, teacher)

    @classmethod
    def compares_outputs(cls, config: DistillSettings) -> bool:
        """Whether the student's outputs are compared with the teacher's, as far as the settings say."""
        return cls.teaches_outputs and cls.weight_in(config) > 0

    @classmethod
    def looks_at_maps(cls, config: DistillSettings) -> bool:  # noqa: ARG003 (one of them looks at its settings)
        """Whether the settings alone say that it looks at the teacher's feature maps."""
        return False

    @classmethod
    def check(cls, config: DistillSettings) -> None:
        """Refuse settings that can't be meant with this method, before anything is made. Raises UserError."""
        if config.teacher_control is not None and not cls.compares_outputs(config):
            raise UserError(
                f"teacher_control '{config.teacher_control}' changes what the teacher answers, and method "
                f"'{config.method}' as it is set does not look at that: leave it out, or take a method such as kd"
            )

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        """The student with this method's auxiliary modules."""
        return StudentWithAuxiliaries(student)

    @property
    def student(self) -> StudentWithAuxiliaries:
        """What learns, without what distributes it."""
        student: StudentWithAuxiliaries = unwrap_model(self.trainable_module)
        return student

    def prepare_distributed(self, device_ids: list[int] | None = None, **named: Any) -> Method:
        """Wrap what learns now in DDP; called again, wrap it anew."""
        self.trainable_module = DistributedDataParallel(self.student, device_ids=device_ids, **named)
        return self

    def phases(self, steps: int, steps_per_epoch: int) -> list[Phase]:
        """The parts of a training of so many ``steps``, in order. Raises UserError when they are too few."""
        return [Phase("all", steps, self.config.train.learning_rate)]

    def enter(self, phase: int) -> None:
        """Prepare for phase number ``phase``: what learns, what is frozen."""

    def grown(self, warmup_epochs: int) -> float:
        """What of its weight a loss has in this epoch that grows to it over so many, evenly."""
        return min((self.epoch + 1) / warmup_epochs, 1.0) if warmup_epochs else 1.0

    def trainable(self) -> Iterator[nn.Parameter]:
        """The parameters that learn in this phase."""
        return (parameter for parameter in self.trainable_module.parameters() if parameter.requires_grad)

    @property
    def asks_teacher(self) -> bool:
        """Whether the steps of this phase want the teacher's output."""
        return self.needs_teacher and self.kd_weight != 0

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch: its losses, and under 'output' the student's logits [B, K, ...].

        Args:
            input: the student's views, float [B, 3, H, W], normalised.
            target: classes [B, ...], or distributions [B, K, ...] after mixing.
            teacher: what the teacher says of the same views, where ``asks_teacher``.
            numbers: of the images [B], for methods that remember something of each.
        """
        output: StudentOutput = self.trainable_module(input)
        loss = self._label_loss(output.logits, target)
        return {"loss": self.config.label_weight * loss, "output": output.logits, "task_loss": loss}


class DistillationMethod(Method, ABC):
    """The frame of the methods that compare the student with a teacher."""

    needs_teacher = True
    needs_labels = False

    @abstractmethod
    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        """The method's own loss, a scalar; everything at the grid of the student's outputs.

        Args:
            student: its logits are [B, K, ...].
            teacher: likewise.
            target: classes [B, ...] or distributions [B, K, ...].
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch, as ``Method.forward``, with the method's loss added."""
        coarse = thinned(target, self.grid)
        # Shuffled before the student's forward: both draw from the same generator.
        shown = None if teacher is None else self._shown(teacher, coarse)
        output: StudentOutput = self.trainable_module(input)
        result = {"output": output.logits, "task_loss": self.labels_part(output, target)}
        loss = self.config.label_weight * result["task_loss"]
        if self.asks_teacher:
            if shown is None:
                raise ValueError(f"method '{self.config.method}' wants the teacher's output of every batch")
            for name, (weight, part) in self.teacher_parts(output, shown, coarse).items():
                result[name] = part
                loss = loss + weight * part
        return {"loss": loss, **result}

    def labels_part(self, student: StudentOutput, target: Tensor) -> Tensor:
        """The loss against the labels, a scalar."""
        return self._label_loss(student.logits, target)

    def teacher_parts(
        self, student: StudentOutput, teacher: TeacherOutput, target: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        """What the teacher adds to the loss: by name a weight and a scalar; takes what ``distillation_loss`` takes."""
        return {"kd_loss": (self.kd_weight, self.distillation_loss(student, teacher, target))}

    @property
    def softening(self) -> float:
        """The temperature by which the method softens the outputs that it compares."""
        return self.config.temperature

    def _shown(self, teacher: TeacherOutput, target: Tensor) -> TeacherOutput:
        """The teacher's output as the student gets to see it: at its grid; as a control, if one is asked for.

        ``target``: classes [B, ...] or distributions [B, K, ...] at that grid.
        """
        logits = resized(teacher.logits, self.grid)
        if self.config.teacher_control == "smoothing":
            logits = losses.smoothing_teacher(target, logits.shape[1], HAND_MADE_CONFIDENCE)
        elif self.config.shuffled_teacher or self.config.teacher_control == "flattened":
            rows = by_place(logits)
            if self.config.shuffled_teacher:
                rows = losses.shuffle_non_maximal(rows, torch.default_generator)
            else:
                rows = losses.flatten_non_maximal(rows, self.softening)
            logits = in_places(rows, (len(logits), *logits.shape[2:]))
        return TeacherOutput(logits, teacher.maps)


class LogitMethod(DistillationMethod):
    """The frame of the methods that compare logits with logits, each place of an image by itself."""

    teaches_outputs = True
    default_weight = 1.0
    takes_places: ClassVar[bool] = False  # as they stand in an image; else they are laid out as rows, which takes time

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        logits = student.logits, teacher.logits
        if self.config.standardize_logits or not self.takes_places:
            logits = by_place(student.logits), by_place(teacher.logits)
            target = by_place(target) if target.is_floating_point() else target.flatten()
        if self.config.standardize_logits:
            logits = losses.standardise(logits[0]), losses.standardise(logits[1])
        return self.logit_loss(*logits, target)

    @abstractmethod
    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        """The loss between logits by place [N, K], whose targets are classes [N] or distributions [N, K].

        A method that ``takes_places`` has to take [B, K, ...], with targets [B, ...] or [B, K, ...], too.
        """
        raise NotImplementedError(f"{type(self).__name__} has no loss of its own")


class Hard(LogitMethod):
    """The teacher's decisions as labels."""

    takes_places = True
    softening = 1.0

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return losses.hard(student, teacher)


class Kd(LogitMethod):
    """Vanilla distillation (Hinton et al. 2015): softened outputs."""

    takes_places = True

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return losses.kd(student, teacher, self.config.temperature)


class Bkd(LogitMethod):
    """K binary problems (Hao et al. 2023): the student's sigmoids against the teacher's probabilities."""

    takes_places = True
    softening = 1.0

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return losses.bkd(student, teacher)


class LogitMse(LogitMethod):
    """Squared difference of the logits themselves."""

    takes_places = True
    softening = math.inf  # whose limit it is

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return losses.logit_mse(student, teacher)


class Dkd(LogitMethod):
    """DKD (Zhao et al. 2022) parts the target class from the others: it has to know it, and needs two others."""

    needs_labels = True

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        if student.num_classes < 3:  # type: ignore[operator]
            raise UserError("method 'dkd' needs three classes at least, found 2 (its second part is nothing): take kd")
        return super().with_auxiliaries(student, teacher)

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        settings = self.config.dkd
        # Where nobody knows the label, the student has nothing to learn: it is compared with itself.
        known = target >= 0 if target.ndim == 1 else target.sum(1) > 0
        teacher, target = teacher.where(known[:, None], student.detach()), target.clamp(min=0)
        loss = losses.dkd(student, teacher, target, settings.alpha, settings.beta, self.config.temperature)
        return self.grown(settings.warmup_epochs) * loss


class Dist(LogitMethod):
    """DIST (Huang et al. 2022): correlations within a sample and within a class, weighed by two as its authors do."""

    default_weight = 2.0

    def logit_loss(self, student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        return losses.dist(student, teacher, self.config.dist.beta, self.config.dist.gamma, self.config.temperature)


class FeatureMethod(DistillationMethod):
    """The frame of the methods that look at stages; the loop is told which of the teacher's maps are wanted."""

    stages: ClassVar[slice] = slice(None)  # which of the paired stages
    with_stem: ClassVar[bool] = False  # whether what comes before the first stage counts as one
    with_decoder: ClassVar[bool] = False  # whether a decoder's blocks follow the stages

    @classmethod
    def looks_at_maps(cls, config: DistillSettings) -> bool:  # noqa: ARG003 (as above)
        return True

    @classmethod
    def check(cls, config: DistillSettings) -> None:
        super().check(config)
        if config.cache_views is not None and cls.looks_at_maps(config):
            raise cls._lacks_maps(config)

    @staticmethod
    def _lacks_maps(config: DistillSettings) -> UserError:
        return UserError(
            f"method '{config.method}' looks at the teacher's feature maps and a cache holds its logits: "
            "leave out cache_views, or take a method such as kd"
        )

    def teacher_maps(self, teacher: TeacherOutput) -> list[Tensor]:
        """The teacher's maps [B, C, H, W] at the paired stages."""
        return [teacher.maps[index] for index in self.teacher_indices]

    def pair_stages(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> list[int]:
        """Indices of the student's stages; those of the teacher's go to ``teacher_indices``.

        Raises:
            UserError: one network has no stages, or the teacher is not asked but remembered.
        """
        if isinstance(teacher, CachedTeacher):
            raise self._lacks_maps(self.config)
        assert teacher is not None
        students, teachers = paired(
            stage_indices(student, self.name, self.with_stem),
            stage_indices(teacher.network, "the teacher", self.with_stem),
        )
        if self.with_decoder:
            blocks, its_blocks = paired(block_indices(student), block_indices(teacher.network))
            students, teachers = students + blocks, teachers + its_blocks
        chosen = self.chosen_of(len(students))
        self.teacher_indices = [teachers[at] for at in chosen]
        return [students[at] for at in chosen]

    def chosen_of(self, pairs: int) -> list[int]:
        """Which of so many paired stages are looked at, ascending. Raises UserError."""
        return list(range(pairs))[self.stages]

    def to_compare(self, student_map: Tensor, teacher_map: Tensor) -> tuple[Tensor, Tensor]:
        """An adapted map and the teacher's [B, C, H, W] at the smaller height and width, its normalised if asked."""
        mine, its = same_size(student_map, teacher_map)
        return mine, losses.standardise_channels(its) if self.config.hint.normalize else its

    def adapters(
        self, student: nn.Module, indices: list[int], teacher: Teacher | CachedTeacher | None, where_equal: bool
    ) -> nn.ModuleList:
        """From each of the student's maps to the channels of the teacher's; identity for equal ones if wanted."""
        assert isinstance(teacher, Teacher)
        students = map_shapes(student, self.spec.sides, indices)
        teachers = map_shapes(teacher.network, teacher.sides, self.teacher_indices)
        return nn.ModuleList(
            Adapter(here[0], there[0]) if where_equal or here[0] != there[0] else nn.Identity()
            for here, there in zip(students, teachers, strict=True)
        )


class Hint(FeatureMethod):
    """FitNet's hint (Romero et al. 2015): MSE of an adapted middle stage, or of several, together with the labels.

    Its authors let the stages up to the hint learn it first, and then the whole network from labels and kd without it
    (``hint.two_stages``, ``hint.logits``). Their regressor ends in the convolution, here a BatchNorm follows.
    """

    default_weight = 100.0
    stages = slice(-2, -1)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._indices = self.student.indices
        self._hints_alone = False
        if self._is_staged:
            parts = stage_parameters(self.student.student, self.spec.sides, self._indices)
            self._below = {name for part in parts[:-1] for name in part}  # up to the deepest hint

    @classmethod
    def compares_outputs(cls, config: DistillSettings) -> bool:
        return config.hint.logits

    @property
    def _is_staged(self) -> bool:
        return self.config.hint.two_stages is not None

    def chosen_of(self, pairs: int) -> list[int]:
        stages = self.config.hint.stages
        if stages is None:
            return super().chosen_of(pairs) or [0]
        if wrong := [stage for stage in stages if not 1 <= abs(stage) <= pairs]:
            raise UserError(
                f"hint.stages has {wrong[0]}, and '{self.name}' and its teacher share {pairs} stages: wanted "
                f"1 to {pairs}, or -{pairs} to -1"
            )
        chosen = sorted(stage - 1 if stage > 0 else pairs + stage for stage in stages)
        if twice := [stage + 1 for stage, after in pairwise(chosen) if stage == after]:
            raise UserError(f"hint.stages names stage {twice[0]} of {pairs} twice: name each once")
        return chosen

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        indices = self.pair_stages(student, teacher)
        return StudentWithAuxiliaries(student, indices, self.adapters(student, indices, teacher, where_equal=True))

    def phases(self, steps: int, steps_per_epoch: int) -> list[Phase]:
        """One; or two, the first of ``hint.two_stages`` of the steps, at least one each."""
        share, rate = self.config.hint.two_stages, self.config.train.learning_rate
        if share is None:
            return super().phases(steps, steps_per_epoch)
        if steps < 2:
            raise UserError("hint.two_stages shares 1 step between two phases: take more train.epochs")
        first = min(max(1, round(steps * share)), steps - 1)
        return [Phase("hint", first, rate, has_accuracy=False), Phase("all", steps - first, rate)]

    def enter(self, phase: int) -> None:
        if not self._is_staged:
            return
        student, self._hints_alone = self.student, phase == 0
        for name, parameter in student.student.named_parameters():
            parameter.requires_grad_(phase > 0 or name in self._below)
        student.auxiliaries.requires_grad_(phase == 0)
        student.indices = self._indices if phase == 0 else []

    @property
    def asks_teacher(self) -> bool:
        return self.config.hint.logits or (self._hints_alone if self._is_staged else super().asks_teacher)

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch: labels and hints; or, in two stages, the hints alone and then the labels without them."""
        if not self._hints_alone:
            return super().forward(input, target, teacher, numbers)
        if teacher is None:
            raise ValueError("method 'hint' wants the teacher's output of every batch")
        output: StudentOutput = self.trainable_module(input, len(self._indices) - 1)
        loss = self.distillation_loss(output, teacher, target)
        return {"loss": loss, "kd_loss": loss}

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        pairs = zip(student.auxiliary, self.teacher_maps(teacher), strict=True)
        return torch.stack([losses.hint(*self.to_compare(*pair)) for pair in pairs]).mean()

    def teacher_parts(
        self, student: StudentOutput, teacher: TeacherOutput, target: Tensor
    ) -> dict[str, tuple[float, Tensor]]:
        parts = {} if self._is_staged else super().teacher_parts(student, teacher, target)
        if self.config.hint.logits:
            parts["logit_loss"] = (1.0, losses.kd(student.logits, teacher.logits, self.config.temperature))
        return parts


class ChannelWise(FeatureMethod):
    """Channel-wise distillation (Shu et al. 2021): where in an image each channel is large.

    Of the logits, a channel being a class; or of the deepest features that have several places, which of a decoder
    are those that the head sees, through an adapter only where the widths differ. The weight is the one that its
    authors give logits, at their T = 4.
    """

    default_weight = 3.0
    with_decoder = True

    @classmethod
    def looks_at_maps(cls, config: DistillSettings) -> bool:
        return config.cwd_on == "features"

    @classmethod
    def compares_outputs(cls, config: DistillSettings) -> bool:
        return config.cwd_on != "features"  # left out, the network decides

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        on = self.config.cwd_on or ("logits" if self.grid else "features")
        if on == "logits" and not self.grid:
            raise UserError(
                f"method 'cwd' compares where in an image a class is, and '{self.name}' gives one answer an image: "
                "set cwd_on to features, or take kd"
            )
        if on == "logits":
            return StudentWithAuxiliaries(student)
        if self.config.teacher_control is not None:
            raise UserError(
                f"teacher_control '{self.config.teacher_control}' changes what the teacher answers, and method 'cwd' "
                "looks at features here: leave it out, or set cwd_on to logits"
            )
        if not self.config.label_fraction:
            raise UserError(
                f"method 'cwd' compares features of '{self.name}', so that its outputs learn nothing at label_fraction "
                "0: take more, or kd"
            )
        indices = self.pair_stages(student, teacher)
        assert isinstance(teacher, Teacher)
        mine = map_shapes(student, self.spec.sides, indices)
        its = map_shapes(teacher.network, teacher.sides, self.teacher_indices)
        spread = [
            at
            for at, (here, there) in enumerate(zip(mine, its, strict=True))
            if max(map(min, zip(here[1:], there[1:], strict=True))) > 1
        ]
        if not spread:
            raise UserError(f"method 'cwd': no stage of '{self.name}' has several places: wanted a larger input.size")
        indices, self.teacher_indices = [indices[spread[-1]]], [self.teacher_indices[spread[-1]]]
        return StudentWithAuxiliaries(student, indices, self.adapters(student, indices, teacher, where_equal=False))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        pair = student.logits, teacher.logits
        if student.auxiliary:
            pair = same_size(student.auxiliary[0], self.teacher_maps(teacher)[0])
        return losses.cwd(*pair, self.config.temperature)


class AttentionTransfer(FeatureMethod):
    """Attention transfer (Zagoruyko and Komodakis 2017) over all paired stages."""

    default_weight = 1000.0

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        return StudentWithAuxiliaries(student, self.pair_stages(student, teacher))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        return losses.attention(student.maps, self.teacher_maps(teacher))


class Relational(FeatureMethod):
    """Relational distillation (Park et al. 2019) on the pooled deepest stage."""

    default_weight = 1.0
    stages = slice(-1, None)

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        return StudentWithAuxiliaries(student, self.pair_stages(student, teacher))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        weights = self.config.rkd
        deepest = student.maps[-1], self.teacher_maps(teacher)[-1]
        pooled, teacher_pooled = (maps.float().mean((2, 3)) for maps in deepest)
        return losses.rkd(pooled, teacher_pooled, weights.distance_weight, weights.angle_weight)


class CorrelationCongruence(FeatureMethod):
    """Correlation congruence (Peng et al. 2019) of the pooled deepest stage, without the projection of its authors.

    Their weight is of another balance; this one is our own.
    """

    default_weight = 100.0
    stages = slice(-1, None)

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        return StudentWithAuxiliaries(student, self.pair_stages(student, teacher))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        deepest = student.maps[-1], self.teacher_maps(teacher)[-1]
        pooled, teacher_pooled = (maps.float().mean((2, 3)) for maps in deepest)
        return losses.cc(pooled, teacher_pooled)


class Contrastive(FeatureMethod):
    """Contrastive distillation (Tian et al. 2020) of the pooled deepest stage.

    An image's embedding by one network is to be near that by the other, and far from the other's of other images: of
    another class, where classes are known. Its authors remember an embedding of every image of the data; here the last
    ``crd.negatives`` are remembered, as they were.
    """

    default_weight = 0.8
    stages = slice(-1, None)

    @classmethod
    def check(cls, config: DistillSettings) -> None:
        super().check(config)
        remembered, batch_size = config.crd.negatives, config.train.batch_size
        if remembered < batch_size:
            raise UserError(f"crd.negatives is {remembered}: wanted as many as a batch, {batch_size}, at least")

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        settings = self.config.crd
        indices = self.pair_stages(student, teacher)
        assert isinstance(teacher, Teacher)
        mine = map_shapes(student, self.spec.sides, indices)[0]
        its = map_shapes(teacher.network, teacher.sides, self.teacher_indices)[0]
        return StudentWithAuxiliaries(student, indices, Contrast(mine[0], its[0], settings.width, settings.negatives))

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch, as ``Method.forward``; an image's other views are never its negatives."""
        self._numbers = numbers
        return super().forward(input, target, teacher, numbers)

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        contrast = cast("Contrast", self.student.auxiliaries)
        mine, its = student.auxiliary[0], contrast.of_teacher(self.teacher_maps(teacher)[0])
        unknown = torch.full((len(mine),), UNLABELED, device=mine.device)
        numbers = unknown if self._numbers is None else self._numbers.to(mine.device, non_blocking=True)
        is_negative = contrast.remember(mine, its, self._classes(target, unknown), numbers)
        temperature = self.config.crd.temperature
        return losses.crd(mine, its, contrast.teachers, is_negative, temperature) + losses.crd(
            its, mine, contrast.students, is_negative, temperature
        )

    @staticmethod
    def _classes(target: Tensor, unknown: Tensor) -> Tensor:
        """The class of each image [B], where an image has one."""
        if target.ndim > 2 or (target.ndim == 2 and not target.is_floating_point()):
            return unknown
        return target if target.ndim == 1 else target.argmax(1).where(target.sum(1) > 0, unknown)


class KnowledgeReview(FeatureMethod):
    """Knowledge review (Chen et al. 2021): all stages' maps, each fused with those that are deeper.

    Its authors take the teacher's maps before their last activation, here they are as timm gives them.
    """

    default_weight = 1.0

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        indices = self.pair_stages(student, teacher)
        assert isinstance(teacher, Teacher)
        mine = map_shapes(student, self.spec.sides, indices)
        its = map_shapes(teacher.network, teacher.sides, self.teacher_indices)
        channels = [[shape[0] for shape in shapes] for shapes in (mine, its)]
        return StudentWithAuxiliaries(student, indices, Review(*channels))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        pairs = zip(student.auxiliary, self.teacher_maps(teacher), strict=True)
        mine, its = zip(*(self.to_compare(*pair) for pair in pairs), strict=True)
        return self.grown(self.config.review.warmup_epochs) * losses.review(mine, its)


class DeepSupervision(DistillationMethod):
    """Vanilla distillation of the student's logits and of auxiliary heads on its inner stages.

    A design of this project: the idea (more information for the student) is Hao et al.'s (2025), whose own
    branches are not public; ``deep`` says how wide the heads are and what they weigh. Of a network that draws masks
    the heads sit on the encoder's stages and on the decoder's blocks, and say something of every place.
    """

    teaches_outputs = True
    default_weight = 1.0

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        indices = [*stage_indices(student, self.name), *block_indices(student)]
        *shapes, deepest = map_shapes(student, self.spec.sides, indices)
        widest = self._widest(deepest[0], teacher) if self.config.deep.width == "doubling" else 0
        classes = cast("int", student.num_classes)
        heads: list[nn.Module] = []
        for at, (channels, height, width) in enumerate(shapes):
            if self.grid:
                heads.append(PlacesHead(channels, (height, width), (self.grid[0], self.grid[1]), classes))
            else:
                halvings = min(len(shapes) - at, max(0, min(height, width).bit_length() - 1))
                heads.append(AuxiliaryHead(channels, halvings, classes, widest))
        return StudentWithAuxiliaries(student, indices[:-1], heads)

    @classmethod
    def check(cls, config: DistillSettings) -> None:
        super().check(config)
        if config.deep.width == "doubling" and config.cache_views is not None:
            raise UserError(
                "deep.width is doubling, up to the teacher's width, and a cache does not tell that: leave it own, or "
                "leave out cache_views"
            )

    def _widest(self, channels: int, teacher: Teacher | CachedTeacher | None) -> int:
        """The larger of the student's deepest ``channels`` and the teacher's. Raises UserError."""
        if self.grid:
            raise UserError(
                "deep.width is doubling, and heads that say something of every place halve no map: leave it own"
            )
        if not isinstance(teacher, Teacher) or not hasattr(teacher.network, "forward_intermediates"):
            raise UserError(
                "deep.width is doubling, up to the teacher's width, and this teacher gives no intermediate features: "
                "leave it own"
            )
        deepest = stage_indices(teacher.network, "the teacher")[-1:]
        return max(channels, map_shapes(teacher.network, teacher.sides, deepest)[0][0])

    @property
    def head_weight(self) -> float:
        """What a head weighs in this epoch."""
        left = 1 - self.epoch / self.config.train.epochs if self.config.deep.fade else 1.0
        return self.config.deep.weight * left

    def labels_part(self, student: StudentOutput, target: Tensor) -> Tensor:
        if not self.config.deep.labels:
            return super().labels_part(student, target)
        return self._sum(student, lambda logits: self._label_loss(logits, target))

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            return losses.kd(logits, resized(teacher.logits, logits.shape[2:]), self.config.temperature)

        return self._sum(student, loss)

    def _sum(self, student: StudentOutput, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss of the student's logits, and those of the heads by their weight."""
        return torch.stack([loss(student.logits), *(self.head_weight * loss(each) for each in student.auxiliary)]).sum()


class Stagewise(FeatureMethod):
    """One stage after another learns the teacher's features, the rest frozen; then the head learns the labels.

    After Kulkarni et al. (2019), without selection on the test set. The stem is the first stage where both networks
    give its map. A stage's loss is the MSE to the teacher's map, through an adapter only where the widths differ.
    The blocks of a decoder follow the encoder's stages, one by one.
    The head's loss is the labels', and KD's if ``kd_weight`` is given.
    """

    teaches_outputs = True  # its head, if kd_weight is given
    with_stem = True
    with_decoder = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        student = self.student
        self._stages = stage_parameters(student.student, self.spec.sides, student.indices)
        self._phase = 0

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        indices = self.pair_stages(student, teacher)
        # What a stage ends in may not be able to give what is below a mean, so that normalised maps want an adapter.
        adapters = self.adapters(student, indices, teacher, where_equal=self.config.hint.normalize)
        return StudentWithAuxiliaries(student, indices, adapters)

    def phases(self, steps: int, steps_per_epoch: int) -> list[Phase]:
        """One a stage and one of the head: equal shares of ``steps``, or ``stagewise.epochs`` each."""
        settings, train = self.config.stagewise, self.config.train
        count = len(self._stages)
        if settings.epochs is not None:
            steps = count * settings.epochs * steps_per_epoch
        if steps < count:
            raise UserError(
                f"method 'stagewise' shares {steps} step(s) between {count} phases: wanted one each, "
                "take more train.epochs or a smaller train.batch_size"
            )
        ends = [steps * (at + 1) // count for at in range(count)]
        shares = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
        rate = settings.learning_rate or train.learning_rate
        parts = zip(self._names, shares, strict=False)  # the last share is the head's
        stages = [Phase(name, share, rate, False, settings.handover) for name, share in parts]
        return [*stages, Phase("head", shares[-1], train.learning_rate)]

    @property
    def _names(self) -> list[str]:
        """Of the stages, without the head."""
        blocks = len(set(self.student.indices) & set(block_indices(self.student.student)))
        stages = len(self.student.indices) - blocks
        stem = ["stem"] if stages > STAGES else []
        return [
            *stem,
            *(f"stage {at + 1}" for at in range(stages - len(stem))),
            *(f"block {at + 1}" for at in range(blocks)),
        ]

    def enter(self, phase: int) -> None:
        self._phase = phase
        student = self.student
        learning = set(self._stages[phase])
        for name, parameter in student.student.named_parameters():
            parameter.requires_grad_(name in learning)
        for at, adapter in enumerate(student.auxiliaries.children()):
            adapter.requires_grad_(at == phase)
        self.train()

    def train(self, mode: bool = True) -> Stagewise:
        """Keep the statistics of frozen BatchNorms, unless ``frozen_batchnorm`` lets them move on."""
        super().train(mode)
        if mode and hasattr(self, "_phase") and self.config.stagewise.frozen_batchnorm == "eval":
            for module in self.student.modules():
                own = list(module.parameters(recurse=False))
                if own and isinstance(module, nn.modules.batchnorm._BatchNorm) and not own[0].requires_grad:
                    module.eval()
        return self

    @property
    def _learns_head(self) -> bool:
        return self._phase == len(self._stages) - 1

    @property
    def asks_teacher(self) -> bool:
        return super().asks_teacher or not self._learns_head

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch: the loss of this phase's stage, or of the head."""
        if self._learns_head:
            return super().forward(input, target, teacher, numbers)
        if teacher is None:
            raise ValueError("method 'stagewise' wants the teacher's output of every batch")
        # Stages above learn later; they are left out unless their statistics are to move already.
        deepest = self._phase if self.config.stagewise.frozen_batchnorm == "eval" else None
        shown = self._shown(teacher, thinned(target, self.grid))
        output: StudentOutput = self.trainable_module(input, deepest)
        pair = output.auxiliary[self._phase], self.teacher_maps(shown)[self._phase]
        loss = losses.hint(*self.to_compare(*pair))
        return {"loss": loss, "kd_loss": loss}

    def distillation_loss(self, student: StudentOutput, teacher: TeacherOutput, target: Tensor) -> Tensor:
        return losses.kd(student.logits, teacher.logits, self.config.temperature)


class MaskedImages(Method):
    """Masked-image modelling: squares of a view are hidden, and the network learns to paint them from the rest.

    After SimMIM (Xie et al. 2022): one linear layer paints, which is dropped afterwards, and the loss is the mean
    absolute difference over what was hidden, in normalised colours. What is hidden has the mean colour instead of a
    learned token, so that convolutions can be trained as well as transformers. No teacher, no labels: the head learns
    nothing, and the result is what a student starts from.
    """

    needs_labels = False
    learns_outputs = False

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        student, settings = self.student, self.config.masked
        self._patch = settings.patch or max(1, min(self.spec.sides) // 7)
        rows, columns = (math.ceil(side / self._patch) for side in self.spec.sides)
        if rows * columns < 2:
            raise UserError(
                f"masked.patch is {self._patch} and hides a view of {size_words(self.spec.size)} pixels whole: "
                "take a smaller one"
            )
        self._squares = rows, columns
        self._count = min(max(1, round(settings.ratio * rows * columns)), rows * columns - 1)
        self._learning = set(stage_parameters(student.student, self.spec.sides, student.indices)[0])
        self._seed = int(torch.randint(2**31, ()))  # from that of the run, in whose name this is made

    @classmethod
    def check(cls, config: DistillSettings) -> None:
        super().check(config)
        if config.train.select == "best":
            raise UserError("train.select best: method 'masked' has no accuracy to select by, take last")

    def with_auxiliaries(self, student: nn.Module, teacher: Teacher | CachedTeacher | None) -> StudentWithAuxiliaries:
        try:
            deepest = [*stage_indices(student, self.name), *block_indices(student)][-1:]
        except UserError:
            raise UserError(
                f"method 'masked' paints from a stage's features, and '{self.name}' gives none through timm: take a "
                "network of timm's own"
            ) from None
        [(channels, height, width)] = map_shapes(student, self.spec.sides, deepest)
        return StudentWithAuxiliaries(student, deepest, [Painter(channels, (height, width), self.spec.sides)])

    def phases(self, steps: int, steps_per_epoch: int) -> list[Phase]:
        return [Phase("masked", steps, self.config.train.learning_rate, has_accuracy=False)]

    def enter(self, phase: int) -> None:
        """Freeze what no painted pixel depends on: the head."""
        for name, parameter in self.student.student.named_parameters():
            if name not in self._learning:
                parameter.requires_grad_(False)

    def hidden(self, numbers: Tensor) -> Tensor:
        """Which pixels of the views of these images [B] are hidden, bool [B, 1, H, W]: as many squares of each.

        A function of the run's seed, the epoch and the image's number: neither the batch nor the process has a say.
        """
        (rows, columns), (height, width) = self._squares, self.spec.sides
        drawn = (np.random.default_rng((self._seed, self.epoch, number)) for number in numbers.tolist())
        order = np.stack([generator.permutation(rows * columns) for generator in drawn])
        squares = torch.from_numpy(order < self._count).reshape(len(order), 1, rows, columns)
        return squares.repeat_interleave(self._patch, 2).repeat_interleave(self._patch, 3)[..., :height, :width]

    def forward(
        self,
        input: Tensor,
        target: Tensor,
        teacher: TeacherOutput | None = None,
        numbers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One batch: how far what is painted is from what was hidden."""
        known = torch.arange(len(input)) if numbers is None else numbers
        hidden = self.hidden(known).to(input.device, non_blocking=True)
        output: StudentOutput = self.trainable_module(input.masked_fill(hidden, 0), 0)
        missed = ((output.auxiliary[0] - input.float()).abs() * hidden).sum((1, 2, 3))
        return {"loss": (missed / (3 * hidden.sum((1, 2, 3)))).mean()}


METHODS: dict[configuration.Method, type[Method]] = {
    "labels": Method,
    "hard": Hard,
    "kd": Kd,
    "bkd": Bkd,
    "logit_mse": LogitMse,
    "dkd": Dkd,
    "dist": Dist,
    "cwd": ChannelWise,
    "hint": Hint,
    "at": AttentionTransfer,
    "rkd": Relational,
    "cc": CorrelationCongruence,
    "crd": Contrastive,
    "review": KnowledgeReview,
    "deep_supervision": DeepSupervision,
    "stagewise": Stagewise,
    "masked": MaskedImages,
}
