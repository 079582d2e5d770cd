"""The methods: each is one of timm's training tasks, a forward that returns a dict with 'loss'."""

from __future__ import annotations

from timm.loss import LabelSmoothingCrossEntropy
from timm.task import ClassificationTask, LogitDistillationTask, TrainingTask
from torch import nn

from ..core.config import DistillConfig
from ..core.errors import UserError


def label_loss(config: DistillConfig) -> nn.Module:
    smoothing = config.train.label_smoothing
    return LabelSmoothingCrossEntropy(smoothing) if smoothing else nn.CrossEntropyLoss()


def labels_task(config: DistillConfig, student: nn.Module, _: nn.Module | None) -> TrainingTask:
    """Cross-entropy against the labels: the control of every method."""
    return ClassificationTask(student, criterion=label_loss(config), verbose=False)


def kd_task(config: DistillConfig, student: nn.Module, teacher: nn.Module | None) -> TrainingTask:
    """Vanilla distillation (Hinton, Vinyals, Dean 2015, eq. 2-4, as timm computes it).

    loss = label_weight * CE(z_s, y) + kd_weight * T^2 * mean over B of KL(softmax(z_t/T) || softmax(z_s/T))
    with logits [B, K]. The teacher sees the student's view, with its own normalisation.
    """
    if teacher is None:
        raise UserError("method 'kd' needs a teacher: give the folder of a trained one")
    for parameter in teacher.parameters():
        parameter.requires_grad_(False)
    return LogitDistillationTask(
        student,
        teacher_model=teacher,
        criterion=label_loss(config),
        task_loss_weight=config.label_weight,
        distill_loss_weight=config.kd_weight,
        temperature=config.temperature,
        verbose=False,
    )


METHODS = {"labels": labels_task, "kd": kd_task}
