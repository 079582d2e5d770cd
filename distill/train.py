"""The trainer: one run of one network, read top to bottom."""

from __future__ import annotations

import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn
from torch.utils.data import DataLoader

from ..core.artifact import Checkpoint, drafting, write_json
from ..core.config import AdoptConfig, ModelConfig, TrainConfig, TrainingConfig
from ..core.data import Dataset, InputSpec, Part, stratified_fraction
from ..core.errors import GateFailed, UserError, choice
from ..core.progress import progress
from ..networks import models
from .tasks import METHODS
from .views import EpochBatches, EvaluationViews, TrainingViews, seeded, training_transform


def train(config: TrainingConfig, dataset: Dataset, teacher: Checkpoint | None, out: Path) -> Checkpoint:
    """Train ``config.model`` on the training part by ``config.method``.

    The validation part only selects (``train.select``); the test part is evaluated once, at the end.

    Raises:
        UserError: an unknown model or optimiser, a teacher of other classes.
        GateFailed: the loss stopped being finite.
    """
    inputs = {"data": dataset} if teacher is None else {"data": dataset, "teacher": teacher}
    with drafting(Checkpoint, out, stage="train", config=config, inputs=inputs) as draft:
        samples = dataset.samples("train")
        chosen = stratified_fraction([sample.label for sample in samples], config.label_fraction, config.seed)
        write_json(draft.path / "images.json", {"part": "train", "positions": chosen.tolist()})
        with seeded(config.seed):
            network, spec = models.create(config, len(dataset.classes))
        views = TrainingViews([samples[at] for at in chosen], config.train.augment, spec, config.seed)
        guide = None if teacher is None else _teacher_network(teacher, dataset, spec)
        history, best = fit(config, network, spec, views, guide, dataset)
        with (draft.path / "history.jsonl").open("w") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in history)
        _finish(draft.path, draft.facts, config, network, spec, dataset, config.train.select, best)
        draft.facts.update(method=config.method, training_images=len(chosen), epochs=config.train.epochs)
    return draft.artifact


def check_run(config: ModelConfig, settings: TrainConfig | None) -> None:
    """Refuse what training would refuse, without training. Raises UserError."""
    network, spec = models.create(config.model_copy(update={"pretrained": False}), classes=2)
    if settings is not None:
        _optimizer(settings, network)
        training_transform(settings.augment, spec)


def adopt(config: AdoptConfig, dataset: Dataset, out: Path) -> Checkpoint:
    """Seal the user's own weights (or timm's pretrained ones) as a checkpoint, with their test accuracy.

    Raises:
        UserError: unreadable weights, another architecture or class count.
    """
    with drafting(Checkpoint, out, stage="adopt", config=config, inputs={"data": dataset}) as draft:
        network, spec = models.create(config, len(dataset.classes))
        if config.checkpoint is not None:
            models.load_weights(network, config.checkpoint)
        _finish(draft.path, draft.facts, config, network, spec, dataset, "as given", None)
        draft.facts.update(method="as given", training_images=0, epochs=0)
    return draft.artifact


def _teacher_network(teacher: Checkpoint, dataset: Dataset, spec: InputSpec) -> nn.Module:
    labels = json.loads(teacher.file("labels.json").read_text())
    if labels != dataset.classes:
        raise UserError(
            f"the teacher {teacher.path} knows {len(labels)} other classes than the data ({len(dataset.classes)})"
        )
    network, teacher_spec = models.restore(teacher)
    if teacher_spec.size != spec.size:
        raise UserError(
            f"the teacher takes {teacher_spec.size} pixels, the student {spec.size}: set both input.size alike"
        )
    return network


def _finish(
    folder: Path,
    facts: dict[str, Any],
    config: TrainingConfig | AdoptConfig,
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    selected: str,
    best: dict[str, Any] | None,
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
        selected=selected,
        best_validation=best,
        test_accuracy=float((logits.argmax(1) == labels).mean()),
        test_images=len(labels),
    )


