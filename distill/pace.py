"""How fast a method trains a network here, from a few steps of it: nothing is written."""

from __future__ import annotations

import math
import time
from itertools import islice
from pathlib import Path

from ..core.config import TrainConfig
from ..core.kinds import Checkpoint
from ..core.progress import muted
from ..data.dataset import Dataset
from ..networks import models
from .loop import evaluate
from .ranks import Ranks
from .train import trained_runs

# Steps of the two trainings whose times are compared, at least as many as any method has phases: what both take
# besides, to begin, falls out, and neither looks at held-out images, which can take longer than so few steps. The
# second has twice as many, and where they are quick so many more that the noise of the beginning is little beside them.
FEW_STEPS, MORE_STEPS, MOST_STEPS = 6, 12, 384
APART_SECONDS = 1.0
PATIENCE_SECONDS = 20.0  # of the first: where steps are that slow, it is pace enough


def view_seconds(config: TrainConfig, dataset: Dataset, teacher: Checkpoint | None, choices: Path) -> float:
    """Seconds a view in training by ``config``, alone, with the teacher asked. Raises UserError as training does.

    Args:
        choices: where it is remembered what ``precision: auto`` took.
    """
    batch, images = config.train.batch_size, len(dataset.samples("train"))
    share = min(1.0, FEW_STEPS * batch / images)
    steps_per_epoch = max(1, math.ceil(share * images / batch))

    def timed(steps: int) -> tuple[int, float]:
        epochs = max(1, math.ceil(steps / steps_per_epoch))
        train = config.train.model_copy(update={"epochs": epochs, "warmup_epochs": 0, "select": "last"})
        asked = config.model_copy(update={"train": train, "label_fraction": share, "cache_views": None})
        begun = time.perf_counter()
        with muted():
            one = Path("pace")
            runs = trained_runs({one: asked}, {one: None}, dataset, teacher, None, choices, Ranks(), looks=False)
        return sum(run.steps for run in runs.values()) * batch, time.perf_counter() - begun

    few, first = timed(FEW_STEPS)
    if first > PATIENCE_SECONDS:
        return first / few
    steps = MORE_STEPS
    more, second = timed(steps)
    while second - first < APART_SECONDS and steps < MOST_STEPS:
        aim = steps * APART_SECONDS / max(second - first, APART_SECONDS / 8)
        steps = min(MOST_STEPS, max(2 * steps, math.ceil(aim)))
        more, second = timed(steps)
    # Where the beginning took longer than all steps, its noise may hide them.
    return (second - first) / (more - few) if second > first and more > few else second / more


def test_seconds(config: TrainConfig, dataset: Dataset) -> float:
    """Seconds to look at the whole test part once."""
    network, spec = models.create(
        config.model_copy(update={"pretrained": False}), len(dataset.classes), dataset.facts.task
    )
    taken, seen, begun = 0.0, 0, time.perf_counter()
    for outputs, _ in islice(evaluate(network, spec, dataset, "test", workers=0), 2):
        taken, seen, begun = time.perf_counter() - begun, len(outputs), time.perf_counter()  # the first warms up
    return taken / max(1, seen) * len(dataset.samples("test"))
