"""Every method on masks: what a network says of every place, at its own stride, learned from labels and teachers."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_cache, evaluated, train, train_together
from PIL import Image
from test_resume import LIBRARIES, train_telling
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy
from torch import Tensor, nn
from torch.nn import functional

from kdpipe.chain import Chain, train_order
from kdpipe.core.config import CachePlan, DataPlan, DistillSettings, TeacherPlan, TrainConfig, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Cache, Checkpoint
from kdpipe.data.dataset import UNLABELED, Dataset
from kdpipe.data.views import TrainingViews, training_images
from kdpipe.distill import losses
from kdpipe.distill.cache import (
    ALL_CLASSES_OF_PLACES,
    TOP_OF_PLACES,
    CachedTeacher,
    answers_grid,
    config_of,
    decode,
    encode,
    record_type,
    top_count,
    verify,
)
from kdpipe.distill.features import block_indices, by_place, in_places, output_grid, resized, stage_indices, thinned
from kdpipe.distill.loop import JUDGED_SIDE, Tally
from kdpipe.distill.methods import METHODS, label_loss, places_label_loss
from kdpipe.distill.ranks import Ranks
from kdpipe.distill.teacher import Teacher, open_teacher
from kdpipe.distill.train import cache_config, companions
from kdpipe.networks import models
from kdpipe.runtime.task import TASKS

CLASSES, HEIGHT, WIDTH = ["ground", "disc", "bar"], 32, 64
TRAIN = {"epochs": 2, "batch_size": 8, "workers": 0, "warmup_epochs": 0, "augment": {"crop": "none", "flip": 0}}
INPUT = {"size": [HEIGHT, WIDTH], "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "interpolation": "bilinear"}
# Logits of every pixel; of every fourth.
UNET = {"model": "unet", "encoder": "test_resnet", "model_args": {"decoder_channels": [16, 16, 8, 8, 8]}}
FPN = {
    "model": "fpn",
    "encoder": "test_resnet",
    "model_args": {"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32, "decoder_dropout": 0.0},
}
NETWORKS: dict[str, dict[str, Any]] = {"unet": UNET, "fpn": FPN}
GRIDS = {"unet": (HEIGHT, WIDTH), "fpn": (HEIGHT // 4, WIDTH // 4)}


def draw_scenes(folder: Path, count: int, seed: int, masks: bool = True) -> None:
    """Photos of a bright disc and a striped bar on noise, 40x72 pixels, with masks whose first row is ignored."""
    generator = np.random.default_rng(seed)
    rows, columns = np.mgrid[:40, :72]
    for name in ("images", "masks") if masks else ("images",):
        (folder / name).mkdir(parents=True)
    for at in range(count):
        pixels = generator.integers(0, 90, (40, 72, 3), dtype=np.uint8)
        mask = np.zeros((40, 72), np.uint8)
        middle, radius = generator.integers((10, 12), (30, 60)), generator.integers(6, 10)
        disc = (rows - middle[0]) ** 2 + (columns - middle[1]) ** 2 < radius**2
        pixels[disc], mask[disc] = (230, 200, 60), 1
        left = int(generator.integers(0, 60))
        bar = (columns >= left) & (columns < left + 9)
        pixels[bar] = np.where((rows[bar] % 4 < 2)[:, None], (40, 90, 220), (90, 200, 250))
        mask[bar] = 2
        mask[0] = 255
        Image.fromarray(pixels).save(folder / "images" / f"{at:03d}.png")
        if masks:
            Image.fromarray(mask).save(folder / "masks" / f"{at:03d}.png")


@dataclass
class Scenes:
    folder: Path
    chain: Chain
    dataset: Dataset
    teacher: Checkpoint


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    folder = tmp_path_factory.mktemp("scenes")
    source = folder / "photos"
    for seed, (split, count) in enumerate({"train": 40, "val": 8, "test": 12}.items()):
        draw_scenes(source / split, count, seed)
    (source / "classes.txt").write_text("\n".join(CLASSES))
    chain = Chain(folder / "artifacts")
    dataset = chain.data(plan(source))
    settings = {**UNET, "input": INPUT, "train": {**TRAIN, "epochs": 12, "learning_rate": 0.01}}
    return Scenes(source, chain, dataset, chain.teacher(validated(TeacherPlan, settings, "test"), dataset))


def plan(source: Path, **change: Any) -> DataPlan:
    return DataPlan(source=str(source), task="segmentation", test_split="test", val_split="val", **change)


def configuration(network: str = "fpn", **change: Any) -> TrainConfig:
    values = {**NETWORKS[network], "input": INPUT, **change}
    return validated(TrainConfig, {**values, "train": {**TRAIN, **change.get("train", {})}}, "test")


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made = models.create(configuration(name), len(CLASSES))[0]
    for parameter in made.parameters():  # residual branches that timm starts at zero count too
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 0.5, 0.1)
    return made


def batch(count: int = 4) -> tuple[Tensor, Tensor]:
    """Images and labels, a fifth of which nobody knows."""
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(0, len(CLASSES), (count, HEIGHT, WIDTH), generator=generator)
    unknown = torch.rand(label.shape, generator=generator) < 0.2
    return torch.randn(count, 3, HEIGHT, WIDTH, generator=generator), label.masked_fill(unknown, UNLABELED)


class Taught:
    """A method on masks with its teacher, who is asked as the training loop asks."""

    def __init__(self, config: TrainConfig, student: nn.Module, teacher: nn.Module | None = None) -> None:
        spec = models.input_spec(config)
        self.teacher = None if teacher is None else Teacher(teacher, spec, spec)
        self.method = METHODS[config.method](config, student, spec, self.teacher, "it", task="segmentation")
        if self.teacher is not None:
            self.teacher.wanted.update(self.method.teacher_indices)

    def __call__(self, image: Tensor, target: Tensor) -> dict[str, Tensor]:
        asked = self.teacher is not None and self.method.asks_teacher
        return self.method(image, target, self.teacher(image) if asked and self.teacher is not None else None)


# ---- the labels' loss ------------------------------------------------------------------------------------------


def loss_of(logits: Tensor, target: Tensor, **change: Any) -> Tensor:
    return places_label_loss(validated(DistillSettings, change, "test"))(logits, target)


@pytest.mark.parametrize("label_loss_name", ["ce", "bce"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("stride", [1, 4])
def test_labels_loss_is_timms_at_every_known_place(label_loss_name: str, smoothing: float, stride: int) -> None:
    """Timm's losses, of the places one by one, once the logits are as large as the labels; a mean over all places."""
    _, label = batch()
    logits = 3 * torch.randn(4, 3, HEIGHT // stride, WIDTH // stride, generator=torch.Generator().manual_seed(1))
    found = loss_of(logits, label, label_loss=label_loss_name, train={"label_smoothing": smoothing})
    larger = functional.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    known = label.flatten() >= 0
    rows, truth = larger.movedim(1, -1).reshape(-1, 3)[known], label.flatten()[known]
    criterion = BinaryCrossEntropy(smoothing) if label_loss_name == "bce" else LabelSmoothingCrossEntropy(smoothing)
    wanted = criterion(rows, truth) * known.float().mean()
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5)
    # The classification's own loss, asked place by place, is the same.
    alone = label_loss(
        validated(DistillSettings, {"label_loss": label_loss_name, "train": {"label_smoothing": smoothing}}, "test")
    )
    assert found.item() == pytest.approx(alone(by_place(larger), label.flatten()).item(), rel=1e-5)


