"""What training for 8 bits gains over INT8 without it, and over as many steps in float32: on all test images.

    python benchmarks/qad.py CIFAR10 --out runs --hours 6
    python benchmarks/qad.py CIFAR10 --out runs --model repvit_m0_9 --epochs 20 --steps 2000
    python benchmarks/qad.py --student CHECKPOINT --data DATA --out runs --steps 2000      such as of masks
    python benchmarks/qad.py --imagenet WEIGHTS --samples NPZ --out runs --steps 500       MobileNetV2, reported only
    python benchmarks/qad.py CIFAR10 --out runs --no-make                                  what is there so far

CIFAR10 is a folder with train and val, each of a folder a class (CIFAR-10 as JPEG of quality 75: say so). Students are
trained from scratch on the labels, 5 % of the training images being kept to refuse by. Then for every CPU target four
files: float32, INT8 without training, INT8 of the student after as many steps in float32, and int8-qad. Each is asked
about all test images; differences are paired, image by image.

WEIGHTS and NPZ are the MobileNetV2 and the thousand ImageNet images of the shared data: half of them, which it was
probably trained on, set ranges and are learned from, the others test; its weights lie on an INT8 grid already.

Everything is sealed, and a killed run goes on where it was. With --hours the epochs of students and the steps of
int8-qad are cut so that what is missing fits, by what a view in training takes here: a step of both trainings counts as
five of the student's own. What was cut is kept beside the runs. A line of JSON a file, in the end a table in Markdown.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from PIL import Image

from kdpipe.chain import Chain
from kdpipe.core import progress
from kdpipe.core.artifact import write_json
from kdpipe.core.config import (
    DataPlan,
    ExportConfig,
    QadSettings,
    QuantizeConfig,
    TeacherPlan,
    TrainConfig,
    suited,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint, Damage, Model, ModelFacts
from kdpipe.core.stats import Interval, no_worse
from kdpipe.data.dataset import Dataset
from kdpipe.devices import find_device
from kdpipe.distill.pace import view_seconds
from kdpipe.export import TARGETS
from kdpipe.quantize import VARIANTS
from kdpipe.quantize.calibrate import CalibrationInputs
from kdpipe.quantize.guard import scored
from kdpipe.quantize.work import Work
from kdpipe.runtime.task import TASKS
from kdpipe.terminal import listener, tell_step

CPU_TARGETS = ("onnxruntime", "openvino", "tflite")
NETWORKS: dict[str, dict[str, Any]] = {
    "mobilenetv4_conv_small": {},
    "repvit_m0_9": {},
    "efficientnet_lite0": {},
    # Of its own patches of 16 pixels two by two would fill an image of 32.
    "vit_tiny": {"model": "vit_tiny_patch16_224", "model_args": {"patch_size": 4}},
}
SIZE, BATCH, CALIBRATING = 32, 64, 128
MOST_EPOCHS, LEAST_EPOCHS, MOST_STEPS, LEAST_STEPS = 30, 2, 2000, 100
STEP_COSTS = 5  # of the student's own steps: two forwards, grids, and the control's
STUDENTS_SHARE = 0.5  # of the time
MARGIN_POINTS = 0.5
TRAIN = {
    "batch_size": BATCH,
    "learning_rate": 2e-3,
    "warmup_epochs": 1,
    "validate_every": 10**6,  # at the end alone: nothing is selected
    "workers": 1,
    "augment": {"crop": "pad", "flip": 0.5},
}


class Effort(NamedTuple):
    """How long a student is trained, and its 8 bits."""

    epochs: int
    steps: int


class Told(NamedTuple):
    """One file against its float32 one."""

    network: str
    target: str
    file: str
    drop: Interval  # of accuracy, negative where it is lost
    decibel: float | None
    minutes: float  # of training


def main(
    cifar: Annotated[Path | None, typer.Argument(help="folder of CIFAR-10")] = None,
    out: Annotated[Path, typer.Option(help="folder of all runs")] = Path("runs/qad"),
    model: Annotated[list[str], typer.Option(help="of the students")] = list(NETWORKS),  # noqa: B006
    target: Annotated[list[str], typer.Option()] = list(CPU_TARGETS),  # noqa: B006
    student: Annotated[Path | None, typer.Option(help="a checkpoint in place of CIFAR's students")] = None,
    data: Annotated[Path | None, typer.Option(help="its data set")] = None,
    imagenet: Annotated[Path | None, typer.Option(help="weights of MobileNetV2")] = None,
    samples: Annotated[Path | None, typer.Option(help="images of ImageNet, .npz")] = None,
    hours: Annotated[float | None, typer.Option(help="for what is not there yet")] = None,
    epochs: Annotated[int, typer.Option()] = MOST_EPOCHS,
    steps: Annotated[int, typer.Option(help="of int8-qad")] = MOST_STEPS,
    learning_rate: Annotated[float, typer.Option(help="of int8-qad")] = QadSettings().learning_rate,
    images: Annotated[int | None, typer.Option(help="of each part at most, to try it")] = None,
    make: Annotated[bool, typer.Option(help="make what is missing")] = True,
) -> None:
    """Make and print every file that is asked for."""
    progress.listen(listener())
    out.mkdir(parents=True, exist_ok=True)
    chain = Chain(out, tell=tell_step)
    told: list[Told] = []
    for name, network, dataset, effort in students(
        chain, cifar, model, student, data, imagenet, samples, hours, Effort(epochs, steps), images
    ):
        for its in target:
            told += list(compared(chain, name, network, dataset, its, effort.steps, learning_rate, make))
    print_table(told)


# ---- students ------------------------------------------------------------------------------------------------


def students(
    chain: Chain,
    cifar: Path | None,
    names: Sequence[str],
    student: Path | None,
    data: Path | None,
    imagenet: Path | None,
    samples: Path | None,
    hours: float | None,
    asked: Effort,
    images: int | None,
) -> Iterator[tuple[str, Checkpoint, Dataset, Effort]]:
    """Each with its name, its data and the effort; trained or adopted if it is not there."""
    if student is not None:
        if data is None:
            raise UserError("--student wants --data: the data set that it was trained on")
        found = Checkpoint.open(student)
        yield found.facts.model, found, Dataset.open(data), asked
    if imagenet is not None:
        if samples is None:
            raise UserError("--imagenet wants --samples: images of ImageNet")
        dataset = chain.data(of_imagenet(samples, chain.folder / "imagenet"))
        plan = validated(
            TeacherPlan,
            {
                "model": "mobilenetv2_100",
                "model_args": {"pad_type": "same"},
                "checkpoint": imagenet,
                "input": {"size": 224, "mean": [0.5] * 3, "std": [0.5] * 3, "crop_fraction": 1.0},
            },
            "the benchmark",
        )
        yield "mobilenetv2_100 (ImageNet)", chain.teacher(plan, dataset, name="mobilenetv2"), dataset, asked
    if cifar is None:
        return
    dataset = chain.data(DataPlan(source=str(cifar), val_fraction=0.05, most_images=images))
    for name in names:
        if name not in NETWORKS:
            raise UserError(f"unknown network '{name}': wanted of {', '.join(NETWORKS)}")
        effort = planned(chain, name, dataset, hours, len(names), asked)
        config = training(name, effort.epochs)
        yield name, chain.train(f"student-{name}", config, dataset, None), dataset, effort


def training(name: str, epochs: int) -> TrainConfig:
    """How a student of CIFAR-10 is trained."""
    train = {**TRAIN, "epochs": epochs}
    values = {"model": name, "input": {"size": SIZE}, "method": "labels", "train": train, **NETWORKS[name]}
    return validated(TrainConfig, values, "the benchmark")


def planned(chain: Chain, name: str, dataset: Dataset, hours: float | None, networks: int, asked: Effort) -> Effort:
    """The effort that fits a network's share of the hours, at most as asked; planned once for the same of both."""
    if hours is None:
        return asked
    seconds = 3600 * hours / networks
    known = chain.folder / f"plan-{name}-{seconds:.0f}s-{asked.epochs}-{asked.steps}-{dataset.key[:12]}.json"
    if known.is_file():
        return Effort(**json.loads(known.read_text()))
    a_view = view_seconds(training(name, LEAST_EPOCHS), dataset, None, chain.folder / ".precisions")
    of_student = int(STUDENTS_SHARE * seconds / a_view / len(dataset.samples("train")))
    of_steps = int((1 - STUDENTS_SHARE) * seconds / a_view / BATCH / STEP_COSTS)
    effort = Effort(max(LEAST_EPOCHS, min(asked.epochs, of_student)), max(LEAST_STEPS, min(asked.steps, of_steps)))
    progress.note(f"{name}: {1e3 * a_view:.1f} ms a view, so {effort.epochs} epochs and {effort.steps} steps")
    write_json(known, effort._asdict())
    return effort


