"""The page of a study: how much each method gains at how many images, which claims hold, and what to take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..core.claims import Claim, Figures, Judged, Table, difference, groups_of, judge
from ..core.config import StudyConfig
from ..core.kinds import Checkpoint
from ..core.sealed import printable
from ..core.stats import CALIBRATION_BINS, CONFIDENCE, Interval, expected_calibration_error, mean_interval
from ..data.dataset import Dataset
from ..runtime.task import TASKS, Task
from .answers import is_finite
from .plots import GREY, PALETTE, STYLE, Figure, canvas, finished, legend_rows, plain_ticks, shortened
from .templates import filled

Numbers = dict[str, Any]
LABELS = "labels"
JUDGED = ("agreement", "calibration_error")
# Of runs other than methods and controls a figure each.
TITLES = {
    "longer": "Gain over labels alone that were trained as much longer",
    "teacher": "Gain over labels alone by other teachers",
    "start": "Gain over labels alone from the same weights",
}
UNEVEN = 0.05  # of what the plan gives a run
MARKERS = ("o", "D", "s", "^", "v", "P")


@dataclass(frozen=True)
class Ran:
    """One run of a study. ``small`` gives what its INT8 says of the test images [N, ...], None where there is none."""

    method: str
    kind: str
    control: str  # the labels alone that it is compared with
    fraction: float
    seed: int
    images: int
    views: int
    planned_views: int
    checkpoint: Checkpoint
    guide: Checkpoint  # with which its answers are compared
    small: Callable[[], np.ndarray | None]


@dataclass(frozen=True)
class Asked:
    """What a study was about. ``middle`` is the temperature of its controls."""

    dataset: Dataset
    teacher: Checkpoint
    claims: Sequence[Claim]
    middle: float
    detectable: float | None


def collect(config: StudyConfig, runs: Sequence[Ran], asked: Asked) -> Numbers:
    """Every number of the page, for JSON.

    Accuracies, gains and errors are in points. An interval of a gain is for one look, with the spread over seeds that
    the cells share (``core.claims``); only the claims are corrected for their number.
    """
    task = TASKS[asked.dataset.facts.task]
    groups = groups_of(runs[0].checkpoint.facts.test_images)
    table: dict[tuple[str, float], dict[int, Figures]] = {}
    small: dict[tuple[str, float], dict[int, Figures]] = {}
    by_class: dict[tuple[str, float], dict[int, dict[int, float]]] = {}
    rows: dict[tuple[str, float], Numbers] = {}
    for run in runs:
        outputs, labels = run.checkpoint.tested
        scores = task.scores(outputs, labels)
        where = run.method, run.fraction
        table.setdefault(where, {})[run.seed] = figures(task, scores, groups)
        classes = task.of_classes(task.by_class(scores, labels))
        by_class.setdefault(where, {})[run.seed] = {each: 100 * its.value for each, its in classes.items()}
        found = _judged(task, outputs, labels, run.guide, asked.dataset)
        quantised = run.small()
        if quantised is not None:
            its_scores = task.scores(quantised, labels)
            small.setdefault(where, {})[run.seed] = figures(task, its_scores, groups)
            found["int8"] = {
                "accuracy": float(small[where][run.seed][0]),
                **_judged(task, quantised, labels, run.guide, asked.dataset),
            }
        row = rows.setdefault(
            where,
            {
                "method": run.method,
                "kind": run.kind,
                "over": None if run.method == LABELS else run.control,
                "fraction": run.fraction,
                "images": run.images,
                "views": run.views,
                "planned_views": run.planned_views,
                "runs": [],
            },
        )
        accuracy = float(table[where][run.seed][0])
        row["runs"].append({"seed": run.seed, "key": run.checkpoint.key, "accuracy": accuracy, "int8": None, **found})
    for (method, share), row in rows.items():
        row["accuracy"] = _mean_of([each["accuracy"] for each in row["runs"]], 0, 100)
        row["gain"] = _interval(table, method, row["over"], share)
        row |= {name: _mean(row["runs"], name) for name in JUDGED}
        quantized = [each["int8"] for each in row["runs"] if each["int8"]]
        row["int8"] = quantized and {
            "accuracy": _mean_of([each["accuracy"] for each in quantized], 0, 100),
            "gain": _interval(small, method, row["over"], share),
            **{name: _mean(quantized, name) for name in JUDGED},
        }
        row["int8"] = row["int8"] or None
    judged = judge(asked.claims, table, config.plan.worth, len(groups))
    advice = advise(table, list(rows.values()), config.plan.worth)
    teacher = asked.teacher
    return {
        "title": f"{runs[0].checkpoint.facts.model}, taught by {teacher.facts.model}",
        "student": runs[0].checkpoint.facts.model,
        "teacher": {
            "model": teacher.facts.model,
            "key": teacher.key,
            "accuracy": 100 * teacher.facts.test_accuracy,
            "training_images": teacher.facts.training_images,
        },
        "task": {"metric": task.metric, "unit": task.unit, "class_metric": task.class_metric},
        "test_images": len(groups),
        "data": {
            "source": printable(str(asked.dataset.settings.get("source", ""))),
            "key": asked.dataset.key,
            "training_images": len(asked.dataset.samples("train")),
        },
        "plan": config.plan.model_dump(mode="json"),
        "views": config.views,
        "cost": config.plan.cost,
        "seeds": config.plan.seeds,
        "worth": config.plan.worth,
        "detectable_deviations": asked.detectable,
        "fractions": sorted({run.fraction for run in runs}),
        "methods": list(dict.fromkeys(run.method for run in runs)),
        "rows": list(rows.values()),
        "temperatures": _temperatures(config, rows),
        "claims": [{**each.as_dict(), "sentence": verdict(each)} for each in judged],
        "advice": advice,
        "classes": _classes(by_class, advice["shown"], list(rows.values()), asked.dataset),
        "caveats": _caveats(config, list(rows.values())),
        "failed": config.failed,
    }


def figures(task: Task, scores: np.ndarray, groups: np.ndarray) -> Figures:
    """The figure of all images and of those without each group, [1 + groups], in points."""
    kept = [scores, *(scores[groups != each] for each in range(int(groups.max()) + 1))]
    return np.array([100 * task.summary(each).value for each in kept])


def _judged(task: Task, outputs: np.ndarray, labels: np.ndarray, guide: Checkpoint, dataset: Dataset) -> Numbers:
    """Agreement with the teacher and calibration error, in points; None where it cannot be told."""
    surety = task.surety(outputs, labels, CALIBRATION_BINS) if is_finite(outputs) else None
    agreement = None
    # A teacher that was tested on other images says nothing of these.
    if guide.manifest.inputs["data"].key == dataset.key:
        said, _ = guide.tested
        # Nor one whose masks are of another size of every place.
        if not task.dense or said.shape == outputs.shape:
            agreement = 100 * task.agreement(said, outputs)
    error = None
    if surety is not None:
        error = 100 * expected_calibration_error(surety.confidence, surety.right, surety.weight if task.dense else None)
    return {"agreement": agreement, "calibration_error": error}


def _mean(rows: Sequence[Numbers], name: str) -> float | None:
    known = [row[name] for row in rows if row[name] is not None]
    return float(np.mean(known)) if known else None


def _mean_of(values: Sequence[float], least: float, most: float) -> Numbers:
    """Their mean, with an interval of values that can be; without one where all are the same, which tells no spread."""
    found = mean_interval(values)
    if found.low is None or found.high is None or found.low == found.high:
        return Interval(found.value, None, None, found.n).as_dict()
    return Interval(found.value, max(least, found.low), min(most, found.high), found.n).as_dict()


def _interval(table: Table, method: str, control: str | None, share: float) -> Numbers | None:
    found = None if control is None else difference(table, method, control, share)
    return None if found is None else found.interval().as_dict()


def _temperatures(config: StudyConfig, rows: Mapping[tuple[str, float], Numbers]) -> list[Numbers]:
    """The gain of kd by temperature on each share."""
    found = []
    for at in sorted(config.plan.temperatures):
        for share in config.plan.fractions:
            row = rows.get((f"kd-T{at:g}", share))
            if row is not None and row["gain"]:
                found.append({"temperature": at, "fraction": share, "gain": row["gain"]})
    return found


def advise(table: Table, rows: Sequence[Numbers], worth: float) -> Numbers:
    """What to take on the largest share: the method of the largest gain, where that is shown.

    Else labels alone: because no method gains what would matter, or because these runs cannot tell.

    All methods are looked at and the best one is taken, so the interval is at the level over their number (Bonferroni).
    ``shown`` is the method whose classes are shown.
    """
    share = max(row["fraction"] for row in rows)
    taken = [row["method"] for row in rows if row["fraction"] == share and row["kind"] == "method"]
    found = {name: apart for name in taken if (apart := difference(table, name, LABELS, share)) is not None}
    whose = "all of the images" if share == 1 else f"{100 * share:g} % of the images"
    if not found:
        sentence = f"With {whose} nothing was compared with labels alone: no advice."
        return {"method": LABELS, "shown": None, "fraction": share, "gain": None, "sentence": sentence}
    best = max(found, key=lambda name: found[name].points)
    gain = found[best].interval((1 - CONFIDENCE) / len(found))
    told = {"shown": best, "fraction": share, "gain": gain.as_dict()}
    if gain.low is None:
        sentence = (
            f"No advice: with {whose} {best} did best, {gain.value:+.2f} points over labels alone, but one seed is one "
            "draw; take three or more."
        )
        return {"method": LABELS, **told, "sentence": sentence}
    spread = f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}] points over labels alone"
    if gain.low > 0:
        small = "" if gain.value >= worth else f", which is less than the {worth:g} that would matter"
        return {"method": best, **told, "sentence": f"With {whose} take {best}: {spread}{small}."}
    nearest = f"the nearest is {best} with {spread}"
    highest = max(each.interval((1 - CONFIDENCE) / len(found)).high or 0.0 for each in found.values())
    if highest < worth:
        sentence = (
            f"With {whose} train on the labels alone: no method gains {worth:g} points, which would matter; {nearest}."
        )
    else:
        sentence = (
            f"With {whose} no method is shown to do better than the labels alone, nor to do no better: {nearest}; more "
            "seeds or test images may tell."
        )
    return {"method": LABELS, **told, "sentence": sentence}


def _classes(
    by_class: Mapping[tuple[str, float], Mapping[int, Mapping[int, float]]],
    method: str | None,
    rows: Sequence[Numbers],
    dataset: Dataset,
) -> Numbers | None:
    """The gain of each class on the smallest and the largest share, by the seeds of both."""
    if method is None:
        return None
    shares = sorted({row["fraction"] for row in rows})
    shown = list(dict.fromkeys([shares[0], shares[-1]]))
    found = []
    for each, name in enumerate(dataset.classes):
        gains: list[Numbers | None] = []
        for share in shown:
            its, labels = by_class.get((method, share), {}), by_class.get((LABELS, share), {})
            apart = [
                its[seed][each] - labels[seed][each]
                for seed in sorted(its.keys() & labels.keys())
                if each in its[seed] and each in labels[seed]
            ]
            gains.append(_mean_of(apart, -100, 100) if apart else None)
        if any(gains):
            found.append({"class": printable(name), "gains": gains})
    return {"method": method, "fractions": shown, "rows": found}


def verdict(claim: Judged) -> str:
    """What came out for a claim, in a sentence."""
    found = claim.interval
    if not found.n:
        return "not enough data: the two have no seed in common"
    if found.low is None or found.high is None:
        return f"one draw: {found.value:+.2f} points in a single seed, which say nothing of the next one"
    told = f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}] points over {found.n} seeds"
    if claim.answer != "not enough data":
        return f"{claim.answer}: {told}"
    if claim.more_seeds is not None:
        return f"not enough data: {told}; about {claim.more_seeds} seeds more would tell, if it is as it seems"
    return (
        f"not enough data: {told}; seeds alone would not tell, it takes about {claim.images_needed:,} test images"
        if claim.images_needed is not None
        else f"not enough data: {told}"
    )


def _caveats(config: StudyConfig, rows: Sequence[Numbers]) -> list[str]:
    """What a reader must know before believing a curve."""
    found = []
    if config.plan.seeds == 1:
        found.append("One seed: every figure is one draw, and no claim can hold.")
    labels = sorted(
        ((row["fraction"], row["accuracy"]) for row in rows if row["method"] == LABELS), key=lambda each: each[0]
    )
    for (_, before), (share, after) in itertools.pairwise(labels):
        if after["value"] - before["value"] < config.plan.worth and share >= 0.1:
            found.append(
                f"Labels alone hardly gain from more images up to {100 * share:g} %: there {config.views:,} views "
                "bind, not the images. What is said of such shares is said of this budget."
            )
            break
    off = {
        row["fraction"]: max(abs(each["views"] / each["planned_views"] - 1) for each in rows
        if each["fraction"] == row["fraction"]) for row in rows
    }  # fmt: skip
    uneven = [f"{100 * share:g} % (by up to {100 * its:.0f} %)" for share, its in sorted(off.items()) if its > UNEVEN]
    if uneven:
        found.append(
            f"A run is of whole epochs, so that on these shares not all cost the same {config.plan.cost} as planned: "
            f"{', '.join(uneven)}."
        )
    if any(row["kind"] == "longer" for row in rows):
        times = config.plan.longer
        found.append(
            f"What ends in -x{times} had {times} times the {config.plan.cost}, as the labels alone that it is compared "
            "with."
        )
    if config.failed:
        found.append(f"Not made: {', '.join(config.failed)}. What is said rests on the other runs.")
    return found


# ---- drawings ----------------------------------------------------------------------------------------------


def drawings(numbers: Numbers) -> dict[str, Figure]:
    """``gain`` by images with intervals, a ``gain_KIND`` of other runs, and ``temperature`` where there are several."""
    import matplotlib

    found: dict[str, Figure] = {}
    with matplotlib.rc_context(STYLE):
        # Labels alone in another way are what others are compared with, not what is gained by a teacher.
        controls = {row["over"] for row in numbers["rows"]}
        gained = [row for row in numbers["rows"] if row["gain"] and row["method"] not in controls]
        main = [row for row in gained if row["kind"] in ("method", "control")]
        if main:
            found["gain"] = _gain_by_images(main, "Gain over labels alone by the number of images", "gain")
        for kind, title in TITLES.items():
            if its := [row for row in gained if row["kind"] == kind]:
                found[f"gain_{kind}"] = _gain_by_images(its, title, f"gain-{kind}")
        if len({row["temperature"] for row in numbers["temperatures"]}) > 1:
            found["temperature"] = _gain_by_temperature(numbers["temperatures"])
    return found


def _lines(series: Mapping[str, Sequence[tuple[float, Numbers]]], over: str, title: str, salt: str) -> Figure:
    """One line with error bars a name, over a logarithmic axis; nothing gained as a line across."""
    columns, lines = legend_rows([shortened(name) for name in series])
    height = 3.4 + 0.24 * lines
    figure = canvas(9.4, height, left=0.075, right=0.985, bottom=0.55 / height, top=1 - (0.2 + 0.24 * lines) / height)
    axes = figure.add_subplot()
    axes.axhline(0, color=GREY, linewidth=1)
    for at, (name, places) in enumerate(series.items()):
        values = [gain["value"] for _, gain in places]
        arms = np.array(
            [
                [0.0, 0.0] if gain["low"] is None else [gain["value"] - gain["low"], gain["high"] - gain["value"]]
                for _, gain in places
            ]
        ).T
        # A little aside, so that intervals of one place stand beside each other.
        aside = math.exp(0.02 * (at - (len(series) - 1) / 2))
        style = {"color": PALETTE[at % len(PALETTE)], "linewidth": 1.3, "capsize": 2, "markersize": 5}
        style["linestyle"] = ("-", "--", ":")[at // len(PALETTE) % 3]
        axes.errorbar(
            [place * aside for place, _ in places], values, yerr=arms, label=shortened(name),
            marker=MARKERS[at % len(MARKERS)], **style,
        )  # fmt: skip
    axes.set_xscale("log")
    plain_ticks(axes.xaxis)
    axes.set_xlabel(over)
    axes.set_ylabel("gain over labels alone, points")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handletextpad=0.5)
    return finished(figure, title, salt)


def _gain_by_images(rows: Sequence[Numbers], title: str, salt: str) -> Figure:
    series: dict[str, list[tuple[float, Numbers]]] = {}
    for row in sorted(rows, key=lambda row: row["images"]):
        series.setdefault(row["method"], []).append((row["images"], row["gain"]))
    return _lines(series, "images to learn from", title, salt)


def _gain_by_temperature(rows: Sequence[Numbers]) -> Figure:
    series: dict[str, list[tuple[float, Numbers]]] = {}
    for row in rows:
        series.setdefault(f"{100 * row['fraction']:g} % of the images", []).append((row["temperature"], row["gain"]))
    return _lines(series, "temperature", "Gain of kd over labels alone by temperature", "temperature")


def spread(found: Numbers | None, sign: bool = False) -> str:
    """A value and its interval; nothing of nothing."""
    if found is None:
        return ""
    form = "+.2f" if sign else ".2f"
    # Nothing has no sign.
    value, low, high = (None if each is None else f"{round(each, 2) + 0.0:{form}}" for each in _parts(found))
    return f"{value}" if low is None else f"{value} [{low}, {high}]"


def _parts(found: Numbers) -> tuple[float, float | None, float | None]:
    return found["value"], found["low"], found["high"]


def render(numbers: Numbers) -> str:
    """The page of ``numbers``, which stands alone; everything is escaped but the figures drawn here."""
    return filled("study.html", {**numbers, "figures": drawings(numbers), "spread": spread})


def closing_lines(numbers: Numbers) -> list[str]:
    """What a terminal shows: claims, caveats, advice."""
    claims = [f"claim: {each['claim']}: {each['sentence']}" for each in numbers["claims"]]
    return [*claims, *numbers["caveats"], numbers["advice"]["sentence"]]
