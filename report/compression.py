"""What making models smaller did: the advised variant, noise by layer, the guard's curve, flipped images."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import AnyArtifact, Provenance
from ..core.kinds import BundleFacts, Graph, Measurement, Model, student_of
from ..data.dataset import Dataset
from ..runtime.preprocess import decode
from ..runtime.task import TASKS

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

    def as_inputs(self) -> dict[str, AnyArtifact]:
        found: dict[str, AnyArtifact] = {f"graph-{key[:12]}": graph for key, graph in self.graphs.items()}
        found |= {f"model-{key[:12]}": model for key, model in self.models.items()}
        return found | ({} if self.dataset is None else {"data": self.dataset})


def advice(
    rows: Sequence[Numbers], hops: Sequence[Numbers], max_drop: float, surely_faster: Callable[[str, str], bool]
) -> list[Numbers]:
    """By target the variant to ship: the fastest of those that are surely faster than float32 and keep its accuracy.

    Float32 itself where there is none; nothing where float32 was not timed. Variants that the session cannot tell from
    the fastest tie with it. What could change the advice, it rests on: ``untrusted`` names those whose latency is not
    to be believed, and then nothing is to be shipped by it.

    Args:
        surely_faster: whether the session shows the first of two bundles to be faster than the second.
    """
    differences = {step["bundle"]: step["difference"] for hop in hops for step in hop["steps"] if step["variant"]}
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target and row["latency_p50_ms"]]
        float32 = next((row for row in mine if row["variant"] == "float32"), None)
        if float32 is None:
            continue
        able = [row for row in mine if row["name"] in differences and _keeps(differences[row["name"]], max_drop)]
        faster = [row for row in able if _believed(row) and surely_faster(row["name"], float32["name"])]
        best = min(faster, key=lambda row: row["latency_p50_ms"]["value"], default=float32)
        rivals = [row for row in able if row is not best and not surely_faster(best["name"], row["name"])]
        rests_on = list({row["name"]: row for row in (float32, best, *rivals)}.values())
        found.append(
            {
                "target": target,
                "variant": best["variant"],
                "bundle": best["name"],
                "ties": [row["variant"] for row in rivals if row in faster],
                "over_float32": best["latency_over_float32"],
                "difference": differences.get(best["name"]),
                "max_drop_points": max_drop,
                "untrusted": [{"name": row["name"], **row["trust"]} for row in rests_on if not _believed(row)],
            }
        )
    return found


def _keeps(difference: Numbers, max_drop: float) -> bool:
    """Whether a variant loses at most ``max_drop`` points of accuracy."""
    return bool(-100 * difference["value"] <= max_drop)


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
    """Up to 16 test images that a variant calls something else than its float32 file, taking turns.

    Args:
        pairs: names of bundles: the float32 one and the variant.
    """
    if sources.dataset is None:
        return []
    task, classes, samples = TASKS[measurement.facts.task], sources.dataset.classes, sources.dataset.samples("test")
    queues = []
    for before, after in pairs:
        outputs = [measurement.outputs(name) for name in (before, after)]
        first, second = (task.decide(each) for each in outputs)
        queues.append(
            [
                {
                    "bundle": after,
                    "image": samples[at].path.name,
                    "position": int(at),
                    "label": classes[labels[at]],
                    "float32": classes[first[at]],
                    "variant": classes[second[at]],
                }
                for at in task.differing(*outputs)
            ]
        )
    turns = [queue[turn] for turn in range(max(map(len, queues), default=0)) for queue in queues if turn < len(queue)]
    return turns[:FLIPS]


def thumbnail(path: Path) -> str:
    """The image as a data URI, small enough for a page."""
    image = decode(path)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()
