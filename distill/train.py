"""The stages that make checkpoints: train a network, or adopt the user's weights."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn

from ..core.artifact import Draft, Order, drafting, write_json
from ..core.config import (
    AdoptConfig,
    CacheConfig,
    DrawConfig,
    ModelSettings,
    RestartConfig,
    TrainConfig,
    TrainSettings,
)
from ..core.errors import UserError, choice
from ..core.inputs import InputSpec, size_words
from ..core.kinds import DRAWN, Cache, Checkpoint, CheckpointFacts, PrunedFacts, as_name
from ..core.progress import note
from ..core.stats import Interval
from ..data.copies import side_for
from ..data.dataset import Dataset, load_images
from ..data.labels import other_order
from ..data.views import TrainingViews, moving_transform, seeded, training_images, training_transform
from ..networks import models
from ..networks.drawn import draw_scales
from ..networks.onnx import OnnxNetwork
from ..networks.start import begin
from ..networks.weights import load_body, load_weights
from ..runtime.task import TASKS, Task
from .cache import CachedTeacher, answers_grid, check_fit, config_for
from .features import resized
from .loop import Lockstep, Run, evaluate
from .methods import METHODS
from .precision import Choices
from .ranks import Ranks, join
from .teacher import Address, Teacher, TeacherOutput, open_teacher
from .trackers import Nothing, tracker


def train(
    order: Order[TrainConfig],
    dataset: Dataset,
    teacher: Checkpoint | None,
    out: Path,
    cache: Cache | None = None,
    choices: Path | None = None,
) -> Checkpoint:
    """Train the order's network on the training part by its method; see ``train_together``."""
    return train_together({out: order}, dataset, teacher, cache, choices)[out]


def cache_config(config: TrainConfig) -> CacheConfig | None:
    """The cache that ``config`` learns from, or None where the teacher is asked in training."""
    if config.cache_views is None or not config.needs_teacher:
        return None
    return config_for(config, models.input_spec(config))


def companions(orders: Mapping[Path, Order[TrainConfig]], dataset: Dataset) -> list[dict[Path, Order[TrainConfig]]]:
    """Runs parted by what they see: those of one part can share views, batches and the teacher's outputs."""
    unlabeled = bool(dataset.samples("unlabeled"))
    parts: dict[str, dict[Path, Order[TrainConfig]]] = {}
    for out, order in orders.items():
        config = order.config
        settings = config.train
        mixing = (
            [settings.mixup, settings.cutmix, settings.label_smoothing] if settings.mixup or settings.cutmix else []
        )
        sees = [
            *(config.seed, config.label_fraction, settings.batch_size, config.cache_views, config.views_by),
            config.cache_views is not None and answers_grid(config),  # a cache holds answers for one
            *(unlabeled and METHODS[config.method].needs_labels, settings.repeats, settings.workers, mixing),
            *(settings.augment.model_dump(), models.input_spec(config).model_dump()),
        ]
        parts.setdefault(json.dumps(sees), {})[out] = order
    return list(parts.values())


def train_together(
    orders: Mapping[Path, Order[TrainConfig]],
    dataset: Dataset,
    teacher: Checkpoint | None,
    cache: Cache | None = None,
    choices: Path | None = None,
) -> dict[Path, Checkpoint]:
    """Train runs that see the same views side by side (``companions``); each ends as it would have ended alone.

    The validation part only selects (``train.select``); the test part is evaluated once, at the end. Killed at
    any moment and called again, it goes on where it was. Under torchrun every process calls this; the first
    writes. A run that fails does not stop the others: they are sealed before its error is raised. With ``cache``
    the teacher is not asked: what it said beforehand is looked up. What ``precision: auto`` takes is one for all
    of a network's runs, remembered in the folder ``choices``.

    Raises:
        UserError: an unknown model or optimiser, a teacher of other classes, a cache of something else, no memory,
            a loss that stopped being finite, fewer steps than the method has phases.
    """
    ranks = join()
    with contextlib.ExitStack() as stack:
        drafts = {
            out: stack.enter_context(drafting(Checkpoint, order, out, resumable=True)) if ranks.leads else None
            for out, order in orders.items()
        }
        leading = next(iter(drafts.values()))
        ranks.shared(leading.path if leading else None)
        configs = {out: order.config for out, order in orders.items()}
        runs = trained_runs(configs, drafts, dataset, teacher, cache, choices, ranks)
        for out, run in runs.items():
            draft = drafts[out]
            if draft is None:
                continue
            if run.failure is not None:
                draft.failed = True
                continue
            _write(draft, run, dataset, cache)
    ranks.from_leader(None)  # until the leader has sealed them
    for run in runs.values():
        if run.failure is not None:
            raise run.failure
    return {out: draft.artifact if draft else Checkpoint.open(out) for out, draft in drafts.items()}