@pytest.mark.parametrize("label_loss_name", ["ce", "bce"])
def test_what_nobody_knows_teaches_nothing(label_loss_name: str) -> None:
    image, label = batch()
    for soft in (False, True):
        logits = image[:, :3].clone().requires_grad_()
        target = label
        if soft:
            target = functional.one_hot(label.clamp(min=0), 3).movedim(-1, 1) * (label >= 0)[:, None].float()
        loss_of(logits, target, label_loss=label_loss_name).backward()
        assert logits.grad is not None
        moved = logits.grad.abs().sum(1) > 0
        assert torch.equal(moved, label >= 0)
    nothing = loss_of(image, torch.full_like(label, UNLABELED), label_loss=label_loss_name)
    assert nothing.item() == 0


@pytest.mark.parametrize("label_loss_name", ["ce", "bce"])
def test_distributions_that_are_sure_are_labels(label_loss_name: str) -> None:
    image, label = batch()
    sure = functional.one_hot(label.clamp(min=0), 3).movedim(-1, 1) * (label >= 0)[:, None].float()
    found = (loss_of(image, target, label_loss=label_loss_name).item() for target in (label, sure))
    assert next(found) == pytest.approx(next(found), rel=1e-6)


def test_labels_loss_is_in_float32_far_out() -> None:
    _, label = batch()
    for kind in (torch.bfloat16, torch.float16):
        logits = (1e4 * torch.randn(4, 3, 8, 16, generator=torch.Generator().manual_seed(2))).to(kind)
        for name in ("ce", "bce"):
            found = loss_of(logits, label, label_loss=name)
            assert found.dtype == torch.float32 and torch.isfinite(found)


