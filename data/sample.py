"""A few of a data set's images as a data set of its own: enough to make and to time networks, not to judge them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import SampleConfig
from .dataset import Dataset, DatasetFacts, Index, Part, Sample, index_records

TESTED = 8  # images of the test part, on which nothing is judged


def sample(order: Order[SampleConfig], dataset: Dataset, out: Path) -> Dataset:
    """Write ``config.images`` images of the training part, classes taking turns, and a few more as a test part.

    Both are of the training part: what is held out is not looked at. Raises UserError for images that can't be read.
    """
    config = order.config
    images = dataset.balanced("train", config.images + TESTED, seed=0)
    tested = images[config.images :] or images[:TESTED]
    parts: dict[Part, list[Sample]] = {"train": images[: config.images], "test": tested}
    with drafting(Dataset, order, out) as draft:
        for part, samples in parts.items():
            (draft.path / part).mkdir()
            names = []
            for at, each in enumerate(samples):
                image = each.image()
                image.thumbnail((config.longest_side, config.longest_side))
                names.append(f"{part}/{at:05d}.png".encode())
                image.save(draft.path / part / f"{at:05d}.png")
            labels = np.array([each.label for each in samples], np.int32)
            np.save(draft.path / Dataset.records_name(part), index_records(names, labels, copied=False))
        index = Index(classes=tuple(dataset.classes), roots=dict.fromkeys(parts))
        write_json(draft.path / Dataset.INDEX, index.model_dump(mode="json"))
        draft.facts = DatasetFacts(
            task=dataset.facts.task,
            source=dataset.facts.source,
            classes=len(dataset.classes),
            images={part: len(samples) for part, samples in parts.items()},
        )
    return draft.artifact
