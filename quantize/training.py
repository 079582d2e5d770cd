"""Quantisation-aware distillation: a student learns to say in 8 bits what it says in float32. No label is wanted.

The recipe: BatchNorms folded first; weights symmetric by output channel, their scale taken from the largest of them at
every step and never learned, so that every writer finds the same integers again; ranges of activations learned where
files have them, and frozen for the last third. After SQAKD (Zhao and Zhao 2024, the loss) and LSQ+ (Bhalgat et al.
2020, the ranges).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import QadConfig, TrainConfig, TrainSettings
from ..core.errors import UserError
from ..core.inputs import InputSpec
from ..core.kinds import Checkpoint, Graph, Tuned, TunedFacts, TunedRange
from ..core.proc import children_signal_kept, quiet
from ..core.progress import progress
from ..data.dataset import UNLABELED, Dataset, load_images
from .calibrate import CalibrationInputs, choose
from .qdq import QUANTIZED_INPUT, OnnxActivations, left_in_float, observe_onnx, write_qdq
from .ranges import estimate, normalisation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..data.views import EpochBatches, TrainingImages, TrainingViews
    from .fake import Ranges, Shared

STATE = "state.pt"
SEEN_IMAGES = 2  # by which tensors of files are known in the network
FROZEN_FROM = 2 / 3  # of the steps
WARM_UP = 0.05  # of the steps
ROWS = 200  # of the history, at most

# What a teacher says of views float32 [B, 3, H, W], normalised for the student, by their addresses: logits [B, K, ...].
Answers = Callable[["Tensor", "tuple[Tensor, Tensor]"], "Tensor"]


def tune(
    order: Order[QadConfig],
    student: Checkpoint,
    graph: Graph,
    dataset: Dataset,
    out: Path,
    answers: Answers | None = None,
) -> Tuned:
    """Train ``student`` on the grids of its INT8 files. Killed at any moment and called again, it goes on bit for bit.

    Views are made as they were when the student was trained.

    Args:
        graph: its ONNX: the INT8 file that is written of it says which tensors are on a grid.
        answers: what is learned from in the student's place.

    Raises:
        UserError: no images, a BatchNorm that cannot be folded, a loss that stopped being finite.
    """
    import torch

    from ..networks import models
    from .fake import Ranges, fold, put_on_grids

    config = order.config
    dataset.check_classes_of(student, "the checkpoint")
    with drafting(Tuned, order, out, resumable=True) as draft:
        network, spec = models.restore(student)
        learned = learned_images(config, student, dataset)
        views, batches = _views(config, student, learned, dataset, spec)
        whole = models.Normalise(models.deployed(network), spec).eval()
        reference = models.Normalise(network, spec).eval().requires_grad_(False)
        shown = load_images(dataset.balanced("train", SEEN_IMAGES, config.calibrate.seed), spec.model_dump())
        images = torch.from_numpy(shown).permute(0, 3, 1, 2).float()
        fold(whole, images, student.facts.model)
        begun: list[Shared] = []
        unplaced = 0
        if config.quantized:
            with quiet():
                begun, unplaced = _places(config, whole, graph, dataset, spec, shown)
        ranges = Ranges(begun, config.symmetric)
        assert draft.resume is not None
        learner = _Learner(config, whole, ranges, reference, spec, answers, draft.resume)
        learner.train(views, batches)
        weights = put_on_grids(whole, images, config.weight_levels) if config.quantized else 0
        models.save_weights(whole.network, draft.path / Tuned.WEIGHTS)
        grids = {place: ranges.grid(place) for place in ranges.index}
        write_json(
            draft.path / Tuned.RANGES,
            [TunedRange(place=at, scale=scale, zero_point=zero).model_dump() for at, (scale, zero) in grids.items()],
        )
        losses = learner.losses
        few = max(1, len(losses) // ROWS)
        rows = [{"step": at + 1, "loss": float(np.mean(losses[at : at + few]))} for at in range(0, len(losses), few)]
        (draft.path / Tuned.HISTORY).write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copyfile(student.file(student.LABELS), draft.path / Tuned.LABELS)
        tenth = max(1, len(losses) // 10)
        draft.facts = TunedFacts(
            task=student.facts.task,
            model=student.facts.model,
            input=spec,
            steps=config.steps,
            training_images=learned.labeled,
            unlabeled_images=learned.unlabeled,
            weights=weights,
            places=len(grids),
            unplaced=unplaced,
            first_loss=float(np.mean(losses[:tenth])),
            last_loss=float(np.mean(losses[-tenth:])),
        )
    return draft.artifact


def trained_as(student: Checkpoint) -> TrainConfig | None:
    """How the student was trained; None where it was not trained here."""
    return TrainConfig.model_validate(student.settings) if student.manifest.stage == "train" else None


def learned_images(config: QadConfig, student: Checkpoint, dataset: Dataset) -> TrainingImages:
    """What is learned from: all images, or where a cache may answer, those that the student learned from.

    Raises:
        UserError: there are none.
    """
    from ..data.views import training_images

    run = trained_as(student) if config.learn_from == "teacher" else None
    fraction, seed = (1.0, config.seed) if run is None else (run.label_fraction, run.seed)
    found = training_images(dataset, fraction, seed, config.unlabeled)
    if len(found.numbers) < 2:
        raise UserError(
            f"{dataset.path} has {len(found.numbers)} training image(s): int8-qad wants images to learn from, with or "
            "without labels (data.unlabeled)"
        )
    return found


def _views(
    config: QadConfig, student: Checkpoint, learned: TrainingImages, dataset: Dataset, spec: InputSpec
) -> tuple[TrainingViews, EpochBatches]:
    """The views to learn from, made as the student's were, and the order they come in."""
    from ..data.views import EpochBatches, TrainingViews

    run = trained_as(student)
    settings = TrainSettings() if run is None else run.train
    # A cache answers about the views that the student saw.
    asked = run if config.learn_from == "teacher" else None
    seed, cached = (config.seed, None) if asked is None else (asked.views_by, asked.cache_views)
    views = TrainingViews(learned, settings, spec, len(dataset.classes), seed)
    batch = min(config.batch_size, len(views.images))
    return views, EpochBatches(views.images, batch, config.seed, views=cached)


