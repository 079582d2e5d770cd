"""How much each method gains over labels alone on CamVid, by how many images there are: one teacher, one student.

    python benchmarks/camvid.py CAMVID --imagenet WEIGHTS --out runs --hours 7
    python benchmarks/camvid.py CAMVID --imagenet WEIGHTS --out runs --hours 1 --share 0.1 --seed 0 --method labels
    python benchmarks/camvid.py CAMVID --out runs --encoder distilled --encoder undistilled    also labels from these
    python benchmarks/camvid.py CAMVID --out runs --no-train              what is there so far

CAMVID is a folder with train, val and test, each of images/ and masks/ (classes 0 to 10, 11 is ignored). WEIGHTS are of
timm's mobilenetv2_100 with pad_type "same", on which the teacher's decoder is trained; without them it is trained from
scratch. The student is a Unet over mobilenetv3_small_100, from scratch.

Before anything is trained, teacher and students are timed on a few batches. Every cell (method, share, seed) then sees
the same number of views: as many as fit the hours, and if these were too few, of fewer seeds. The plan is written
beside the runs and kept by whoever goes on; every run is sealed and a killed one goes on where it was. The methods of
one share and seed see the same images, order and views, train side by side, and share the teacher's answers. For every
cell that is there a line of JSON is printed, in the end the table as Markdown.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.artifact import write_json
from kdpipe.core.config import Config, DataPlan, TeacherPlan, TrainConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.stats import mean_interval
from kdpipe.data.dataset import Dataset
from kdpipe.data.views import training_images
from kdpipe.runtime.task import TASKS
from kdpipe.terminal import listener, tell_step

CLASSES = (
    "sky",
    "building",
    "pole",
    "road",
    "pavement",
    "tree",
    "sign_symbol",
    "fence",
    "car",
    "pedestrian",
    "bicyclist",
)
IGNORED = 11
BATCH = 16
AUGMENT = {"crop": "resized", "min_scale": 0.4, "flip": 0.5}
TRAIN = {
    "batch_size": BATCH,
    "learning_rate": 3e-3,
    "weight_decay": 0.01,
    "validate_every": 10**6,  # at the end alone: nothing is selected
    "precision": "float32",
    "workers": 1,
    "augment": AUGMENT,
}
IMAGENET_COLOURS = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}  # as the teacher's encoder was trained
TEACHER = {"model": "unet", "encoder": "mobilenetv2_100", "model_args": {"pad_type": "same"}}
STUDENT = {
    "model": "unet",
    "encoder": "mobilenetv3_small_100",
    "model_args": {"decoder_channels": [64, 32, 24, 16, 16]},
}
# As their authors set them for pixels, where they did (see docs/results.md).
METHODS: dict[str, dict[str, Any]] = {
    "labels": {"method": "labels"},
    "kd": {"method": "kd", "temperature": 1},
    "dist": {"method": "dist", "temperature": 1, "kd_weight": 1},
    "cwd": {"method": "cwd", "temperature": 4},
    "hint": {"method": "hint", "kd_weight": 1},  # not 100: maps of the teacher's stage have a variance of about ten
    "stagewise": {"method": "stagewise"},
    # Not unless they are asked for: controls, and what else there is.
    "smoothing": {"method": "labels", "train": {"label_smoothing": 0.1}},
    "shuffled": {"method": "kd", "temperature": 1, "shuffled_teacher": True},
    "cwd-features": {"method": "cwd", "cwd_on": "features", "temperature": 1},
    "deep": {"method": "deep_supervision", "temperature": 1},
    "dkd": {"method": "dkd", "temperature": 1, "dkd": {"beta": 2, "warmup_epochs": 0}},
}
USUAL = list(METHODS)[:6]
MOST_VIEWS, LEAST_VIEWS = 36_700, 7_340  # of a cell: 100 and 20 epochs of all 367 images
MOST_TEACHER_VIEWS, TEACHER_SHARE = 36_700, 0.25  # and which share of the time it may take
SPARE = 0.05  # of the time, for what was not timed
WARM_UP = 4  # epochs of a tenth of the images, before anything is timed: a step for each phase of stagewise


class Plan(Config):
    """What is trained, at what cost."""

    size: tuple[int, int]  # height and width, pixels
    methods: tuple[str, ...]
    shares: tuple[float, ...]
    seeds: tuple[int, ...]
    views: int  # of a cell
    teacher_views: int
    hours: float  # that it was made to fit
    timed: dict[str, float]  # what it was made from: seconds a view, and what a run takes besides


class Cost(NamedTuple):
    """What training takes on this machine."""

    seconds_a_view: float
    seconds_besides: float  # to begin, to be tested and to be sealed


def main(
    source: Annotated[Path, typer.Argument(help="folder of CamVid")],
    out: Annotated[Path, typer.Option(help="folder of all runs")],
    imagenet: Annotated[Path | None, typer.Option(help="weights of the teacher's encoder")] = None,
    encoder: Annotated[list[Path] | None, typer.Option(help="folders of a mobilenetv3_small_100 to begin from")] = None,
    hours: Annotated[float, typer.Option(help="for everything that is not there yet")] = 7.0,
    method: Annotated[list[str], typer.Option()] = USUAL,
    share: Annotated[list[float], typer.Option(help="of the images, for the students")] = [0.1, 1.0],  # noqa: B006
    seed: Annotated[list[int], typer.Option()] = [0, 1, 2],  # noqa: B006
    size: Annotated[tuple[int, int], typer.Option(help="height and width, pixels")] = (128, 160),
    least_views: Annotated[int, typer.Option(help="of a cell; where fewer fit, seeds are left out")] = LEAST_VIEWS,
    train: Annotated[bool, typer.Option(help="train what is missing")] = True,
) -> None:
    """Train and print every cell of the plan."""
    progress.listen(listener())
    out.mkdir(parents=True, exist_ok=True)
    (out / "classes.txt").write_text("\n".join(CLASSES))
    data = DataPlan(
        task="segmentation", source=str(source), test_split="test", val_split="val", classes=out / "classes.txt",
        ignore_index=IGNORED, store="none",
    )  # fmt: skip
    chain = Chain(out, tell=tell_step)
    dataset = chain.data(data, out / "data")
    known = out / "plan.json"
    if known.is_file():
        plan = validated(Plan, json.loads(known.read_text()), str(known))
        progress.note(f"the plan in {known} is kept: delete it, or take another --out, for another one")
    elif not train:
        raise UserError(f"no plan in {out}: nothing is there yet")
    else:
        plan = planned(dataset, tuple(method), tuple(share), tuple(seed), size, hours, least_views, imagenet)
        write_json(known, plan.model_dump(mode="json"))
    tell(plan, dataset)
    teacher = chain.teacher(teacher_plan(plan, dataset, imagenet), dataset, out / "teacher") if train else None
    teacher = teacher or Checkpoint.open(out / "teacher")
    encoders = {path.name: path for path in encoder or ()}
    if len(encoders) < len(encoder or ()):
        raise UserError("--encoder: two folders of one name: wanted names that tell them apart in the table")
    cells: dict[tuple[str, float, int], Checkpoint] = {}
    for seed_number in plan.seeds:
        for fraction in plan.shares:
            configs = block(plan, fraction, seed_number, dataset, encoders)
            if train:
                chain.train_all(configs, dataset, teacher, together=True)
            for name, run in opened(chain, configs, dataset, teacher).items():
                cells[name, fraction, seed_number] = run
                control = cells.get(("labels", fraction, seed_number))
                print(json.dumps(line(plan, name, run, control, teacher)), flush=True)
    print_table(cells, teacher)


# ---- the plan --------------------------------------------------------------------------------------------------


def planned(
    dataset: Dataset,
    methods: tuple[str, ...],
    shares: tuple[float, ...],
    seeds: tuple[int, ...],
    size: tuple[int, int],
    hours: float,
    least_views: int,
    imagenet: Path | None,
) -> Plan:
    """As many views a cell as fit the hours by what a view takes here, of fewer seeds if they were too few.

    Raises:
        UserError: too few for a single seed.
    """
    if unknown := sorted(set(methods) - METHODS.keys()):
        raise UserError(f"unknown method '{unknown[0]}': wanted of {', '.join(METHODS)}")
    draft = Plan(
        size=size, methods=methods, shares=shares, seeds=seeds, views=BATCH, teacher_views=BATCH, hours=hours, timed={}
    )
    its, students = timed(draft, dataset, imagenet)
    seconds = 3600 * hours * (1 - SPARE)
    teacher_seconds = min(TEACHER_SHARE * seconds, its.seconds_besides + MOST_TEACHER_VIEWS * its.seconds_a_view)
    teacher_views = int((teacher_seconds - its.seconds_besides) / its.seconds_a_view)
    for count in range(len(seeds), 0, -1):
        blocks = count * len(shares)
        left = (seconds - teacher_seconds) / blocks - students.seconds_besides
        views = min(MOST_VIEWS, int(left / students.seconds_a_view))
        if views >= least_views and teacher_views >= least_views:
            break
    else:
        least = len(shares) * (students.seconds_besides + least_views * students.seconds_a_view)
        its_least = its.seconds_besides + least_views * its.seconds_a_view
        wanted = max(least / (1 - TEACHER_SHARE), its_least / TEACHER_SHARE) / (1 - SPARE) / 3600
        raise UserError(
            f"{hours:g} hours are {max(0, views)} views a cell and {max(0, teacher_views)} of the teacher: wanted "
            f"{least_views} of each at least, about {wanted:.1f} hours, or fewer methods or shares"
        )
    costs = {"teacher": its, "students": students}
    found = {f"{who}_{field}": value for who, cost in costs.items() for field, value in cost._asdict().items()}
    changed = {"seeds": seeds[:count], "views": views, "teacher_views": teacher_views, "timed": found}
    return draft.model_copy(update=changed)


def timed(plan: Plan, dataset: Dataset, imagenet: Path | None) -> tuple[Cost, Cost]:
    """What the teacher's training and a block of all methods take, from runs of a few batches in another folder."""
    with tempfile.TemporaryDirectory() as folder:
        chain = Chain(Path(folder))
        few = teacher_plan(plan, dataset, imagenet).training().model_copy(update={"label_fraction": 0.1})

        def teach(views: int) -> Checkpoint:
            return chain.train("teacher", _of_views(few, views, dataset), dataset, None)

        def learn(views: int) -> object:
            configs = block(plan.model_copy(update={"views": views}), few.label_fraction, 0, dataset, {})
            return chain.train_all(configs, dataset, guide, together=True)

        images = len(drawn(dataset, few.label_fraction, 0))
        its, guide = cost(teach, images), teach(WARM_UP * images)
        return its, cost(learn, images)


