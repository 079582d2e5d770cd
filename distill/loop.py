"""Training runs, each of which can be killed at any moment and goes on bit for bit.

Order, views and dropout are functions of (seed, epoch, step or image); the rest of what a step depends
on is in the state that is saved: weights, optimiser, position. So runs that see the same views may go in
lockstep, with one teacher's answer for all, and each ends as it would have ended alone.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.config import TrainConfig, TrainSettings
from ..core.errors import KdpipeError, UserError
from ..core.inputs import InputSpec
from ..core.proc import children_signal_kept, first_line
from ..core.progress import note, progress
from ..data.dataset import Dataset, Part
from ..networks.models import Normalise
from ..runtime.task import TASKS
from .cache import CachedTeacher
from .methods import Method, Phase
from .precision import Precision, fastest
from .ranks import Ranks
from .teacher import Address, Teacher, TeacherOutput
from .trackers import Tracker
from .views import EpochBatches, EvaluationViews, TrainingView, TrainingViews, seeded

STATE = "state.pt"


class Batch:
    """One batch as every run of a lockstep sees it: laid out once for each memory format, and the teacher asked once
    for each precision.
    """

    def __init__(self, view: TrainingView, ranks: Ranks, teacher: Teacher | CachedTeacher | None) -> None:
        """``view``: of a batch; what it holds has the batch as its first dimension."""
        self.label = view.label
        self.target = view.target.to(ranks.device)
        self._address = cast("Address", tuple(view.address))
        self._device, self._teacher = ranks.device_kind, teacher
        self._images = {False: view.image.to(ranks.device)}
        self._outputs: dict[tuple[str, bool], TeacherOutput] = {}

    @property
    def numbers(self) -> Tensor:
        """Numbers of the images [B]."""
        return self._address[1]

    @property
    def known(self) -> Tensor:
        """Which images have a label, bool [B]."""
        return (self.label >= 0).reshape(len(self.label), -1).any(1)

    def image(self, precision: Precision) -> Tensor:
        """The views [B, 3, H, W] in the layout of ``precision``."""
        if precision.channels_last not in self._images:
            self._images[precision.channels_last] = precision.place(self._images[False])
        return self._images[precision.channels_last]

    def ask_teacher(self, precision: Precision) -> TeacherOutput:
        """What the teacher says of the views in this precision."""
        assert self._teacher is not None  # a method that wants it has refused to do without
        with precision.context(self._device):
            output: TeacherOutput = self._teacher(self.image(precision), self._address)
        return output

    def teacher_output(self, precision: Precision) -> TeacherOutput:
        """The same, asked at the first call and remembered for the other runs."""
        known = (precision.name, precision.channels_last)
        if known not in self._outputs:
            self._outputs[known] = self.ask_teacher(precision)
        return self._outputs[known]


class Run:
    """One student's training.

    Attributes:
        history: one row an epoch (losses, accuracies, images/s).
        best: the best epoch on the validation part, or None without one.
        precision: what was taken.
        failure: why it was given up, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        dataset: Dataset,
        spec: InputSpec,
        steps_per_epoch: int,
        ranks: Ranks,
        resume: Path | None,
        tracker: Tracker,
    ) -> None:
        self.config, self.settings, self.method, self.spec, self._dataset = config, config.train, method, spec, dataset
        self.network = method.student.student
        self._task = TASKS[dataset.facts.task]
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.last_validation: float | None = None
        self.precision = Precision("float32")
        self.failure: KdpipeError | None = None
        self.steps_per_epoch, self._ranks, self._resume, self._tracker = steps_per_epoch, ranks, resume, tracker
        self._phases = method.phases()
        self.epochs = sum(phase.epochs for phase in self._phases)
        method.to(ranks.device)
        self._has_validation = bool(dataset.samples("val"))
        if self.settings.select == "best" and not self._has_validation:
            raise UserError("train.select is 'best' but there is no validation part: set data.val_fraction above 0")
        self._saved = time.monotonic()
        self.epoch = self.step = 0  # where it is; the epoch counts through all phases
        self._sums = _nothing()
        self._best_weights: dict[str, Tensor] | None = None
        self._lowest = math.inf  # loss of the best epoch of a phase that hands over its best
        self._began = 0.0
        self._optimizer: torch.optim.Optimizer
        self._schedule: Any
        self._scaler: torch.amp.GradScaler | None = None
        if self.settings.average:
            method.setup_ema(decay=self.settings.average, use_warmup=True)

    @property
    def position(self) -> int:
        """Steps done."""
        return self.epoch * self.steps_per_epoch + self.step

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def begin(self, first: Batch) -> None:
        """Read the state of a killed run, or choose the precision by timing steps on ``first``."""
        state = self._load()
        if state is None:
            chosen = self._choose_precision(first) if self._ranks.leads else self.precision
            self.precision = self._ranks.from_leader(chosen)
        for row in self.history:
            self._tell(row)
        self.precision.prepare(self.method)
        if self.precision.name == "fp16":
            self._scaler = torch.amp.GradScaler(self._ranks.device_kind)
        if self.epoch < self.epochs:
            self._enter_phase()
        if state is not None and self.epoch < self.epochs:
            self._optimizer.load_state_dict(state["optimizer"])
            if self._scaler is not None:
                self._scaler.load_state_dict(state["scaler"])

    def begin_epoch(self) -> None:
        _, before = self._phase()
        self.method.epoch = self.epoch - before
        self.method.train()
        self._began, self._began_images = time.monotonic(), self._sums["images"]

    def learn(self, batch: Batch) -> str:
        """One step; a few words on how it goes. Raises UserError when it can't go on."""
        drawn_by = (self.config.seed, 1, self.epoch, self.step, self._ranks.rank)
        with self._memory_watched(len(batch.label)), seeded(*drawn_by):  # dropout draws from torch's own generators
            if self._ranks.device_kind == "cuda":
                torch.cuda.manual_seed(torch.initial_seed())
            self._learn(batch)
        self.step += 1
        if self.settings.checkpoint_seconds <= time.monotonic() - self._saved:
            self._save()
        images = self._sums["images"]
        speed = (images - self._began_images) / (time.monotonic() - self._began)
        accuracy = self._sums["right"] / max(1.0, self._sums["judged"])
        return f"loss {self._sums['loss'] / images:.3f}, {self._task.metric} {accuracy:.1%}, {speed:.0f} images/s"

    @contextlib.contextmanager
    def _memory_watched(self, images: int) -> Iterator[None]:
        """Say what to lower when memory runs out in the block. Raises UserError."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
                raise UserError(
                    f"out of memory training {self.config.model} on {images} images of {self.spec.size} pixels "
                    f"({first_line(error)}): lower train.batch_size or input.size, train with distill.together false, "
                    "or try train.precision bf16"
                ) from None
            raise

    def _learn(self, batch: Batch) -> None:
        phase, before = self._phase()
        self._schedule.step_update((self.epoch - before) * self.steps_per_epoch + self.step)
        # The teacher first: the student's activations are then still in the cache when its backward wants them.
        teacher = batch.teacher_output(self.precision) if self.method.asks_teacher else None
        with self.precision.context(self._ranks.device_kind):
            result = self.method(batch.image(self.precision), batch.target, teacher, batch.numbers)
        count = len(batch.label)
        sums = {"images": float(count), "loss": float(result["loss"].item()) * count, "judged": 0.0, "right": 0.0}
        if phase.has_accuracy:
            known = batch.known.numpy()
            outputs = result["output"].detach().float().cpu().numpy()
            scores = self._task.scores(outputs[known], batch.label.numpy()[known])
            judged = float(len(scores))
            sums |= {"judged": judged, "right": judged * self._task.summary(scores).value if judged else 0.0}
        sums = self._ranks.total(sums)  # of all processes, so that all of them stop together
        value = sums["loss"] / sums["images"]
        if not math.isfinite(value):
            cure = "take train.precision bf16 or float32" if self._scaler else "lower train.learning_rate"
            raise UserError(
                f"the loss became {value} in epoch {self.epoch + 1}, batch {self.step + 1}: {cure} "
                "(the last good state is kept)"
            )
        # The mean over all ranks' images, whatever their shares: DDP takes the mean of the ranks' gradients.
        loss = result["loss"] * (count * self._ranks.count / sums["images"])
        self._optimizer.zero_grad()
        if self._scaler is None:
            loss.backward()
        else:
            self._scaler.scale(loss).backward()
            self._scaler.unscale_(self._optimizer)
        if self.settings.clip_gradient:
            nn.utils.clip_grad_norm_(self.method.trainable(), self.settings.clip_gradient)
        if self._scaler is None:
            self._optimizer.step()
        else:
            self._scaler.step(self._optimizer)
            self._scaler.update()
        self.method.update_ema()
        self._sums = {name: total + sums[name] for name, total in self._sums.items()}

    def end_epoch(self) -> None:
        """Add a row to the history, validate, hand over from one phase to the next."""
        speed = (self._sums["images"] - self._began_images) / (time.monotonic() - self._began)
        phase, before = self._phase()
        sums = self._sums
        row: dict[str, Any] = {"epoch": self.epoch + 1, "phase": phase.name, "loss": sums["loss"] / sums["images"]}
        if sums["judged"]:
            row["train_accuracy"] = sums["right"] / sums["judged"]
        row |= {
            "images_per_second": speed,
            "learning_rate": self._optimizer.param_groups[0]["lr"],
        }
        self.epoch, self.step, self._sums = self.epoch + 1, 0, _nothing()
        done = self.epoch - before
        last = done == phase.epochs
        if self._has_validation and phase.has_accuracy and (last or done % self.settings.validate_every == 0):
            self._validate(row)
        elif phase.handover == "best" and row["loss"] < self._lowest:
            self._lowest, self._best_weights = row["loss"], copy.deepcopy(self.network.state_dict())
        self.history.append(row)
        self._tell(row)
        if last:
            if phase.handover == "best" and self._best_weights is not None:
                self.network.load_state_dict(self._best_weights)
            if not phase.has_accuracy:
                self._lowest, self._best_weights = math.inf, None
            if self.epoch < self.epochs:
                self._enter_phase()

    def _tell(self, row: dict[str, Any]) -> None:
        self._tracker.row(row["epoch"], {key: value for key, value in row.items() if isinstance(value, float)})

    def _validate(self, row: dict[str, Any]) -> None:
        if not self._ranks.leads:
            return
        averaged = self.method.get_trainable_module(ema=True)
        network = self.network if averaged is None else averaged.module.student
        batches = evaluate(network, self.spec, self._dataset, "val", self.settings.workers)
        scores = [self._task.scores(outputs, labels) for outputs, labels in batches]
        accuracy = self._task.summary(np.concatenate(scores)).value
        self.last_validation = row["validation_accuracy"] = accuracy
        if self.best is None or accuracy > self.best["validation_accuracy"]:
            self.best = {"epoch": row["epoch"], "validation_accuracy": accuracy}
            if self.settings.select == "best":
                self._best_weights = copy.deepcopy(network.state_dict())

    def finish(self) -> None:
        """Make ``network`` what is kept: the average, the best or the last; on the CPU."""
        self._tracker.close()
        averaged = self.method.get_trainable_module(ema=True)
        if averaged is not None:
            self.network.load_state_dict(averaged.module.student.state_dict())
        if self.settings.select == "best" and self._best_weights is not None:
            self.network.load_state_dict(self._best_weights)
        self.network.to("cpu").to(memory_format=torch.contiguous_format)

    # ---- phases ----------------------------------------------------------------------------------------

    def _phase(self) -> tuple[Phase, int]:
        """The phase of this epoch, and the epochs before it."""
        before = 0
        for phase in self._phases:
            if self.epoch < before + phase.epochs:
                break
            before += phase.epochs
        return phase, before

    def _enter_phase(self) -> None:
        phase, _ = self._phase()
        self.method.enter(self._phases.index(phase))
        if self._ranks.count > 1:  # anew: DDP looks at what learns only when it wraps
            self.method.prepare_distributed(device_ids=_device_ids(self._ranks))
        self._optimizer = self._new_optimizer(phase)
        self._schedule = _schedule(self.settings, self._optimizer, phase, self.steps_per_epoch)

    def _new_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Timm's optimiser over what learns in this phase; biases, norms and what the network names get no decay."""
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.network,
            opt=self.settings.optimizer,
            lr=phase.learning_rate,
            weight_decay=self.settings.weight_decay,
            momentum=self.settings.momentum,
            layer_decay=self.settings.layer_decay,
        )
        auxiliaries = [each for each in self.method.student.auxiliaries.parameters() if each.requires_grad]
        if auxiliaries:
            optimizer.add_param_group({"params": auxiliaries, "weight_decay": self.settings.weight_decay})
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", phase.learning_rate)
        return optimizer

    def _choose_precision(self, batch: Batch) -> Precision:
        if self.settings.precision != "auto":
            return Precision(self.settings.precision)

        def step(method: nn.Module, precision: Precision) -> None:
            # Of a step's time is what the teacher takes in this precision, so it is asked anew.
            teacher = batch.ask_teacher(precision) if self.method.asks_teacher else None
            with precision.context(self._ranks.device_kind):
                loss = method(batch.image(precision), batch.target, teacher, batch.numbers)["loss"]
            loss.backward()
            method.zero_grad()

        self.method.enter(0)
        self.method.train()
        with seeded(self.config.seed, 3), self._memory_watched(len(batch.label)):
            return fastest(self.method, step)

    # ---- state -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        """Write the state beside the last one and put it in its place: a kill leaves one or the other."""
        self._saved = time.monotonic()
        if self._resume is None:
            return
        averaged = self.method.get_trainable_module(ema=True)
        state = {
            "weights": self.method.student.state_dict(),
            "averaged": None if averaged is None else averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": None if self._scaler is None else self._scaler.state_dict(),
            "position": [self.epoch, self.step],
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

    def _load(self) -> dict[str, Any] | None:
        saved = self._resume / STATE if self._resume is not None else None
        content = self._ranks.from_leader(saved.read_bytes() if saved is not None and saved.is_file() else None)
        if content is None:
            return None
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=self._ranks.device, weights_only=True)
        self.method.student.load_state_dict(state["weights"])
        averaged = self.method.get_trainable_module(ema=True)
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        self.epoch, self.step = state["position"]
        self._sums, self.history, self.best = state["sums"], state["history"], state["best"]
        self._best_weights, self._lowest = state["best_weights"], state["lowest"]
        self.last_validation, self.precision = state["last_validation"], Precision(**state["precision"])
        return state


