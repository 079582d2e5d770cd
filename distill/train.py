"""The stages that make checkpoints: train a network, or adopt the user's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from timm.optim import list_optimizers
from torch import nn

from ..core.artifact import Checkpoint, drafting, write_json
from ..core.config import AdoptConfig, ModelConfig, TrainConfig, TrainingConfig
from ..core.data import Dataset, InputSpec, stratified_fraction
from ..core.errors import UserError, choice
from ..networks import models
from .loop import Run, evaluate
from .tasks import METHODS
from .teacher import Teacher
from .views import TrainingViews, seeded, training_transform


def train(config: TrainingConfig, dataset: Dataset, teacher: Checkpoint | None, out: Path) -> Checkpoint:
    """Train ``config.model`` on the training part by ``config.method``.

    The validation part only selects (``train.select``); the test part is evaluated once, at the end. Killed at
    any moment and called again, it goes on where it was.

    Raises:
        UserError: an unknown model or optimiser, a teacher of other classes.
        GateFailed: the loss stopped being finite.
    """
    inputs = {"data": dataset} if teacher is None else {"data": dataset, "teacher": teacher}
    with drafting(Checkpoint, out, stage="train", config=config, inputs=inputs, resumable=True) as draft:
        samples = dataset.samples("train")
        chosen = stratified_fraction([sample.label for sample in samples], config.label_fraction, config.seed)
        write_json(draft.path / "images.json", {"part": "train", "positions": chosen.tolist()})
        with seeded(config.seed):
            network, spec = models.create(config, len(dataset.classes))
            guide = None if teacher is None else _teacher(teacher, dataset, spec, config.shuffled_teacher)
            task = METHODS[config.method](config, network, spec, guide, config.model)
        views = TrainingViews([samples[at] for at in chosen], config.train.augment, spec, config.seed)
        run = Run(config, task, views, dataset, spec, draft.resume)
        run.finish()
        with (draft.path / "history.jsonl").open("w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in run.history)
        _describe(draft.path, draft.facts, config, run.network, spec, dataset)
        draft.facts.update(
            method=config.method,
            training_images=len(chosen),
            epochs=len(run.history),
            selected=config.train.select,
            best_validation=run.best,
            last_validation=run.last_validation,
            precision=run.precision.as_dict(),
        )
    return draft.artifact


def adopt(config: AdoptConfig, dataset: Dataset, out: Path) -> Checkpoint:
    """Seal the user's own weights (or timm's pretrained ones) as a checkpoint, with their test accuracy.

    Raises:
        UserError: unreadable weights, another architecture or class count.
    """
    with drafting(Checkpoint, out, stage="adopt", config=config, inputs={"data": dataset}) as draft:
        network, spec = models.create(config, len(dataset.classes))
        if config.checkpoint is not None:
            models.load_weights(network, config.checkpoint)
        _describe(draft.path, draft.facts, config, network, spec, dataset)
        draft.facts.update(method="as given", training_images=0, epochs=0, selected="as given", best_validation=None)
    return draft.artifact


def check_run(config: ModelConfig, settings: TrainConfig | None) -> None:
    """Refuse what training would refuse, without training. Raises UserError."""
    _, spec = models.create(config.model_copy(update={"pretrained": False}), classes=2)
    if settings is not None:
        if settings.optimizer not in list_optimizers():
            raise choice("optimiser", settings.optimizer, list_optimizers())
        training_transform(settings.augment, spec)


def _teacher(teacher: Checkpoint, dataset: Dataset, spec: InputSpec, shuffled: bool) -> Teacher:
    labels = json.loads(teacher.file("labels.json").read_text())
    if labels != dataset.classes:
        raise UserError(
            f"the teacher {teacher.path} knows {len(labels)} other classes than the data ({len(dataset.classes)}): "
            "classes and their order must be the same"
        )
    network, teacher_spec = models.restore(teacher)
    return Teacher(network, teacher_spec, spec, shuffled)


def _describe(
    folder: Path, facts: dict[str, Any], config: ModelConfig, network: nn.Module, spec: InputSpec, dataset: Dataset
) -> None:
    """Weights, labels and the test logits, for the last time this network is seen as a torch module."""
    models.save_weights(network, folder)
    write_json(folder / "labels.json", dataset.classes)
    logits, labels = evaluate(network, spec, dataset, "test", workers=0)
    np.savez(folder / "test_logits.npz", logits=logits, labels=labels)
    facts.update(
        model=config.model,
        model_args=config.model_args,
        classes=len(dataset.classes),
        input=spec.model_dump(mode="json"),
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        test_accuracy=float((logits.argmax(1) == labels).mean()),
        test_images=len(labels),
    )