def cost(train: Callable[[int], object], images: int) -> Cost:
    """From two trainings, of a few epochs of so many images and of more; both begin, are tested and sealed."""
    few, many = (WARM_UP + 1) * images, (WARM_UP + 9) * images
    train(WARM_UP * images)  # what is imported and made once is not theirs
    seconds = []
    for views in (few, many):
        begun = time.monotonic()
        train(views)
        seconds.append(time.monotonic() - begun)
    a_view = max(1e-6, (seconds[1] - seconds[0]) / (many - few))
    return Cost(a_view, max(0.0, seconds[0] - few * a_view))


def tell(plan: Plan, dataset: Dataset) -> None:
    """What the plan is, and at what cost."""
    height, width = plan.size
    images = [len(drawn(dataset, share, 0)) for share in plan.shares]
    shown = " and ".join(f"{share:.0%} ({count} images)" for share, count in zip(plan.shares, images, strict=True))
    progress.note(
        f"{len(plan.methods)} methods on {shown}, seeds {', '.join(map(str, plan.seeds))}, at {height}x{width} pixels: "
        f"{plan.views} views a cell in steps of {BATCH}, {plan.teacher_views} for the teacher, made to fit "
        f"{plan.hours:g} hours; timed: {', '.join(f'{name} {value:.3f}' for name, value in plan.timed.items())}"
    )


