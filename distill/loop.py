"""The training loop: one run of one task, which can be killed at any moment and goes on bit for bit.

Order, views and mixing are functions of (seed, epoch, step or image); the rest of what a step depends on is
in the state that is saved: weights, optimiser, torch's generator, position.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.config import TrainingConfig
from ..core.data import Dataset, InputSpec, Part
from ..core.errors import GateFailed, UserError
from ..core.progress import progress
from ..networks.models import Normalise
from .precision import Precision, fastest
from .tasks import DistillationTask, Phase
from .views import EpochBatches, EvaluationViews, TrainingViews, seeded

STATE = "state.pt"


class Run:
    """One training run; ``finish`` brings it to its end from wherever it is.

    Attributes:
        history: one row an epoch (losses, accuracies, images/s).
        best: the best epoch on the validation part, or None without one.
        precision: what was taken.
    """

    def __init__(
        self,
        config: TrainingConfig,
        task: DistillationTask,
        views: TrainingViews,
        dataset: Dataset,
        spec: InputSpec,
        resume: Path | None,
    ) -> None:
        self.config, self.settings, self.task, self.spec, self._dataset = config, config.train, task, spec, dataset
        self.network = task.trainable_module.student
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.last_validation: float | None = None
        self.precision = Precision("float32")
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        task.to(self._device)
        self._batches = EpochBatches(len(views), self.settings.batch_size, config.seed)
        workers = self.settings.workers
        self._loader = DataLoader(
            views,
            batch_sampler=self._batches,
            num_workers=workers,
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own: starting an epoch again must not move torch's
        )
        self._mixing = _mixing(self.settings, len(dataset.classes))
        self._has_validation = bool(dataset.samples("val"))
        if self.settings.select == "best" and not self._has_validation:
            raise UserError("train.select is 'best' but there is no validation part: set data.val_fraction above 0")
        if not len(self._batches):
            raise UserError(f"{len(views)} training image(s) make no batch: take more images or a larger fraction")
        self._resume = resume
        self._saved = time.monotonic()
        # Position: phase, epoch in it, step in that; and the sums of the epoch so far.
        self._phase = self._epoch = self._step = 0
        self._sums = {"loss": 0.0, "train_accuracy": 0.0, "images": 0.0}
        self._best_weights: dict[str, Tensor] | None = None
        self._lowest = math.inf  # loss of the best epoch of a phase that hands over its best
        if self.settings.average:
            task.setup_ema(decay=self.settings.average, use_warmup=True)

    def finish(self) -> None:
        """Train to the end. Raises GateFailed when the loss stops being finite."""
        with children_signal_kept():
            self._finish()
        self.network.to("cpu").to(memory_format=torch.contiguous_format)

    def _finish(self) -> None:
        phases = self.task.phases()
        total = sum(phase.epochs for phase in phases) * len(self._batches)
        with seeded(self.config.seed, 1):  # dropout draws from torch's own generator
            state = self._load()
            if state is None:
                self.precision = self._choose_precision()
            self.precision.prepare(self.task)
            with progress(self._title(), total) as advance:
                done_epochs = sum(phase.epochs for phase in phases[: self._phase])
                advance((done_epochs + self._epoch) * len(self._batches) + self._step, "")
                while self._phase < len(phases):
                    self._run_phase(phases, state, advance)
                    state = None
        averaged = self.task.get_trainable_module(ema=True)
        if averaged is not None:
            self.network.load_state_dict(averaged.module.student.state_dict())
        if self.settings.select == "best" and self._best_weights is not None:
            self.network.load_state_dict(self._best_weights)

    def _run_phase(self, phases: list[Phase], state: dict[str, Any] | None, advance: Any) -> None:
        phase = phases[self._phase]
        before = sum(each.epochs for each in phases[: self._phase])
        self.task.enter(self._phase)
        optimizer = self._optimizer(phase)
        schedule = _schedule(self.settings, optimizer, phase, len(self._batches))
        if state is not None:
            optimizer.load_state_dict(state["optimizer"])
        while self._epoch < phase.epochs:
            self._batches.epoch, self._batches.skip = before + self._epoch, self._step
            self.task.epoch = self._epoch
            self.task.train()
            begun, images_before, speed = time.monotonic(), self._sums["images"], 0.0
            for image, label in self._loader:
                update = self._epoch * len(self._batches) + self._step
                schedule.step_update(update)
                loss = self._train_step(image, label, optimizer)
                self._step += 1
                speed = (self._sums["images"] - images_before) / (time.monotonic() - begun)
                accuracy = self._sums["train_accuracy"] / self._sums["images"]
                advance(1, f"loss {loss:.3f}, top-1 {accuracy:.1%}, {speed:.0f} images/s")
                if time.monotonic() - self._saved >= self.settings.checkpoint_seconds:
                    self._save(optimizer)
            self._end_epoch(phase, before, optimizer, speed)
        if phase.handover == "best" and self._best_weights is not None:
            self.network.load_state_dict(self._best_weights)
        self._phase, self._epoch, self._lowest, self._best_weights = self._phase + 1, 0, math.inf, self._kept(phase)

    def _kept(self, phase: Phase) -> dict[str, Tensor] | None:
        return self._best_weights if phase.has_accuracy else None

    def _train_step(self, image: Tensor, label: Tensor, optimizer: torch.optim.Optimizer) -> float:
        epoch, target = self._batches.epoch, label
        if self._mixing is not None:
            even = len(image) // 2 * 2  # Mixup pairs images up
            with seeded(self.config.seed, 2, epoch, self._step):
                image, target = self._mixing(image[:even].clone(), label[:even])
                label = label[:even]
        image, target = self.precision.place(image.to(self._device)), target.to(self._device)
        with self.precision.context(self._device):
            result = self.task(image, target)
        value = float(result["loss"].item())
        if not math.isfinite(value):
            raise GateFailed(
                f"the loss became {value} in epoch {epoch + 1}, batch {self._step + 1}: lower train.learning_rate "
                "(the last good state is kept)"
            )
        optimizer.zero_grad()
        result["loss"].backward()
        if self.settings.clip_gradient:
            nn.utils.clip_grad_norm_(self.task.trainable(), self.settings.clip_gradient)
        optimizer.step()
        self.task.update_ema()
        self._sums["images"] += len(label)
        self._sums["loss"] += value * len(label)
        self._sums["train_accuracy"] += float((result["output"].argmax(1).cpu() == label).sum())
        return value

    def _end_epoch(self, phase: Phase, before: int, optimizer: torch.optim.Optimizer, speed: float) -> None:
        images = self._sums.pop("images")
        row: dict[str, Any] = {"epoch": before + self._epoch + 1, "phase": phase.name}
        row |= {name: total / images for name, total in self._sums.items()}
        row |= {"images_per_second": speed, "learning_rate": optimizer.param_groups[0]["lr"]}
        self._epoch, self._step, self._sums = self._epoch + 1, 0, dict.fromkeys([*self._sums, "images"], 0.0)
        last = self._epoch == phase.epochs
        if self._has_validation and phase.has_accuracy and (last or self._epoch % self.settings.validate_every == 0):
            averaged = self.task.get_trainable_module(ema=True)
            network = self.network if averaged is None else averaged.module.student
            logits, labels = evaluate(network, self.spec, self._dataset, "val", self.settings.workers)
            accuracy = float((logits.argmax(1) == labels).mean())
            self.last_validation = row["validation_accuracy"] = accuracy
            if self.best is None or accuracy > self.best["validation_accuracy"]:
                self.best = {"epoch": row["epoch"], "validation_accuracy": accuracy}
                if self.settings.select == "best":
                    self._best_weights = copy.deepcopy(network.state_dict())
        elif phase.handover == "best" and row["loss"] < self._lowest:
            self._lowest, self._best_weights = row["loss"], copy.deepcopy(self.network.state_dict())
        self.history.append(row)

    # ---- state -----------------------------------------------------------------------------------------

    def _save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the state beside the last one and put it in its place: a kill leaves one or the other."""
        if self._resume is None:
            return
        averaged = self.task.get_trainable_module(ema=True)
        state = {
            "weights": self.task.trainable_module.state_dict(),
            "averaged": None if averaged is None else averaged.state_dict(),
            "optimizer": optimizer.state_dict(),
            "generator": torch.get_rng_state(),
            "position": [self._phase, self._epoch, self._step],
            "sums": self._sums,
            "history": self.history,
            "best": self.best,
            "best_weights": self._best_weights,
            "lowest": self._lowest,
            "last_validation": self.last_validation,
            "precision": self.precision.as_dict(),
        }
        draft = self._resume / f"{STATE}.new"
        with draft.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self._resume / STATE)
        self._saved = time.monotonic()

    def _load(self) -> dict[str, Any] | None:
        if self._resume is None or not (self._resume / STATE).is_file():
            return None
        state: dict[str, Any] = torch.load(self._resume / STATE, map_location=self._device, weights_only=True)
        self.task.trainable_module.load_state_dict(state["weights"])
        averaged = self.task.get_trainable_module(ema=True)
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        torch.set_rng_state(state["generator"].cpu())
        self._phase, self._epoch, self._step = state["position"]
        self._sums, self.history, self.best = state["sums"], state["history"], state["best"]
        self._best_weights, self._lowest = state["best_weights"], state["lowest"]
        self.last_validation, self.precision = state["last_validation"], Precision(**state["precision"])
        return state

    # ---- parts -----------------------------------------------------------------------------------------

    def _optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Timm's optimiser over what learns in this phase; biases, norms and what the network names get no decay."""
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.network,
            opt=self.settings.optimizer,
            lr=phase.learning_rate,
            weight_decay=self.settings.weight_decay,
            momentum=self.settings.momentum,
            layer_decay=self.settings.layer_decay,
        )
        additions = [each for each in self.task.trainable_module.additions.parameters() if each.requires_grad]
        if additions:
            optimizer.add_param_group({"params": additions, "weight_decay": self.settings.weight_decay})
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", phase.learning_rate)
        return optimizer

    def _choose_precision(self) -> Precision:
        if self.settings.precision != "auto":
            return Precision(self.settings.precision)
        image, label = next(iter(self._loader))

        def step(task: nn.Module, precision: Precision) -> None:
            with precision.context(self._device):
                loss = task(precision.place(image.to(self._device)), label.to(self._device))["loss"]
            loss.backward()
            task.zero_grad()

        self.task.enter(0)
        self.task.train()
        with seeded(self.config.seed, 3):
            return fastest(self.task, step)

    def _title(self) -> str:
        how = "labels" if self.config.method == "labels" else self.config.method
        return f"training {self.config.model} on {how}, seed {self.config.seed}"