# ---- places ------------------------------------------------------------------------------------------------


def _places(
    config: QadConfig, whole: nn.Module, graph: Graph, dataset: Dataset, spec: InputSpec, shown: np.ndarray
) -> tuple[list[Shared], int]:
    """Where files have grids, with the ranges that they begin with, and how many of the files' were not found.

    They are read from the INT8 file as it is written without training. Outputs of all matrix products are on a grid
    too, which ONNX Runtime's own files of transformers leave out: TFLite's have them.
    """
    from .fake import Shared, matched, signatures

    source = graph.file(graph.ONNX)
    samples = choose(config.calibrate, dataset, _nobody, None)
    inputs = CalibrationInputs(samples, spec.model_copy(update={"layout": "NCHW"}).model_dump(), "calibrating")
    ranges = estimate(observe_onnx(source, inputs), config.calibrate.ranges, config.symmetric)
    with tempfile.TemporaryDirectory() as scratch:
        written = Path(scratch) / "model.onnx"
        kind = "int8" if config.symmetric else "uint8"
        extra = {"ActivationSymmetric": config.symmetric}
        write_qdq(source, ranges, {}, written, kind, (), False, extra, left_in_float(graph.facts.nodes_by_kind))
        wanted = quantized_tensors(source, written)
    activations = OnnxActivations(source)
    held = held_by_file(activations, shown, inputs)
    found = matched(signatures(whole, shown), {name: held[name] for name in wanted if name in held})
    known = {found[layer.output] for layer in normalisation(activations) if layer.output in found}
    shared: dict[str, dict[int, QuantizedTensor]] = {}
    for name, place in sorted(found.items()):
        shared.setdefault(wanted[name].scale_of, {}).setdefault(place, wanted[name])
    taken: set[int] = set()
    begun = []
    for group in shared.values():
        places = tuple(place for place in group if place not in taken)
        if places:
            taken.update(places)
            its = group[places[0]]
            begun.append(Shared(places, its.low, its.high, not known.isdisjoint(places)))
    return begun, len(wanted) - len(found)