def of_imagenet(samples: Path, folder: Path) -> DataPlan:
    """The thousand images as a folder: classes take turns in being learned from and in testing."""
    with np.load(samples, allow_pickle=False) as found:
        blob, starts, labels = found["blob"], found["off"], found["y"]
    for at, label in enumerate(labels.tolist()):
        file = folder / ("train" if at % 2 == 0 else "val") / f"{label:04d}" / f"{at:04d}.jpg"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            content = blob[starts[at] : starts[at + 1]].tobytes()
            with Image.open(io.BytesIO(content)) as image:
                image.load()
            file.write_bytes(content)
    classes = folder / "classes.txt"
    classes.write_text("".join(f"{at:04d}\n" for at in range(int(labels.max()) + 1)))
    return DataPlan(source=str(folder), val_fraction=0.0, classes=classes, store="none")


# ---- files ---------------------------------------------------------------------------------------------------


def compared(
    chain: Chain,
    name: str,
    student: Checkpoint,
    dataset: Dataset,
    target: str,
    steps: int,
    learning_rate: float,
    make: bool,
) -> Iterator[Told]:
    """The three INT8 files of a student for a target against its float32 one, on all test images."""
    qad = QadSettings(steps=steps, learning_rate=learning_rate, workers=1)
    probe = find_device("local").probe()
    settings = QuantizeConfig(variant="int8-qad", qad=qad, allow_damage=True, calibrate={"images": CALIBRATING})
    settings = suited(settings, probe.machine, probe.known_flags)
    known = chain.folder / "told" / f"{student.key[:12]}-{target}-{steps}-{learning_rate:g}.json"
    if not known.is_file():
        if not make:
            return
        whole = chain.export(ExportConfig(target=target), student, dataset)
        trained = chain.quantize(settings, whole, dataset, probe)
        known.parent.mkdir(exist_ok=True)
        rows = list(files(chain, whole, trained, settings, dataset))
        draft = known.with_suffix(".tmp")
        write_json(draft, rows)
        draft.rename(known)
    for row in json.loads(known.read_text()):
        drop = Interval(**row["drop"])
        told = Told(name, target, row["file"], drop, row["decibel"], row["minutes"])
        print(json.dumps({**told._asdict(), "drop": drop.as_dict()}), flush=True)
        yield told


