"""What papers on distillation claim, tried by `kdpipe study`: which images, methods, controls, and five claims each.

    nice -n 10 python benchmarks/experiments.py hint CIFAR10 --out runs         is a hint ahead, made fair?
    nice -n 10 python benchmarks/experiments.py untrained CIFAR10 --out runs    is it ahead by what the teacher knows?
    nice -n 10 python benchmarks/experiments.py deep CIFAR10 --out runs         heads at inner stages against kd
    nice -n 10 python benchmarks/experiments.py budget CIFAR10 --out runs       is it the images or the views?
    nice -n 10 python benchmarks/experiments.py knowledge CIFAR10 --out runs    what of the teacher's answer counts
    python benchmarks/experiments.py pitfall-weak TINY100 --out runs            for a GPU: losses by scale of data,
    python benchmarks/experiments.py pitfall-strong TINY100 --out runs          with weak and strong training
    python benchmarks/experiments.py hint CIFAR10 --out runs --dry-run          what it would run, and its time here

CIFAR10 and TINY100 are folders with train/<class>/* and val/<class>/*. Every run is sealed and shared by the
experiments that want the same; a killed one goes on where it was. In the end a table as Markdown and the claims are
printed; the page lies beside the runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdpipe import study
from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.config import DataPlan, StudyPlan, TeacherPlan, validated
from kdpipe.core.errors import KdpipeError, choice
from kdpipe.core.kinds import Checkpoint
from kdpipe.report.study import closing_lines, spread
from kdpipe.terminal import listener, tell_step

BALANCE = {"label_weight": 0.1, "kd_weight": 0.9}  # of the CIFAR literature
WITHOUT_LABELS = {"method": "kd", "label_weight": 0, "kd_weight": 1}
AUGMENT = {"crop": "pad", "flip": 0.5}
SMALL = {
    "student": {"model": "resnet8"},
    "views": 135_000,
    "int8": "none",
    "distill": {
        **BALANCE,
        "train": {"epochs": 30, "warmup_epochs": 2, "precision": "bf16", "workers": 1, "augment": AUGMENT},
    },
}
SMALL_TEACHER = {
    "model": "resnet20",
    "train": {
        "epochs": 14,
        "batch_size": 128,
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "weight_decay": 5e-4,
        "warmup_epochs": 2,
        "precision": "bf16",
        "workers": 1,
        "augment": AUGMENT,
    },
}


def faster(method: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The method at half and twice the learning rate of the others, by how its name ends."""
    return {how: {**method, "train": {"learning_rate": rate}} for how, rate in (("slow", 0.001), ("fast", 0.004))}


def heads(**settings: Any) -> dict[str, Any]:
    return {"method": "deep_supervision", "temperature": 4, **BALANCE, "deep": settings}


WEAK = {
    "epochs": 60,
    "warmup_epochs": 0,
    "batch_size": 128,
    "optimizer": "momentum",
    "learning_rate": 0.1,
    "weight_decay": 5e-4,
    "schedule": "multistep",
    "milestones": [38, 45, 53],
    "augment": AUGMENT,
}
STRONG = {**WEAK, "mixup": 0.1, "cutmix": 1.0, "augment": {**AUGMENT, "auto_augment": "rand-m7-mstd0.5"}}


def pitfall(train: dict[str, Any]) -> dict[str, Any]:
    """Plain kd against losses made to do better, on a fifth of the images and on all."""
    return {
        "student": {"model": "resnet8x4"},
        "fractions": (0.2, 1.0),
        "methods": ("kd", "dist", "hint"),
        "temperatures": (4,),
        "controls": (),
        "further": {"dkd": {"method": "dkd", "dkd": {"beta": 8}}, "deep": heads(width="doubling", weight=0.3)},
        "claims": (
            *(f"{method} > kd-T4 at {share}" for method in ("dkd", "dist") for share in (0.2, 1)),
            "deep > kd-T4 at 1",
        ),
        "distill": {**BALANCE, "train": train},
    }


