"""How much each method gains over labels alone, by how many images there are: one teacher, one student, all methods.

    python benchmarks/grid.py CIFAR10 --out runs                       every fraction, seed 0
    python benchmarks/grid.py CIFAR10 --out runs --fraction 0.1 --seed 0 --seed 1 --seed 2
    python benchmarks/grid.py CIFAR10 --out runs --fraction 0.1 --method kd-V1 --method kd-V4 --method kd-V16
    python benchmarks/grid.py CIFAR10 --out runs --no-train            what is there so far, as Markdown

CIFAR10 is a folder with train/<class>/* and val/<class>/*. Every run is sealed, so a killed grid goes on where it
was. The methods of one fraction and seed see the same images, order and views, and train side by side.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.config import DataPlan, DistillPlan, ModelSettings, TeacherPlan, validated
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.stats import mean_interval
from kdpipe.pipeline import student_runs
from kdpipe.terminal import listener, tell_step

# Passes over the drawn images: every cell of the grid costs the same, 135,000 views of CIFAR-10.
EPOCHS = {0.004: 750, 0.02: 150, 0.1: 30, 0.5: 6, 1.0: 3}
BALANCE = {"label_weight": 0.1, "kd_weight": 0.9}  # of the CIFAR literature
METHODS: dict[str, dict[str, Any]] = {
    "smoothing": {"method": "labels", "train": {"label_smoothing": 0.1}},
    "shuffled": {"method": "kd", "temperature": 4, "shuffled_teacher": True, **BALANCE},
    "kd-T1": {"method": "kd", "temperature": 1, **BALANCE},
    "kd-T4": {"method": "kd", "temperature": 4, **BALANCE},
    "kd-T20": {"method": "kd", "temperature": 20, **BALANCE},
    "logit-mse": {"method": "logit_mse", **BALANCE},
    "dkd-b2": {"method": "dkd", "dkd": {"beta": 2}},
    "dist-T4": {"method": "dist"},
    "hint-100": {"method": "hint"},
    "deep": {"method": "deep_supervision", **BALANCE},
    "stages": {"method": "stagewise"},
}
# kd-T4 from a cache of so many views of each image; kd-T4 itself has a new one every epoch.
CACHED = {f"kd-V{views}": {**METHODS["kd-T4"], "cache_views": views} for views in (1, 4, 16)}
AUGMENT = {"crop": "pad", "flip": 0.5}
TRAIN = {
    "precision": "auto",
    "validate_every": 1000,  # at the end alone: nothing is selected
    "workers": 1,
    "augment": AUGMENT,
}
TEACHER = {
    "epochs": 14,
    "batch_size": 128,
    "optimizer": "sgd",
    "learning_rate": 0.2,
    "weight_decay": 5e-4,
    "warmup_epochs": 2,
    "precision": "auto",
    "workers": 1,
    "augment": AUGMENT,
}


def main(
    source: Annotated[Path, typer.Argument(help="folder of images")],
    out: Annotated[Path, typer.Option(help="folder of all runs")],
    fraction: Annotated[list[float], typer.Option(help="of the images, for the students")] = list(EPOCHS),  # noqa: B006
    seed: Annotated[list[int], typer.Option()] = [0],  # noqa: B006
    teacher: Annotated[Path | None, typer.Option(help="a trained one [default: resnet20, trained here]")] = None,
    student: Annotated[str, typer.Option()] = "resnet8",
    method: Annotated[list[str], typer.Option(help="besides labels")] = list(METHODS),  # noqa: B006
    train: Annotated[bool, typer.Option(help="train what is missing")] = True,
) -> None:
    progress.listen(listener())
    if train:
        chain = Chain(out, tell=tell_step)
        dataset = chain.data(DataPlan(source=str(source)), out / "data")
        if teacher is None:
            config = validated(TeacherPlan, {"model": "resnet20", "train": TEACHER}, "the teacher")
            guide = chain.teacher(config, dataset, out / "teacher")
        else:
            guide = Checkpoint.open(teacher)
        for share in fraction:
            chain.train_all(
                student_runs(ModelSettings(model=student), plan(share, seed, method)), dataset, guide, together=True
            )
    print_table(sorted(out.glob("student-*")))


def plan(share: float, seeds: list[int], methods: list[str]) -> DistillPlan:
    """These methods on this share of the images."""
    epochs = EPOCHS[share]
    students = {name: dict((METHODS | CACHED)[name]) for name in methods}
    if "dkd-b2" in students:
        students["dkd-b2"]["dkd"] = {"beta": 2, "warmup_epochs": epochs // 12}
    train = {**TRAIN, "epochs": epochs, "warmup_epochs": max(1, epochs // 15)}
    values = {"method": "labels", "label_fraction": share, "seeds": seeds, "students": students, "train": train}
    return validated(DistillPlan, values, "the grid")


def print_table(folders: list[Path]) -> None:
    """Test top-1 in %; in brackets the gain over labels in points, with its 95 % interval over the seeds."""
    found: dict[tuple[str, float], dict[int, Checkpoint]] = defaultdict(dict)
    for folder in folders:
        if (folder / "manifest.json").is_file() and folder.suffix != ".part":
            run = Checkpoint.open(folder)
            method, _, _ = folder.name.removeprefix("student-").rpartition("-seed")
            found[method, run.manifest.config["label_fraction"]][run.manifest.config["seed"]] = run
            teacher = run.manifest.inputs.get("teacher")
            if teacher:
                facts = Checkpoint.facts_of(teacher)
                about = f"{facts.model} ({100 * facts.test_accuracy:.2f} %)"
    shares = sorted({share for _, share in found})
    print(f"taught by {about}\n\n| method | " + " | ".join(f"{100 * share:g} %" for share in shares) + " |")
    print("|---" * (len(shares) + 1) + "|")
    for method in ("labels", *METHODS, *CACHED):
        cells = [cell(found[method, share], found["labels", share], method == "labels") for share in shares]
        print(f"| {method} | " + " | ".join(cells) + " |")


def cell(runs: dict[int, Checkpoint], controls: dict[int, Checkpoint], alone: bool) -> str:
    """Accuracy and gain over the seeds that both have."""
    seeds = sorted(runs.keys() & controls.keys())
    if not seeds:
        return "–"
    accuracies = [100 * runs[seed].facts.test_accuracy for seed in seeds]
    gain = mean_interval(
        [top - 100 * controls[seed].facts.test_accuracy for top, seed in zip(accuracies, seeds, strict=True)]
    )
    spread = "" if gain.low is None else f" [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"{mean_interval(accuracies).value:.2f}" + ("" if alone else f" ({gain.value:+.2f}{spread})")


if __name__ == "__main__":
    typer.run(main)