def fit(
    config: TrainingConfig,
    network: nn.Module,
    spec: InputSpec,
    views: TrainingViews,
    teacher: nn.Module | None,
    dataset: Dataset,
) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Train ``network`` in place.

    Returns:
        One row an epoch (losses, accuracies, images/s), and the best epoch on the validation part.
    """
    settings = config.train
    batches = EpochBatches(len(views), settings.batch_size, config.seed)
    loader = DataLoader(
        views, batch_sampler=batches, num_workers=settings.workers, persistent_workers=settings.workers > 0
    )
    task = METHODS[config.method](config, network, teacher)
    optimizer = _optimizer(settings, network)
    schedule = _schedule(settings, optimizer, len(batches) * settings.epochs)
    has_validation = bool(dataset.samples("val"))
    if settings.select == "best" and not has_validation:
        raise UserError("train.select is 'best' but there is no validation part: set data.val_fraction above 0")
    history: list[dict[str, Any]] = []
    best: dict[str, Any] | None = None
    best_weights = None
    # Dropout and stochastic depth draw from torch's global generator.
    with seeded(config.seed, 1), progress(_title(config), settings.epochs * len(batches)) as advance:
        for epoch in range(settings.epochs):
            batches.epoch = epoch
            task.train()
            begun, totals, images = time.monotonic(), {"loss": 0.0, "train_accuracy": 0.0}, 0
            for image, label in loader:
                result = task(image, label)
                optimizer.zero_grad()
                result["loss"].backward()
                optimizer.step()
                schedule.step()
                loss = result["loss"].item()
                if not math.isfinite(loss):
                    raise GateFailed(f"the loss became {loss} in epoch {epoch + 1}: lower train.learning_rate")
                images += len(label)
                totals["loss"] += loss * len(label)
                totals["train_accuracy"] += float((result["output"].argmax(1) == label).sum())
                advance(1, f"loss {loss:.3f}")
            row = {"epoch": epoch + 1, **{name: total / images for name, total in totals.items()}}
            row["images_per_second"] = images / (time.monotonic() - begun)
            row["learning_rate"] = optimizer.param_groups[0]["lr"]
            if has_validation and (epoch + 1 == settings.epochs or (epoch + 1) % settings.validate_every == 0):
                logits, labels = evaluate(network, spec, dataset, "val", settings.workers)
                row["validation_accuracy"] = float((logits.argmax(1) == labels).mean())
                if best is None or row["validation_accuracy"] > best["validation_accuracy"]:
                    best = {"epoch": epoch + 1, "validation_accuracy": row["validation_accuracy"]}
                    best_weights = copy.deepcopy(network.state_dict()) if settings.select == "best" else None
            history.append(row)
    if best_weights is not None:
        network.load_state_dict(best_weights)
    return history, best


def _title(config: TrainingConfig) -> str:
    return f"training {config.model} on {'labels' if config.method == 'labels' else config.method}, seed {config.seed}"


def _optimizer(settings: TrainConfig, network: nn.Module) -> torch.optim.Optimizer:
    if settings.optimizer not in list_optimizers():
        raise choice("optimiser", settings.optimizer, list_optimizers())
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        network, opt=settings.optimizer, lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    return optimizer


def _schedule(settings: TrainConfig, optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up, then a cosine to zero, step by step."""
    warmup = max(1, round(steps * settings.warmup_fraction))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.inference_mode()
def evaluate(
    network: nn.Module, spec: InputSpec, dataset: Dataset, part: Part, workers: int, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [N, K] and labels [N] of one part, through the preprocessing the device shares."""
    was_training = network.training
    whole = models.Normalise(network, spec).eval()
    logits, labels = [], []
    for image, label in DataLoader(EvaluationViews(dataset.samples(part), spec), batch_size, num_workers=workers):
        logits.append(whole(image.permute(0, 3, 1, 2).float()).numpy())
        labels.append(label.numpy())
    network.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)
