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
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from timm.optim import create_optimizer_v2, param_groups_weight_decay
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..core.config import TrainConfig, TrainSettings
from ..core.errors import KdpipeError, UserError
from ..core.inputs import InputSpec, size_words
from ..core.kinds import PrunedFacts
from ..core.proc import children_signal_kept, first_line
from ..core.progress import note, progress
from ..data.dataset import Dataset, Part
from ..data.views import EpochBatches, EvaluationViews, TrainingView, TrainingViews, seeded
from ..networks.models import Normalise
from ..runtime.task import TASKS, Task
from .cache import CachedTeacher
from .features import thinned
from .methods import Method, Phase
from .precision import Choices, Precision, fastest
from .ranks import Ranks
from .teacher import Address, Teacher, TeacherOutput
from .trackers import Tracker

STATE = "state.pt"
READ_EVERY = 16  # steps on a device that works on while nobody asks it
JUDGED_SIDE = 32  # places along each side of a training output that are judged, at most
EVALUATED, EVALUATED_PLACES = 256, 16  # images at a time, and of those about every place of which something is said


class Batch:
    """One batch as every run of a lockstep sees it: laid out once for each memory format, and the teacher asked once
    for each precision.
    """

    def __init__(self, view: TrainingView, images: int, ranks: Ranks, teacher: Teacher | CachedTeacher | None) -> None:
        """``view``: of a batch; what it holds has the batch as its first dimension. ``images``: of all processes."""
        self.images = images
        self.label = view.label
        self.target = view.target.to(ranks.device, non_blocking=True)
        self._address = cast("Address", tuple(view.address))
        self._device, self._teacher = ranks.device_kind, teacher
        self._images = {False: view.image.to(ranks.device, non_blocking=True)}
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


class Tally:
    """What the last steps gave, left on the device until it is read: reading waits for the device.

    On a CPU every step is read, before its gradient is taken. Of outputs that say something of every place some
    places are judged, spread evenly: to judge all of them would take as long as a part of the step.
    """

    def __init__(self, task: Task, ranks: Ranks) -> None:
        self._task, self._ranks = task, ranks
        self._interval = 1 if ranks.device_kind == "cpu" else READ_EVERY
        self._steps: list[tuple[tuple[int, int], Tensor, Tensor | None, Tensor]] = []

    def add(self, at: tuple[int, int], loss: Tensor, outputs: Tensor | None, labels: Tensor) -> None:
        """One step by epoch and number: its mean loss, outputs [B, ...] where they mean something, labels [B, ...]."""
        if outputs is not None:
            grid = [min(side, JUDGED_SIDE) for side in outputs.shape[2:]]
            outputs, labels = thinned(outputs.detach(), grid), thinned(labels, grid)
        self._steps.append((at, loss.detach(), outputs, labels))

    @property
    def is_empty(self) -> bool:
        """Whether everything was read."""
        return not self._steps

    @property
    def is_due(self) -> bool:
        """Whether so many steps wait that they should be read: the same on every process."""
        return len(self._steps) >= self._interval

    def read(self) -> list[tuple[tuple[int, int], dict[str, float]]]:
        """The sums of each step that waits, over the images of all processes, in order."""
        rows = []
        for at, loss, outputs, labels in self._steps:
            sums = {"images": float(len(labels)), "loss": float(loss.item()) * len(labels), "judged": 0.0, "right": 0.0}
            if outputs is not None:
                known = (labels >= 0).reshape(len(labels), -1).any(1).numpy()
                scores = self._task.scores(outputs.float().cpu().numpy()[known], labels.numpy()[known])
                judged = float(len(scores))
                sums |= {"judged": judged, "right": judged * self._task.summary(scores).value if judged else 0.0}
            rows.append((at, self._ranks.total(sums)))  # of all processes, so that all of them stop together
        self._steps = []
        return rows


