"""Figures as inline SVG that take the page's text colour, so that they read in light and dark alike."""

from __future__ import annotations

import html
import io
import itertools
import math
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from . import words
from .tables import Numbers

# Stands for the page's text colour: matplotlib knows no currentColor, so it is put in afterwards.
INK = "#123457"
# Distinct under colour-blindness (after Okabe and Ito), and of a middle lightness for both backgrounds.
PALETTE = ("#2b83c6", "#d9730d", "#1a9a6c", "#b45fae", "#a58a00", "#5aa9c9")
GREY = "#808a94"
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, selectable, in the page's font
    "font.size": 10,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "legend.frameon": False,
    "text.parse_math": False,  # a name with dollars is a name
}
Box = tuple[float, float, float, float]  # left, bottom, right, top in points
WIDTH = 9.4  # inches
CHARACTER, LINE = 6.4, 13.0  # points that a character of a label takes, whatever the page's font, and a line of it
FRAME_WIDTH = 72 * WIDTH * 0.91  # points between the axes of a figure with labels
LONGEST_NAME = 44  # characters of a label; a bundle may be called anything
LARGEST_MATRIX, LARGEST_COUNTED = 40, 20  # classes that a confusion matrix is drawn of, and with counts in its cells


@dataclass(frozen=True)
class Figure:
    """A drawn figure: a notebook and a template show it by themselves, ``save`` writes it."""

    title: str
    svg: str = field(repr=False)  # the element alone, in the text colour of what is around it

    def _repr_html_(self) -> str:
        return self.svg

    __html__ = _repr_html_  # for templates: it needs no escaping

    def save(self, path: Path | str) -> None:
        """Write a file that stands alone. Raises OSError."""
        Path(path).write_text(f'<?xml version="1.0" encoding="utf-8"?>\n{self.svg}\n', encoding="utf-8")


def figures(numbers: Numbers) -> dict[str, Figure]:
    """Every figure that has something to show, by name.

    ``pareto`` (with several devices ``pareto DEVICE`` of each), ``accuracy`` of every network and bundle,
    ``confusion``, ``noise``, ``curves``, and ``gain METHOD`` of each gain.
    """
    import matplotlib

    task, found = numbers["task"], {}
    with matplotlib.rc_context(STYLE):
        for device in numbers["devices"]:
            timed = [row for row in device["bundles"] if row["latency_p50_ms"] and row["accuracy"]]
            if timed:
                name = pareto_name(numbers, device)
                found[name] = accuracy_against_latency(timed, device["front"], task, salt=name)
        compared = compared_networks(numbers)
        if len(compared) > 1:
            found["accuracy"] = accuracy_of_each(compared, task)
        if numbers["answers"] and 1 < len(numbers["answers"]["classes"]) <= LARGEST_MATRIX:
            found["confusion"] = confusion(numbers["answers"], task.get("counted", "images"))
        for name, gain in zip(gain_names(numbers["gains"]), numbers["gains"], strict=True):
            if gain["gain_points"]:
                found[name] = gain_by_seed(gain, task)
        if numbers["noise_by_layer"]:
            found["noise"] = noise_by_layer(numbers["noise_by_layer"])
        if numbers["curves"]:
            found["curves"] = training_curves(numbers["curves"], task)
    return found


def pareto_name(numbers: Numbers, device: Numbers) -> str:
    """What a device's figure of accuracy against latency is called."""
    return "pareto" if len(numbers["devices"]) == 1 else f"pareto {device['device']}"


def gain_names(gains: Sequence[Numbers]) -> list[str]:
    """What the figure of each gain is called; runs of one method in several settings are counted."""
    methods = [gain["method"] for gain in gains]
    counts = [methods[: at + 1].count(method) for at, method in enumerate(methods)]
    return [f"gain {name}" + (f" {count}" if count > 1 else "") for name, count in zip(methods, counts, strict=True)]


