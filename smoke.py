"""A recipe made small: two batches through every stage, with every target, variant and device that it names.

What a smoke run makes lies in a folder of its own, begun anew each time, so that what it shows is of this code and this
machine; the last one is kept to be looked at.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .core.artifact import is_held
from .core.config import TRAINED_VARIANT, DistillPlan, Recipe, TrainSettings
from .core.errors import GateFailed, KdpipeError, UserError
from .core.kinds import Measurement

SMOKE = ".smoke"  # in a folder of artifacts
BATCHES = 2
PHASE_EPOCHS = 4  # of a method that goes in phases, which share the steps
CALIBRATION_IMAGES, CHECK_IMAGES, PARITY_IMAGES = 16, 16, 8
TOLERANCE = 0.05  # of parity at least: outputs that have learned nothing are close to each other
WHOLE_DROP = 100.0  # points: what a guard allows of a network that has learned nothing


def smoke(recipe: Recipe) -> Recipe:
    """``recipe`` with so few images, epochs and calls that every stage is soon through, and its first seed alone.

    Networks, inputs, methods, targets, variants, devices and sizes of batches are as they were.
    """
    plan = recipe.distill
    batches = [recipe.teacher.train.batch_size, plan.train.batch_size]
    batches += [int(change.get("train", {}).get("batch_size", 0)) for change in plan.students.values()]
    teacher = recipe.teacher.model_copy(update={"train": _short(recipe.teacher.train, 1)})
    quantize = recipe.quantize
    if quantize is not None:
        few = {"images": min(quantize.calibrate.images, CALIBRATION_IMAGES)}
        trained = {"qad": quantize.qad.model_copy(update={"steps": min(quantize.qad.steps, BATCHES)})}
        quantize = quantize.model_copy(
            update={
                "calibrate": quantize.calibrate.model_copy(update=few),
                "check_images": min(quantize.check_images, CHECK_IMAGES),
                "allow_damage": True,
                "max_drop": None if quantize.max_drop is None else WHOLE_DROP,
                "guard_steps": 1,
                **(trained if TRAINED_VARIANT in quantize.variants else {}),
            }
        )
    return recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"most_images": BATCHES * max(batches)}),
            "teacher": teacher,
            "distill": _short_plan(plan),
            "export": recipe.export.model_copy(
                update={
                    "parity_images": min(recipe.export.parity_images, PARITY_IMAGES),
                    "hop_images": min(recipe.export.hop_images, PARITY_IMAGES),
                    "parity_tolerance": max(recipe.export.parity_tolerance, TOLERANCE),
                }
            ),
            "quantize": quantize,
            "package": recipe.package.model_copy(update={"golden_images": 2}),
            "bench": recipe.bench.model_copy(
                update={
                    "seconds": 0.02,
                    "min_samples": 2,
                    "max_seconds": 0.02,
                    "warm_up_seconds": 0.0,
                    "cold_starts": min(recipe.bench.cold_starts, 1),
                    "rounds": 2,
                    "sessions": 1,
                    "sustained": min(recipe.bench.sustained, 0.05),
                    "images": min(recipe.bench.images, 4),
                }
            ),
        }
    )


def _short(settings: TrainSettings, epochs: int) -> TrainSettings:
    return settings.model_copy(update={"epochs": epochs, "validate_every": 1})


def _short_plan(plan: DistillPlan) -> DistillPlan:
    """Every student for as few epochs as the methods can do with, all for the same: they may share a control."""
    methods = {plan.method, *(change.get("method", plan.method) for change in plan.students.values())}
    epochs = PHASE_EPOCHS if "stagewise" in methods else 1

    def few(views: int | None) -> int | None:
        return None if views is None else min(views, BATCHES)

    students: dict[str, dict[str, Any]] = {}
    for name, change in plan.students.items():
        train = {**change.get("train", {}), "epochs": epochs, "validate_every": 1}
        students[name] = {**change, "train": train}
        if "cache_views" in change:
            students[name]["cache_views"] = few(change["cache_views"])
        if change.get("label_fraction"):
            students[name]["label_fraction"] = 1.0
        if "stagewise" in change:
            students[name]["stagewise"] = {**change["stagewise"], "epochs": None}
    return plan.model_copy(
        update={
            "train": _short(plan.train, epochs),
            "stagewise": plan.stagewise.model_copy(update={"epochs": None}),
            "label_fraction": 1.0 if plan.label_fraction else 0.0,
            "cache_views": few(plan.cache_views),
            "control_epochs": None,
            "seeds": plan.seeds[:1],
            "students": students,
            "tracker": "none",
        }
    )


@contextlib.contextmanager
def own_folder(artifacts: Path) -> Iterator[Path]:
    """A new folder for one smoke run, held as long as it lives; those of earlier ones are removed.

    Raises:
        UserError: it cannot be made.
    """
    place = artifacts / SMOKE
    stamp = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H-%M-%S.%f")
    folder = place / f"{stamp}-{os.getpid()}"
    with contextlib.ExitStack() as stack:
        try:
            place.mkdir(parents=True, exist_ok=True)
            with contextlib.ExitStack() as door:  # one at a time, so that none removes what another is about to hold
                _hold(place, door)
                for earlier in place.iterdir():
                    if not is_held(earlier):
                        shutil.rmtree(earlier, ignore_errors=True)
                folder.mkdir()
                _hold(folder, stack)
        except OSError as error:
            raise UserError(f"cannot make {folder} ({error.strerror}): choose another --artifacts") from None
        yield folder


def _hold(folder: Path, stack: contextlib.ExitStack) -> None:
    """Hold the lock of a folder as long as the stack lasts."""
    descriptor = os.open(folder, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX)


def faults(measurements: Mapping[str, Measurement]) -> dict[str, KdpipeError]:
    """By bundle and device what a device could not do, which a real run would report and go on without."""
    found: dict[str, KdpipeError] = {}
    for device, measurement in measurements.items():
        for name, result in measurement.facts.results.items():
            if result.failed:
                found[f"{name} on {device}"] = GateFailed(result.status)
            elif result.session is None:  # neither its own runtime nor a stand-in is there
                found[f"{name} on {device}"] = UserError(result.status)
    return found
