"""The accuracy guard: what a mix of float and small layers is worth, and the mix that is taken."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import Draft, Model, write_json
from ..core.errors import GateFailed, UserError
from ..core.proc import quiet
from ..core.progress import progress
from ..core.stats import mcnemar
from ..data.dataset import Sample
from ..runtime import open_session, predict, predict_files
from ..runtime.preprocess import load_images
from .calibrate import CalibrationInputs
from .layers import sensitivities
from .search import Step, as_curve, mix_name, search
from .work import TRACED_IMAGES, open_checked, write_variant

if TYPE_CHECKING:
    from .variant import Variant

SETTINGS = "settings.json"
# Of the layers that add most noise of their own each is tried alone, on so many images.
RANKED, RANKING_IMAGES = 32, 64
TIMED_ROUNDS, TIMED_INFERENCES = 5, 20  # of a mix's latency ratio: for the curve, not for a verdict


def guarded(
    max_drop: float, limit: int, variant: Variant, model: Model, held_out: Sequence[Sample], draft: Draft[Model]
) -> dict[str, Any]:
    """Write the mix with the fewest float layers that keeps the drop into the draft; its settings.

    Every mix and what was measured of it lie in the draft's ``resume`` until it is sealed.

    Raises:
        UserError: no mix keeps the drop, or the target cannot mix.
        GateFailed: a mix whose outputs are not finite.
    """
    assert draft.resume is not None  # the draft was begun as a resumable one
    resume, facts = draft.resume, model.facts
    labels = np.array([sample.label for sample in held_out])
    paths = [sample.path for sample in held_out]
    few = load_images(paths[:RANKING_IMAGES], facts["input"])
    with quiet():
        right = predict_files(open_checked(model.path, facts), paths, facts["input"]).argmax(1) == labels

    def make(keep_float: Sequence[str], folder: Path) -> Step:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        settings = write_variant(variant, model, keep_float, folder)
        write_json(folder / SETTINGS, settings)
        mine = {**facts, "runtime": {**facts["runtime"], **settings.get("runtime", {})}}
        with quiet():
            session = open_checked(folder, mine)
            logits = predict_files(session, paths, facts["input"])
        if not np.isfinite(logits).all():
            raise GateFailed("the variant's outputs are not finite: it is not sealed")
        found = mcnemar(right, logits.argmax(1) == labels)
        size = sum(path.stat().st_size for path in folder.glob(f"{Path(facts['entry']).stem}.*"))
        return Step(
            kept=len(keep_float),
            drop_points=-100 * found.difference,
            drop_low=-100 * found.high,
            drop_high=-100 * found.low,
            images=found.n,
            over_float32=_over_float32(model, folder, mine, few),
            size_bytes=size,
        )

    def ranked() -> list[str]:
        plain = variant.activations(resume / mix_name(0) / facts["entry"])
        whole = variant.activations(model.file(facts["entry"]))
        if whole is None or plain is None:
            raise UserError(
                f"{facts['target']} cannot keep single layers of this variant in float, and it loses more than "
                f"{max_drop:g} points: choose another variant"
            )
        traced = CalibrationInputs(held_out[:TRACED_IMAGES], facts["input"], "tracing layers")
        with quiet():
            found = sensitivities(whole, plain, traced)
        names = [layer.name for layer in sorted(found, key=lambda layer: -layer.own_noise)]
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
                write_variant(variant, model, [other for other in names if other != name], Path(scratch))
                with quiet():
                    error[name] = float(np.square(predict(open_checked(Path(scratch), facts), few) - expected).mean())
        return [*sorted(tried, key=lambda name: -error[name]), *names[RANKED:]]

    steps, folder, kept = search(ranked, make, max_drop, limit, resume)
    for path in folder.iterdir():
        if path.name != SETTINGS:
            shutil.copyfile(path, draft.path / path.name)
            shutil.copymode(path, draft.path / path.name)
    draft.facts["guard"] = {"max_drop_points": max_drop, "curve": as_curve(steps), "kept_float": kept}
    chosen: dict[str, Any] = json.loads((folder / SETTINGS).read_text())
    return chosen


def _over_float32(model: Model, folder: Path, facts: dict[str, Any], images: np.ndarray) -> float | None:
    """Single-image latency over the float32 model's, taking turns; None by a stand-in's clock."""
    if "stand_in" in facts:
        return None
    ratios = []
    for _ in range(TIMED_ROUNDS):
        ratios.append(_milliseconds(folder, facts, images) / _milliseconds(model.path, model.facts, images))
    return round(float(np.median(ratios)), 3)


def _milliseconds(folder: Path, facts: dict[str, Any], images: np.ndarray) -> float:
    with quiet():
        session = open_session(folder, facts, threads=1)
    ready = session.prepare(images[:1])
    taken = []
    for _ in range(TIMED_INFERENCES):
        begun = time.perf_counter()
        session.infer(ready)
        taken.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(taken[TIMED_INFERENCES // 4 :]))