def canvas(width: float, height: float, **margins: float) -> Any:
    """An empty figure of so many inches, as matplotlib has them; margins are shares of its width and height."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, facecolor="none")  # 72 dpi: a pixel is a point
    figure.subplots_adjust(**margins)
    return figure


def finished(figure: Any, title: str, salt: str, told: Mapping[str, str] | None = None) -> Figure:
    """What was drawn on ``figure``, as an ``<svg>`` element; ``salt`` keeps ids reproducible and apart from others'.

    Args:
        told: by id of a drawn thing what a pointer on it is shown.
    """
    import matplotlib

    stream = io.StringIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    with matplotlib.rc_context({"svg.hashsalt": salt}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's font has it
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :].rstrip().replace(INK, "currentColor")
    for name, what in (told or {}).items():
        text = text.replace(f'<g id="{name}">', f'<g id="{name}"><title>{html.escape(what)}</title>')
    return Figure(title, text)


def shortened(name: str, longest: int = LONGEST_NAME) -> str:
    """A name that takes no more room than so many characters of Latin letters; what is left out shows as dots."""
    if extent(name) <= longest * CHARACTER:
        return name
    kept = list(itertools.takewhile(lambda end: extent(name[:end]) <= (longest - 1) * CHARACTER, range(1, len(name))))
    return name[: kept[-1] if kept else 1] + "\N{HORIZONTAL ELLIPSIS}"


def extent(name: str) -> float:
    """Points that a label takes at most: characters of East Asian scripts are twice as wide."""
    return CHARACTER * sum(2 if unicodedata.east_asian_width(each) in "WF" else 1 for each in name)


def plain_ticks(axis: Any) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5, as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def legend_rows(names: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of a legend above a figure."""
    columns = max(1, min(len(names), int(620 // (40 + max(map(extent, names))))))
    return columns, math.ceil(len(names) / columns)


def accuracy_against_latency(
    rows: Sequence[Numbers], front: Sequence[Sequence[str]], task: Numbers, salt: str = "pareto"
) -> Figure:
    """Accuracy against median latency with both intervals, a label at each point, and the Pareto front.

    The front passes through the fastest of each of its places. The more points there are, the higher the figure is, so
    that there is always room for their labels.
    """
    height = room([shortened(row["name"]) for row in rows]) / 72 + 0.69
    figure = canvas(WIDTH, height, left=0.075, right=0.985, bottom=0.55 / height, top=1 - 0.14 / height)
    axes = figure.add_subplot()
    targets = list(dict.fromkeys(row["target"] for row in rows))
    latencies = [row["latency_p50_ms"]["value"] for row in rows]
    if max(latencies) > 10 * min(latencies):
        axes.set_xscale("log")
        plain_ticks(axes.xaxis)
    told = {}
    for at, row in enumerate(rows):
        colour = PALETTE[targets.index(row["target"]) % len(PALETTE)]
        x, y = _point(row)
        error = {"xerr": _arms(row["latency_p50_ms"], 1), "yerr": _arms(row["accuracy"], 100)}
        marker = "o" if row["variant"] == "float32" else "D"
        hollow = {"markerfacecolor": "none"} if row["trust"]["word"] != "trusted" else {}
        style = {"fmt": marker, "color": colour, "markersize": 8, "elinewidth": 1, "alpha": 0.9, **hollow}
        name = f"{salt.replace(' ', '-')}-{at}"
        axes.errorbar(x, y, **error, **style).lines[0].set_gid(name)
        p50, accuracy = words.interval(row["latency_p50_ms"]), words.shares(row["accuracy"])
        told[name] = f"{row['name']}: p50 {p50} ms, {task['metric']} {accuracy} {task['unit']}, {row['trust']['word']}"
    axes.margins(x=0.22, y=0.08)  # room for labels beside the outermost points
    axes.set_xlim(*axes.get_xlim())
    axes.set_ylim(*axes.get_ylim())
    covered = _draw_front(axes, [_point(row) for place in front for row in rows if row["name"] == place[0]])
    _draw_labels(axes, rows, covered)
    axes.set_xlabel("latency of one image, p50, ms")
    axes.set_ylabel(f"{task['metric']} on the test images, {task['unit']}")
    return finished(figure, "Accuracy against latency of every timed bundle", salt, told)


def _point(row: Numbers) -> tuple[float, float]:
    return row["latency_p50_ms"]["value"], 100 * row["accuracy"]["value"]


def _arms(found: Numbers, scale: float) -> list[list[float]]:
    """Lengths of an error bar; a bound that n is too small for has none, nor one that rounding put beyond the value."""
    value = found["value"]
    low, high = (value if found[end] is None else found[end] for end in ("low", "high"))
    return [[scale * max(0.0, value - low)], [scale * max(0.0, high - value)]]


def _draw_front(axes: Any, points: Sequence[tuple[float, float]]) -> list[Box]:
    """A staircase through the points; returns what it covers, so that labels keep off it."""
    if not points:
        return []
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    xs, ys = [xs[0], *xs, axes.get_xlim()[1]], [axes.get_ylim()[0], *ys, ys[-1]]
    dashes = {"linewidth": 1, "linestyle": (0, (4, 3)), "alpha": 0.6, "zorder": 1}
    axes.plot(xs, ys, drawstyle="steps-post", color=INK, **dashes)
    corners = axes.transData.transform(list(zip(xs, ys, strict=True)))
    covered: list[Box] = []
    for (left, low), (right, high) in itertools.pairwise(corners):
        covered += [(left, low - 2, right, low + 2), (right - 2, low, right + 2, high)]
    return covered


def _draw_labels(axes: Any, rows: Sequence[Numbers], taken: Sequence[Box]) -> None:
    centres = [tuple(axes.transData.transform(_point(row))) for row in rows]
    bars = [*taken]
    for row, (x, y) in zip(rows, centres, strict=True):
        ends = [axes.transData.transform((_point(row)[0], 100 * row["accuracy"][end]))[1] for end in ("low", "high")]
        bars += [(x - 2, ends[0], x + 2, ends[1]), (x - 6, y - 6, x + 6, y + 6)]
    frame = axes.bbox.extents
    names = [shortened(row["name"]) for row in rows]
    for name, centre, box in zip(names, centres, place(names, centres, bars, frame), strict=True):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        nearest = min(max(centre[0], box[0]), box[2]), min(max(centre[1], box[1]), box[3])
        apart, *others = _apart(np.array([box]), [centre, *centres])[0]
        axes.annotate(name, (x, y), xycoords="figure pixels", ha="center", va="center")
        if apart < 20 and apart <= min(others):
            continue  # nobody takes it for another's
        axes.annotate(
            "", nearest, xytext=centre, xycoords="figure pixels", textcoords="figure pixels",
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 6, "shrinkB": 0},
        )  # fmt: skip


def room(names: Sequence[str]) -> float:
    """The height in points of a frame in which names find a place wherever the others are.

    A name takes two lines of a grid at worst, and on each keeps others off twice its width.
    """
    in_a_line = max(1, int(FRAME_WIDTH // (2 * max(map(extent, names)))))
    return max(280.0, 50 + 2 * LINE * math.ceil(len(names) / in_a_line))


def place(names: Sequence[str], centres: Sequence[Any], taken: Sequence[Box], frame: Sequence[float]) -> list[Box]:
    """A box for each name inside the frame: off the others' boxes; near its own centre and off what is taken if it can.

    In a frame that is high enough (``room``) no two boxes overlap: where nothing is free around a centre, a name goes
    to a free place of the whole frame.
    """
    boxes: list[Box] = []
    near = [
        (distance, right, up)
        for distance in (8, 16, 26, 40, 58, 78, 100)
        for right, up in ((1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1))
    ]
    for name, (x, y) in zip(names, centres, strict=True):
        half = extent(name) / 2, LINE / 2
        around = [(x + right * (far + half[0]), y + up * (far + half[1])) for far, right, up in near]
        best, crowded = _least_crowded(around, half, (x, y), centres, boxes, taken, frame)
        if crowded:
            across = np.arange(frame[0] + half[0], max(frame[0], frame[2] - half[0]) + 1e-6, 24.0)
            upwards = np.arange(frame[1] + half[1], max(frame[1], frame[3] - half[1]) + 1e-6, LINE)
            anywhere = [(column, line) for line in upwards for column in across] or around
            best, _ = _least_crowded(anywhere, half, (x, y), centres, boxes, taken, frame)
        boxes.append(best)
    return boxes


def _least_crowded(
    middles: Sequence[tuple[float, float]],
    half: tuple[float, float],
    own: tuple[float, float],
    centres: Sequence[Any],
    boxes: Sequence[Box],
    taken: Sequence[Box],
    frame: Sequence[float],
) -> tuple[Box, bool]:
    """Of the boxes around ``middles`` the one that hits fewest names, then the one that is least in the way.

    That is one that covers little, is nearer to its own centre than to another, and near. Returns whether it hits a
    name, or lies outside the frame, all the same.
    """
    found = np.asarray(middles)[:, [0, 1, 0, 1]] + np.array([-half[0], -half[1], *half])
    slack = 1e-6  # of a box that fits exactly
    outside = (found[:, :2] < np.array(frame[:2]) - slack).any(1) | (found[:, 2:] > np.array(frame[2:]) + slack).any(1)
    barred = _hits(found, boxes) + outside
    apart = _apart(found, [own])[:, 0]
    nearer = (_apart(found, centres) < apart[:, None]).sum(1)  # it would seem to be theirs
    best = np.lexsort((2 * (_hits(found, taken) + nearer) + apart / 30, barred))[0]
    left, bottom, right, top = found[best].tolist()
    return (left, bottom, right, top), bool(barred[best])


def _hits(found: np.ndarray, taken: Sequence[Box]) -> np.ndarray:
    """How many boxes each of the boxes [N, 4] overlaps."""
    others = np.array(taken, dtype=float).reshape(-1, 4)
    apart = (found[:, None, :2] >= others[:, 2:]) | (others[:, :2] >= found[:, None, 2:])
    return np.asarray((~apart.any(2)).sum(1))


def _apart(found: np.ndarray, points: Sequence[Any]) -> np.ndarray:
    """How far each point lies from each of the boxes [N, 4]: [N, points]."""
    there = np.asarray(points, dtype=float)[:, :2]
    beyond = np.maximum(found[:, None, :2] - there, there - found[:, None, 2:])
    return np.asarray(np.hypot(*np.moveaxis(np.maximum(beyond, 0), 2, 0)))


def compared_networks(numbers: Numbers) -> list[Numbers]:
    """The teachers, the students, and every bundle that was tested: name, kind and accuracy of each."""
    found = [{**row, "kind": "teacher" if row["teacher"] else "student"} for row in numbers["networks"]]
    several = len(numbers["devices"]) > 1
    for device in numbers["devices"]:
        on = f" on {device['device']}" if several else ""
        found += [
            {"name": row["name"] + on, "kind": "bundle", "accuracy": row["accuracy"]}
            for row in device["bundles"]
            if row["accuracy"]
        ]
    return found


def accuracy_of_each(rows: Sequence[Numbers], task: Numbers) -> Figure:
    """One line a network or bundle with its accuracy and interval, from the first down."""
    names = [shortened(row["name"]) for row in rows]
    inches, line = 72 * WIDTH, 17 / 72
    height = 0.95 + line * len(rows)
    left = (max(map(extent, names)) + 14) / inches
    figure = canvas(WIDTH, height, left=left, right=0.985, bottom=0.6 / height, top=1 - 0.32 / height)
    axes = figure.add_subplot()
    styles = {"teacher": ("s", PALETTE[1]), "student": ("o", GREY), "bundle": ("D", PALETTE[0])}
    told: dict[str, str] = {}
    legend: dict[str, Any] = {}
    for at, row in enumerate(rows):
        marker, colour = styles[row["kind"]]
        style = {"fmt": marker, "color": colour, "markersize": 6, "elinewidth": 1.2, "alpha": 0.9}
        drawn = axes.errorbar(100 * row["accuracy"]["value"], at, xerr=_arms(row["accuracy"], 100), **style)
        drawn.lines[0].set_gid(f"accuracy-{at}")
        told[f"accuracy-{at}"] = f"{row['name']}: {task['metric']} {words.shares(row['accuracy'])} {task['unit']}"
        legend.setdefault(row["kind"], drawn)
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(f"{task['metric']} on the test images, {task['unit']}")
    axes.legend(
        list(legend.values()), list(legend), loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2,
        handletextpad=0.5,
    )  # fmt: skip
    return finished(figure, "Accuracy of every network and bundle", "accuracy", told)


def confusion(answers: Numbers, counted: str = "images") -> Figure:
    """How many answers about each class (a row) are what (a column), the darker the larger the share of the row.

    Args:
        counted: what its answers are, images or pixels.
    """
    from matplotlib.patches import Rectangle

    names = [row["class"] for row in answers["classes"]]
    counts = [[0] * len(names) for _ in names]
    for each in answers["confusions"]:
        label, said = each["classes"]
        counts[label][said] = each[counted]
    for at, row in enumerate(answers["classes"]):
        counts[at][at] = row.get("answers", row["test_images"]) - sum(counts[at])
    shown, inches = [shortened(name, 18) for name in names], 72 * WIDTH
    longest, cell = max(map(extent, shown)), max(15.0, min(26.0, 420 / len(names)))
    height = (cell * len(names) + longest + 50) / 72
    left = (longest + 34) / inches
    figure = canvas(
        WIDTH, height, left=left, right=0.985, bottom=(longest + 34) / (72 * height), top=1 - 8 / (72 * height)
    )
    axes = figure.add_subplot()
    axes.grid(visible=False)
    told = {}
    for row, (name, line) in enumerate(zip(names, counts, strict=True)):
        for column, count in enumerate(line):
            if not count:
                continue
            colour = PALETTE[2] if row == column else PALETTE[1]
            share = count / sum(line)
            cell_name = f"confusion-{row}-{column}"
            axes.add_patch(
                Rectangle((column - 0.5, row - 0.5), 1, 1, color=colour, alpha=0.15 + 0.75 * share, gid=cell_name, lw=0)
            )
            told[cell_name] = f"'{name}' called '{names[column]}': {count:,} of {sum(line):,} {counted}"
            if len(names) <= LARGEST_COUNTED:
                thousands = f"{count / 1000:.0f}k" if count < 10_000_000 else f"{count / 1e6:.0f}M"
                told_count = str(count) if count < 10_000 else thousands
                axes.text(column, row, told_count, ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xticks(range(len(names)), shown, rotation=90, fontsize=9)
    axes.set_yticks(range(len(names)), shown, fontsize=9)
    axes.set_xlabel("is called")
    axes.set_ylabel("is")
    return finished(figure, f"What {answers['bundle']} takes for what", "confusion", told)


def gain_by_seed(gain: Numbers, task: Numbers) -> Figure:
    """One line a seed from the control to the method; the teacher as a dashed line."""
    seeds = [seed for seed in gain["seeds"] if seed["labels_accuracy"] is not None][::-1]
    height = 1.25 + 0.34 * len(seeds)
    figure = canvas(WIDTH, height, left=0.075, right=0.985, bottom=0.58 / height, top=1 - 0.38 / height)
    axes = figure.add_subplot()
    for at, seed in enumerate(seeds):
        alone, taught = 100 * seed["labels_accuracy"], 100 * seed["accuracy"]
        axes.plot([alone, taught], [at, at], color=PALETTE[0], linewidth=2, alpha=0.45, zorder=1)
        axes.plot(alone, at, "o", color=GREY, markersize=8, label="labels alone" if at == 0 else None)
        axes.plot(taught, at, "D", color=PALETTE[0], markersize=8, label=gain["method"] if at == 0 else None)
    if gain["teacher_accuracy"] is not None:
        axes.axvline(100 * gain["teacher_accuracy"], color=PALETTE[1], linestyle="--", linewidth=1.4, label="teacher")
    axes.set_yticks(range(len(seeds)), [f"seed {seed['seed']}" for seed in seeds])
    axes.set_ylim(-0.6, len(seeds) - 0.4)
    axes.margins(x=0.06)
    axes.set_xlabel(f"{task['metric']} on the test images, {task['unit']}")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2, handletextpad=0.5)
    title = f"Accuracy of {gain['method']} and of labels alone by seed"
    return finished(figure, title, f"gain-{gain['method']}-{gain['label_fraction']}")


def noise_by_layer(models: Sequence[Numbers]) -> Figure:
    """Signal-to-quantisation-noise ratio at each layer's output against its place, one line a variant."""
    columns, lines = legend_rows([model["bundle"] for model in models])
    height = 3.15 + 0.24 * lines
    bottom, top = 0.51 / height, 1 - (0.24 + 0.24 * lines) / height
    figure = canvas(WIDTH, height, left=0.075, right=0.985, bottom=bottom, top=top)
    axes = figure.add_subplot()
    for at, model in enumerate(models):
        ratios = [layer["out_db"] for layer in model["layers"]]
        places = [100 * place / max(1, len(ratios) - 1) for place in range(len(ratios))]
        known = [(x, y) for x, y in zip(places, ratios, strict=True) if y is not None]
        style = {"color": PALETTE[at % len(PALETTE)], "linewidth": 1.3, "alpha": 0.85}
        style["linestyle"] = ("-", "--", ":")[at // len(PALETTE) % 3]
        axes.plot([x for x, _ in known], [y for _, y in known], label=model["bundle"], **style)
    axes.set_xlabel("place among the layers, % from input to output")
    axes.set_ylabel("signal to noise, dB")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, borderaxespad=0.2, handletextpad=0.5)
    return finished(figure, "Signal-to-quantisation-noise ratio by layer", "noise")


def training_curves(curves: Sequence[Numbers], task: Numbers) -> Figure:
    """Loss and, where there was a validation part, its accuracy; one colour a method, the teacher apart."""
    names = {"labels": "labels alone"}
    columns, lines = legend_rows([names.get(group, group) for group in {curve["group"] for curve in curves}])
    height = 3.4 + 0.24 * lines
    bottom, top = 0.55 / height, 1 - (0.2 + 0.24 * lines) / height
    figure = canvas(WIDTH, height, left=0.075, right=0.985, bottom=bottom, top=top, wspace=0.2)
    groups = sorted({curve["group"] for curve in curves} - {"labels", "teacher"})
    colours = {"labels": GREY, "teacher": PALETTE[1], **dict(zip(groups, (PALETTE[0], *PALETTE[2:]), strict=False))}
    validated = any(curve["validation_epochs"] for curve in curves)
    panels = figure.subplots(1, 2 if validated else 1, squeeze=False)[0]
    drawn: dict[str, Any] = {}
    for curve in curves:
        style = {"color": colours.get(curve["group"], GREY), "linewidth": 1.3, "alpha": 0.85}
        style["linestyle"] = "--" if curve["group"] == "teacher" else "-"
        (drawn[curve["group"]],) = panels[0].plot(curve["epochs"], curve["loss"], **style)
        if validated:
            accuracy = [100 * value for value in curve["validation_accuracy"]]
            panels[1].plot(curve["validation_epochs"], accuracy, **style)
    panels[0].set_yscale("log")
    plain_ticks(panels[0].yaxis)
    validation = f"{task['metric']} on the validation images, {task['unit']}"
    for axes, what in zip(panels, ("training loss (log scale)", validation), strict=False):
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
    figure.legend(
        list(drawn.values()), [names.get(name, name) for name in drawn],
        loc="upper left", bbox_to_anchor=(0.065, 1), ncols=columns, handletextpad=0.5,
    )  # fmt: skip
    return finished(figure, "Training loss and validation accuracy by epoch", "curves")
