"""The methods: each is one of timm's training tasks, a forward that returns a dict with 'loss'.

``loss = label_weight * label loss + kd_weight * the method's loss``; both are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from timm.task import TrainingTask
from torch import Tensor, nn

from ..core.config import DistillConfig
from ..core.data import InputSpec
from ..core.errors import UserError
from . import losses
from .features import (
    Adapter,
    AuxiliaryHead,
    map_shapes,
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
    """What the pupil says of a batch: logits [B, K], its maps, and what its additions make of them."""

    logits: Tensor
    maps: list[Tensor]
    outputs: list[Tensor]


class Pupil(nn.Module):
    """The student with what a method adds to it: trained together, the additions dropped afterwards."""

    def __init__(self, student: nn.Module, indices: Sequence[int] = (), additions: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.student, self.additions = student, nn.ModuleList(additions)
        self.indices: list[int] = list(indices)

    def forward(self, image: Tensor) -> Answer:
        if not self.indices:
            return Answer(self.student(image), [], [])
        maps, logits = maps_and_logits(self.student, image, self.indices)
        outputs = [addition(features) for addition, features in zip(self.additions, maps, strict=False)]
        return Answer(logits, maps, outputs)


def label_loss(config: DistillConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy or BCE (mean over B * K, as timm), smoothed if asked, in float32."""
    smoothing = config.train.label_smoothing
    if config.label_loss == "bce":
        criterion: nn.Module = BinaryCrossEntropy(smoothing)
    else:
        criterion = LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()
    return lambda logits, target: criterion(logits.float(), target)


class DistillationTask(TrainingTask):  # type: ignore[misc]
    """Labels alone: the control of every method, and the frame of all others."""

    needs_teacher: ClassVar[bool] = False
    own_weight: ClassVar[float] = 0.0  # of the method's loss, where the configuration names none

    def __init__(
        self, config: DistillConfig, student: nn.Module, spec: InputSpec, teacher: Teacher | None, name: str = "student"
    ) -> None:
        super().__init__(verbose=False)
        if self.needs_teacher and teacher is None:
            raise UserError(f"method '{config.method}' needs a teacher: give the folder of a trained one")
        self.config, self.spec, self.name = config, spec, name
        self.teacher = teacher if self.needs_teacher else None
        self.kd_weight = self.own_weight if config.kd_weight is None else config.kd_weight
        self.epoch = 0  # the trainer's, for losses that grow
        self._label_loss = label_loss(config)
        self.trainable_module = self.pupil(student)

    def pupil(self, student: nn.Module) -> Pupil:
        """The student with this method's additions."""
        return Pupil(student)

    def phases(self) -> list[Phase]:
        train = self.config.train
        return [Phase("all", train.epochs, train.learning_rate)]

    def enter(self, phase: int) -> None:
        """Prepare for phase number ``phase``: what learns, what is frozen."""

    def trainable(self) -> Iterator[nn.Parameter]:
        return (parameter for parameter in self.trainable_module.parameters() if parameter.requires_grad)

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        """The method's own loss, a scalar."""
        raise NotImplementedError

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        answer = self.trainable_module(input)
        result = {"output": answer.logits, "task_loss": self._label_loss(answer.logits, target)}
        loss = self.config.label_weight * result["task_loss"]
        if self.teacher is not None and self.kd_weight:
            result["kd_loss"] = self.compare(answer, self.teacher(input), target)
            loss = loss + self.kd_weight * result["kd_loss"]
        return {"loss": loss, **result}


class LogitTask(DistillationTask):
    """Everything that compares logits with logits."""

    needs_teacher = True
    own_weight = 1.0

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return logit_loss(self.config, answer.logits, lesson.logits, target, self.epoch)


class DistTask(LogitTask):
    """DIST weighs its correlations by two (its authors' setting)."""

    own_weight = 2.0


