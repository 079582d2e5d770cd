"""One step of distillation here against the same step as a bare PyTorch loop, timm's task and torchdistill.

    python benchmarks/distill.py --threads 1 --model resnet8 --teacher resnet20 --size 32 --batch 64
    python benchmarks/distill.py --model fpn --encoder mobilenetv3_small_100 --teacher unet --size 128 --batch 16

Same networks, weights, batch, loss (0.5 cross-entropy + 0.5 KL at T = 4), AdamW and threads, one process. The
contenders take turns in a shuffled order; a ratio is of two neighbours of one round. Before timing, all four must
give the same loss. torchdistill is compared where it is installed; it is no dependency. With an encoder the networks
draw masks of 11 classes, both losses are means over places, and nobody else's loop takes part.
"""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import timm
import torch
import typer
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, InputSettings, ModelSettings, TrainConfig, validated
from kdpipe.core.inputs import InputSpec
from kdpipe.core.stats import ratio_interval
from kdpipe.data.views import TrainingView
from kdpipe.distill.loop import Batch, Run
from kdpipe.distill.methods import METHODS
from kdpipe.distill.ranks import Ranks
from kdpipe.distill.teacher import Teacher
from kdpipe.distill.trackers import Nothing
from kdpipe.networks import models

TEMPERATURE, LEARNING_RATE, WEIGHT_DECAY = 4.0, 1e-3, 0.05
Step = Callable[[], float]  # one training step; its loss


def loss_of_classes(logits: Tensor, taught: Tensor, label: Tensor) -> Tensor:
    """For logits [B, K] and labels [B]."""
    divergence = functional.kl_div(
        functional.log_softmax(logits / TEMPERATURE, 1),
        functional.softmax(taught / TEMPERATURE, 1),
        reduction="batchmean",
    )
    return 0.5 * functional.cross_entropy(logits, label) + 0.5 * TEMPERATURE**2 * divergence


def loss_of_masks(logits: Tensor, taught: Tensor, label: Tensor) -> Tensor:
    """For logits [B, K, h, w] of each network at its own stride and labels [B, H, W], -1 where nobody knows."""
    taught = functional.interpolate(taught, logits.shape[2:], mode="bilinear", align_corners=False)
    divergence = functional.kl_div(
        functional.log_softmax(logits / TEMPERATURE, 1),
        functional.softmax(taught / TEMPERATURE, 1),
        reduction="sum",
    ) / (len(logits) * logits.shape[2:].numel())
    whole = functional.interpolate(logits, label.shape[1:], mode="bilinear", align_corners=False)
    return 0.5 * functional.cross_entropy(whole, label, ignore_index=-1) + 0.5 * TEMPERATURE**2 * divergence


def bare(student: nn.Module, teacher: nn.Module, image: Tensor, label: Tensor, bf16: bool) -> Step:
    """What one writes by hand."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    student.train()
    teacher.eval()
    loss_of = loss_of_masks if label.ndim == 3 else loss_of_classes

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                taught = teacher(image)
            logits = student(image)
        loss = loss_of(logits.float(), taught.float(), label)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.item())

    return step


def timms(student: nn.Module, teacher: nn.Module, image: Tensor, label: Tensor, bf16: bool) -> Step:
    """timm.task.LogitDistillationTask in the loop of timm's train script."""
    from timm.task import LogitDistillationTask

    task = LogitDistillationTask(
        student, teacher, nn.CrossEntropyLoss(), distill_loss_weight=0.5, task_loss_weight=0.5,
        temperature=TEMPERATURE, verbose=False,
    )  # fmt: skip
    optimizer = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    task.train()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = task(image, label)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.item())

    return step


def torchdistills(student: nn.Module, teacher: nn.Module, image: Tensor, label: Tensor, bf16: bool) -> Step:
    """Torchdistill's box with its KDLoss, as its examples configure it."""
    from torchdistill.core.distillation import get_distillation_box

    output = {
        f"{who}_module_{what}": value
        for who in ("student", "teacher")
        for what, value in (("path", "."), ("io", "output"))
    }
    loss = {"key": "KDLoss", "kwargs": {**output, "temperature": TEMPERATURE, "alpha": 0.5}}
    config = {
        "num_epochs": 1,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "AdamW", "kwargs": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY}},
        "criterion": {
            "key": "WeightedSumLoss",
            "kwargs": {"sub_terms": {"kd": {"criterion": loss, "weight": 1.0}}, "model_term": {"weight": 0}},
        },
    }
    box = get_distillation_box(teacher, student, {}, config, torch.device("cpu"), None, False, 1)
    box.student_model.train()
    box.teacher_model.eval()

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = box.forward_process(image, label)
        box.post_forward_process(value)
        return float(value.item())

    return step


