"""What making models smaller did: the advised variant, noise by layer, the guard's curve, flipped images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import AnyArtifact, Provenance
from ..core.config import TRAINED_VARIANT
from ..core.errors import UserError
from ..core.kinds import BundleFacts, Graph, Measurement, Model, student_of
from ..core.sealed import printable
from ..core.stats import Interval, NoWorse, no_worse
from ..data.dataset import UNLABELED, Dataset
from ..runtime.task import TASKS

if TYPE_CHECKING:
    from PIL import Image

Numbers = dict[str, Any]
FLIPS = 16
THUMBNAIL = 96  # pixels


@dataclass(frozen=True)
class Packed:
    """A bundle of the measurement, of which the manifest alone is at hand: what it says, and what it was made from."""

    facts: BundleFacts
    source: Provenance

    @property
    def student_key(self) -> str | None:
        return student_of(self.source)


@dataclass(frozen=True)
class Sources:
    """Artifacts behind a measurement that were found beside it; those that were not are left out of the page."""

    graphs: Mapping[str, Graph] = field(default_factory=dict)  # by key, like the models
    models: Mapping[str, Model] = field(default_factory=dict)
    dataset: Dataset | None = None
    bundles: Mapping[str, Path] = field(default_factory=dict)  # folders: where to take one from, not what is in it

    def as_inputs(self) -> dict[str, AnyArtifact]:
        """What was found, by role, as inputs of the report."""
        found: dict[str, AnyArtifact] = {f"graph-{key[:12]}": graph for key, graph in self.graphs.items()}
        found |= {f"model-{key[:12]}": model for key, model in self.models.items()}
        return found | ({} if self.dataset is None else {"data": self.dataset})


def advice(
    rows: Sequence[Numbers],
    hops: Sequence[Numbers],
    max_drop: float,
    surely_faster: Callable[[str, str], bool],
    student: str = "",
) -> list[Numbers]:
    """By target the variant to ship: the fastest of those that are surely faster than float32 and keep its accuracy.

    That is, are shown to lose at most ``max_drop`` points. Float32 itself where there is none; nothing where float32
    was not timed. Variants that the session cannot tell from the fastest tie with it. ``may_do`` is a faster one that
    keeps the accuracy by the point value, of which the test images cannot tell whether it does. A variant that was
    trained must be worth it: it is left out, and ``gains_nothing`` says so, where one that was not and is not shown to
    be slower loses no more. What could change the advice, it rests on: ``untrusted`` names those whose latency is not
    to be believed, and then nothing is to be shipped by it.

    Args:
        rows: the bundles of one student.
        surely_faster: whether the session shows the first of two bundles to be faster than the second.
        student: what it is called, where there are several.
    """
    drops = {step["bundle"]: step["difference"] for hop in hops for step in hop["steps"] if step["variant"]}
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target and row["latency_p50_ms"]]
        float32 = next((row for row in mine if row["variant"] == "float32"), None)
        if float32 is None:
            continue
        kept = {row["name"]: no_worse(Interval(**drops[row["name"]]), max_drop) for row in mine if row["name"] in drops}
        able = [row for row in mine if row["name"] in kept and kept[row["name"]].answer == "holds"]
        perhaps = [row for row in mine if row["name"] in kept and _may_do(kept[row["name"]], max_drop)]
        untrained = [row for row in able if row["variant"] != TRAINED_VARIANT]
        gains_nothing = {
            row["name"]: row
            for row in (*able, *perhaps)
            if row["variant"] == TRAINED_VARIANT
            and any(
                drops[other["name"]]["value"] >= drops[row["name"]]["value"]
                and not surely_faster(row["name"], other["name"])
                for other in untrained
            )
        }
        able, perhaps = ([row for row in each if row["name"] not in gains_nothing] for each in (able, perhaps))
        faster = [row for row in (*able, *perhaps) if _believed(row) and surely_faster(row["name"], float32["name"])]
        best = min((row for row in faster if row in able), key=_p50, default=float32)
        may_do = min((row for row in faster if row in perhaps and _p50(row) < _p50(best)), key=_p50, default=None)
        fastest = best if may_do is None else may_do
        rivals = [row for row in (*able, *perhaps) if not surely_faster(fastest["name"], row["name"])]
        rests_on = list({row["name"]: row for row in (float32, best, *rivals)}.values())
        also = [row for row in faster if row in able and row is not best]
        ties = [row for row in also if not surely_faster(best["name"], row["name"])]
        advised = {
            "target": target,
            "student": student,
            **_advised(best, drops.get(best["name"])),
            "ties": [row["variant"] for row in ties],
            "max_drop_points": max_drop,
            "may_do": None,
            "untrusted": [{"name": row["name"], **row["trust"]} for row in rests_on if not _believed(row)],
        }
        if gains_nothing:
            advised["gains_nothing"] = [row["variant"] for row in gains_nothing.values()]
        if may_do is not None:
            accuracy = kept[may_do["name"]].as_dict()
            advised["may_do"] = {**_advised(may_do, drops[may_do["name"]]), "accuracy": accuracy}
        found.append(advised)
    return found


def _advised(row: Numbers, difference: Numbers | None) -> Numbers:
    return {
        "variant": row["variant"],
        "bundle": row["name"],
        "over_float32": row["latency_over_float32"],
        "difference": difference,
    }


def _may_do(kept: NoWorse, max_drop: float) -> bool:
    return kept.answer == "cannot tell" and kept.drop_points <= max_drop


def _p50(row: Numbers) -> float:
    return float(row["latency_p50_ms"]["value"])


def _believed(row: Numbers) -> bool:
    return bool(row["trust"]["word"] == "trusted")


def noise_by_layer(bundles: Mapping[str, Packed], sources: Sources) -> list[Numbers]:
    """Per variant with single layers: name, kind and ratio in and out of each, in the order they run."""
    found = []
    for name, bundle in bundles.items():
        model = sources.models.get(bundle.source.inputs["model"].key)
        layers = [] if model is None else model.noise_by_layer
        if layers:
            found.append({"bundle": name, "layers": [layer.model_dump() for layer in layers]})
    return found


def guards(bundles: Mapping[str, Packed]) -> list[Numbers]:
    """Per guarded variant: the drop allowed, every mix that was tried, the layers that stayed float."""
    guarded = {name: bundle.facts.guard for name, bundle in bundles.items()}
    return [{"bundle": name, **guard.model_dump(mode="json")} for name, guard in guarded.items() if guard is not None]


def flips(
    measurement: Measurement, pairs: Sequence[tuple[str, str]], labels: np.ndarray, sources: Sources
) -> list[Numbers]:
    """Up to 16 test images of which a variant says something else than its float32 file, taking turns.

    Args:
        pairs: names of bundles: the float32 one and the variant.
    """
    if sources.dataset is None:
        return []
    task, samples = TASKS[measurement.facts.task], sources.dataset.samples("test")
    classes = [printable(name) for name in sources.dataset.classes]
    fits = labels.min() >= UNLABELED and 0 <= labels.max() < len(classes)
    if len(samples) != len(labels) or not fits:
        raise UserError(f"{measurement.path} measured other images than those of {sources.dataset.path}")
    queues = []
    for before, after in pairs:
        outputs = [measurement.outputs(name) for name in (before, after)]
        if any(task.mislabeled(labels, each) for each in outputs):
            raise UserError(f"{measurement.path} measured other images than those of {sources.dataset.path}")
        if any(task.misfit(each, len(labels), len(classes)) for each in outputs):
            raise UserError(f"{measurement.path} has outputs of other classes than {sources.dataset.path}")
        first, second = (task.decide(each) for each in outputs)
        queues.append(
            [
                {
                    "bundle": after,
                    "against": before,
                    "image": printable(samples[at].path.name),
                    "position": int(at),
                    "label": task.tell(labels[at], classes),
                    "float32": task.tell(first[at], classes),
                    "variant": task.tell(second[at], classes),
                    "changed": float((first[at] != second[at]).mean()),  # a share of the image
                }
                for at in task.differing(*outputs)[:FLIPS]
            ]
        )
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:FLIPS]


def thumbnail(image: Image.Image) -> str:
    """The image as a data URI, small enough for a page."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