def _nobody(_: object) -> np.ndarray:
    raise UserError("quantize.calibrate.select: for int8-qad wanted balanced or random, which ask no network")


class QuantizedTensor(NamedTuple):
    """What a tensor's grid holds, and by what name its scale goes, which others may share."""

    scale_of: str
    low: float
    high: float


def quantized_tensors(source: Path, written: Path) -> dict[str, QuantizedTensor]:
    """What is on a grid in the Q/DQ file ``written``, without its input, by the names of the float graph ``source``.

    An activation that a range makes needless is left out of the file: what came before it bears its name then.
    """
    import onnx
    from onnx import numpy_helper

    before, after = onnx.load(source).graph, onnx.load(written).graph
    known = {name for node in before.node for name in node.output}
    constants = {tensor.name: tensor for tensor in after.initializer}
    found = {}
    for node in after.node:
        name = node.input[0].removesuffix(QUANTIZED_INPUT)
        if node.op_type != "QuantizeLinear" or name not in known:
            continue
        scale = float(numpy_helper.to_array(constants[node.input[1]]))
        zero = numpy_helper.to_array(constants[node.input[2]])
        bounds = np.iinfo(zero.dtype)
        least = -int(bounds.max) if bounds.min < 0 else 0  # int8 is symmetric
        low, high = ((end - int(zero)) * scale for end in (least, int(bounds.max)))
        found[name] = QuantizedTensor(node.input[1], low, high)
    return found


def held_by_file(activations: Any, shown: np.ndarray, inputs: CalibrationInputs) -> dict[str, list[np.ndarray]]:
    """What every tensor of a file holds for images uint8 [N, H, W, 3], as ``fake.signature`` has it."""
    from .fake import signature

    held: dict[str, list[np.ndarray]] = {}
    for image in shown:
        for name, values in activations(inputs.as_input(image)).items():
            if values.ndim > 1:
                held.setdefault(name, []).append(signature(values))
    return held


# ---- the loop ----------------------------------------------------------------------------------------------


