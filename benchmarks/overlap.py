"""What the intervals of a mean IoU and of its change are worth: simulated through the functions that judge real masks.

    python benchmarks/overlap.py simulate                      some minutes
    python benchmarks/overlap.py simulate --trials 200 --images 20
    python benchmarks/overlap.py seconds

``simulate`` draws test sets from populations of images whose true figures are known from very many images: classes that
not every image shows, and a second network that changes few images a lot, or all of them in a skewed way. A line each:
how often the interval of the change holds the true change, how often it lies above it (then a network that loses
exactly the margin would pass as no worse; a correct interval does so in 2.5 of 100), how often the interval of the
figure itself holds the truth, and how wide both are. ``seconds`` times scores and a change of a set like CamVid's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import typer

from kdpipe.runtime import task as judging
from kdpipe.runtime.task import TASKS

TRIALS, IMAGES = 2000, (20, 50, 233)
TRUTH_IMAGES = 400_000
PIXELS = 20_480  # of an image of 128x160
# Of eleven classes, as a street shows them: in which share of the images each is, and which share of those it fills.
SHOWN = np.array([1, 1, 1, 0.95, 0.9, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2])
FILLS = np.array([0.3, 0.25, 0.2, 0.1, 0.05, 0.03, 0.02, 0.02, 0.01, 0.01, 0.01])
SURE = np.array([3, 2.5, 2.5, 2, 1.5, 1, 0.5, 0.5, 0.5, 0, 0.0])  # logarithms of right over wrong

Lost = Callable[[np.random.Generator, np.ndarray], np.ndarray]  # shares of what was right, below 0 of what was wrong

app = typer.Typer(add_completion=False)


def rare(probability: float) -> Lost:
    """So many images lose one of their classes altogether; the others stay as they are."""

    def lost(generator: np.random.Generator, shown: np.ndarray) -> np.ndarray:
        chosen = np.argmax(np.where(shown, generator.random(shown.shape), -1), axis=1)
        hit = generator.random(len(shown)) < probability
        return np.asarray((np.arange(shown.shape[1]) == chosen[:, None]) & hit[:, None])

    return lost


def skewed(mean: float, sigma: float) -> Lost:
    """Every image loses a share of all its classes, most of them little and some very much (log-normal)."""

    def lost(generator: np.random.Generator, shown: np.ndarray) -> np.ndarray:
        shares = mean * np.exp(sigma * generator.normal(size=(len(shown), 1)) - sigma**2 / 2)
        return np.asarray(np.minimum(shares, 1) * shown)

    return lost


def both_ways(mean: float, spread: float) -> Lost:
    """Images lose and win, with heavy tails (Student's t of three degrees), and lose more."""

    def lost(generator: np.random.Generator, shown: np.ndarray) -> np.ndarray:
        shares = mean + spread * generator.standard_t(3, size=(len(shown), 1))
        return np.asarray(np.clip(shares, -1, 1) * shown)

    return lost


def one_class(at: int, mean: float) -> Lost:
    """One class alone is harmed, where it is shown at all, in a skewed way."""

    def lost(generator: np.random.Generator, shown: np.ndarray) -> np.ndarray:
        return np.asarray(skewed(mean, 1)(generator, shown) * (np.arange(shown.shape[1]) == at))

    return lost


def also(first: Lost, second: Lost) -> Lost:
    """Both, one after the other as far as anything is left."""
    return lambda generator, shown: np.clip(first(generator, shown) + second(generator, shown), -1, 1)


POPULATIONS: dict[str, Lost] = {
    "nothing changes": rare(0),
    "1 image of 100 loses a class": rare(0.01),
    "1 image of 50 loses a class": rare(0.02),
    "1 image of 20 loses a class": rare(0.05),
    "1 image of 5 loses a class": rare(0.2),
    "skewed": skewed(0.02, 1),
    "very skewed": skewed(0.02, 1.5),
    "both ways": both_ways(0.005, 0.02),
    "one class of 30 % of the images": one_class(9, 0.1),
    "both ways, and 1 of 20 loses a class": also(both_ways(0.002, 0.005), rare(0.05)),
}


def draw(generator: np.random.Generator, images: int, lost: Lost, classes: slice) -> tuple[np.ndarray, np.ndarray]:
    """Scores [N, K, 3] of both networks on so many images of a population."""
    shown = generator.random((images, len(SHOWN[classes]))) < SHOWN[classes]
    areas = FILLS[classes] * np.exp(0.6 * generator.normal(size=shown.shape)) * shown
    labelled = np.rint(areas / areas.sum(1, keepdims=True) * PIXELS)
    # Images are hard or easy as a whole, and each of their classes is.
    hard = generator.normal(size=(images, 1)) * 0.5 + generator.normal(size=shown.shape) * 0.7
    right = np.rint(labelled / (1 + np.exp(hard - SURE[classes])))
    shares = lost(generator, shown)
    changed = np.rint(np.where(shares > 0, shares * right, shares * (labelled - right)))
    return tuple(_scores(labelled, each) for each in (right, right - changed))  # type: ignore[return-value]


def _scores(labelled: np.ndarray, right: np.ndarray) -> np.ndarray:
    """What is missed of a class is called the next class that the image shows, and that of its last class the first."""
    said, missed, carried = right.copy(), labelled - right, np.zeros(len(labelled))
    for turn in range(2):  # the first finds what the last class of each image hands on
        for at in range(labelled.shape[1]):
            shown = labelled[:, at] > 0
            if turn:
                said[shown, at] += carried[shown]
            carried[shown] = missed[shown, at]
    return np.stack([right, said, labelled], axis=2).astype(np.int64)


def truth(lost: Lost, classes: slice) -> tuple[float, float]:
    """The first network's mean IoU and its change, of very many images."""
    sums = np.zeros((2, len(SHOWN[classes]), 3))
    step = 20_000
    for at in range(TRUTH_IMAGES // step):
        sums += [each.sum(0) for each in draw(np.random.default_rng([7, at]), step, lost, classes)]
    figures = (sums[..., 0] / (sums[..., 1] + sums[..., 2] - sums[..., 0])).mean(1)
    return float(figures[0]), float(figures[1] - figures[0])


@app.command()
def simulate(
    trials: Annotated[int, typer.Option(help="test sets of each population and size")] = TRIALS,
    images: Annotated[
        list[int] | None, typer.Option(help="how many a test set has; 20, 50 and 233 if not said")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="populations, by name; all if not said")] = None,
) -> None:
    """Count over simulated test sets; prints one JSON object a line."""
    judging.SWAPS = 1  # the p-value is not what is counted here, and takes most of the time
    for classes, called in ((slice(None), "11 classes"), (slice(1, 3), "2 classes")):
        for name in only or POPULATIONS:
            known = truth(POPULATIONS[name], classes)
            for count in images or IMAGES:
                found = covered(POPULATIONS[name], known, classes, count, trials)
                print(json.dumps({"population": name, "classes": called, "images": count, **found}), flush=True)


def covered(lost: Lost, known: Sequence[float], classes: slice, images: int, trials: int) -> dict[str, float]:
    """How often the intervals hold what is true, in per cent, and how wide they are, in points."""
    task, figure, change = TASKS["segmentation"], *known
    held, above, held_figure, widths, figure_widths = 0, 0, 0, [], []
    for at in range(trials):
        before, after = draw(np.random.default_rng([1, at]), images, lost, classes)
        found, alone = task.change(before, after), task.summary(before)
        held += found.low <= change <= found.high
        above += found.low >= change
        held_figure += alone.low <= figure <= alone.high
        widths.append(found.high - found.low)
        figure_widths.append(alone.high - alone.low)
    return {
        "change_points": round(100 * change, 3),
        "holds_percent": round(100 * held / trials, 2),
        "passes_at_margin_percent": round(100 * above / trials, 2),
        "half_width_points": round(50 * float(np.median(widths)), 3),
        "figure_percent": round(100 * figure, 2),
        "figure_holds_percent": round(100 * held_figure / trials, 2),
        "figure_half_width_points": round(50 * float(np.median(figure_widths)), 3),
    }


@app.command()
def seconds(images: int = 233, height: int = 128, width: int = 160, stride: int = 4, classes: int = 11) -> None:
    """What judging takes, the best of five; prints one JSON object."""
    generator, task = np.random.default_rng(0), TASKS["segmentation"]
    labels = generator.integers(-1, classes, (images, height, width)).astype(np.int16)
    shape = (images, classes, height // stride, width // stride)
    first = generator.normal(size=shape).astype(np.float32)
    second = first + 0.1 * generator.normal(size=shape).astype(np.float32)
    before, after = task.scores(first, labels), task.scores(second, labels)
    asked: dict[str, Callable[[], object]] = {
        "scores": lambda: task.scores(first, labels),
        "summary": lambda: task.summary(before),
        "change": lambda: task.change(before, after),
        "of_classes": lambda: task.of_classes(before),
        "surety": lambda: task.surety(first, labels, 15),
        "agreement": lambda: task.agreement(first, second),
        "guessing": lambda: task.guessing(labels),
    }
    found = {}
    for name, ask in asked.items():
        taken = []
        for _ in range(5):
            begun = time.perf_counter()
            ask()
            taken.append(time.perf_counter() - begun)
        found[name] = round(min(taken), 4)
    print(json.dumps({"images": images, "sides": [height, width], "stride": stride, "classes": classes, **found}))


if __name__ == "__main__":
    app()