def files(
    chain: Chain, whole: Model, trained: Model, settings: QuantizeConfig, dataset: Dataset
) -> Iterator[dict[str, Any]]:
    """What the table has of each file."""
    task, tested = TASKS[whole.facts.task], dataset.samples("test")
    before = scored(whole.path, whole.facts, tested, task)
    record = trained.facts.trained
    assert record is not None  # it was trained

    def told(file: str, folder: Path, facts: ModelFacts, found: Damage | None, minutes: float) -> dict[str, Any]:
        change = task.change(before, scored(folder, facts, tested, task))
        drop = Interval(change.difference, change.low, change.high, change.n)
        decibel = None if found is None else found.signal_to_noise_db
        return {"file": file, "drop": drop.as_dict(), "decibel": decibel, "minutes": minutes}

    training = chain._trained(settings, whole, dataset)
    minutes = {
        name: round(each.tuned.manifest.seconds / 60, 1)
        for name, each in (("own", training.own), ("control", training.float32_steps))
    }
    kind = VARIANTS[whole.facts.target]["int8-qad"].untrained
    assert kind is not None
    spec = whole.facts.input.model_dump()
    inputs = CalibrationInputs(dataset.balanced("train", CALIBRATING, settings.calibrate.seed), spec, "calibrating")
    work = Work(whole, chain._graph_of(whole), inputs, settings, TARGETS[whole.facts.target].check)
    for file, each, found, took in (
        ("int8", work, record.untrained, 0.0),
        ("float32 steps, int8", work.of(training.float32_steps), record.float32_steps, minutes["control"]),
    ):
        folder = chain.folder / "controls"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        kind(each).write((), folder)
        yield told(file, folder, trained.facts, found.against_float32, took)
    yield told("int8-qad", trained.path, trained.facts, record.own.against_float32, minutes["own"])


def print_table(found: Sequence[Told]) -> None:
    """As Markdown: points of accuracy against float32 with their interval, and what the goal says of it."""
    print("\n| network | target | file | points against float32 | dB | minutes | loses at most 0.5 |")
    print("|---|---|---|---|---|---|---|")
    for each in found:
        drop, said = each.drop, no_worse(each.drop, MARGIN_POINTS)
        bounds = "" if drop.low is None or drop.high is None else f" [{100 * drop.low:+.2f}, {100 * drop.high:+.2f}]"
        decibel = "" if each.decibel is None else f"{each.decibel:.1f}"
        print(
            f"| {each.network} | {each.target} | {each.file} | {100 * drop.value:+.2f}{bounds} | {decibel} | "
            f"{each.minutes:.1f} | {said.answer} |"
        )


if __name__ == "__main__":
    typer.run(main)