def trained_runs(
    configs: Mapping[Path, TrainConfig],
    drafts: Mapping[Path, Draft[Checkpoint] | None],
    dataset: Dataset,
    teacher: Checkpoint | None,
    cache: Cache | None,
    choices: Path | None,
    ranks: Ranks,
    looks: bool = True,
) -> dict[Path, Run]:
    """Every run of ``configs``, trained, with ``looks`` at the validation part; without a draft nothing is kept."""
    first = next(iter(configs.values()))
    # An image is known by its number among all of the training part and those without labels.
    source = training_images(
        dataset, first.label_fraction, first.seed, with_unlabeled=not METHODS[first.method].needs_labels
    )
    for config in configs.values():
        _check_labels(config, source.labeled, len(dataset.samples("unlabeled")))
    asked: Teacher | CachedTeacher | None = None
    networks: dict[Path, tuple[nn.Module, InputSpec]] = {}
    pruned: dict[Path, PrunedFacts | None] = {}
    for out, config in configs.items():
        with seeded(config.seed):
            networks[out] = models.create(config, len(dataset.classes), dataset.facts.task)
        pruned[out] = begin(networks[out][0], config, networks[out][1], dataset.classes)
    spec = networks[next(iter(configs))][1]
    copies, wanted = dataset.facts.copies, side_for(spec, first.train.augment)
    if copies is not None and copies.shorter_side < wanted:
        note(
            f"{first.model} at {size_words(spec.size)} pixels wants images of {wanted} pixels, the copies in "
            f"{dataset.path} have {copies.shorter_side}: its smallest crops are enlarged (data.store_side {wanted} "
            "makes others)"
        )
    taught = [config for config in configs.values() if config.needs_teacher]
    if teacher is not None and cache is not None and taught:
        for config in taught:
            check_fit(cache, config, spec, source.numbers, dataset, teacher)
        asked = CachedTeacher(cache)
    elif teacher is not None and taught:
        asked = open_teacher(teacher, dataset, spec).to(ranks.device)
    views = TrainingViews(source, first.train, spec, len(dataset.classes), first.views_by)
    lockstep = Lockstep(views, first, ranks, asked, Choices(choices, dataset.key, ranks.device))
    whole = source.labeled + len(dataset.samples("unlabeled"))
    runs = {}
    for out, config in configs.items():
        draft = drafts[out]
        with seeded(config.seed, 4):
            method = METHODS[config.method](
                config,
                networks[out][0],
                spec,
                asked,
                config.model,
                task=dataset.facts.task,
                all_labeled=not source.unlabeled,
            )
        if isinstance(asked, Teacher):
            asked.wanted.update(method.teacher_indices)
        resume, shown = (draft.resume, tracker(config, out)) if draft else (None, Nothing())
        of_all = lockstep.steps_of(whole) if config.steps_as_unlabeled else lockstep.steps_per_epoch
        steps = config.train.epochs * of_all
        runs[out] = Run(
            config, method, dataset, spec, steps, lockstep.steps_per_epoch, ranks, resume, shown, pruned[out], looks
        )
        if draft is not None:
            np.save(draft.path / Checkpoint.IMAGES, source.numbers[: source.labeled])
    lockstep.train(list(runs.values()))
    return runs


def answers(
    teacher: Checkpoint,
    run: TrainConfig | None,
    student: InputSpec,
    images: np.ndarray,
    dataset: Dataset,
    cache: Cache | None,
) -> Callable[[Tensor, Address], Tensor]:
    """What says the teacher's logits [B, K, ...] of a student's views [B, 3, H, W] by their addresses.

    Args:
        run: the student's training, whose views a ``cache`` must be of.
        student: what the student takes.
        images: the numbers of those it is asked about.

    Raises:
        UserError: a teacher of other classes, a cache of other views.
    """
    if cache is not None and run is not None:
        check_fit(cache, run, student, images, dataset, teacher)
        asked: CachedTeacher | Teacher = CachedTeacher(cache)
    else:
        asked = open_teacher(teacher, dataset, student)

    def say(view: Tensor, address: Address) -> Tensor:
        said: TeacherOutput = asked(view, address)
        return said.logits

    return say