# ---- grids -----------------------------------------------------------------------------------------------------


def test_places_are_taken_from_the_middle() -> None:
    numbers = torch.arange(8 * 12).reshape(1, 8, 12)
    assert thinned(numbers, (8, 12)) is numbers and thinned(numbers, ()) is numbers
    assert torch.equal(thinned(numbers, (2, 3)), numbers[:, 2::4, 2::4])
    assert torch.equal(thinned(numbers.float()[None], (8, 4)), numbers.float()[None][..., 1::3])
    nearest = functional.interpolate(numbers[None].float(), (5, 7), mode="nearest-exact")
    assert torch.equal(thinned(numbers[None].float(), (5, 7)), nearest)
    outputs = torch.randn(2, 3, 4, 5)
    assert torch.equal(in_places(by_place(outputs), (2, 4, 5)), outputs)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_answer_at_their_own_stride(name: str) -> None:
    made = network(name)
    assert output_grid(made.train(), (HEIGHT, WIDTH)) == GRIDS[name] and made.training
    assert answers_grid(configuration(name)) == GRIDS[name]
    stages, blocks = stage_indices(made, name, with_stem=True), block_indices(made)
    assert len(blocks) >= 4 and max(stages) < min(blocks) and len(stages) >= 4


def test_an_image_has_no_grid() -> None:
    config = validated(TrainConfig, {"model": "test_resnet", "input": {"size": 32}}, "test")
    assert output_grid(models.create(config, 3)[0], (32, 32)) == () and answers_grid(config) is None
    logits = torch.randn(4, 3)
    assert resized(logits, ()) is logits


# ---- the methods -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("student", "teacher"), [("unet", "fpn"), ("fpn", "unet")])
def test_any_student_learns_from_any_teacher(method: str, student: str, teacher: str) -> None:
    """Of one stride or of others: one step of every phase gives finite gradients to the student alone."""
    mine, its = network(student), network(teacher, seed=1)
    before = {name: tensor.clone() for name, tensor in its.state_dict().items()}
    task = Taught(configuration(student, method=method), mine, its)
    phases = task.method.phases(40, 10)
    for phase, (image, label) in zip(range(len(phases)), [batch()] * len(phases), strict=True):
        task.method.enter(phase)
        task.method.train()
        result = task(image, label)
        assert ("output" in result) == phases[phase].has_accuracy
        assert "output" not in result or result["output"].shape == (4, 3, *GRIDS[student])
        task.method.zero_grad()
        result["loss"].backward()
        gradients = [p.grad for p in task.method.trainable() if p.grad is not None]
        assert gradients and all(torch.isfinite(gradient).all() for gradient in gradients)
        assert any(gradient.any() for gradient in gradients)
    assert all(parameter.grad is None for parameter in its.parameters()) and not its.training
    assert all(torch.equal(before[name], tensor) for name, tensor in its.state_dict().items())


