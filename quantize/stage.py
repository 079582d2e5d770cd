"""The quantize stage: a float32 model to one sealed variant, with what it changed on real images."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import EVIDENCE, Order, drafting, find_ancestors, write_json
from ..core.config import QuantizeConfig
from ..core.errors import GateFailed, UserError, choice
from ..core.kinds import Checkpoint, Control, Damage, Graph, Model, ModelFacts, Refusal, RefusalFacts, TrainedFacts
from ..core.proc import quiet, require
from ..core.progress import note, progress
from ..core.sealed import printable
from ..core.stats import Interval, lost_or_won
from ..data.dataset import Dataset, Sample, load_images, predict_samples
from ..runtime import Session, predict
from ..runtime.task import TASKS, Task
from . import VARIANTS
from .bias import decibels
from .calibrate import CalibrationInputs, choose
from .guard import guarded, scored
from .layers import noise_by_layer, signal_to_noise_db
from .trained import Trained
from .variant import Variant
from .work import TRACED_IMAGES, Training, Work, open_checked

if TYPE_CHECKING:
    from torch import nn

# Below it a variant is another network more often than not. Measured on digits and on networks of random weights: 0.75
# and more at 4.5 dB and more, 0.55 at 4.4 dB, 0.27 and less at 0.4 dB and less.
LEAST_AGREEMENT, JUDGING_IMAGES = 0.5, 8  # fewer images than that judge nobody
MOST_OUTPUT_BYTES = 2**28  # of one model's outputs that are compared at once


def quantize(
    order: Order[QuantizeConfig],
    model: Model,
    dataset: Dataset,
    out: Path,
    check: Callable[[Path], None],
    graph: Graph | None = None,
    teacher: Checkpoint | None = None,
    training: Training | None = None,
) -> Model:
    """Make the variant of a float32 model; ranges come from training images, never from random data.

    With ``config.max_drop`` layers are kept in float, the most damaging first, until the variant is shown to lose no
    more than that on held-out images. One of which these images cannot tell is sealed all the same: ``guard.shown``
    says so.

    Args:
        order: its configuration as ``suited`` to a machine.
        check: refuses a file that cannot be run where it is going.
        graph: the ONNX that ``model`` was made from, if it was made from one.
        teacher: for ``calibrate.select: teacher``.
        training: of a variant that is trained, what the student became, and its control.

    Raises:
        UserError: not a float32 model, an unknown variant, images of other classes, too few images, a missing
            package, an operator the quantiser lacks.
        GateFailed: the variant's outputs are not finite, do not depend on the image, or agree with float32's on too
            few images; or no mix keeps the drop; or a trained one is worse than the same without training.
    """
    config, target = order.config, model.facts.target
    if model.facts.precision != "float32":
        raise UserError(f"{model.path} is {model.facts.variant} already: give the float32 model")
    if config.variant not in VARIANTS[target]:
        raise choice(f"variant of {target}", config.variant, VARIANTS[target])
    kind = VARIANTS[target][config.variant]
    require(f"{config.variant} for '{target}'", kind.needs, target)
    if kind.untrained is not None:
        check_training(config.variant, model, training)
    dataset.check_classes_of(model, "the model")
    spec = model.facts.input.model_dump()
    held_out = _held_out(config, dataset)
    with drafting(Model, order, out, resumable=config.max_drop is not None) as draft:
        calibration = _calibration(config, model, dataset, teacher) if kind.calibrated else []
        inputs = CalibrationInputs(calibration, spec, f"calibrating {target}")
        work = Work(model, graph, inputs, config, check)
        variant = kind(work if training is None else work.of(training.own))
        (draft.path / EVIDENCE).mkdir()
        guard = None
        if config.max_drop is None:
            taken = variant.write((), draft.path)
        else:
            taken, guard = guarded(config.max_drop, config.guard_steps, variant, model, held_out, draft)
        facts = model.facts.model_copy(
            update={
                "variant": config.variant,
                "precision": kind.precision,
                "runtime": {**model.facts.runtime, **taken.runtime},
                "settings": taken.settings,
                "parity": None,
                "calibration_images": len(calibration),
                "guard": guard,
            }
        )
        if calibration:
            files = [sample.path.name for sample in calibration]
            write_json(draft.path / Model.CALIBRATION, {"part": "train", "files": files})
        shutil.copyfile(model.file(model.LABELS), draft.path / Model.LABELS)
        checked = _checked(config, dataset, {sample.path for sample in calibration})
        damage = _compare(config, variant, model, checked, draft.path, facts)
        facts = facts.model_copy(update={"against_float32": damage})
        if training is not None and isinstance(variant, Trained):
            controlled = against_controls(variant, work, training, draft.path, facts, dataset, checked)
            facts = facts.model_copy(update={"trained": controlled})
        draft.facts = facts
    return draft.artifact


def refuse(order: Order[QuantizeConfig], model: Model, error: GateFailed, out: Path) -> Refusal:
    """Seal that the variant of ``order`` was refused, and why. Raises UserError as every stage."""
    with drafting(Refusal, order, out) as draft:
        draft.facts = RefusalFacts(
            model=model.facts.model,
            target=model.facts.target,
            variant=order.config.variant,
            reason=printable(str(error)),
        )
    return draft.artifact


def _held_out(config: QuantizeConfig, dataset: Dataset) -> list[Sample]:
    if config.max_drop is None:
        return []
    # Classes take turns: the first few, on which layers are ranked, are of many.
    found = dataset.balanced(config.guard_part, len(dataset.samples(config.guard_part)), seed=0)
    if not found:
        raise UserError(
            f"max_drop wants held-out images, and {dataset.path} has no '{config.guard_part}' part: "
            "set data.val_fraction above 0, or guard_part test"
        )
    return found


def _calibration(
    config: QuantizeConfig, model: Model, dataset: Dataset, teacher: Checkpoint | None
) -> Sequence[Sample]:
    spec = model.facts.input.model_dump()

    @cache
    def opened() -> Session:
        return open_checked(model.path, model.facts)

    def by_model(samples: Sequence[Sample]) -> np.ndarray:
        with quiet():
            return predict_samples(opened(), samples, spec)

    @cache
    def restored() -> tuple[nn.Module, dict[str, Any]]:
        from ..networks import models

        assert teacher is not None  # choose() asks only where there is one
        network, its_spec = models.restore(teacher)
        return models.Normalise(network, its_spec).eval(), its_spec.model_dump()

    def by_teacher(samples: Sequence[Sample]) -> np.ndarray:
        import torch

        whole, its_spec = restored()
        with torch.inference_mode():
            batch = torch.from_numpy(load_images(samples, its_spec)).permute(0, 3, 1, 2).float()
            said: np.ndarray = whole(batch).numpy()
        return said

    return choose(config.calibrate, dataset, by_model, None if teacher is None else by_teacher)


def check_training(variant: str, model: Model, training: Training | None) -> None:
    """Refuse what was trained of another student, or nothing. Raises UserError."""
    student = next(iter(find_ancestors(model.manifest.provenance(), Checkpoint)), None)
    if training is None or student is None:
        raise UserError(f"{variant} trains the student of {model.path}: wanted what it became, found nothing")
    for retrained in (training.own, training.float32_steps):
        if retrained.tuned.student.key != student.key:
            raise UserError(
                f"{retrained.tuned.path} was trained of another student ({retrained.tuned.student.key[:12]}) than "
                f"{model.path} is of ({student.key[:12]}): train that one"
            )


def _checked(config: QuantizeConfig, dataset: Dataset, seen: set[Path]) -> list[Sample]:
    """Training images that set no range."""
    samples = dataset.balanced("train", config.check_images + len(seen), config.calibrate.seed)
    return [sample for sample in samples if sample.path not in seen][: config.check_images]


def _compare(
    config: QuantizeConfig,
    variant: Variant,
    model: Model,
    checked: Sequence[Sample],
    folder: Path,
    facts: ModelFacts,
) -> Damage | None:
    """What changed, on ``checked`` images: of the outputs, and layer by layer (written down)."""
    spec = model.facts.input.model_dump()
    if not checked:
        return None
    found = damaged_by(variant, model, folder, facts, checked)
    with quiet():
        float32 = variant.activations(variant.traced)
        quantized = variant.activations(folder / facts.entry)
    traced = CalibrationInputs(checked[:TRACED_IMAGES], spec, "comparing layers")
    damaged = found.agreement < LEAST_AGREEMENT and found.images >= JUDGING_IMAGES
    if damaged and not config.allow_damage:
        raise GateFailed(
            f"{config.variant} of {facts.model} for {facts.target} agrees with float32 on {found.agreement:.1%} of "
            f"{found.images} images, {_words(found)} (wanted {LEAST_AGREEMENT:.0%}): not sealed; "
            "keep layers in float by --max-drop, choose another variant, or seal it all the same by --allow-damage true"
        )
    if float32 is not None and quantized is not None:
        with quiet():
            layers = noise_by_layer(float32, quantized, traced)
            write_json(folder / Model.NOISE_BY_LAYER, [layer.model_dump() for layer in layers])
    return found


def damaged_by(variant: Variant, model: Model, folder: Path, facts: ModelFacts, checked: Sequence[Sample]) -> Damage:
    """What the file in ``folder`` changed of the outputs of the float32 ``model``. Raises GateFailed as ``damage``."""
    spec = model.facts.input.model_dump()
    images = load_images(checked, spec)
    with quiet():
        whole = open_checked(model.path, model.facts)
        images = images[: most_images(predict(whole, images[:1]), len(images))]
        before, after = predict(whole, images), predict(open_checked(folder, facts), images)
        found = damage(TASKS[facts.task], before, after)
        if found.signal_to_noise_db is None:
            float32, small = variant.activations(model.entry), variant.activations(folder / facts.entry)
            if float32 is not None and small is not None:
                traced = CalibrationInputs(checked[:TRACED_IMAGES], spec, "comparing outputs")
                found = found.model_copy(update={"signal_to_noise_db": decibels(float32, small, traced)[0]})
    return found


def against_controls(
    variant: Trained,
    work: Work,
    training: Training,
    folder: Path,
    facts: ModelFacts,
    dataset: Dataset,
    checked: Sequence[Sample],
) -> TrainedFacts:
    """The trained variant in ``folder`` beside the same file without training, and after as many steps in float32.

    Where the guard left layers in float, all three are written anew without: what those gain is not the training's.

    Raises:
        GateFailed: it is shown to be less right on held-out images than without training.
    """
    assert variant.untrained is not None
    model, task, held_out = work.model, TASKS[facts.task], dataset.samples(work.config.guard_part)
    scores: dict[str, np.ndarray] = {}
    if held_out:
        scores["float32"] = scored(model.path, model.facts, held_out, task)

    def control(name: str, made_by: Variant, folder: Path) -> Control:
        found = damaged_by(made_by, model, folder, facts, checked) if checked else None
        if not held_out:
            return Control(against_float32=found)
        scores[name] = scored(folder, facts, held_out, task)
        return Control(against_float32=found, accuracy=_apart(task, scores["float32"], scores[name]))

    def written(name: str, kind: Variant) -> Control:
        with tempfile.TemporaryDirectory() as scratch:
            kind.write((), Path(scratch))
            return control(name, kind, Path(scratch))

    with progress("comparing with the controls", 3) as advance:
        is_mixed = facts.guard is not None and bool(facts.guard.kept_float)
        own = written("own", variant) if is_mixed else control("own", variant, folder)
        advance(1, "without training")
        untrained = written("untrained", variant.untrained(work))
        advance(1, "as long in float32")
        float32_steps = written("float32_steps", variant.untrained(work.of(training.float32_steps)))
        advance(1, "")
    gained = _apart(task, scores["untrained"], scores["own"]) if held_out else None
    if gained is not None:
        of = f"{work.config.variant} of {facts.model} for {facts.target}"
        told = f"{lost_or_won(-100 * gained.value)} of accuracy to the same without training"
        if gained.high is not None and gained.high < 0 and not work.config.allow_damage:
            raise GateFailed(
                f"{of} {told} on {gained.n} held-out images, surely: not sealed; take the variant without training, or "
                "train it longer or more slowly (--qad.steps, --qad.learning-rate)"
            )
        if gained.value < 0:
            note(f"{of} {told} on {gained.n} held-out images, which cannot tell: it is not advised where both are")
    return TrainedFacts(
        tuned=training.own.tuned.key,
        placed=variant.placed,
        from_images=variant.from_images,
        own=own,
        untrained=untrained,
        float32_steps=float32_steps,
        over_untrained=gained,
    )


def _apart(task: Task, before: np.ndarray, after: np.ndarray) -> Interval:
    """The accuracy after less that before, of the same images."""
    found = task.change(before, after)
    return Interval(found.difference, found.low, found.high, found.n)


def most_images(output: np.ndarray, count: int) -> int:
    """How many of ``count`` images to look at, of outputs like this one: eight at least, and no more than fit."""
    return min(count, max(JUDGING_IMAGES, MOST_OUTPUT_BYTES // output.nbytes))


def damage(task: Task, before: np.ndarray, after: np.ndarray) -> Damage:
    """What a variant changed in outputs [N, ...]: signal-to-noise ratio in dB, and how far both say the same.

    The ratio is None where the outputs are classes, which no difference can be taken of.

    Raises:
        GateFailed: outputs that are not finite or the same for every image.
    """
    if not np.isfinite(after).all() or (len(after) > 1 and (after == after[0]).all()):
        raise GateFailed("the variant's outputs are not finite or do not depend on the image: it is not sealed")
    return Damage(
        images=len(before),
        signal_to_noise_db=signal_to_noise_db(before, after - before) if before.dtype.kind == "f" else None,
        agreement=task.agreement(before, after),
    )


def _words(found: Damage) -> str:
    return "of unknown noise" if found.signal_to_noise_db is None else f"{found.signal_to_noise_db:g} dB"