class _Learner:
    """One training from its first step, or the last that was saved, to its end."""

    def __init__(
        self,
        config: QadConfig,
        whole: nn.Module,
        ranges: Ranges,
        reference: nn.Module,
        spec: InputSpec,
        answers: Answers | None,
        resume: Path,
    ) -> None:
        import torch

        from .fake import Quantized

        self._config, self._whole, self._ranges, self._reference = config, whole, ranges, reference
        self._answers, self._state = answers, resume / STATE
        self._quantized = Quantized(ranges, config.weight_levels) if config.quantized else None
        self._mean, self._std = (torch.tensor(each).view(1, 3, 1, 1) for each in (spec.mean, spec.std))
        self._learned = [each for each in whole.parameters() if each.requires_grad]
        groups = [{"params": self._learned, "lr": config.learning_rate}]
        if ranges.index:
            groups.append({"params": [ranges.factors], "lr": config.range_learning_rate})
        self._optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        self._peaks = [float(group["lr"]) for group in groups]  # type: ignore[arg-type]
        self._averaged = None if config.average is None else [each.detach().clone() for each in self._learned]
        self._frozen_from = math.ceil(FROZEN_FROM * config.steps)
        self._saved = time.monotonic()
        self._step = 0
        self.losses: list[float] = []
        self._load()

    def train(self, views: TrainingViews, batches: EpochBatches) -> None:
        """Take all steps that are left; the average is what stays, where one is kept. Raises UserError."""
        import torch

        steps = self._config.steps
        kind = "in 8 bits" if self._config.quantized else "as long in float32, the control"
        with children_signal_kept(), progress(f"training {kind}", steps) as advance:
            advance(self._step, "")
            for view in self._following(views, batches):
                self._learn(view)
                self._step += 1
                advance(1, f"loss {np.mean(self.losses[-50:]):.4f}")
                if time.monotonic() - self._saved >= self._config.checkpoint_seconds:
                    self._save()
                if self._step == steps:
                    break
        if self._averaged is not None:
            with torch.no_grad():
                for each, average in zip(self._learned, self._averaged, strict=True):
                    each.copy_(average)

    def _following(self, views: TrainingViews, batches: EpochBatches) -> Iterator[Any]:
        import torch
        from torch.utils.data import DataLoader

        loader = DataLoader(
            views,
            batch_sampler=batches,
            num_workers=self._config.workers,
            persistent_workers=self._config.workers > 0,
            generator=torch.Generator(),  # its own: starting an epoch again must not move torch's
        )
        epoch, skip = divmod(self._step, len(batches))
        while self._step < self._config.steps:
            batches.epoch, batches.skip = epoch, skip
            yield from loader
            epoch, skip = epoch + 1, 0

    def _learn(self, view: Any) -> None:
        import torch
        from torch.nn.functional import cross_entropy, interpolate, kl_div

        config = self._config
        if self._step == self._frozen_from:
            self._ranges.freeze()
        for group, peak in zip(self._optimizer.param_groups, self._peaks, strict=True):
            group["lr"] = peak * _share(self._step, config.steps)
        raw = (view.image * self._std + self._mean) * 255
        autocast = torch.autocast("cpu", torch.bfloat16) if config.precision == "bf16" else nullcontext()
        with autocast:
            with torch.no_grad():
                wanted = self._reference(raw) if self._answers is None else self._answers(view.image, view.address)
            outputs = self._whole(raw) if self._quantized is None else self._quantized.run(self._whole, raw)
        outputs, wanted = outputs.float(), wanted.float()
        if wanted.shape != outputs.shape:  # a teacher draws masks at a stride of its own
            wanted = interpolate(wanted, outputs.shape[2:], mode="bilinear", align_corners=False)
        heat = config.temperature
        apart = kl_div(
            (outputs / heat).log_softmax(1), (wanted / heat).log_softmax(1), log_target=True, reduction="none"
        )
        loss = heat**2 * apart.sum(1).mean()
        if config.label_weight and bool((view.label != UNLABELED).any()):
            if view.label.ndim > 1:
                outputs = interpolate(outputs, view.label.shape[1:], mode="bilinear", align_corners=False)
            loss = loss + config.label_weight * cross_entropy(outputs, view.label.long(), ignore_index=UNLABELED)
        value = float(loss.item())
        if not math.isfinite(value):
            raise UserError(
                f"the loss of int8-qad became {value} in step {self._step + 1}: lower quantize.qad.learning_rate, or "
                "look at the student's outputs (the last good state is kept)"
            )
        self._optimizer.zero_grad()
        torch.autograd.backward(loss)
        self._optimizer.step()
        self.losses.append(value)
        if self._averaged is not None and config.average is not None:
            decay = min(config.average, (1 + self._step) / (10 + self._step))
            torch._foreach_lerp_(self._averaged, [each.detach() for each in self._learned], 1 - decay)

    def _save(self) -> None:
        """Write the state beside the last one and put it in its place: a kill leaves one or the other."""
        import torch

        state = {
            "weights": self._whole.state_dict(),
            "ranges": self._ranges.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "averaged": self._averaged,
            "step": self._step,
            "losses": self.losses,
        }
        draft = self._state.with_suffix(".new")
        with draft.open("wb") as stream:
            torch.save(state, stream)
            stream.flush()
            os.fsync(stream.fileno())
        draft.replace(self._state)
        self._saved = time.monotonic()

    def _load(self) -> None:
        """Read the state of a killed run, if there is one."""
        import torch

        if not self._state.is_file():
            return
        state: Mapping[str, Any] = torch.load(self._state, weights_only=True)
        self._whole.load_state_dict(state["weights"])
        self._ranges.load_state_dict(state["ranges"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._averaged, self._step, self.losses = state["averaged"], state["step"], list(state["losses"])
        if self._step > self._frozen_from:
            self._ranges.factors.requires_grad_(False)


def _share(step: int, steps: int) -> float:
    """Of the peak learning rate: a linear warm-up, then half a cosine."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
