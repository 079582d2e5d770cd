"""The accuracy guard: what a mix of float and small layers is worth, and the mix that is taken."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..core.artifact import Draft, write_json
from ..core.errors import GateFailed, UserError
from ..core.kinds import GuardFacts, Mix, Model, ModelFacts
from ..core.proc import quiet
from ..core.progress import note, progress
from ..core.stats import Interval, NoWorse, no_worse
from ..data.dataset import Sample, load_images, load_labels, predict_samples
from ..data.splits import even_fraction
from ..runtime import open_session, predict
from ..runtime.bundle import apart
from ..runtime.task import TASKS, Change, Task
from .calibrate import CalibrationInputs
from .layers import noise_by_layer, own_noise
from .search import mix_name, search
from .variant import Taken, Variant
from .work import TRACED_IMAGES, open_checked

SETTINGS = "settings.json"
RANKED = 32  # of the layers that add most noise of their own: each is tried alone, on some images
TIMED_ROUNDS, TIMED_INFERENCES = 5, 20  # of a mix's latency ratio: for the curve, not for a verdict


def guarded(
    max_drop: float, limit: int, variant: Variant, model: Model, held_out: Sequence[Sample], draft: Draft[Model]
) -> tuple[Taken, GuardFacts]:
    """Write the mix with the fewest float layers that keeps the drop into the draft.

    One half of the held-out images searches, the other confirms what was found.

    Returns:
        What the quantiser did for it, and every mix that was tried.

    Every mix and what was measured of it lie in the draft's ``resume`` until it is sealed.

    Raises:
        UserError: too few images to part.
        GateFailed: the best mix surely loses more, or one whose outputs are not finite.
    """
    assert draft.resume is not None  # the draft was begun as a resumable one
    resume, facts = draft.resume, model.facts
    spec, task = facts.input.model_dump(), TASKS[facts.task]
    searching, confirming = parted(held_out, task)
    few = load_images(searching[: task.together], spec)

    def scores(folder: Path, as_run: ModelFacts, samples: Sequence[Sample]) -> np.ndarray:
        return scored(folder, as_run, samples, task)

    before = scores(model.path, facts, searching)

    def as_run(taken: Taken) -> ModelFacts:
        return facts.model_copy(update={"runtime": {**facts.runtime, **taken.runtime}})

    def confirm(folder: Path) -> NoWorse:
        after = scores(folder, as_run(_taken(folder)), confirming)
        found = kept_accuracy(task.change(scores(model.path, facts, confirming), after), max_drop)
        # Of all held-out images, of which the other half searches.
        return replace(found, images_needed=None if found.images_needed is None else 2 * found.images_needed)

    def make(keep_float: Sequence[str], folder: Path) -> Mix:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        taken = variant.write(keep_float, folder)
        write_json(folder / SETTINGS, taken._asdict())
        found = task.change(before, scores(folder, as_run(taken), searching))
        size = sum(path.stat().st_size for path in folder.glob(f"{Path(facts.entry).stem}.*"))
        return Mix(
            kept=len(keep_float),
            drop_points=-100 * found.difference,
            drop_low=-100 * found.high,
            drop_high=-100 * found.low,
            images=found.n,
            over_float32=_over_float32(model, folder, as_run(taken), few),
            size_bytes=size,
        )

    def ranked() -> list[str]:
        quantized = variant.activations(resume / mix_name(0) / facts.entry)
        float32 = variant.activations(variant.traced)
        if float32 is None or quantized is None:  # no single layer of this variant can stay float
            return []
        traced = CalibrationInputs(searching[:TRACED_IMAGES], spec, "tracing layers")
        with quiet():
            found = noise_by_layer(float32, quantized, traced)
        names = [layer.name for layer in sorted(found, key=own_noise, reverse=True)]
        return by_damage(names) if variant.quick else names

    def by_damage(names: Sequence[str]) -> list[str]:
        """The most damaging first: the outputs' error when a layer alone is small and all others are float.

        A bad range hurts the layer that makes a tensor and the one that takes it: both come out on top, where leaving
        either of them in float would change nothing.
        """
        error = {}
        with quiet():
            expected = predict(open_checked(model.path, facts), few)
        tried = names[:RANKED]
        with progress("ranking layers", len(tried)) as advance, tempfile.TemporaryDirectory() as scratch:
            for name in tried:
                advance(1, name)
                variant.write([other for other in names if other != name], Path(scratch))
                with quiet():
                    error[name] = _error(expected, predict(open_checked(Path(scratch), facts), few))
        return [*sorted(tried, key=lambda name: -error[name]), *names[RANKED:]]

    can_show = enough_to_show(task, before[: min(len(searching), len(confirming))], max_drop)
    mixes, folder, kept, confirmed = search(ranked, make, confirm, max_drop, limit, resume, can_show)
    note(_told(confirmed, facts.target))
    for path in folder.iterdir():
        if path.name != SETTINGS:
            shutil.copyfile(path, draft.path / path.name)
            shutil.copymode(path, draft.path / path.name)
    curve = tuple(sorted(mixes, key=lambda mix: mix.kept))
    found = GuardFacts(
        max_drop_points=max_drop,
        curve=curve,
        kept_float=tuple(kept),
        shown=confirmed.answer == "holds",
        confirmed=confirmed,
    )
    return _taken(folder), found


def scored(folder: Path, facts: ModelFacts, samples: Sequence[Sample], task: Task) -> np.ndarray:
    """Scores of ``samples`` by the model in ``folder``, a part of them in memory at a time.

    Raises:
        GateFailed: outputs that are not finite.
    """
    found, spec = [], facts.input.model_dump()
    with quiet():
        session = open_checked(folder, facts)
        for at in range(0, len(samples), task.together):
            some = samples[at : at + task.together]
            outputs = predict_samples(session, some, spec)
            if not np.isfinite(outputs).all():
                raise GateFailed("the variant's outputs are not finite: it is not sealed")
            found.append(task.scores(outputs, load_labels(some, spec)))
    return np.concatenate(found)


def parted(held_out: Sequence[Sample], task: Task) -> tuple[list[Sample], list[Sample]]:
    """Half of the images, even over the classes, to search on, the others to confirm on, in their order.

    Raises:
        UserError: none to confirm on.
    """
    first = set(even_fraction([sample.label for sample in held_out], 0.5, 0, task).tolist())
    searching = [sample for at, sample in enumerate(held_out) if at in first]
    confirming = [sample for at, sample in enumerate(held_out) if at not in first]
    if not confirming:
        raise UserError(
            "max_drop searches on one half of the held-out images and confirms on the other: wanted two at least, of a "
            f"class where each image has one, found {len(held_out)} images; raise data.val_fraction, or set guard_part "
            "test"
        )
    return searching, confirming


def kept_accuracy(change: Change, max_drop: float) -> NoWorse:
    """Whether a change of accuracy is shown to be a loss of at most ``max_drop`` points."""
    return no_worse(Interval(change.difference, change.low, change.high, change.n), max_drop)


def enough_to_show(task: Task, scores: np.ndarray, max_drop: float) -> bool:
    """Whether so many images would show a loss of at most ``max_drop`` points if not one of them changed."""
    return kept_accuracy(task.change(scores, scores), max_drop).answer == "holds"


def _told(confirmed: NoWorse, target: str) -> str:
    text = (
        f"the mix for {target} {confirmed.words()} (on {confirmed.images} images that the search did not use, "
        f"which can tell a drop of {confirmed.detectable_points:.2f})"
    )
    return text if confirmed.answer == "holds" else f"{text}; not shown to lose at most {confirmed.max_drop_points:g}"


def _error(expected: np.ndarray, actual: np.ndarray) -> float:
    """The mean square of what was added to logits; of classes the share of the places that changed."""
    return float((np.square(actual - expected) if expected.dtype.kind == "f" else apart(expected, actual)).mean())


def _taken(folder: Path) -> Taken:
    return Taken(**json.loads((folder / SETTINGS).read_text()))


def _over_float32(model: Model, folder: Path, facts: ModelFacts, images: np.ndarray) -> float | None:
    """Single-image latency over the float32 model's, taking turns; None by a stand-in's clock."""
    if facts.stand_in is not None:
        return None
    ratios = []
    for _ in range(TIMED_ROUNDS):
        ratios.append(_milliseconds(folder, facts, images) / _milliseconds(model.path, model.facts, images))
    return round(float(np.median(ratios)), 3)


def _milliseconds(folder: Path, facts: ModelFacts, images: np.ndarray) -> float:
    with quiet():
        session = open_session(folder, facts.for_runtime(), threads=1)
    ready = session.prepare(images[:1])
    taken = []
    for _ in range(TIMED_INFERENCES):
        begun = time.perf_counter()
        session.infer(ready)
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(taken[TIMED_INFERENCES // 4 :]))
