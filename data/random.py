"""Random images where there is no data set: smooth ones, so that networks say something else of each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..core.artifact import Order, drafting, write_json
from ..core.config import RandomConfig
from ..core.inputs import sides
from .dataset import RANDOM, Dataset, DatasetFacts, Index, Part, index_records

TESTED = 8  # images of the test part, which says nothing
LARGEST_BLOCKS = 12  # across an image


def random_images(order: Order[RandomConfig], out: Path) -> Dataset:
    """Seeded blots of colour of the network's own size, whose labels mean nothing: on them parity is told."""
    from PIL import Image

    config = order.config
    generator = np.random.default_rng(config.seed)
    height, width = sides(config.size)
    counts: dict[Part, int] = {"train": config.images, "test": TESTED}
    with drafting(Dataset, order, out) as draft:
        for part, count in counts.items():
            (draft.path / part).mkdir()
            names = []
            for at in range(count):
                blocks = int(generator.integers(2, LARGEST_BLOCKS + 1))
                colours = generator.integers(0, 256, (blocks, blocks, 3), dtype=np.uint8)
                image = Image.fromarray(colours).resize((width, height), Image.Resampling.BICUBIC)
                names.append(f"{part}/{at:05d}.png".encode())
                image.save(draft.path / part / f"{at:05d}.png")
            labels = np.arange(count, dtype=np.int32) % config.classes
            np.save(draft.path / Dataset.records_name(part), index_records(names, labels, copied=False))
        index = Index(classes=tuple(map(str, range(config.classes))), roots=dict.fromkeys(counts))
        write_json(draft.path / Dataset.INDEX, index.model_dump(mode="json"))
        draft.facts = DatasetFacts(task="classification", source=RANDOM, classes=config.classes, images=dict(counts))
    return draft.artifact
