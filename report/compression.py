"""What making models smaller did: the advised variant, noise by layer, the guard's curve, flipped images."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..core.artifact import Artifact, Graph, Measurement, Model, Provenance
from ..data.dataset import Dataset
from ..runtime.preprocess import decode

Numbers = dict[str, Any]
FLIPS = 16
THUMBNAIL = 96  # pixels
LAYERS = "evidence/layers.json"


@dataclass(frozen=True)
class Sources:
    """Artifacts behind a measurement that were found beside it; those that were not are left out of the page."""

    graphs: Mapping[str, Graph] = field(default_factory=dict)  # by key, like the models
    models: Mapping[str, Model] = field(default_factory=dict)
    dataset: Dataset | None = None

    def as_inputs(self) -> dict[str, Artifact]:
        found: dict[str, Artifact] = {f"graph-{key[:12]}": graph for key, graph in self.graphs.items()}
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
        whole = next((row for row in mine.values() if row["variant"] == "float32"), None)
        if whole is None:
            continue
        best, latency = whole, 1.0
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


def noise_by_layer(bundles: Mapping[str, Provenance], sources: Sources) -> list[Numbers]:
    """Per variant with single layers: name, kind and ratio in and out of each, in the order they run."""
    found = []
    for name, bundle in bundles.items():
        model = sources.models.get(bundle.inputs["model"].key)
        if model is not None and LAYERS in model.manifest.files:
            found.append({"bundle": name, **json.loads(model.file(LAYERS).read_text())})
    return found


def guards(bundles: Mapping[str, Provenance]) -> list[Numbers]:
    """Per guarded variant: the drop allowed, every mix that was tried, the layers that stayed float."""
    return [{"bundle": name, **bundle.facts["guard"]} for name, bundle in bundles.items() if "guard" in bundle.facts]


def flips(
    measurement: Measurement, pairs: Sequence[tuple[str, str]], labels: np.ndarray, sources: Sources
) -> list[Numbers]:
    """Up to 16 test images that a variant calls something else than its float32 file, taking turns.

    Args:
        pairs: names of bundles: the float32 one and the variant.
    """
    if sources.dataset is None:
        return []
    classes, samples = sources.dataset.classes, sources.dataset.samples("test")
    queues = []
    for before, after in pairs:
        first, second = (
            np.load(measurement.file(f"logits/{name}.npy"), allow_pickle=False).argmax(1) for name in (before, after)
        )
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
                for at in np.flatnonzero(first != second)
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
