"""The methods: each is one of timm's training tasks, a forward that returns a dict with 'loss'.

``loss = label_weight * label loss + kd_weight * the method's loss``; both are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import torch
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import TrainingTask
from timm.utils.model import unwrap_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..core.config import DistillSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from . import losses
from .cache import CachedTeacher
from .features import (
    Adapter,
    AuxiliaryHead,
    map_shapes,
    maps_alone,
    maps_and_logits,
    paired,
    same_size,
    stage_indices,
    stage_parameters,
)
from .teacher import Lesson, Teacher


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own optimiser and schedule."""

    name: str
    epochs: int
    learning_rate: float
    has_accuracy: bool = True  # whether the network's logits mean something yet
    handover: str = "last"


class Answer(NamedTuple):
    """What the pupil says of a batch: logits [B, K] (if it went so far), its maps, what its additions make of them."""

    logits: Any  # a Tensor wherever it is looked at
    maps: list[Tensor]
    outputs: list[Tensor]


class Pupil(nn.Module):
    """The student with what a method adds to it: trained together, the additions dropped afterwards."""

    def __init__(self, student: nn.Module, indices: Sequence[int] = (), additions: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.student, self.additions = student, nn.ModuleList(additions)
        self.indices: list[int] = list(indices)

    def forward(self, image: Tensor, deepest: int | None = None) -> Answer:
        """All of it; or the maps up to number ``deepest`` alone, without logits."""
        if not self.indices:
            return Answer(self.student(image), [], [])
        if deepest is None:
            maps, logits = maps_and_logits(self.student, image, self.indices)
        else:
            maps, logits = maps_alone(self.student, image, self.indices[: deepest + 1]), None
        outputs = [addition(features) for addition, features in zip(self.additions, maps, strict=False)]
        return Answer(logits, maps, outputs)


def label_loss(config: DistillSettings) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy or BCE (mean over B * K, as timm), smoothed if asked, in float32.

    The target is a class [B], or a distribution [B, K] after mixing. An image without label, whose class is
    ``UNLABELED`` or whose distribution is nothing, adds nothing to the sum over the batch's images.
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
        if known.all():
            return cast("Tensor", criterion(logits.float(), target))
        if not known.any():
            return 0 * logits.float().sum()
        return cast("Tensor", criterion(logits[known].float(), target[known])) * known.float().mean()

    return loss


class DistillationTask(TrainingTask):  # type: ignore[misc]
    """Labels alone: the control of every method, and the frame of all others."""

    needs_teacher: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = True  # and so learns nothing from images that have none
    teaches_outputs: ClassVar[bool] = False  # rather than features alone
    looks_at_maps: ClassVar[bool] = False  # of the teacher, so that its logits are not enough
    own_weight: ClassVar[float] = 0.0  # of the method's loss, where the configuration names none

    def __init__(
        self,
        config: DistillSettings,
        student: nn.Module,
        spec: InputSpec,
        teacher: Teacher | CachedTeacher | None,
        name: str = "student",
    ) -> None:
        super().__init__(verbose=False)
        if self.needs_teacher and teacher is None:
            raise UserError(f"method '{config.method}' needs a teacher: give the folder of a trained one")
        self.config, self.spec, self.name = config, spec, name
        self.teacher = teacher if self.needs_teacher else None
        self.kd_weight = self.own_weight if config.kd_weight is None else config.kd_weight
        self.epoch = 0  # the trainer's, for losses that grow
        self._label_loss = label_loss(config)
        self.trainable_module: nn.Module = self.equip(student)

    def equip(self, student: nn.Module) -> Pupil:
        """The student with this method's additions."""
        return Pupil(student)

    @property
    def pupil(self) -> Pupil:
        """What learns, without what distributes it."""
        pupil: Pupil = unwrap_model(self.trainable_module)
        return pupil

    def prepare_distributed(self, device_ids: list[int] | None = None, **named: Any) -> DistillationTask:
        """Wrap what learns now in DDP; called again, wrap it anew."""
        self.trainable_module = DistributedDataParallel(self.pupil, device_ids=device_ids, **named)
        return self

    def phases(self) -> list[Phase]:
        train = self.config.train
        return [Phase("all", train.epochs, train.learning_rate)]

    def enter(self, phase: int) -> None:
        """Prepare for phase number ``phase``: what learns, what is frozen."""

    def trainable(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.trainable_module.parameters() if parameter.requires_grad)

    def lesson(self, input: Tensor) -> Lesson:
        """What the teacher says of a batch, its non-maximal logits shuffled if that control is asked for."""
        assert self.teacher is not None
        lesson: Lesson = self.teacher(input)
        if self.config.shuffled_teacher:
            lesson = Lesson(losses.shuffle_non_maximal(lesson.logits, torch.default_generator), lesson.maps)
        return lesson

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        """The method's own loss, a scalar."""
        raise NotImplementedError

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        # The teacher first: the student's activations are then still in the cache when its backward wants them.
        lesson = self.lesson(input) if self.teacher is not None and self.kd_weight else None
        answer = self.trainable_module(input)
        result = {"output": answer.logits, "task_loss": self._label_loss(answer.logits, target)}
        loss = self.config.label_weight * result["task_loss"]
        if lesson is not None:
            result["kd_loss"] = self.compare(answer, lesson, target)
            loss = loss + self.kd_weight * result["kd_loss"]
        return {"loss": loss, **result}


class LogitTask(DistillationTask):
    """Everything that compares logits with logits."""

    needs_teacher = True
    needs_labels = False
    teaches_outputs = True
    own_weight = 1.0

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return logit_loss(self.config, answer.logits, lesson.logits, target, self.epoch)


class DkdTask(LogitTask):
    """DKD parts the target class from the others, so it has to know it, and needs two others at least."""

    needs_labels = True

    def equip(self, student: nn.Module) -> Pupil:
        if student.num_classes < 3:  # type: ignore[operator]
            raise UserError("method 'dkd' needs three classes at least, found 2 (its second part is nothing): take kd")
        return super().equip(student)


class DistTask(LogitTask):
    """DIST weighs its correlations by two (its authors' setting)."""

    own_weight = 2.0


def logit_loss(config: DistillSettings, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> Tensor:
    """The loss of a logit method between logits [B, K]; ``epoch`` counts from 0."""
    if config.standardize_logits:
        student, teacher = losses.standardise(student), losses.standardise(teacher)
    match config.method:
        case "hard":
            return losses.hard(student, teacher)
        case "bkd":
            return losses.bkd(student, teacher)
        case "logit_mse":
            return losses.logit_mse(student, teacher)
        case "dkd":
            warmup = config.dkd.warmup_epochs
            grown = min((epoch + 1) / warmup, 1.0) if warmup else 1.0
            return grown * losses.dkd(student, teacher, target, config.dkd.alpha, config.dkd.beta, config.temperature)
        case "dist":
            return losses.dist(student, teacher, config.dist.beta, config.dist.gamma, config.temperature)
        case _:
            return losses.kd(student, teacher, config.temperature)


class FeatureTask(DistillationTask):
    """The frame of methods that look at stages; the teacher is told which of its maps are wanted."""

    needs_teacher = True
    needs_labels = False
    looks_at_maps = True
    stages: ClassVar[slice] = slice(None)  # which of the paired stages
    its_stages: list[int]  # of the teacher, paired with the student's

    def maps(self, lesson: Lesson) -> list[Tensor]:
        """The teacher's maps at the paired stages."""
        return [lesson.maps[index] for index in self.its_stages]

    def indices(self, student: nn.Module) -> list[int]:
        """Agree with the teacher on stages. Raises UserError where one network has none."""
        assert isinstance(self.teacher, Teacher)
        mine, its = paired(stage_indices(student, self.name), stage_indices(self.teacher.network, "the teacher"))
        self.its_stages = its[self.stages]
        self.teacher.wanted.update(self.its_stages)
        return mine[self.stages]

    def adapters(self, student: nn.Module, indices: list[int], where_equal: bool) -> nn.ModuleList:
        """From each of the student's maps to the channels of the teacher's; identity for equal ones if wanted."""
        assert isinstance(self.teacher, Teacher)
        mine = map_shapes(student, self.spec.size, indices)
        its = map_shapes(self.teacher.network, self.teacher.size, self.its_stages)
        return nn.ModuleList(
            Adapter(here[0], there[0]) if where_equal or here[0] != there[0] else nn.Identity()
            for here, there in zip(mine, its, strict=True)
        )


class HintTask(FeatureTask):
    """FitNet's hint (Romero et al. 2015): MSE of an adapted middle stage, together with the labels."""

    own_weight = 100.0
    stages = slice(-2, -1)

    def equip(self, student: nn.Module) -> Pupil:
        indices = self.indices(student)
        return Pupil(student, indices, self.adapters(student, indices, where_equal=True))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.hint(*same_size(answer.outputs[0], self.maps(lesson)[0]))


class AttentionTask(FeatureTask):
    """Attention transfer (Zagoruyko and Komodakis 2017) over all paired stages."""

    own_weight = 1000.0

    def equip(self, student: nn.Module) -> Pupil:
        return Pupil(student, self.indices(student))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.attention(answer.maps, self.maps(lesson))


class RelationTask(FeatureTask):
    """Relational distillation (Park et al. 2019) on the pooled deepest stage."""

    own_weight = 1.0
    stages = slice(-1, None)

    def equip(self, student: nn.Module) -> Pupil:
        return Pupil(student, self.indices(student))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        weights = self.config.rkd
        mine, its = (each[-1].float().mean((2, 3)) for each in (answer.maps, self.maps(lesson)))
        return losses.rkd(mine, its, weights.distance_weight, weights.angle_weight)


class DeepSupervisionTask(DistillationTask):
    """Vanilla distillation of the student's logits and of auxiliary heads on its inner stages.

    A design of this project: the idea (more information for the student) is Hao et al.'s (2025), whose own
    branches are not public. Every head gets the same KL as the last, with equal weight.
    """

    needs_teacher = True
    needs_labels = False
    teaches_outputs = True
    own_weight = 1.0

    def equip(self, student: nn.Module) -> Pupil:
        indices = stage_indices(student, self.name)[:-1]
        classes = student.num_classes
        heads = nn.ModuleList(
            AuxiliaryHead(channels, min(len(indices) - at, max(0, height.bit_length() - 1)), classes)  # type: ignore[arg-type]
            for at, (channels, height, _) in enumerate(map_shapes(student, self.spec.size, indices))
        )
        return Pupil(student, indices, heads)

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        loss = losses.kd(answer.logits, lesson.logits, self.config.temperature)
        for logits in answer.outputs:
            loss = loss + losses.kd(logits, lesson.logits, self.config.temperature)
        return loss


class StagewiseTask(FeatureTask):
    """One stage after another learns the teacher's features, the rest frozen; then the head learns the labels.

    After Kulkarni et al. (2019), without selection on the test set. A stage's loss is the MSE to the teacher's
    map, through an adapter only where the widths differ. The head's loss is the labels', and KD's if
    ``kd_weight`` is given.
    """

    teaches_outputs = True  # its head, if kd_weight is given

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        pupil = self.pupil
        self._stages = stage_parameters(pupil.student, self.spec.size, pupil.indices)
        self._phase = 0

    def equip(self, student: nn.Module) -> Pupil:
        indices = self.indices(student)
        return Pupil(student, indices, self.adapters(student, indices, where_equal=False))

    def phases(self) -> list[Phase]:
        settings, train = self.config.stagewise, self.config.train
        count = len(self._stages)
        epochs = settings.epochs or max(1, train.epochs // count)
        head = settings.epochs or max(1, train.epochs - epochs * (count - 1))
        rate = settings.learning_rate or train.learning_rate
        stages = [Phase(f"stage {at + 1}", epochs, rate, False, settings.handover) for at in range(count - 1)]
        return [*stages, Phase("head", head, train.learning_rate)]

    def enter(self, phase: int) -> None:
        self._phase = phase
        pupil = self.pupil
        learning = set(self._stages[phase])
        for name, parameter in pupil.student.named_parameters():
            parameter.requires_grad_(name in learning)
        for at, adapter in enumerate(pupil.additions):
            adapter.requires_grad_(at == phase)
        self.train()

    def train(self, mode: bool = True) -> StagewiseTask:
        """Keep the statistics of frozen BatchNorms, unless ``frozen_batchnorm`` lets them move on."""
        super().train(mode)
        if mode and hasattr(self, "_phase") and self.config.stagewise.frozen_batchnorm == "eval":
            for module in self.pupil.modules():
                own = list(module.parameters(recurse=False))
                if own and isinstance(module, nn.modules.batchnorm._BatchNorm) and not own[0].requires_grad:
                    module.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self._phase == len(self._stages) - 1:
            return super().forward(input, target)
        # Stages above learn later; they are left out unless their statistics are to move already.
        deepest = self._phase if self.config.stagewise.frozen_batchnorm == "eval" else None
        lesson, answer = self.lesson(input), self.trainable_module(input, deepest)
        loss = losses.hint(*same_size(answer.outputs[self._phase], self.maps(lesson)[self._phase]))
        return {"loss": loss, "kd_loss": loss}

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.kd(answer.logits, lesson.logits, self.config.temperature)


METHODS: dict[str, type[DistillationTask]] = {
    "labels": DistillationTask,
    "hard": LogitTask,
    "kd": LogitTask,
    "bkd": LogitTask,
    "logit_mse": LogitTask,
    "dkd": DkdTask,
    "dist": DistTask,
    "hint": HintTask,
    "at": AttentionTask,
    "rkd": RelationTask,
    "deep_supervision": DeepSupervisionTask,
    "stagewise": StagewiseTask,
}
