"""Whether what distillation gains survives pruning and INT8: pruned networks against smaller ones, taught alike.

    nice -n 10 python benchmarks/prune.py resnet CIFAR10 --out runs
    nice -n 10 python benchmarks/prune.py mobilenet CIFAR10 --out runs
    python benchmarks/prune.py resnet CIFAR10 --out runs --epochs 1 --seeds 1 --images 400 --effort quick
    python benchmarks/prune.py resnet CIFAR10 --out runs --no-run                              what is there so far

CIFAR10 is a folder with train/<class>/* and val/<class>/*, which is what is tested. The whole network is trained on the
labels and is the teacher of all. What is pruned to 0.7 and 0.5 of its multiply-accumulates begins as it, the smaller
networks at random; each is taught (kd) and, as its control, trained on the labels alone, for as many epochs. Since a
pruned network comes after a whole one that was trained for twice as many, the smaller ones are there for three times
the epochs too.
Of the first seed's students float32 and INT8 are measured in one session, so that which of them takes as long as which
is told there, and their accuracy on every test image.

It is a recipe, which lies beside the runs: every run is sealed, a killed one goes on where it was, and the page of
``kdpipe run`` is made. In the end a table is printed as Markdown: test accuracy over the seeds in %, what kd gains over
the labels in points with its interval over the seeds, and the first seed's bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kdpipe import pipeline
from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.artifact import write_json
from kdpipe.core.config import Recipe, validated
from kdpipe.core.errors import choice
from kdpipe.core.kinds import Checkpoint, Report
from kdpipe.core.stats import mean_interval
from kdpipe.terminal import listener, tell_step

KEEPS = {"pruned-70": 0.7, "pruned-50": 0.5}
LONGER = 3  # times the epochs that a pruned network has, together with the whole one that it was
# The whole network, and smaller ones of its family on both sides of what is left of it.
FAMILIES: dict[str, dict[str, Any]] = {
    "resnet": {"whole": "resnet20", "smaller": ("resnet14", "resnet8"), "size": 32},
    "mobilenet": {
        "whole": "mobilenetv4_conv_small",
        "smaller": ("mobilenetv4_conv_small_050", "mobilenetv4_conv_small_035"),
        "size": 64,
    },
}


def recipe_of(
    family: str, images: Path, start: Path | None, epochs: int, seeds: int, most: int | None, effort: str
) -> Recipe:
    """Everything that is trained and measured; ``start`` is the trained whole network, None while there is none."""
    found = FAMILIES[family]
    network = {"input": {"size": found["size"]}}
    train = {
        "epochs": epochs,
        "batch_size": 128,
        "warmup_epochs": min(1, epochs - 1),
        "precision": "bf16",
        "validate_every": epochs,  # at the end alone: nothing is selected
        "workers": 1,
        "augment": {"crop": "pad", "flip": 0.5},
    }
    first, *others = KEEPS
    students: dict[str, Any] = {name: {"prune": {"keep": KEEPS[name]}} for name in others}
    for model in found["smaller"]:
        plain = {"model": model, "start": None, "prune": {"keep": None}}
        students[model] = plain
        students[f"{model}-longer"] = {**plain, "train": {"epochs": LONGER * epochs, "validate_every": LONGER * epochs}}
    values = {
        "name": f"prune-{family}",
        "data": {
            "source": str(images),
            "val_split": None,
            "val_fraction": 0,
            **({"most_images": most} if most else {}),
        },
        "teacher": {"model": found["whole"], **network, "train": {**train, "epochs": (LONGER - 1) * epochs}},
        "student": {
            "model": found["whole"],
            **network,
            **({"start": str(start), "prune": {"keep": KEEPS[first]}} if start else {}),
        },
        "distill": {
            "method": "kd",
            "label_weight": 0.1,
            "kd_weight": 0.9,
            "temperature": 4,
            "seeds": list(range(seeds)),
            "train": train,
            "students": students if start else {},
        },
        "export": {"targets": ["onnxruntime"], "students": "all" if start else "method"},
        "quantize": {"variants": ["int8"]},
        "bench": {"threads": 1, "effort": effort},
    }
    return validated(Recipe, values, "the benchmark")


def main(
    family: Annotated[str, typer.Argument(help=", ".join(FAMILIES))],
    images: Annotated[Path, typer.Argument(help="folder of images")],
    out: Annotated[Path, typer.Option(help="folder of all runs")],
    epochs: Annotated[int, typer.Option(help="of every student; the teacher has twice as many")] = 12,
    seeds: Annotated[int, typer.Option()] = 3,
    most: Annotated[int | None, typer.Option("--images", help="of each part at most [default: all]")] = None,
    effort: Annotated[str, typer.Option(help="of the measurement, as kdpipe bench has it")] = "default",
    run: Annotated[bool, typer.Option(help="run what is missing")] = True,
) -> None:
    """Run what is missing, and print what is there."""
    if family not in FAMILIES:
        raise choice("family", family, FAMILIES)
    progress.listen(listener())
    chain = Chain(out, tell=tell_step)
    begun = recipe_of(family, images, None, epochs, seeds, most, effort)
    dataset = chain.data(begun.data, wants=lambda: pipeline.wants(begun))
    teacher = chain.teacher(begun.teacher, dataset)
    recipe = recipe_of(family, images, teacher.path, epochs, seeds, most, effort)
    write_json(out / f"{recipe.name}.json", recipe.model_dump(mode="json", exclude_defaults=True))
    if run:
        pipeline.run(recipe, chain)
    legs = pipeline.plan(recipe, chain)
    there = {leg.name: leg.path for leg in legs if leg.sealed and leg.path is not None}
    students = {name: Checkpoint.open(path) for name, path in there.items() if name.startswith("student-")}
    reports = [Report.open(leg.path) for leg in legs if leg.name == "report" and leg.sealed and leg.path is not None]
    rows = [row for report in reports for device in report.numbers["devices"] for row in device["bundles"]]
    print_table(recipe, teacher, students, rows)


def print_table(
    recipe: Recipe, teacher: Checkpoint, students: Mapping[str, Checkpoint], rows: list[dict[str, Any]]
) -> None:
    """A line a student, by what it takes."""
    print(f"taught by {teacher.facts.model}, {100 * teacher.facts.test_accuracy:.2f} %\n")
    print(
        "| student | million multiply-accumulates | parameters | labels | kd | gain | float32, INT8 in ms | float32, "
        "INT8 in % |\n|---|---|---|---|---|---|---|---|"
    )
    lines = []
    for name in ("kd", *recipe.distill.students):
        pairs = []
        for seed in recipe.distill.seeds:
            control = f"student-labels{'' if name == 'kd' else f'-{name}'}-seed{seed}"
            taught = f"student-{name}-seed{seed}"
            if taught in students and control in students:
                pairs.append((students[taught], students[control]))
        if not pairs:
            continue
        first = pairs[0][0]
        kd, labels = ([100 * each.facts.test_accuracy for each in side] for side in zip(*pairs, strict=True))
        gain = mean_interval([taught - alone for taught, alone in zip(kd, labels, strict=True)])
        shipped = f"student-{name}-seed{recipe.distill.seeds[0]}"
        mine = {row["variant"]: row for row in rows if row["student"] == shipped}
        measured = [mine[variant] for variant in ("float32", "int8") if variant in mine]
        cells = [
            first.facts.model + ("" if not name.endswith("-longer") else f", {LONGER} times as long"),
            f"{(first.facts.macs or 0) / 1e6:.2f}",
            f"{first.facts.parameters:,}",
            f"{sum(labels) / len(labels):.2f}",
            f"{sum(kd) / len(kd):.2f}",
            _interval({"value": gain.value, "low": gain.low, "high": gain.high}, sign="+"),
            ", ".join(_interval(row["latency_p50_ms"]) for row in measured),
            ", ".join(_interval(row["accuracy"], 100) for row in measured),
        ]
        lines.append((first.facts.macs or 0, f"| {' | '.join(cells)} |"))
    print("\n".join(line for _, line in sorted(lines, reverse=True)))


def _interval(found: Mapping[str, float | None] | None, scale: float = 1, sign: str = "") -> str:
    """An estimate and its bounds, as far as they are known."""
    if found is None or found["value"] is None:
        return "–"
    bounds = [f"{scale * bound:.2f}" for bound in (found["low"], found["high"]) if bound is not None]
    return f"{scale * found['value']:{sign}.2f}" + (f" [{', '.join(bounds)}]" if bounds else "")


if __name__ == "__main__":
    typer.run(main)