def logit_loss(config: DistillConfig, student: Tensor, teacher: Tensor, target: Tensor, epoch: int) -> Tensor:
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
    stages: ClassVar[slice] = slice(None)  # which of the paired stages

    def indices(self, student: nn.Module) -> list[int]:
        """Agree with the teacher on stages. Raises UserError where one network has none."""
        assert self.teacher is not None
        mine, its = paired(stage_indices(student, self.name), stage_indices(self.teacher.network, "the teacher"))
        self.teacher.indices = its[self.stages]
        return mine[self.stages]

    def adapters(self, student: nn.Module, indices: list[int], where_equal: bool) -> nn.ModuleList:
        """From each of the student's maps to the channels of the teacher's; identity for equal ones if wanted."""
        assert self.teacher is not None
        mine = map_shapes(student, self.spec.size, indices)
        its = map_shapes(self.teacher.network, self.teacher.size, self.teacher.indices)
        return nn.ModuleList(
            Adapter(here[0], there[0]) if where_equal or here[0] != there[0] else nn.Identity()
            for here, there in zip(mine, its, strict=True)
        )


class HintTask(FeatureTask):
    """FitNet's hint (Romero et al. 2015): MSE of an adapted middle stage, together with the labels."""

    own_weight = 100.0
    stages = slice(-2, -1)

    def pupil(self, student: nn.Module) -> Pupil:
        indices = self.indices(student)
        return Pupil(student, indices, self.adapters(student, indices, where_equal=True))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.hint(*same_size(answer.outputs[0], lesson.maps[0]))


class AttentionTask(FeatureTask):
    """Attention transfer (Zagoruyko and Komodakis 2017) over all paired stages."""

    own_weight = 1000.0

    def pupil(self, student: nn.Module) -> Pupil:
        return Pupil(student, self.indices(student))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.attention(answer.maps, lesson.maps)


class RelationTask(FeatureTask):
    """Relational distillation (Park et al. 2019) on the pooled deepest stage."""

    own_weight = 1.0
    stages = slice(-1, None)

    def pupil(self, student: nn.Module) -> Pupil:
        return Pupil(student, self.indices(student))

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        weights = self.config.rkd
        mine, its = (each[-1].float().mean((2, 3)) for each in (answer.maps, lesson.maps))
        return losses.rkd(mine, its, weights.distance_weight, weights.angle_weight)


class DeepSupervisionTask(DistillationTask):
    """Vanilla distillation of the student's logits and of auxiliary heads on its inner stages.

    A design of this project: the idea (more information for the student) is Hao et al.'s (2025), whose own
    branches are not public. Every head gets the same KL as the last, with equal weight.
    """

    needs_teacher = True
    own_weight = 1.0

    def pupil(self, student: nn.Module) -> Pupil:
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

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        pupil = self.trainable_module
        self._stages = stage_parameters(pupil.student, self.spec.size, pupil.indices)
        self._phase = 0

    def pupil(self, student: nn.Module) -> Pupil:
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
        pupil = _unwrapped(self.trainable_module)
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
            for module in _unwrapped(self.trainable_module).modules():
                own = list(module.parameters(recurse=False))
                if own and isinstance(module, nn.modules.batchnorm._BatchNorm) and not own[0].requires_grad:
                    module.eval()
        return self

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        if self._phase == len(self._stages) - 1:
            return super().forward(input, target)
        assert self.teacher is not None
        answer, lesson = self.trainable_module(input), self.teacher(input)
        loss = losses.hint(*same_size(answer.outputs[self._phase], lesson.maps[self._phase]))
        return {"loss": loss, "output": answer.logits.detach(), "kd_loss": loss}

    def compare(self, answer: Answer, lesson: Lesson, target: Tensor) -> Tensor:
        return losses.kd(answer.logits, lesson.logits, self.config.temperature)


def _unwrapped(module: nn.Module) -> Any:
    return getattr(module, "module", module)


METHODS: dict[str, type[DistillationTask]] = {
    "labels": DistillationTask,
    "hard": LogitTask,
    "kd": LogitTask,
    "bkd": LogitTask,
    "logit_mse": LogitTask,
    "dkd": LogitTask,
    "dist": DistTask,
    "hint": HintTask,
    "at": AttentionTask,
    "rkd": RelationTask,
    "deep_supervision": DeepSupervisionTask,
    "stagewise": StagewiseTask,
}