# ---- the runs --------------------------------------------------------------------------------------------------


def drawn(dataset: Dataset, share: float, seed: int) -> Any:
    """Which training images a cell has."""
    return training_images(dataset, share, seed, with_unlabeled=False).numbers


def _of_views(config: TrainConfig, views: int, dataset: Dataset) -> TrainConfig:
    """``config`` for as many epochs as come nearest to so many views."""
    epochs = max(1, round(views / len(drawn(dataset, config.label_fraction, config.seed))))
    settings = config.train.model_copy(update={"epochs": epochs, "warmup_epochs": max(1, epochs // 20)})
    return config.model_copy(update={"train": settings})


def teacher_plan(plan: Plan, dataset: Dataset, imagenet: Path | None) -> TeacherPlan:
    """The teacher, of all training images."""
    epochs = max(1, round(plan.teacher_views / len(dataset.samples("train"))))
    settings = {**TRAIN, "epochs": epochs, "warmup_epochs": max(1, epochs // 20)}
    values = {**TEACHER, "input": {"size": list(plan.size), **IMAGENET_COLOURS}, "train": settings}
    return validated(TeacherPlan, {**values, "encoder_checkpoint": imagenet}, "the teacher")


def block(
    plan: Plan, share: float, seed: int, dataset: Dataset, encoders: Mapping[str, Path]
) -> dict[str, TrainConfig]:
    """The runs of all methods on one share and seed, and of labels over each encoder, by name."""
    runs: dict[str, dict[str, Any]] = {name: METHODS[name] for name in plan.methods}
    runs |= {f"labels+{its}": {**METHODS["labels"], "encoder_checkpoint": path} for its, path in encoders.items()}
    found = {}
    for name, change in runs.items():
        values = {**STUDENT, "input": {"size": list(plan.size), **IMAGENET_COLOURS}, **change}
        values |= {"train": {**TRAIN, **change.get("train", {})}, "label_fraction": share, "seed": seed}
        config = _of_views(validated(TrainConfig, values, name), plan.views, dataset)
        found[f"{name}-share{share:g}-seed{seed}"] = config
    return found


def opened(
    chain: Chain, configs: dict[str, TrainConfig], dataset: Dataset, teacher: Checkpoint
) -> dict[str, Checkpoint]:
    """Those of these runs that are there, by the method's name."""
    from kdpipe.chain import train_order

    paths = {name: chain.path(name, train_order(config, dataset, teacher)) for name, config in configs.items()}
    return {name.partition("-share")[0]: Checkpoint.open(path) for name, path in paths.items() if path.exists()}


# ---- what came out ---------------------------------------------------------------------------------------------


def line(plan: Plan, name: str, run: Checkpoint, control: Checkpoint | None, teacher: Checkpoint) -> dict[str, Any]:
    """One cell: figures in %, the gain over labels in points, paired by test image."""
    facts, settings, task = run.facts, run.manifest.config, TASKS[run.facts.task]
    interval = facts.test_interval
    assert interval is not None and facts.guessing is not None
    told = {
        "method": name,
        "share": settings["label_fraction"],
        "seed": settings["seed"],
        "images": facts.training_images,
        "views": facts.epochs * facts.training_images,
        "steps": facts.steps,
        "block_seconds": run.manifest.seconds,  # of everything that trained beside it, since it was last begun
        "mIoU": 100 * facts.test_accuracy,
        "low": 100 * (interval.low or 0),
        "high": 100 * (interval.high or 0),
        "parameters": facts.parameters,
        "macs": facts.macs,
        "guessing": 100 * facts.guessing,
        "teacher": 100 * teacher.facts.test_accuracy,
        "size": list(plan.size),
        "key": run.key,
    }
    if control is not None and control.key != run.key:
        (before, labels), (after, _) = control.tested, run.tested
        change = task.change(task.scores(before, labels), task.scores(after, labels))
        told |= {"gain": 100 * change.difference, "gain_low": 100 * change.low, "gain_high": 100 * change.high}
    return told


def print_table(cells: dict[tuple[str, float, int], Checkpoint], teacher: Checkpoint) -> None:
    """Test mIoU in %; in brackets the gain over labels in points, with its 95 % interval over the seeds."""
    shares = sorted({share for _, share, _ in cells})
    names = list(dict.fromkeys(name for name, _, _ in cells))
    facts = teacher.facts
    print(f"\ntaught by {facts.model} ({100 * facts.test_accuracy:.2f} %)\n", file=sys.stderr)
    rows = [
        "| method | " + " | ".join(f"{100 * share:g} %" for share in shares) + " |",
        "|---" * (1 + len(shares)) + "|",
    ]
    for name in names:
        rows.append(f"| {name} | " + " | ".join(entry(cells, name, share) for share in shares) + " |")
    print("\n".join(rows), file=sys.stderr)


def entry(cells: dict[tuple[str, float, int], Checkpoint], name: str, share: float) -> str:
    """Figure and gain over the seeds that both have."""
    seeds = sorted(seed for method, part, seed in cells if (method, part) == (name, share))
    figures = [100 * cells[name, share, seed].facts.test_accuracy for seed in seeds]
    if not figures:
        return "–"
    mean = f"{mean_interval(figures).value:.2f}"
    paired = [
        figure - 100 * cells["labels", share, seed].facts.test_accuracy
        for figure, seed in zip(figures, seeds, strict=True)
        if ("labels", share, seed) in cells and name != "labels"
    ]
    if not paired:
        return mean
    gain = mean_interval(paired)
    spread = "" if gain.low is None or math.isnan(gain.low) else f" [{gain.low:+.2f}, {gain.high:+.2f}]"
    return f"{mean} ({gain.value:+.2f}{spread})"


if __name__ == "__main__":
    typer.run(main)