class Run:
    """One student's training.

    Attributes:
        history: one row an epoch (losses, accuracies, images/s).
        best: the best epoch on the validation part, or None without one.
        precision: what was taken.
        pruned: how narrow the network was made before it learned, or None.
        failure: why it was given up, or None.
    """

    def __init__(
        self,
        config: TrainConfig,
        method: Method,
        dataset: Dataset,
        spec: InputSpec,
        steps: int,
        steps_per_epoch: int,
        ranks: Ranks,
        resume: Path | None,
        tracker: Tracker,
        pruned: PrunedFacts | None = None,
        looks: bool = True,
    ) -> None:
        """``steps`` in all, unless the method's phases have a length of their own; ``looks`` at held-out images.

        Raises:
            UserError: it can't be trained so.
        """
        self.config, self.settings, self.method, self.spec, self._dataset = config, config.train, method, spec, dataset
        self.network, self.pruned = method.student.student, pruned
        self._task = TASKS[dataset.facts.task]
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.last_validation: float | None = None
        self.precision = Precision("float32")
        self.failure: KdpipeError | None = None
        self.steps_per_epoch, self._ranks, self._resume, self._tracker = steps_per_epoch, ranks, resume, tracker
        self._phases = method.phases(steps, steps_per_epoch)
        self._ends = list(accumulate(phase.steps for phase in self._phases))
        self.steps = self._ends[-1]
        self.epochs = math.ceil(self.steps / steps_per_epoch)
        method.to(ranks.device)
        self._looks = looks and bool(dataset.samples("val"))
        if self.settings.select == "best" and not self._looks:
            raise UserError("train.select is 'best' but there is no validation part: set data.val_fraction above 0")
        self._saved = time.monotonic()
        self.epoch = self.step = 0  # where it is; the epoch counts through all phases, which may end within one
        self._phase_number = 0
        self._sums, self._tally = _nothing(), Tally(self._task, ranks)
        self._best_weights: dict[str, Tensor] | None = None
        self._lowest = math.inf  # loss of the best epoch of a phase that hands over its best
        self._began = 0.0
        self._state: dict[str, Any] | None = None
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
    def chooses_precision(self) -> bool:
        """Whether it has none yet, and is to find the fastest."""
        return self.settings.precision == "auto" and self._state is None

    @property
    def is_done(self) -> bool:
        """Whether all its steps are made."""
        return self.position >= self.steps

    def begin(self, precision: Precision | None = None) -> None:
        """Go on from the state that ``load`` found, or begin in this precision."""
        state, self._state = self._state, None
        if state is None:
            self.precision = precision or Precision(self.settings.precision)
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
        self.method.epoch = self.epoch
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
        if self._phase_is_over and self.step < self.steps_per_epoch and not self.is_done:
            self._end_part()
            self._next_phase()
            self._began, self._began_images = time.monotonic(), 0.0
        # What waits to be read is in no state, and may not be finite.
        if self._tally.is_empty and self.settings.checkpoint_seconds <= time.monotonic() - self._saved:
            self._save()
        images = self._sums["images"]
        if not images:
            return ""
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
                    f"out of memory training {self.config.model} on {images} images of {size_words(self.spec.size)} "
                    f"pixels ({first_line(error)}): lower train.batch_size or input.size, train with distill.together "
                    "false, or try train.precision bf16"
                ) from None
            raise

    def _learn(self, batch: Batch) -> None:
        phase = self._phase
        self._schedule.step_update(self.position - self._ends[self._phase_number] + phase.steps)
        # The teacher first: the student's activations are then still in the cache when its backward wants them.
        teacher = batch.teacher_output(self.precision) if self.method.asks_teacher else None
        with self.precision.context(self._ranks.device_kind):
            result = self.method(batch.image(self.precision), batch.target, teacher, batch.numbers)
        outputs = result["output"] if phase.has_accuracy else None
        self._tally.add((self.epoch, self.step), result["loss"], outputs, batch.label)
        if self._tally.is_due:
            self._read()
        # The mean over all ranks' images, whatever their shares: DDP takes the mean of the ranks' gradients.
        loss = result["loss"] * (len(batch.label) * self._ranks.count / batch.images)
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

    def _read(self) -> None:
        """Add what the tally holds to the sums. Raises UserError for a loss that is not finite."""
        for (epoch, step), sums in self._tally.read():
            value = sums["loss"] / sums["images"]
            if not math.isfinite(value):
                cure = "take train.precision bf16 or float32" if self._scaler else "lower train.learning_rate"
                raise UserError(
                    f"the loss became {value} in epoch {epoch + 1}, batch {step + 1}: {cure} "
                    "(the last good state is kept)"
                )
            self._sums = {name: total + sums[name] for name, total in self._sums.items()}

    def end_epoch(self) -> None:
        """End the row of the epoch, and the phase if it ends here too. Raises UserError when it can't go on."""
        self._end_part()
        over = self._phase_is_over
        self.epoch, self.step = self.epoch + 1, 0
        if over and self.epoch < self.epochs:
            self._next_phase()

    def _end_part(self) -> None:
        """Add a row to the history for what an epoch had of this phase, validate, and hand over if it is over."""
        self._read()
        sums, self._sums, phase = self._sums, _nothing(), self._phase
        speed = (sums["images"] - self._began_images) / (time.monotonic() - self._began)
        row: dict[str, Any] = {"epoch": self.epoch + 1, "phase": phase.name, "loss": sums["loss"] / sums["images"]}
        if sums["judged"]:
            row["train_accuracy"] = sums["right"] / sums["judged"]
        row["learning_rate"] = self._optimizer.param_groups[0]["lr"]
        over = self._phase_is_over
        is_due = over or (self.epoch + 1) % self.settings.validate_every == 0
        if self._looks and phase.has_accuracy and is_due:
            self._validate(row)
        elif phase.handover == "best" and row["loss"] < self._lowest:
            self._lowest, self._best_weights = row["loss"], copy.deepcopy(self.network.state_dict())
        self.history.append(row)
        # Its speed is an event: sealed, the same run would never give the same file.
        self._tell(row | {"images_per_second": speed})
        if over:
            if phase.handover == "best" and self._best_weights is not None:
                self.network.load_state_dict(self._best_weights)
            if not phase.has_accuracy:
                self._lowest, self._best_weights = math.inf, None

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

    @property
    def _phase(self) -> Phase:
        return self._phases[self._phase_number]

    @property
    def _phase_is_over(self) -> bool:
        return self.position == self._ends[self._phase_number]

    def _next_phase(self) -> None:
        self._phase_number += 1
        self._enter_phase()

    def _enter_phase(self) -> None:
        phase = self._phase
        self.method.enter(self._phase_number)
        if self._ranks.count > 1:  # anew: DDP looks at what learns only when it wraps
            self.method.prepare_distributed(device_ids=_device_ids(self._ranks))
        self._optimizer = self._new_optimizer(phase)
        self._schedule = _schedule(self.settings, self._optimizer, phase)

    def _new_optimizer(self, phase: Phase) -> torch.optim.Optimizer:
        """Timm's optimiser over what learns in this phase, of the network and beside it, by one rule of decay.

        Biases, norms and what the network names get none, unless ``decay_all``.
        """
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            self.network,
            opt=self.settings.optimizer,
            lr=phase.learning_rate,
            weight_decay=self.settings.weight_decay,
            momentum=self.settings.momentum,
            layer_decay=self.settings.layer_decay,
        )
        for group in param_groups_weight_decay(self.method.student.auxiliaries, self.settings.weight_decay):
            optimizer.add_param_group(group)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", phase.learning_rate)
            if self.settings.decay_all:
                group["weight_decay"] = self.settings.weight_decay
        return optimizer

    def fastest_precision(self, batch: Batch) -> Precision:
        """The one in which a step on ``batch`` takes the least time."""

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
            return fastest(self.method, step, self._ranks.device_kind)

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
            "phase": self._phase_number,
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

    def load(self) -> None:
        """Read the state of a killed run, if there is one."""
        saved = self._resume / STATE if self._resume is not None else None
        content = self._ranks.from_leader(saved.read_bytes() if saved is not None and saved.is_file() else None)
        if content is None:
            return
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location=self._ranks.device, weights_only=True)
        self.method.student.load_state_dict(state["weights"])
        averaged = self.method.get_trainable_module(ema=True)
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        (self.epoch, self.step), self._phase_number = state["position"], state["phase"]
        self._sums, self.history, self.best = state["sums"], state["history"], state["best"]
        self._best_weights, self._lowest = state["best_weights"], state["lowest"]
        self.last_validation, self.precision = state["last_validation"], Precision(**state["precision"])
        self._state = state