EXPERIMENTS: dict[str, dict[str, Any]] = {
    "hint": {
        **SMALL,
        "fractions": (0.02,),
        "methods": ("kd", "hint"),
        "temperatures": (4,),
        "controls": (),
        "further": {
            "kd-T4-alone": {**WITHOUT_LABELS, "temperature": 4},
            "kd-T20-alone": {**WITHOUT_LABELS, "temperature": 20},
            **{f"labels-{how}": change for how, change in faster({"method": "labels"}).items()},
            **{f"kd-T4-{how}": change for how, change in faster({"temperature": 4}).items()},
            **{f"hint-{how}": change for how, change in faster({"method": "hint"}).items()},
            **{f"hint-{weight}": {"method": "hint", "kd_weight": weight} for weight in (1, 10, 1000)},
            "hint-kd": {"method": "hint", "hint": {"logits": True}},
            "hint-three": {"method": "hint", "hint": {"stages": [1, 2, 3]}},
        },
        "claims": (
            "hint > kd-T4 at 0.02",
            "hint > kd-T4-fast at 0.02",
            "hint > kd-T20-alone at 0.02",
            "hint-kd > hint at 0.02",
            "hint-three > hint at 0.02",
        ),
    },
    "untrained": {
        **SMALL,
        "fractions": (0.02,),
        "methods": ("hint",),
        "controls": (),
        "teachers": ("untrained",),
        "claims": ("hint > hint-by-untrained at 0.02", "hint-by-untrained > labels at 0.02"),
    },
    "deep": {
        **SMALL,
        "fractions": (0.02, 0.1),
        "methods": ("kd",),
        "temperatures": (4,),
        "controls": (),
        "further": {
            **{
                f"deep-{width}-{weight}": heads(width=width, weight=weight)
                for width in ("own", "doubling")
                for weight in (1, 0.3)
            },
            "deep-own-fading": heads(width="own", weight=0.1, fade=True),
            "deep-doubling-fading": heads(width="doubling", weight=0.1, fade=True),
            "deep-own-labels": heads(width="own", weight=0.3, labels=True),
            "deep-doubling-labels": heads(width="doubling", weight=0.3, labels=True),
        },
        "claims": (
            "deep-doubling-0.3 > kd-T4 at 0.02",
            "deep-doubling-0.3 > kd-T4 at 0.1",
            "deep-own-0.3 > kd-T4 at 0.02",
            "deep-own-0.3 > kd-T4 at 0.1",
            "deep-doubling-0.3 > deep-own-1 at 0.1",
        ),
    },
    "budget": {
        **SMALL,
        "fractions": (0.02, 0.1),
        "methods": ("kd", "hint", "stagewise"),
        "temperatures": (1,),
        "controls": (),
        "longer": 4,
        "further": {"kd-T20-alone": {**WITHOUT_LABELS, "temperature": 20}},
        "claims": (
            "kd-T20-alone-x4 > labels-x4 at 0.1",
            "kd-T20-alone-x4 > kd-T1-x4 at 0.1",
            "hint-x4 > labels-x4 at 0.1",
            "stagewise-x4 > labels-x4 at 0.1",
            "stagewise-x4 > labels-x4 at 0.02",
        ),
    },
    "knowledge": {
        **SMALL,
        "fractions": (0.004, 0.1),
        "methods": ("kd",),
        "temperatures": (20,),
        "controls": ("smoothing", "shuffled", "flattened", "smoothing-teacher"),
        "teachers": ("random-head",),
        "claims": (
            "kd-T20 > smoothing at 0.004",
            "kd-T20 > smoothing-teacher at 0.004",
            "kd-T20 > flattened at 0.004",
            "kd-T20 > shuffled at 0.004",
            "kd-T20 > flattened at 0.1",
        ),
    },
    "pitfall-weak": pitfall(WEAK),
    "pitfall-strong": pitfall(STRONG),
}
LARGE_TEACHER = {"model": "resnet32x4", "train": WEAK}


def main(
    name: Annotated[str, typer.Argument(help=", ".join(EXPERIMENTS))],
    images: Annotated[Path, typer.Argument(help="folder of images")],
    out: Annotated[Path, typer.Option(help="folder of all runs")],
    seeds: Annotated[int, typer.Option()] = 3,
    views: Annotated[int | None, typer.Option(help="a run [default: the experiment's]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what it would run; teachers are trained")] = False,
) -> None:
    if name not in EXPERIMENTS:
        raise choice("experiment", name, EXPERIMENTS)
    progress.listen(listener())
    values = dict(EXPERIMENTS[name])
    is_large = values["student"]["model"] == "resnet8x4"
    chain = Chain(out, tell=tell_step)
    dataset = chain.data(DataPlan(source=str(images), val_fraction=0 if is_large else 0.1))
    teacher = LARGE_TEACHER if is_large else SMALL_TEACHER
    guide = chain.teacher(validated(TeacherPlan, teacher, "the teacher"), dataset)
    values["teachers"] = {
        each: chain.teacher(
            validated(TeacherPlan, {**teacher, "start": each.replace("-", "_")}, each), dataset, out / f"teacher-{each}"
        ).path
        for each in values.get("teachers", ())
    }
    plan = validated(StudyPlan, {**values, "seeds": seeds, **({"views": views} if views else {})}, name)
    if dry_run:
        print("\n".join(study.plan(plan, dataset, guide, chain).lines()))
        return
    failed: dict[str, KdpipeError] = {}
    made = study.run(plan, dataset, guide, chain, failed)
    print_table(made.numbers, guide)
    for run, error in failed.items():
        print(f"not made: {run}: {error}")
    print("\n".join([*closing_lines(made.numbers), f"page: {made.page}"]))


def print_table(numbers: dict[str, Any], guide: Checkpoint) -> None:
    """Test top-1 in %, in brackets the gain over labels in points with its interval over the seeds."""
    print(
        f"taught by {guide.facts.model} ({100 * guide.facts.test_accuracy:.2f} %), {numbers['views']:,} views a run\n"
    )
    shares = numbers["fractions"]
    print("| method | " + " | ".join(f"{100 * share:g} %" for share in shares) + " |")
    print("|---" * (len(shares) + 1) + "|")
    rows = {(row["method"], row["fraction"]): row for row in numbers["rows"]}
    for method in numbers["methods"]:
        cells = []
        for share in shares:
            row = rows.get((method, share))
            gain = row and row["gain"] and f" ({spread(row['gain'], sign=True)})"
            cells.append("–" if row is None else f"{row['accuracy']['value']:.2f}{gain or ''}")
        print(f"| {method} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    typer.run(main)