class Lockstep:
    """Runs that see the same views, side by side: each view is made once, and one teacher's answer serves all."""

    def __init__(
        self, views: TrainingViews, config: TrainConfig, ranks: Ranks, teacher: Teacher | CachedTeacher | None
    ) -> None:
        settings, self._ranks, self._teacher = config.train, ranks, teacher
        self._batches = EpochBatches(
            views.images,
            settings.batch_size,
            config.seed,
            settings.repeats,
            ranks.rank,
            ranks.count,
            config.cache_views,
        )
        self.steps_per_epoch = len(self._batches)
        self._loader = DataLoader(
            views,
            batch_sampler=self._batches,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            generator=torch.Generator(),  # its own: starting an epoch again must not move torch's
        )

    def train(self, runs: Sequence[Run]) -> None:
        """Take every run from where it is to its end, or to its ``failure``. Raises the failure of a lone run."""
        with children_signal_kept(), progress(_title(runs), sum(run.steps for run in runs)) as advance:
            self._begin(runs)
            for run in runs:
                advance(run.position, "")
            for epoch in range(min(run.epoch for run in runs), max(run.epochs for run in runs)):
                # After a kill some may be ahead of the others: they have had these batches.
                learners = [run for run in runs if run.epoch == epoch < run.epochs and run.failure is None]
                if not learners:
                    continue
                for run in learners:
                    run.begin_epoch()
                for step, batch in self._epoch(epoch, min(run.step for run in learners)):
                    for run in learners:
                        if run.step == step and run.failure is None:
                            advance(1, self._learn(run, batch, alone=len(runs) == 1))
                for run in learners:
                    if run.failure is None:
                        run.end_epoch()
        for run in runs:
            run.finish()

    def _begin(self, runs: Sequence[Run]) -> None:
        _, first = next(self._epoch(0, 0))
        for run in runs:
            run.begin(first)
            if self._teacher is not None:
                run.precision.prepare(self._teacher)

    def _learn(self, run: Run, batch: Batch, alone: bool) -> str:
        try:
            told = run.learn(batch)
        except KdpipeError as error:
            if alone:
                raise
            run.failure = error
            note(f"{run.config.model} by {run.config.method} is given up, the others go on: {error}")
            return ""
        return told if alone else f"{run.config.method}: {told}"

    def _epoch(self, epoch: int, skip: int) -> Iterator[tuple[int, Batch]]:
        self._batches.epoch, self._batches.skip = epoch, skip
        for step, view in enumerate(self._loader, skip):
            yield step, Batch(view, self._ranks, self._teacher)


def _title(runs: Sequence[Run]) -> str:
    first = runs[0].config
    what = f"{first.model} on {first.method}" if len(runs) == 1 else f"{len(runs)} students side by side"
    return f"training {what}, seed {first.seed}"


def _nothing() -> dict[str, float]:
    return {"images": 0.0, "loss": 0.0, "judged": 0.0, "right": 0.0}


def _device_ids(ranks: Ranks) -> list[int] | None:
    return [torch.device(ranks.device).index] if ranks.device_kind == "cuda" else None


def _schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer, phase: Phase, updates_per_epoch: int) -> Any:
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


def evaluate(
    network: nn.Module, spec: InputSpec, dataset: Dataset, part: Part, workers: int, batch_size: int = 256
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float32 outputs [B, ...] and labels [B] of one part batch by batch, by the preprocessing the device shares."""
    device = next(network.parameters()).device
    was_training = network.training
    normalised = Normalise(network, spec).to(device).eval()
    for image, label in DataLoader(EvaluationViews(dataset.samples(part), spec), batch_size, num_workers=workers):
        with torch.inference_mode():
            outputs = normalised(image.permute(0, 3, 1, 2).float().to(device)).cpu().numpy()
        yield outputs, label.numpy()
    network.train(was_training)