class Lockstep:
    """Runs that see the same views, side by side: each view is made once, and one teacher's answer serves all."""

    def __init__(
        self,
        views: TrainingViews,
        config: TrainConfig,
        ranks: Ranks,
        teacher: Teacher | CachedTeacher | None,
        choices: Choices,
    ) -> None:
        """``choices``: what ``precision: auto`` took before."""
        settings, self._ranks, self._teacher, self._choices = config.train, ranks, teacher, choices
        self._images, self._batch_size = len(views.images), settings.batch_size
        self._batches_of = partial(
            EpochBatches,
            batch_size=settings.batch_size,
            seed=config.seed,
            repeats=settings.repeats,
            rank=ranks.rank,
            ranks=ranks.count,
            views=config.cache_views,
        )
        self._batches = self._batches_of(views.images)
        self.steps_per_epoch = len(self._batches)
        self._loader = DataLoader(
            views,
            batch_sampler=self._batches,
            num_workers=settings.workers,
            persistent_workers=settings.workers > 0,
            generator=torch.Generator(),  # its own: starting an epoch again must not move torch's
            pin_memory=ranks.device_kind != "cpu",  # from where a device fetches by itself
        )

    def steps_of(self, images: int) -> int:
        """Steps of an epoch of so many images."""
        return len(self._batches_of(range(images)))

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
                        if run.step == step and run.failure is None and not run.is_done:
                            advance(1, self._guarded(run, partial(run.learn, batch), alone=len(runs) == 1))
                    if all(run.is_done or run.failure is not None for run in learners):
                        break
                for run in learners:
                    if run.failure is None:
                        self._guarded(run, run.end_epoch, alone=len(runs) == 1)
        for run in runs:
            run.finish()

    def _begin(self, runs: Sequence[Run]) -> None:
        _, first = next(self._epoch(0, 0))
        for run in runs:
            run.load()
        chosen = iter(self._ranks.from_leader(self._choose(runs, first) if self._ranks.leads else []))
        for run in runs:
            run.begin(next(chosen) if run.chooses_precision else None)
            if self._teacher is not None:
                run.precision.prepare(self._teacher)

    def _choose(self, runs: Sequence[Run], first: Batch) -> list[Precision]:
        """What each run that chooses its precision is to take: what is remembered of its network, or one for all.

        That one is what another of these runs has taken already, or timed now: with the teacher, if any run asks it.
        """
        choosing = [run for run in runs if run.chooses_precision]
        if not choosing:
            return []
        known = [self._choices.of(run.config) for run in choosing]
        taken = [run.precision for run in runs if run.settings.precision == "auto" and run not in choosing]
        common = next((each for each in (*taken, *known) if each is not None), None)
        if common is None:
            common = max(choosing, key=lambda run: run.method.asks_teacher).fastest_precision(first)
        for run, own in zip(choosing, known, strict=True):
            if own is None:
                self._choices.keep(run.config, common)
        return [own or common for own in known]

    def _guarded(self, run: Run, work: Callable[[], str | None], alone: bool) -> str:
        """Do a part of a run's work: a lone run's failure is raised, one of several is kept."""
        try:
            told = work()
        except KdpipeError as error:
            if alone:
                raise
            run.failure = error
            note(f"{run.config.model} by {run.config.method} is given up, the others go on: {error}")
            return ""
        return told or "" if alone else f"{run.config.method}: {told}"

    def _epoch(self, epoch: int, skip: int) -> Iterator[tuple[int, Batch]]:
        self._batches.epoch, self._batches.skip = epoch, skip
        for step, view in enumerate(self._loader, skip):
            images = min(self._batch_size, self._images - step * self._batch_size)
            yield step, Batch(view, images, self._ranks, self._teacher)


