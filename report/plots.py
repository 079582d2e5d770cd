"""Figures as inline SVG that take the page's text colour, so that they read in light and dark alike."""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
    """Every figure that has something to show: ``pareto``, ``noise``, ``curves``, and ``gain METHOD`` of each gain.

    With several devices there is a ``pareto DEVICE`` of each.
    """
    import matplotlib

    task, found = numbers["task"], {}
    with matplotlib.rc_context(STYLE):
        for device in numbers["devices"]:
            timed = [row for row in device["bundles"] if row["latency_p50_ms"] and row["accuracy"]]
            if timed:
                found[pareto_name(numbers, device)] = accuracy_against_latency(timed, device["front"], task)
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


def _figure(width: float, height: float, **margins: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=72, facecolor="none")  # 72 dpi: a pixel is a point
    figure.subplots_adjust(**margins)
    return figure


def _drawn(figure: Any, title: str, salt: str) -> Figure:
    """Only the ``<svg>`` element; ``salt`` keeps ids reproducible and apart from other figures'."""
    import matplotlib

    stream = io.StringIO()
    for axes in figure.axes:
        axes.set_facecolor("none")
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return Figure(title, text[text.index("<svg") :].rstrip().replace(INK, "currentColor"))


def accuracy_against_latency(rows: Sequence[Numbers], front: Sequence[Sequence[str]], task: Numbers) -> Figure:
    """Accuracy against median latency with both intervals, a label at each point, and the Pareto front.

    The front passes through the fastest of each of its places.
    """
    figure = _figure(9.4, 4.6, left=0.075, right=0.985, bottom=0.12, top=0.97)
    axes = figure.add_subplot()
    targets = list(dict.fromkeys(row["target"] for row in rows))
    latencies = [row["latency_p50_ms"]["value"] for row in rows]
    if max(latencies) > 10 * min(latencies):
        axes.set_xscale("log")
    for row in rows:
        colour = PALETTE[targets.index(row["target"]) % len(PALETTE)]
        x, y = _point(row)
        error = {"xerr": _arms(row["latency_p50_ms"], 1), "yerr": _arms(row["accuracy"], 100)}
        marker = "o" if row["variant"] == "float32" else "D"
        hollow = {"markerfacecolor": "none"} if row["trust"]["word"] != "trusted" else {}
        axes.errorbar(x, y, **error, fmt=marker, color=colour, markersize=8, elinewidth=1, alpha=0.9, **hollow)
    axes.margins(x=0.22, y=0.08)  # room for labels beside the outermost points
    axes.set_xlim(*axes.get_xlim())
    axes.set_ylim(*axes.get_ylim())
    covered = _draw_front(axes, [_point(row) for place in front for row in rows if row["name"] == place[0]])
    _draw_labels(axes, rows, covered)
    axes.set_xlabel("latency of one image, p50, ms")
    axes.set_ylabel(f"{task['metric']} on the test images, {task['unit']}")
    return _drawn(figure, "Accuracy against latency of every timed bundle", "pareto")


def _point(row: Numbers) -> tuple[float, float]:
    return row["latency_p50_ms"]["value"], 100 * row["accuracy"]["value"]


def _arms(found: Numbers, scale: float) -> list[list[float]]:
    """Lengths of an error bar; a bound that n is too small for has none."""
    value = found["value"]
    low, high = (value if found[end] is None else found[end] for end in ("low", "high"))
    return [[scale * (value - low)], [scale * (high - value)]]


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
    for row, centre, box in zip(rows, centres, place([row["name"] for row in rows], centres, bars, frame), strict=True):
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        x0, y0 = centre
        nearest = min(max(x0, box[0]), box[2]), min(max(y0, box[1]), box[3])
        axes.annotate(row["name"], (x, y), xycoords="figure pixels", ha="center", va="center")
        if abs(nearest[0] - x0) + abs(nearest[1] - y0) < 22:
            continue  # near enough to need no line
        axes.annotate(
            "", nearest, xytext=centre, xycoords="figure pixels", textcoords="figure pixels",
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.45, "linewidth": 0.7, "shrinkA": 6, "shrinkB": 0},
        )  # fmt: skip


