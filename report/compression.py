"""What making models smaller did: the advised variant, noise by layer, the guard's curve, flipped images."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.artifact import AnyArtifact, Provenance, find_ancestors
from ..core.errors import UserError
from ..core.kinds import BundleFacts, Checkpoint, Graph, Measurement, Model
from ..core.sealed import printable
from ..data.dataset import Dataset
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
        nearest = next(iter(find_ancestors(self.source, Checkpoint)), None)
        return nearest.key if nearest else None


@dataclass(frozen=True)
class Sources:
    """Artifacts behind a measurement that were found beside it; those that were not are left out of the page."""

    graphs: Mapping[str, Graph] = field(default_factory=dict)  # by key, like the models
    models: Mapping[str, Model] = field(default_factory=dict)
    dataset: Dataset | None = None

    def as_inputs(self) -> dict[str, AnyArtifact]:
        """What was found, by role, as inputs of the report."""
        found: dict[str, AnyArtifact] = {f"graph-{key[:12]}": graph for key, graph in self.graphs.items()}
        found |= {f"model-{key[:12]}": model for key, model in self.models.items()}
        return found | ({} if self.dataset is None else {"data": self.dataset})


def advice(rows: Sequence[Numbers], hops: Sequence[Numbers], max_drop: float) -> list[Numbers]:
    """By target the variant to ship: the fastest that is surely faster than float32 and loses at most ``max_drop``.

    Float32 itself where there is none; nothing where float32 was not timed.
    """
    drops = {step["bundle"]: step["difference"] for hop in hops for step in hop["steps"] if step["variant"]}
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = {row["name"]: row for row in rows if row["target"] == target and row["latency_p50_ms"]}
        float32 = next((row for row in mine.values() if row["variant"] == "float32"), None)
        if float32 is None:
            continue
        best, latency = float32, 1.0
        for name, row in mine.items():
            ratio, drop = row["latency_over_float32"], drops.get(name)
            if ratio is None or drop is None or ratio["high"] is None:
                continue
            if ratio["high"] < 1 and ratio["value"] < latency and -100 * drop["value"] <= max_drop:
                best, latency = row, ratio["value"]
        drop = drops.get(best["name"])
        found.append(
            {
                "target": target,
                "variant": best["variant"],
                "bundle": best["name"],
                "over_float32": best["latency_over_float32"],
                "difference": drop,
                "max_drop_points": max_drop,
            }
        )
    return found


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
    if len(samples) != len(labels) or not 0 <= labels.min() <= labels.max() < len(classes):
        raise UserError(f"{measurement.path} measured other images than those of {sources.dataset.path}")
    queues = []
    for before, after in pairs:
        outputs = [measurement.outputs(name) for name in (before, after)]
        if any(each.shape[1] != len(classes) for each in outputs):
            raise UserError(f"{measurement.path} has outputs of other classes than {sources.dataset.path}")
        first, second = (task.decide(each) for each in outputs)
        queues.append(
            [
                {
                    "bundle": after,
                    "image": printable(samples[at].path.name),
                    "position": int(at),
                    "label": task.tell(labels[at], classes),
                    "float32": task.tell(first[at], classes),
                    "variant": task.tell(second[at], classes),
                }
                for at in task.differing(*outputs)
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