def _title(runs: Sequence[Run]) -> str:
    first = runs[0].config
    what = f"{first.model} on {first.method}" if len(runs) == 1 else f"{len(runs)} students side by side"
    return f"training {what}, seed {first.seed}"


def _nothing() -> dict[str, float]:
    return {"images": 0.0, "loss": 0.0, "judged": 0.0, "right": 0.0}


def _device_ids(ranks: Ranks) -> list[int] | None:
    return [torch.device(ranks.device).index] if ranks.device_kind == "cuda" else None


def _schedule(settings: TrainSettings, optimizer: torch.optim.Optimizer, phase: Phase) -> Any:
    """Timm's schedule over the steps of a phase; a function of the step's number alone.

    What the settings say in epochs is a share of ``epochs``, and so of any phase, however short.
    """
    milestones = [milestone * phase.steps // settings.epochs for milestone in settings.milestones]
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched={"cosine": "cosine", "multistep": "multistep", "constant": "multistep"}[settings.schedule],
        num_epochs=phase.steps,
        # Timm lowers the rate a step before its milestone.
        decay_milestones=[at + 1 for at in (milestones if settings.schedule == "multistep" else [phase.steps + 1])],
        decay_rate=settings.decay_rate,
        warmup_epochs=min(settings.warmup_epochs * phase.steps // settings.epochs, phase.steps // 4),
        warmup_lr=phase.learning_rate / 100,
        warmup_prefix=False,
        step_on_epochs=False,
        updates_per_epoch=1,
        min_lr=0.0,
    )
    return schedule


def evaluate(
    network: nn.Module, spec: InputSpec, dataset: Dataset, part: Part, workers: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Float32 outputs [B, ...] and labels [B, ...] of a part batch by batch, by the preprocessing the device shares."""
    batch_size = EVALUATED_PLACES if TASKS[dataset.facts.task].dense else EVALUATED
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    was_training = network.training
    normalised = Normalise(network, spec).to(device).eval()
    for image, label in DataLoader(EvaluationViews(dataset.samples(part), spec), batch_size, num_workers=workers):
        with torch.inference_mode():
            outputs = normalised(image.permute(0, 3, 1, 2).float().to(device)).cpu().numpy()
        yield outputs, label.numpy()
    network.train(was_training)