def ours(student: nn.Module, teacher: nn.Module, image: Tensor, label: Tensor, bf16: bool) -> Step:
    """A step of kdpipe's own loop: seeding, schedule, sums and the look for a loss that is not finite included."""
    values = {
        "model": "resnet8",
        "label_weight": 0.5,
        "kd_weight": 0.5,
        "temperature": TEMPERATURE,
        "train": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "precision": "bf16" if bf16 else "float32",
            "schedule": "constant",
            "warmup_epochs": 0,
        },
    }
    config = validated(TrainConfig, values, "the benchmark")
    size = image.shape[-1]
    spec = InputSpec(size=size, mean=(0, 0, 0), std=(1, 1, 1), crop_fraction=1.0, interpolation="bilinear")
    plan = DataPlan(source="digits", test_split=None, val_fraction=0.1)
    if label.ndim > 1:
        plan = DataPlan(task="segmentation", source="masks", most_images=24)
    with tempfile.TemporaryDirectory() as folder:
        dataset = Chain(Path(folder)).data(plan)
        asked = Teacher(teacher, spec, spec)
        method = METHODS["kd"](config, student, spec, asked, task=dataset.facts.task)
        run = Run(config, method, dataset, spec, 10**6, 10**6, Ranks(), None, Nothing())
    view = TrainingView(image, label, label, [torch.zeros_like(label), torch.arange(len(label))])
    run.begin()
    run.begin_epoch()
    before = 0.0

    def step() -> float:
        nonlocal before
        run.learn(Batch(view, len(view.image), Ranks(), asked))
        total, before = run._sums["loss"] - before, run._sums["loss"]
        return total / len(label)

    return step


def main(
    teacher: Annotated[str, typer.Option()] = "resnet20",
    model: Annotated[str, typer.Option()] = "resnet8",
    size: Annotated[int, typer.Option(help="pixels")] = 32,
    batch: Annotated[int, typer.Option(help="images")] = 64,
    encoder: Annotated[str | None, typer.Option(help="of a model that draws masks")] = None,
    teacher_encoder: Annotated[str, typer.Option(help="of its teacher")] = "mobilenetv2_100",
    threads: Annotated[int, typer.Option()] = 1,
    rounds: Annotated[int, typer.Option()] = 30,
    bf16: Annotated[bool, typer.Option()] = False,
) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    image = torch.randn(batch, 3, size, size)
    contenders: dict[str, Any]
    if encoder is None:
        networks = [timm.create_model(name, num_classes=10) for name in (model, teacher)]
        label = torch.randint(0, 10, (batch,))
        contenders = {"bare loop": bare, "the bare loop again": bare, "kdpipe": ours, "timm": timms}
        if importlib.util.find_spec("torchdistill"):
            contenders["torchdistill"] = torchdistills
    else:
        pairs, given = ((model, encoder), (teacher, teacher_encoder)), InputSettings(size=size)
        settings = [ModelSettings(model=name, encoder=below, input=given) for name, below in pairs]
        networks = [models.create(each, 11)[0] for each in settings]
        for module in networks[0].modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.p = 0.0  # what it draws would tell the losses apart
        label = torch.randint(0, 11, (batch, size, size))
        contenders = {"bare loop": bare, "the bare loop again": bare, "kdpipe": ours}
    steps = {name: make(*copy.deepcopy(networks), image, label, bf16) for name, make in contenders.items()}
    first = {name: step() for name, step in steps.items()}
    assert max(first.values()) - min(first.values()) < (0.02 if bf16 else 1e-4) * first["bare loop"], first
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    for _ in range(rounds + 2):
        for name in order.sample(list(steps), len(steps)):
            begun = time.perf_counter()
            for _ in range(3):
                steps[name]()
            seconds[name].append(time.perf_counter() - begun)
    print(
        f"{teacher} teaching {model}, {batch} images of {size} pixels, {threads} thread(s), {rounds} rounds of 3 steps"
    )
    for name in steps:
        found = ratio_interval(seconds["bare loop"][2:], seconds[name][2:])  # two rounds warm up
        print(f"{name:<20} {found.value:.3f} of the bare loop's images/s [{found.low:.3f}, {found.high:.3f}]")


if __name__ == "__main__":
    typer.run(main)
