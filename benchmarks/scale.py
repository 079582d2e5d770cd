"""What a folder of many images costs before and around training: seconds and peak memory by stage.

    python benchmarks/scale.py FOLDER --counts 10000 --counts 100000 --counts 1000000
    python benchmarks/scale.py FOLDER --photographs 40

The first makes folders of so many small JPEGs, each different, and 50,000 to test on, and runs every stage in a process
of its own: ``data``; a ``run`` up to its first training step, twice; the start of an epoch; ``bench``'s accuracy at 224
pixels. What is done already (FOLDER/results.jsonl) is not done again. The second compares training on photographs
of 12 megapixels, stored and not, with training on copies of 256 pixels, taking turns.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

CLASSES, TEST_IMAGES = 100, 50_000
STAGES = ("data", "first run", "second run", "epoch", "bench")
TRAIN = {"epochs": 1, "workers": 0, "batch_size": 64}


# ---- images --------------------------------------------------------------------------------------------------


def write_images(root: Path, numbers: Iterable[int]) -> None:
    """Small JPEGs, no two alike: the number is in the pixels."""
    from PIL import Image

    for number in numbers:
        bits = np.unpackbits(np.array([number], ">u4").view(np.uint8)).reshape(4, 8)
        colours = np.random.default_rng(number % CLASSES).integers(0, 256, (4, 8, 3))
        pixels = np.where(bits[..., None], colours, 255 - colours).astype(np.uint8)
        path = root / f"{number % CLASSES:03d}" / f"{number:07d}.jpg"
        Image.fromarray(pixels).resize((64, 48), Image.Resampling.NEAREST).save(path, quality=80)


def make(root: Path, count: int) -> None:
    """``count`` images, in folders by class; whole or not there."""
    if root.exists():
        return
    part = root.with_name(root.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    for label in range(CLASSES):
        (part / f"{label:03d}").mkdir(parents=True)
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_images, [part] * 100, [range(at, count, 100) for at in range(100)]))
    part.rename(root)


def photographs(root: Path, count: int, side: int) -> None:
    """Photographs of 4 to 3, smooth and a little noisy, as a phone's are; ``side`` is the shorter one."""
    from PIL import Image

    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3)).astype(np.uint8))
        image = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC)).astype(np.int16)
        image += generator.integers(-6, 7, image.shape, np.int8)
        picture = Image.fromarray(image.clip(0, 255).astype(np.uint8))
        if side < 3000:
            picture = picture.resize((side * 4 // 3, side), Image.Resampling.BICUBIC)
        for part in ("train", "val") if number < 4 else ("train",):
            path = root / part / str(number % 2) / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, quality=90)


# ---- stages --------------------------------------------------------------------------------------------------


def peak_mib() -> float:
    """Largest resident set of this process."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def recipe(root: Path, **data: Any) -> Any:
    from kdpipe.core.config import Recipe, validated

    network = {"model": "test_resnet", "input": {"size": 224}}
    values = {
        "name": "scale",
        "data": {"source": str(root), **data},
        "teacher": {**network, "train": TRAIN},
        "student": network,
        "distill": {"train": TRAIN},
    }
    return validated(Recipe, values, "scale")


def stage_data(root: Path, artifacts: Path) -> None:
    from kdpipe.chain import Chain

    Chain(artifacts).data(recipe(root).data)


class FirstStep(Exception):
    """Training has begun."""


def stage_run(root: Path, artifacts: Path) -> None:
    from kdpipe import pipeline
    from kdpipe.chain import Chain
    from kdpipe.distill.loop import Batch, Run

    def learn(_: Run, batch: Batch) -> str:
        raise FirstStep(len(batch.label))

    Run.learn = learn  # type: ignore[method-assign, assignment]
    try:
        pipeline.run(recipe(root), Chain(artifacts))
    except FirstStep:
        return
    raise RuntimeError("no training step was taken")


def opened(artifacts: Path) -> Any:
    from kdpipe.data.dataset import Dataset

    return Dataset.open(next(artifacts.glob("data-*")))


def stage_epoch(root: Path, artifacts: Path) -> None:
    """From a sealed data set to the first batch of an epoch."""
    from kdpipe.core.config import TrainSettings
    from kdpipe.data.views import EpochBatches, TrainingViews, training_images
    from kdpipe.networks.models import input_spec

    source = training_images(opened(artifacts), 1.0, 0, with_unlabeled=False)
    views = TrainingViews(source, TrainSettings.model_validate(TRAIN), input_spec(recipe(root).student), CLASSES, 0)
    batch = next(iter(EpochBatches(source.numbers, 64, 0)))
    assert len([views[address] for address in batch]) == 64


def stage_bundle(_root: Path, artifacts: Path) -> None:
    """A bundle to be measured: random weights for as many classes."""
    from safetensors.torch import save_file

    from kdpipe.chain import Chain
    from kdpipe.core.config import ExportConfig, PackageConfig, TeacherPlan
    from kdpipe.networks import models

    chain, few = Chain(artifacts), artifacts / "few"
    for part in ("train", "val"):
        make(few / part, 400)
    dataset = chain.data(recipe(few).data)
    weights = artifacts / "weights.safetensors"
    network, _ = models.create(recipe(few).student, CLASSES)
    save_file(network.state_dict(), weights)
    plan = TeacherPlan.of(recipe(few).teacher, checkpoint=weights)
    model = chain.export(ExportConfig(target="onnxruntime"), chain.teacher(plan, dataset), dataset)
    chain.package(PackageConfig(), model, dataset, artifacts / "bundle")


def stage_bench(root: Path, artifacts: Path) -> None:
    """The accuracy of one bundle on all test images, by the runner, in a process of its own."""
    from kdpipe.core.config import BenchPlan
    from kdpipe.core.kinds import Bundle
    from kdpipe.data.dataset import load_labels
    from kdpipe.devices import find_device
    from kdpipe.devices import opened as device_opened
    from kdpipe.devices.accuracy import Asked, ask, gather, push
    from kdpipe.devices.journal import Journal
    from kdpipe.devices.session import bench_config
    from kdpipe.devices.talk import Talk
    from kdpipe.runtime.task import TASKS

    bundle, everything = Bundle.open(root.parent.parent / "bundle" / "bundle"), opened(artifacts)
    with (
        tempfile.TemporaryDirectory(dir=artifacts) as name,
        device_opened(find_device("local"), Path(name)) as device,
    ):
        scratch, config = Path(name), bench_config(BenchPlan(), "local")
        talk = Talk(lambda _steps, _detail: None)
        asked = Asked(device, {"one": bundle}, everything, Journal(scratch), scratch, talk, config)
        push(asked)
        ask(asked)
        outputs = gather(asked, "one", scratch / "outputs.npy")
        labels = load_labels(everything.samples("test"), bundle.facts.input.model_dump())
        task = TASKS[bundle.facts.task]
        print(task.summary(task.scores(outputs, labels)))


RUNS: dict[str, Callable[[Path, Path], None]] = {
    "data": stage_data,
    "first run": stage_run,
    "second run": stage_run,
    "epoch": stage_epoch,
    "bundle": stage_bundle,
    "bench": stage_bench,
}


def child(stage: str, root: Path, artifacts: Path) -> dict[str, Any]:
    """Run one stage in a fresh process; seconds and peak memory of it and of the processes it started."""
    command = [sys.executable, __file__, str(root), "--stage", stage, "--artifacts", str(artifacts)]
    begun = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.monotonic() - begun
    return {"seconds": seconds, **json.loads(done.stdout.splitlines()[-1])}


def measure(folder: Path, counts: list[int]) -> None:
    log = folder / "results.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if not (folder / "bundle" / "bundle").exists():
        child("bundle", folder, folder / "bundle")
    for count in counts:
        root = folder / str(count) / "images"
        root.mkdir(parents=True, exist_ok=True)
        make(root / "train", count)
        make(root / "val", TEST_IMAGES)
        for stage in STAGES:
            if any(row["count"] == count and row["stage"] == stage for row in rows):
                continue
            artifacts = root.parent / ("artifacts" if stage != "data" else "alone")
            if stage in ("data", "first run"):
                shutil.rmtree(artifacts, ignore_errors=True)
            row = {"count": count, "stage": stage, **child(stage, root, artifacts)}
            rows.append(row)
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            print(
                f"{count:>9} {stage:<11} {row['seconds']:8.1f} s {row['peak_mib']:6.0f} MiB, "
                f"processes it started {row['children_mib']:6.0f} MiB",
                flush=True,
            )


# ---- photographs ---------------------------------------------------------------------------------------------


def compare_photographs(folder: Path, count: int, rounds: int) -> None:
    """Training views a second on photographs over those on copies of 256 pixels, taking turns."""
    import torch

    from kdpipe.chain import Chain
    from kdpipe.core.config import ModelSettings, TrainConfig, validated
    from kdpipe.core.stats import ratio_interval
    from kdpipe.data.views import TrainingViews, training_images
    from kdpipe.networks import models
    from kdpipe.pipeline import wants

    for name, side in (("photographs", 3000), ("copies", 256)):
        if not (folder / name).exists():
            photographs(folder / name, count, side)
    network = {"model": "mobilenetv4_conv_small", "input": {"size": 224}}
    settings = validated(TrainConfig, {**network, "method": "labels"}, "scale").train
    model, spec = models.create(validated(ModelSettings, network, "scale"), 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    views = {}
    for name, source, store in (
        ("stored", "photographs", "auto"), ("as they are", "photographs", "none"), ("copies", "copies", "none"),
    ):  # fmt: skip
        plan = recipe(folder / source, store=store, val_fraction=0)
        begun = time.monotonic()
        dataset = Chain(folder / f"artifacts-{name}").data(plan.data, wants=partial(wants, plan))
        print(f"{name}: data took {time.monotonic() - begun:.1f} s, copies: {dataset.facts.copies}")
        source_images = training_images(dataset, 1.0, 0, with_unlabeled=False)
        views[name] = TrainingViews(source_images, settings, spec, 2, 0)

    def seconds(name: str, turn: int) -> float:
        begun = time.monotonic()
        addresses = [(turn, int(at)) for at in views[name].images]
        for at in range(0, len(addresses), 20):
            batch = torch.stack([views[name][address].image for address in addresses[at : at + 20]])
            model(batch).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return time.monotonic() - begun

    taken: dict[str, list[float]] = {name: [] for name in views}
    for turn in range(rounds + 1):
        for name in list(views) if turn % 2 else list(views)[::-1]:
            spent = seconds(name, turn)
            if turn:  # the first warms up
                taken[name].append(spent)
    for name in ("stored", "as they are"):
        ratio = ratio_interval(taken["copies"], taken[name])
        print(f"{name}: {ratio.value:.3f} [{ratio.low}, {ratio.high}] of the views a second on copies, {rounds} rounds")


def main(
    folder: Annotated[Path, typer.Argument(help="where images and artifacts go; a folder of images with --stage")],
    counts: Annotated[list[int], typer.Option(help="training images")] = [10_000, 100_000, 1_000_000],  # noqa: B006
    photographs: Annotated[int, typer.Option(help="compare training on so many photographs instead")] = 0,
    rounds: Annotated[int, typer.Option()] = 8,
    stage: Annotated[str, typer.Option(hidden=True)] = "",
    artifacts: Annotated[Path, typer.Option(hidden=True)] = Path(),
) -> None:
    if stage:
        artifacts.mkdir(parents=True, exist_ok=True)
        sys.stdout, kept = sys.stderr, sys.stdout
        RUNS[stage](folder, artifacts)
        sys.stdout = kept
        import resource

        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        print(json.dumps({"peak_mib": peak_mib(), "children_mib": children}))
    elif photographs:
        compare_photographs(folder.absolute(), photographs, rounds)
    else:
        measure(folder.absolute(), counts)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    typer.run(main)