def test_pixel_distillation_is_a_mean_over_places() -> None:
    """T^2 / (B h w) of the KL at every place of the student's grid, to which the teacher's logits are brought."""
    mine, its = network("fpn"), network("unet", seed=1)
    temperature, (image, label) = 2.0, batch()
    task = Taught(configuration(method="kd", temperature=temperature, label_weight=0.3), mine, its)
    task.method.eval()
    with torch.no_grad():
        result, student, teacher = task(image, label), mine(image), its(image)
    teacher = functional.interpolate(teacher, student.shape[2:], mode="bilinear", align_corners=False)
    logs, wanted = (student / temperature).log_softmax(1), (teacher / temperature).softmax(1)
    divergence = (wanted * (wanted.log() - logs)).sum() * temperature**2 / (4 * 8 * 16)
    assert result["kd_loss"].item() == pytest.approx(divergence.item(), rel=1e-4)
    larger = functional.interpolate(student, (HEIGHT, WIDTH), mode="bilinear", align_corners=False)
    truth = functional.cross_entropy(larger, label, ignore_index=-1) * (label >= 0).float().mean()
    assert result["loss"].item() == pytest.approx(0.3 * truth.item() + divergence.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        ("hard", losses.hard),
        ("bkd", losses.bkd),
        ("logit_mse", losses.logit_mse),
        ("dist", lambda s, t: 2 * losses.dist(s, t, 1.0, 1.0, 4.0)),
    ],
)
def test_logits_are_compared_place_by_place(method: str, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    mine, its = network("unet"), network("unet", seed=1)
    task = Taught(configuration("unet", method=method, label_weight=0), mine, its)
    task.method.eval()
    image, label = batch()
    with torch.no_grad():
        wanted = loss(by_place(mine(image)), by_place(its(image)))
        assert task(image, label)["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_dkd_knows_the_label_of_each_place() -> None:
    """That of the pixel in its middle; where nobody knows it nothing is learned."""
    mine, its = network("fpn"), network("unet", seed=1)
    change = {"method": "dkd", "label_weight": 0, "dkd": {"warmup_epochs": 0}}
    task = Taught(configuration(**change), mine, its)
    task.method.eval()
    image, label = batch()
    with torch.no_grad():
        student, teacher = by_place(mine(image)), by_place(resized(its(image), GRIDS["fpn"]))
        truth = label[:, 2::4, 2::4].flatten()
        known = truth >= 0
        wanted = losses.dkd(student[known], teacher[known], truth[known], 1.0, 8.0, 4.0) * known.float().mean()
        assert task(image, label)["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_channels_are_compared_over_the_places_of_an_image() -> None:
    mine, its = network("fpn"), network("unet", seed=1)
    task = Taught(configuration(method="cwd", label_weight=0), mine, its)
    task.method.eval()
    image, label = batch()
    with torch.no_grad():
        wanted = 3 * losses.cwd(mine(image), resized(its(image), GRIDS["fpn"]), 4.0)
        assert task(image, label)["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_channels_of_features_go_through_an_adapter() -> None:
    """Of what the heads see: the last block of either decoder."""
    mine, its = network("fpn"), network("unet", seed=1)
    task = Taught(configuration(method="cwd", cwd_on="features"), mine, its)
    assert task.method.student.indices == block_indices(mine)[-1:]
    assert task.method.teacher_indices == block_indices(its)[-1:]
    (adapter,) = task.method.student.auxiliaries
    assert adapter[0].weight.shape[:2] == (8, 32)
    same = Taught(configuration("unet", method="cwd", cwd_on="features"), network("unet"), its)
    assert isinstance(same.method.student.auxiliaries[0], nn.Identity)


def test_one_answer_an_image_has_no_places() -> None:
    config = validated(
        TrainConfig, {"model": "test_resnet", "input": {"size": 32}, "method": "cwd", "cwd_on": "logits"}, "test"
    )
    student, spec = models.create(config, 10)
    with pytest.raises(UserError, match="gives one answer an image: set cwd_on to features, or take kd"):
        METHODS["cwd"](config, student, spec, Teacher(student, spec, spec), "it", task="classification")


def test_a_shuffled_teacher_keeps_what_it_decides_at_every_place() -> None:
    mine, its = network("fpn"), network("unet", seed=1)
    image, label = batch()
    task = Taught(configuration(shuffled_teacher=True), mine, its)
    assert task.teacher is not None
    shown, plain = task.method._shown(task.teacher(image), label).logits, resized(its(image), GRIDS["fpn"])
    assert shown.shape == plain.shape and torch.equal(shown.argmax(1), plain.argmax(1))
    assert torch.equal(shown.sort(1).values, plain.sort(1).values) and not torch.equal(shown, plain)


def test_stagewise_goes_on_into_the_decoder() -> None:
    """Stem, four stages, five blocks one after another, then the head: eleven phases, each of parameters of its own."""
    mine, its = network("unet"), network("unet", seed=1)
    task = Taught(configuration("unet", method="stagewise"), mine, its)
    phases = task.method.phases(110, 10)
    names = ["stem", *(f"stage {at}" for at in range(1, 5)), *(f"block {at}" for at in range(1, 6)), "head"]
    assert [phase.name for phase in phases] == names and [phase.steps for phase in phases] == 11 * [10]
    groups = task.method._stages
    assert sorted(name for group in groups for name in group) == sorted(dict(mine.named_parameters()))
    for at, group in enumerate(groups):
        where = "encoder." if at < 5 else "decoder." if at < 10 else "segmentation_head."
        assert group and all(name.startswith(where) for name in group), names[at]
    image, label = batch()
    for at in (0, 6, 10):
        before = {name: tensor.clone() for name, tensor in mine.named_parameters()}
        task.method.enter(at)
        task.method.train()
        optimizer = torch.optim.SGD(list(task.method.trainable()), lr=0.1)
        task(image, label)["loss"].backward()
        optimizer.step()
        changed = {name for name, tensor in mine.named_parameters() if not torch.equal(before[name], tensor)}
        assert changed and changed <= set(groups[at])
    own = Taught(configuration("unet", method="stagewise"), network("unet", seed=1), network("unet", seed=1))
    own.method.eval()
    for at in range(10):
        own.method._phase = at
        assert own(image, label)["loss"].item() == pytest.approx(0, abs=1e-9)


def test_deep_supervision_has_heads_for_every_place() -> None:
    mine, its = network("fpn"), network("unet", seed=1)
    task = Taught(configuration(method="deep_supervision", label_weight=0), mine, its)
    image, label = batch()
    task.method.eval()
    output = task.method.student(image)
    assert len(output.auxiliary) == len(stage_indices(mine, "")) + len(block_indices(mine)) - 1
    for logits in output.auxiliary:  # never finer than what is deployed
        assert logits.shape[:2] == (4, 3) and logits.shape[2] <= 8 and logits.shape[3] <= 16
    teacher = its(image)
    said = [output.logits, *output.auxiliary]
    wanted = sum(
        losses.kd(
            by_place(each),
            by_place(
                resized(teacher, GRIDS["fpn"])
                if each.shape[2:] == (8, 16)
                else resized(resized(teacher, GRIDS["fpn"]), each.shape[2:])
            ),
            4.0,
        )
        for each in said
    )
    assert task(image, label)["loss"].item() == pytest.approx(wanted.item(), rel=1e-4)


# ---- training --------------------------------------------------------------------------------------------------

RUNS: list[dict[str, Any]] = [{"method": method} for method in METHODS] + [
    {"method": "cwd", "cwd_on": "features"},
    {"method": "labels", "train": {"label_smoothing": 0.1}},
    {"method": "kd", "shuffled_teacher": True, "standardize_logits": True},
    {"method": "kd", "label_loss": "bce", "train": {"mixup": 0.1, "cutmix": 1.0, "average": 0.9, "clip_gradient": 1.0}},
    {"method": "kd", "train": {"precision": "bf16", "select": "best"}},
]


@pytest.mark.parametrize("change", RUNS, ids=lambda change: str(change)[:60])
def test_every_method_trains_end_to_end(scenes: Scenes, tmp_path: Path, change: dict[str, Any]) -> None:
    """From configuration to a sealed checkpoint whose weights are the student's alone, with class maps of the test."""
    phases = change["method"] == "stagewise"  # each has a step at least
    change = {**change, "train": {**change.get("train", {}), "epochs": 3 if phases else 1}}
    config = configuration("unet" if phases else "fpn", **change)
    done = train(config, scenes.dataset, scenes.teacher, tmp_path / "student")
    restored, spec = models.restore(done)
    outputs, labels = evaluated(restored, spec, scenes.dataset, "test")
    task = TASKS["segmentation"]
    assert done.facts.task == "segmentation" and done.facts.test_images == 12
    # What is kept was enlarged by torch, what is judged here by numpy: of two equal logits either may be larger.
    assert done.facts.test_accuracy == pytest.approx(task.summary(task.scores(outputs, labels)).value, abs=1e-3)
    maps, kept = done.tested
    assert maps.shape == kept.shape == (12, HEIGHT, WIDTH) and maps.dtype == np.uint8 and np.array_equal(kept, labels)
    rows = [json.loads(line) for line in done.file("history.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows)
    assert all(0 <= row["train_accuracy"] <= 1 for row in rows if row["phase"] in ("all", "head"))


def test_it_learns(scenes: Scenes, tmp_path: Path) -> None:
    facts = scenes.teacher.facts
    assert facts.guessing is not None and facts.test_accuracy > facts.guessing + 0.2
    config = configuration(method="kd", label_weight=0, train={"epochs": 8, "learning_rate": 0.005})
    student = train(config, scenes.dataset, scenes.teacher, tmp_path / "student")
    assert student.facts.test_accuracy > facts.guessing + 0.1, "by what the teacher says alone"


def test_several_students_at_once_are_as_alone(scenes: Scenes, tmp_path: Path) -> None:
    """Of one stride and of another, from one answer of the teacher."""
    methods = ["kd", "cwd"]
    configs = {tmp_path / f"together-{name}": configuration(method=name) for name in methods}
    configs[tmp_path / "together-unet"] = configuration("unet", method="stagewise", train={"epochs": 3})
    orders = {out: train_order(config, scenes.dataset, scenes.teacher) for out, config in configs.items()}
    assert len(companions(orders, scenes.dataset)) == 1
    together = train_together(configs, scenes.dataset, scenes.teacher)
    for out, config in configs.items():
        alone = train(config, scenes.dataset, scenes.teacher, tmp_path / out.name.replace("together", "alone"))
        for name in ("model.safetensors", "test_logits.npz"):
            assert together[out].file(name).read_bytes() == alone.file(name).read_bytes(), (out.name, name)


def test_killed_runs_end_the_same(scenes: Scenes, tmp_path: Path) -> None:
    """Through stem, stages, blocks and a head that the teacher teaches too, of mixed views and with an average."""
    import multiprocessing

    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(LIBRARIES)
    change: dict[str, Any] = {
        "method": "stagewise",
        "kd_weight": 1,
        "train": {"epochs": 3, "mixup": 0.2, "average": 0.9},
    }
    config = configuration("unet", **change)
    whole = train(config, scenes.dataset, scenes.teacher, tmp_path / "whole")
    out, killed = tmp_path / "killed", False
    for steps in (7, 10**6):
        told, telling = processes.Pipe(duplex=False)
        arguments = (config, scenes.dataset.path, scenes.teacher.path, out, telling)
        process = processes.Process(target=train_telling, args=arguments)
        process.start()
        telling.close()
        with contextlib.suppress(EOFError):
            for _ in range(steps):
                told.recv()
            process.kill()
            killed = True
        process.join()
    assert killed and process.exitcode == 0
    assert (out / "model.safetensors").read_bytes() == whole.file("model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["kd", "cwd", "hint"])
def test_images_without_masks(scenes: Scenes, tmp_path: Path, method: str) -> None:
    """They teach what the teacher says of them, and are judged by nobody."""
    draw_scenes(tmp_path / "more", 10, seed=9, masks=False)
    semi = scenes.chain.data(plan(scenes.folder, unlabeled=tmp_path / "more" / "images"))
    config = configuration(method=method, label_fraction=0.25)
    done = train(config, semi, scenes.teacher, tmp_path / "student")
    assert done.facts.unlabeled_images == 10 and 8 <= done.facts.training_images <= 12
    nobody = configuration(method="kd", label_fraction=0)
    alone = train(nobody, semi, scenes.teacher, tmp_path / "alone")
    assert alone.facts.training_images == 0 and np.isfinite(alone.history[-1].loss)


def test_training_is_judged_at_some_places(scenes: Scenes) -> None:
    """As many as the limit along each side, of outputs that are right there and of labels that are partly unknown."""
    label = torch.randint(0, 3, (2, 96, 128), generator=torch.Generator().manual_seed(0))
    outputs = functional.one_hot(label, 3).movedim(-1, 1).float()
    label[0] = UNLABELED
    tally = Tally(TASKS["segmentation"], Ranks())
    tally.add((0, 0), torch.tensor(1.0), outputs, label)
    kept = tally._steps[0][2]
    assert kept is not None and kept.shape == (2, 3, JUDGED_SIDE, JUDGED_SIDE)
    ((_, sums),) = tally.read()
    assert sums == {"images": 2.0, "loss": 2.0, "judged": 1.0, "right": 1.0}
    tally.add((0, 1), torch.tensor(1.0), outputs, torch.full_like(label, UNLABELED))
    assert tally.read()[0][1]["judged"] == 0


# ---- the cache -------------------------------------------------------------------------------------------------


def cache_plan(network: str = "fpn", **change: Any) -> CachePlan:
    values = {**NETWORKS[network], "input": INPUT, "views": 2, "augment": TRAIN["augment"], "workers": 0, **change}
    return validated(CachePlan, values, "test")


@pytest.fixture(scope="module")
def cache(scenes: Scenes) -> Cache:
    return scenes.chain.cache(config_of(cache_plan()), scenes.dataset, scenes.teacher)


def test_a_cache_holds_the_students_grid(scenes: Scenes, cache: Cache, tmp_path: Path) -> None:
    """float16 of every class at every fourth pixel; what it is asked is what the teacher said."""
    facts = cache.facts
    assert facts.grid == GRIDS["fpn"] and facts.top is None and facts.record_bytes == 8 * 16 * (3 * 2 + 4)
    assert cache.shard(0).stat().st_size == facts.record_bytes * facts.images
    assert cache.settings["grid"] == [8, 16]
    found = verify(cache, scenes.dataset, scenes.teacher, 1.0)
    assert found["checked"] == found["of"] == 80 and found["agreement"] > 0.99
    wanted = cache_config(configuration(cache_views=2))
    assert wanted is not None and scenes.chain.cache(wanted, scenes.dataset, scenes.teacher).key == cache.key
    said = CachedTeacher(cache)(torch.zeros(2, 3, HEIGHT, WIDTH), (torch.tensor([1, 0]), torch.tensor([3, 5])))
    assert said.logits.shape == (2, 3, 8, 16)


def test_a_cache_for_classes_has_no_grid_in_its_key() -> None:
    plain = validated(CachePlan, {"model": "test_resnet", "input": {"size": 32}}, "test")
    assert "grid" not in config_of(plain).model_dump(mode="json")


LEARNED_FROM_LOGITS = [name for name in METHODS if METHODS[name].teaches_outputs or name == "cwd"]


@pytest.mark.parametrize("method", [name for name in LEARNED_FROM_LOGITS if name != "stagewise"])
def test_from_the_cache_as_from_a_live_teacher(scenes: Scenes, cache: Cache, method: str) -> None:
    """What float16 rounds off the logits moves a step by a hundredth at most, whatever a method compares.

    Half a thousandth of a logit is rounded off; a place, a view or a class mixed up would make another step.
    """
    config = configuration(method=method, kd_weight=1.0, label_weight=0, cache_views=2)
    spec = models.input_spec(config)
    views = TrainingViews(training_images(scenes.dataset, 1.0, 0, False), config.train, spec, len(CLASSES), 0)
    numbers = torch.tensor([0, 3, 7, 11])
    seen = [views[(1, int(number))] for number in numbers]
    image, label = torch.stack([view.image for view in seen]), torch.stack([view.label for view in seen])
    gradients = []
    for asked in (open_teacher(scenes.teacher, scenes.dataset, spec), CachedTeacher(cache)):
        torch.manual_seed(0)
        student, _ = models.create(config, len(CLASSES))
        learner = METHODS[method](config, student, spec, asked, "it", task="segmentation")
        learner.train()
        learner(image, label, asked(image, (torch.ones(4, dtype=torch.long), numbers)))["loss"].backward()
        gradients.append(torch.cat([each.grad.flatten() for each in student.parameters() if each.grad is not None]))
    live, cached = gradients
    assert live.norm() > 0 and (cached - live).norm() < 1e-2 * live.norm()


def test_a_student_learns_from_a_cache(scenes: Scenes, cache: Cache, tmp_path: Path) -> None:
    done = train(configuration(cache_views=2), scenes.dataset, scenes.teacher, tmp_path / "student", cache)
    assert done.facts.cache == cache.key and done.history[-1].loss < done.history[0].loss


def test_a_cache_for_another_grid_is_refused(scenes: Scenes, cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"another grid \(\(8, 16\), not \(32, 64\)\)"):
        train(configuration("unet", cache_views=2), scenes.dataset, scenes.teacher, tmp_path / "student", cache)
    with pytest.raises(UserError, match="looks at the teacher's feature maps and a cache holds its logits"):
        config = configuration(method="cwd", cwd_on="features", cache_views=2)
        train(config, scenes.dataset, scenes.teacher, tmp_path / "student", cache)
    both = {tmp_path / name: configuration(name, cache_views=2) for name in ("unet", "fpn")}
    orders = {out: train_order(config, scenes.dataset, scenes.teacher) for out, config in both.items()}
    assert len(companions(orders, scenes.dataset)) == 2, "each has a cache of its own"


def test_a_cache_of_the_largest_logits(scenes: Scenes, tmp_path: Path) -> None:
    few = build_cache(config_of(cache_plan(top=2)), scenes.dataset, scenes.teacher, tmp_path / "few")
    assert few.facts.top == 2 and few.facts.record_bytes == 8 * 16 * (2 * 6 + 12)
    assert verify(few, scenes.dataset, scenes.teacher, 0.5)["agreement"] > 0.99
    train(configuration(cache_views=2), scenes.dataset, scenes.teacher, tmp_path / "student", few)


def test_how_many_logits_a_place_has() -> None:
    config = config_of(cache_plan())
    assert top_count(config, ALL_CLASSES_OF_PLACES, dense=True) is None
    assert top_count(config, ALL_CLASSES_OF_PLACES + 1, dense=True) == TOP_OF_PLACES
    assert top_count(config, ALL_CLASSES_OF_PLACES + 1) is None
    logits = 3 * torch.randn(2, 150, 5, 7, generator=torch.Generator().manual_seed(0))
    kind = record_type(150, TOP_OF_PLACES, dense=True)
    again = in_places(decode(encode(by_place(logits), kind), 150), (2, 5, 7))
    said, wanted = again.softmax(1), logits.softmax(1)
    assert torch.equal(again.argmax(1), logits.argmax(1))
    torch.testing.assert_close(again.amax(1), logits.amax(1), rtol=1e-3, atol=1e-3)  # also from place to place
    largest = wanted.topk(TOP_OF_PLACES, dim=1).indices
    torch.testing.assert_close(said.gather(1, largest), wanted.gather(1, largest), rtol=5e-3, atol=1e-5)