@contextlib.contextmanager
def children_signal_kept() -> Iterator[None]:
    """Put SIGCHLD's handler back after the block.

    torch's loader with worker processes installs one for good. Delivered later, when any child ends, while
    the converters' native libraries are loaded, it has crashed the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _mixing(settings: Any, classes: int) -> Mixup | None:
    if not (settings.mixup or settings.cutmix):
        return None
    return Mixup(settings.mixup, settings.cutmix, label_smoothing=settings.label_smoothing, num_classes=classes)


def _schedule(settings: Any, optimizer: torch.optim.Optimizer, phase: Phase, updates_per_epoch: int) -> Any:
    """Timm's schedule over the updates of a phase; a function of the update's number alone."""
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched={"cosine": "cosine", "multistep": "multistep", "constant": "multistep"}[settings.schedule],
        num_epochs=phase.epochs,
        decay_milestones=settings.milestones if settings.schedule == "multistep" else (phase.epochs + 1,),
        decay_rate=settings.decay_rate,
        warmup_epochs=min(settings.warmup_epochs, phase.epochs // 4),
        warmup_lr=phase.learning_rate / 100,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=updates_per_epoch,
        min_lr=0.0,
    )
    return schedule


@torch.inference_mode()
def evaluate(
    network: nn.Module, spec: InputSpec, dataset: Dataset, part: Part, workers: int, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [N, K] and labels [N] of one part, through the preprocessing the device shares."""
    device = next(network.parameters()).device
    was_training = network.training
    whole = Normalise(network, spec).to(device).eval()
    logits, labels = [], []
    for image, label in DataLoader(EvaluationViews(dataset.samples(part), spec), batch_size, num_workers=workers):
        logits.append(whole(image.permute(0, 3, 1, 2).float().to(device)).cpu().numpy())
        labels.append(label.numpy())
    network.train(was_training)
    return np.concatenate(logits), np.concatenate(labels)