def place(names: Sequence[str], centres: Sequence[Any], taken: Sequence[Box], frame: Sequence[float]) -> list[Box]:
    """A box for each name near its centre, clear of what is taken and of each other where that is possible."""
    boxes: list[Box] = []
    sides = [(1, 0), (-1, 0), (1, 1), (-1, 1), (1, -1), (-1, -1), (0, 1), (0, -1)]
    for name, (x, y) in zip(names, centres, strict=True):
        half_width, half_height = 3.0 * len(name), 6.5
        candidates = []
        for distance in (8, 16, 26, 40, 58, 78, 100):
            for right, up in sides:
                middle = x + right * (distance + half_width), y + up * (distance + half_height)
                low = middle[0] - half_width, middle[1] - half_height
                candidates.append((*low, low[0] + 2 * half_width, low[1] + 2 * half_height))
        boxes.append(min(candidates, key=lambda box: _crowding(box, [*taken, *boxes], frame)))
    return boxes


def _crowding(box: Box, taken: Sequence[Box], frame: Sequence[float]) -> int:
    outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
    hits = sum(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in taken)
    return hits + 100 * outside


def gain_by_seed(gain: Numbers, task: Numbers) -> Figure:
    """One line a seed from the control to the method; the teacher as a dashed line."""
    seeds = [seed for seed in gain["seeds"] if seed["labels_accuracy"] is not None][::-1]
    height = 1.25 + 0.34 * len(seeds)
    figure = _figure(9.4, height, left=0.075, right=0.985, bottom=0.58 / height, top=1 - 0.38 / height)
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
    return _drawn(figure, title, f"gain-{gain['method']}-{gain['label_fraction']}")


def noise_by_layer(models: Sequence[Numbers]) -> Figure:
    """Signal-to-quantisation-noise ratio at each layer's output against its place, one line a variant."""
    figure = _figure(9.4, 3.4, left=0.075, right=0.985, bottom=0.15, top=0.86)
    axes = figure.add_subplot()
    for at, model in enumerate(models):
        ratios = [layer["out_db"] for layer in model["layers"]]
        places = [100 * place / max(1, len(ratios) - 1) for place in range(len(ratios))]
        known = [(x, y) for x, y in zip(places, ratios, strict=True) if y is not None]
        style = {"color": PALETTE[at % len(PALETTE)], "linewidth": 1.3, "alpha": 0.85}
        axes.plot([x for x, _ in known], [y for _, y in known], label=model["bundle"], **style)
    axes.set_xlabel("place among the layers, % from input to output")
    axes.set_ylabel("signal to noise, dB")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(models), borderaxespad=0.2, handletextpad=0.5)
    return _drawn(figure, "Signal-to-quantisation-noise ratio by layer", "noise")


def training_curves(curves: Sequence[Numbers], task: Numbers) -> Figure:
    """Loss and, where there was a validation part, its accuracy; one colour a method, the teacher apart."""
    figure = _figure(9.4, 3.7, left=0.075, right=0.985, bottom=0.15, top=0.88, wspace=0.2)
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
    validation = f"{task['metric']} on the validation images, {task['unit']}"
    for axes, what in zip(panels, ("training loss (log scale)", validation), strict=False):
        axes.set_xlabel("epoch")
        axes.set_ylabel(what)
    figure.legend(
        list(drawn.values()), ["labels alone" if name == "labels" else name for name in drawn],
        loc="upper left", bbox_to_anchor=(0.065, 1), ncols=len(drawn), handletextpad=0.5,
    )  # fmt: skip
    return _drawn(figure, "Training loss and validation accuracy by epoch", "curves")