def _check_labels(config: TrainConfig, labeled: int, unlabeled: int) -> None:
    """Refuse a method that can't do without the labels that are missing. Raises UserError."""
    method = METHODS[config.method]
    if config.needs_teacher and method.needs_labels and unlabeled:
        raise UserError(
            f"method '{config.method}' needs the label of every image and {unlabeled} have none: "
            "take kd or leave out data.unlabeled"
        )
    if config.teacher_control == "smoothing" and unlabeled:
        raise UserError(
            f"teacher_control 'smoothing' knows the labels and nothing else, and {unlabeled} images have none: take "
            "flattened or leave out data.unlabeled"
        )
    if not labeled and method.learns_outputs and not method.compares_outputs(config):
        raise UserError(
            f"method '{config.method}' needs labels for the outputs and label_fraction is 0: take more, or a method "
            "that teaches the outputs, such as kd"
        )
    if not labeled and not unlabeled:
        raise UserError("label_fraction is 0 and there is no data.unlabeled: nothing is left to learn from")


def _write(draft: Draft[Checkpoint], run: Run, dataset: Dataset, cache: Cache | None) -> None:
    with (draft.path / Checkpoint.HISTORY).open("w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in run.history)
    draft.facts = _described(
        draft.path,
        run.config,
        run.network,
        run.spec,
        dataset,
        method=run.config.method,
        training_images=len(np.load(draft.path / Checkpoint.IMAGES, mmap_mode="r", allow_pickle=False)),
        unlabeled_images=0 if METHODS[run.config.method].needs_labels else len(dataset.samples("unlabeled")),
        epochs=run.epochs,
        steps=run.steps,
        selected=run.settings.select,
        best_validation=run.best,
        last_validation=run.last_validation,
        precision=run.precision.as_dict(),
        cache=cache.key if cache and run.config.needs_teacher else None,
        pruned=run.pruned,
    )


def adopt(order: Order[AdoptConfig], dataset: Dataset, out: Path) -> Checkpoint:
    """Seal the user's own weights, file or pretrained network as a checkpoint, with their test accuracy.

    Raises:
        UserError: unreadable weights, another architecture or class count, outputs that are not finite.
    """
    config = order.config
    with drafting(Checkpoint, order, out) as draft:
        network, spec = models.create(config, len(dataset.classes), dataset.facts.task)
        if config.checkpoint is not None and not isinstance(network, OnnxNetwork):
            load_weights(network, config.checkpoint, config.checkpoint_entry)
        draft.facts = _described(
            draft.path, config, network, spec, dataset,
            method="as given", training_images=0, epochs=0, selected="as given",
        )  # fmt: skip
        with np.load(draft.path / Checkpoint.TEST_OUTPUTS) as tested:
            other_order(TASKS[draft.facts.task], tested["logits"], tested["labels"])
    return draft.artifact


def restart(order: Order[RestartConfig], dataset: Dataset, trained: Checkpoint | None, out: Path) -> Checkpoint:
    """Seal a teacher that is a control: random weights by the order's seed, over ``trained``'s body if it is given.

    Under torchrun every process calls this; the first writes.

    Raises:
        UserError: an unknown network, or a trained one of another architecture.
    """
    config, ranks = order.config, join()
    ranks.total({"here": 1.0})  # none of them is still looking whether it is sealed
    if ranks.leads:
        with drafting(Checkpoint, order, out) as draft:
            fresh = config.model_copy(update={"pretrained": False, "encoder_checkpoint": None})
            with seeded(config.seed):
                network, spec = models.create(fresh, len(dataset.classes), dataset.facts.task)
            if trained is not None:
                spec = trained.facts.input
                load_body(network, trained.file(Checkpoint.WEIGHTS), with_head=False)
            draft.facts = _described(
                draft.path, config, network, spec, dataset,
                method=config.start, training_images=0, epochs=0, selected="as given",
            )  # fmt: skip
    ranks.from_leader(None)  # until it is sealed
    return Checkpoint.open(out)


def draw(order: Order[DrawConfig], dataset: Dataset, out: Path) -> Checkpoint:
    """Seal a network of random weights, whose scales and statistics are as those of trained ones could be.

    Raises:
        UserError: an unknown network, a size that it can't take, outputs that are not finite.
    """
    config = order.config
    with drafting(Checkpoint, order, out) as draft:
        with seeded(config.seed):
            network, spec = models.create(config, len(dataset.classes), dataset.facts.task)
            shown = load_images(dataset.balanced("train", config.images, seed=0), spec.model_dump())
            draw_scales(network, spec, shown)
        draft.facts = _described(
            draft.path, config, network, spec, dataset,
            method=DRAWN, training_images=0, epochs=0, selected=DRAWN,
        )  # fmt: skip
    return draft.artifact


def check_run(config: ModelSettings, settings: TrainSettings | None, task: str) -> None:
    """Refuse what training would refuse, without training. Raises UserError."""
    if isinstance(config, TrainConfig):
        METHODS[config.method].check(config)
    _, spec = models.create(config.model_copy(update={"pretrained": False}), None, task)
    if settings is not None:
        if settings.optimizer not in list_optimizers():
            raise choice("optimiser", settings.optimizer, list_optimizers())
        (moving_transform if TASKS[task].dense else training_transform)(settings.augment, spec)


def _worth_keeping(task: Task, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Logits of whole images; of every place what they decide at the labels' size, in a fraction of the bytes."""
    if not task.dense:
        return outputs
    sides = labels.shape[-2:]
    return np.concatenate([task.decide(resized(torch.from_numpy(each[None]), sides).numpy()) for each in outputs])


def _described(
    folder: Path,
    config: ModelSettings,
    network: nn.Module,
    spec: InputSpec,
    dataset: Dataset,
    pruned: PrunedFacts | None = None,
    **training: Any,
) -> CheckpointFacts:
    """Write weights, labels and the test outputs, for the last time this network is seen as a torch module.

    ``training``: the fields of the record that say how it came to its weights.
    """
    if isinstance(network, OnnxNetwork):
        shutil.copyfile(network.path, folder / Checkpoint.ONNX)
        parameters = network.count_parameters()
    else:
        models.save_weights(network, folder / Checkpoint.WEIGHTS)
        parameters = sum(parameter.numel() for parameter in network.parameters())
    write_json(folder / Checkpoint.LABELS, dataset.classes)
    task, broken, at = TASKS[dataset.facts.task], 0, 0
    logits = labels = np.empty(0)
    for outputs, truth in evaluate(network, spec, dataset, "test", workers=0):
        broken += int((~np.isfinite(outputs.reshape(len(outputs), -1)).all(1)).sum())
        kept = _worth_keeping(task, outputs, truth)
        if at == 0:  # whole at once: those of masks are large, and are not to be there twice
            count = len(dataset.samples("test"))
            logits, labels = (np.empty((count, *each.shape[1:]), each.dtype) for each in (kept, truth))
        logits[at : at + len(kept)], labels[at : at + len(kept)] = kept, truth
        at += len(kept)
    if broken:
        trained = training["epochs"] > 0
        cure = "train it again" if trained else "look at its weights, input.mean and input.std"
        raise UserError(
            f"'{config.model}' gives outputs that are not finite (NaN or infinite) on {broken} of {len(logits)} test "
            f"images: {cure}"
        )
    accuracy = task.summary(task.scores(logits, labels))
    np.savez(folder / Checkpoint.TEST_OUTPUTS, logits=logits, labels=labels)
    return CheckpointFacts(
        task=task.name,
        model=as_name(models.name_of(config)) if pruned is None else pruned.name,
        model_args=config.model_args,
        classes=len(dataset.classes),
        input=spec,
        parameters=parameters,
        macs=None if isinstance(network, OnnxNetwork) else models.multiply_accumulates(network, spec),
        test_accuracy=accuracy.value,
        test_images=len(labels),
        test_interval=Interval(**accuracy._asdict()),
        guessing=task.guessing(labels),
        license=models.license_of(config),
        pruned=pruned,
        **training,
    )
