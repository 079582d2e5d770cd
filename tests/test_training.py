"""Losses against golden values, views that depend on nothing but their address, teachers left alone."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import timm
import torch
from conftest import SMALL_TRAIN, Trained, evaluated, replace_file, train
from torch import nn
from torch.utils.data import DataLoader

from kdpipe.core.artifact import Order
from kdpipe.core.config import (
    AdoptConfig,
    AugmentSettings,
    InputSettings,
    ModelSettings,
    TrainConfig,
    TrainSettings,
    validated,
)
from kdpipe.core.errors import UserError
from kdpipe.core.inputs import InputSpec
from kdpipe.core.kinds import Checkpoint
from kdpipe.core.proc import children_signal_kept
from kdpipe.data.dataset import UNLABELED, Sample
from kdpipe.data.labels import LABELS, ClassNumbers
from kdpipe.data.views import EpochBatches, TrainingImages, TrainingView, TrainingViews, training_images
from kdpipe.distill import loop
from kdpipe.distill import precision as precisions
from kdpipe.distill import train as trainer
from kdpipe.distill.methods import METHODS
from kdpipe.distill.precision import Choices
from kdpipe.distill.ranks import Ranks
from kdpipe.distill.teacher import Teacher
from kdpipe.distill.trackers import Nothing
from kdpipe.networks import models
from kdpipe.runtime.preprocess import decode, fit

SPEC = InputSpec(size=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), crop_fraction=1.0, interpolation="bicubic")
EVERYTHING = AugmentSettings(crop="resized", flip=0.5, auto_augment="rand-m9-mstd0.5", erase=0.5)
PADDED = AugmentSettings(crop="pad", flip=0.5, auto_augment="rand-m9-mstd0.5", erase=0.5)


def some(trained: Trained, count: int) -> TrainingImages:
    """The first so many training images."""
    return TrainingImages(trained.dataset.samples("train"), np.arange(count), count, 0)


@pytest.mark.parametrize(
    "config",
    [
        TrainSettings(augment=EVERYTHING),
        TrainSettings(augment=PADDED),
        TrainSettings(augment=EVERYTHING, mixup=0.2),
        TrainSettings(augment=PADDED, cutmix=1.0),
        TrainSettings(augment=PADDED, mixup=0.2, cutmix=1.0, label_smoothing=0.1),
    ],
    ids=["resized", "pad", "mixup", "cutmix", "both"],
)
def test_views_depend_on_seed_epoch_and_index_only(trained: Trained, config: TrainSettings) -> None:
    views = TrainingViews(some(trained, 40), config, SPEC, 10, seed=5)
    addresses = [(epoch, index) for epoch in range(2) for index in range(40)]
    expected = {address: views[address] for address in addresses}
    image = expected[(0, 3)].image
    assert not torch.equal(image, expected[(1, 3)].image)
    assert not torch.equal(image, TrainingViews(some(trained, 40), config, SPEC, 10, 6)[(0, 3)].image)
    shuffled = [addresses[at] for at in np.random.default_rng(0).permutation(len(addresses))]
    for workers in (0, 2):
        torch.rand(7)  # whatever was drawn before
        loader = DataLoader(views, batch_sampler=[shuffled[:50], shuffled[50:]], num_workers=workers)
        with children_signal_kept():
            batches = list(loader)
        found = torch.cat([batch.image for batch in batches])
        assert torch.equal(found, torch.stack([expected[address].image for address in shuffled]))
        targets = torch.cat([batch.target for batch in batches])
        assert torch.equal(targets, torch.stack([torch.as_tensor(expected[address].target) for address in shuffled]))


def test_views_leave_torchs_generator_alone(trained: Trained) -> None:
    views = TrainingViews(some(trained, 4), TrainSettings(augment=EVERYTHING), SPEC, 10, seed=5)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    views[(0, 0)]
    assert torch.equal(torch.rand(3), expected)


def test_mixed_views_are_what_their_targets_say(trained: Trained) -> None:
    """Undone by hand: the share of the target is the share of the partner's pixels."""
    samples = trained.dataset.samples("train")[:21]
    samples[20] = dataclasses.replace(samples[20], label=UNLABELED)
    none = AugmentSettings(crop="none", flip=0)
    source = TrainingImages(samples, np.arange(21), 20, 1)
    plain = TrainingViews(source, TrainSettings(augment=none), SPEC, 10, seed=5)
    images = torch.stack([plain[(0, at)].image for at in range(21)])
    for settings in ({"mixup": 0.5}, {"cutmix": 1.0}):
        views = TrainingViews(source, TrainSettings(augment=none, **settings), SPEC, 10, seed=5)
        mixed_some = 0
        for at in range(21):
            view = views[(0, at)]
            assert isinstance(view.target, torch.Tensor)
            known = [each.label for each in samples]
            for partner in range(21):
                if "mixup" in settings:
                    difference = images[partner] - images[at]
                    if not difference.any():
                        continue
                    share = 1 - float(((view.image - images[at]) * difference).sum() / (difference**2).sum())
                    fits = torch.allclose(share * images[at] + (1 - share) * images[partner], view.image, atol=1e-4)
                else:
                    changed = (view.image != images[at]).any(0)
                    fits = bool(changed.any()) and torch.equal(view.image[:, changed], images[partner][:, changed])
                    share = 1 - float(changed.float().mean())
                if fits and partner != at and 0 < share < 1:
                    expected = torch.zeros(10)
                    for label, weight in ((known[at], share), (known[partner], 1 - share)):
                        if label != UNLABELED:
                            expected[label] += weight
                    assert torch.allclose(view.target, expected, atol=0.02 if "mixup" in settings else 0.2)
                    mixed_some += 1
                    break
        assert mixed_some > 10


@pytest.mark.parametrize("settings", [{"mixup": 0.5}, {"cutmix": 1.0}], ids=["mixup", "cutmix"])
def test_labels_with_places_are_mixed_place_by_place(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    """The label of a place is here whether its red is dark, and nobody knows where the row is even."""

    class Dark(ClassNumbers):
        def read(self, sample: Sample, spec: Mapping[str, Any]) -> np.ndarray:
            places = (fit(decode(sample.path), spec)[:, :, 0] < 128).astype(np.int64)
            places[::2] = UNLABELED
            return places

    monkeypatch.setitem(LABELS, "classification", Dark())
    source, none = some(trained, 6), AugmentSettings(crop="none", flip=0)
    plain = TrainingViews(source, TrainSettings(augment=none), SPEC, 2, seed=5)
    first = [plain[(0, at)] for at in range(6)]
    views = TrainingViews(source, TrainSettings(augment=none, label_smoothing=0.2, **settings), SPEC, 2, seed=5)
    for at in range(6):
        view = views[(0, at)]
        target = cast("torch.Tensor", view.target)
        assert torch.equal(view.label, first[at].label), "its own, as the accuracy is judged"
        assert target.shape == (2, 32, 32) and not target[:, ::2].any()
        assert torch.allclose(target[:, 1::2].sum(0), torch.ones(16, 32))
        if "cutmix" in settings:  # what is seen at a place is what its target says
            dark = (view.image[0] * SPEC.std[0] + SPEC.mean[0]) * 255 < 127.5
            assert torch.allclose(target[1, 1::2], torch.where(dark, 0.9, 0.1)[1::2])
        else:
            shares = target[1, 1::2].unique()
            assert 1 < len(shares) <= 4 and shares.min() >= 0.1 - 1e-6 and shares.max() <= 0.9 + 1e-6


def test_partners_come_from_the_drawn_images_alone(trained: Trained) -> None:
    """A tenth of the labels is a tenth of the labels, mixed or not."""
    source = training_images(trained.dataset, 0.1, seed=0, with_unlabeled=False)
    reached = set()

    class Watched(list):  # type: ignore[type-arg]
        def __getitem__(self, at):  # type: ignore[no-untyped-def]
            reached.add(at)
            return super().__getitem__(at)

    views = TrainingViews(
        source._replace(samples=Watched(source.samples)), TrainSettings(mixup=0.5, cutmix=0.5), SPEC, 10, seed=0
    )
    for view in range(3):
        for at in source.numbers:
            views[(view, int(at))]
    assert reached == set(source.numbers.tolist())


def test_batches_cover_every_image_once() -> None:
    batches = EpochBatches(range(10), 4, seed=0)
    first = list(batches)
    assert sorted(index for batch in first for _, index in batch) == list(range(10))
    assert len(first) == len(batches) == 3
    batches.epoch = 1
    assert [i for b in batches for _, i in b] != [i for b in first for _, i in b]
    # A last batch of one image would break BatchNorm: it is left out.
    assert len(EpochBatches(range(9), 4, seed=0)) == len(list(EpochBatches(range(9), 4, seed=0))) == 2


def small(model: str = "test_resnet", **more: object) -> TrainConfig:
    values = {
        "model": model,
        "input": {"size": 32},
        "label_fraction": 0.05,
        "train": {**SMALL_TRAIN, "epochs": 1},
        **more,
    }
    return validated(TrainConfig, values, "test")


def test_teacher_is_left_bit_identical(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[nn.Module] = []
    restore = models.restore

    def watched(checkpoint):  # the real thing, looked at afterwards
        network, spec = restore(checkpoint)
        seen.append(network)
        return network, spec

    monkeypatch.setattr(models, "restore", watched)
    train(small(), trained.dataset, trained.teacher, tmp_path / "student")
    [teacher] = seen
    before, _ = restore(trained.teacher)
    assert not teacher.training
    for name, tensor in before.state_dict().items():
        assert torch.equal(teacher.state_dict()[name], tensor), name
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_same_run_same_weights_in_another_process(trained: Trained, tmp_path: Path) -> None:
    config = small()
    first = train(config, trained.dataset, trained.teacher, tmp_path / "first")
    script = (
        "import sys; from pathlib import Path; from kdpipe.core.kinds import Checkpoint;"
        "from kdpipe.chain import train_order;"
        "from kdpipe.core.config import TrainConfig; from kdpipe.data.dataset import Dataset;"
        "from kdpipe.distill.train import train;"
        "config = TrainConfig.model_validate_json(sys.argv[1]);"
        "dataset, teacher = Dataset.open(sys.argv[2]), Checkpoint.open(sys.argv[3]);"
        "train(train_order(config, dataset, teacher), dataset, teacher, Path(sys.argv[4]))"
    )
    arguments = [config.model_dump_json(), trained.dataset.path, trained.teacher.path, tmp_path / "second"]
    subprocess.run([sys.executable, "-c", script, *map(str, arguments)], check=True)
    other = first.path.parent / "second" / "model.safetensors"
    assert first.file("model.safetensors").read_bytes() == other.read_bytes()


def test_facts_are_what_the_weights_do(trained: Trained) -> None:
    network, spec = models.restore(trained.student)
    logits, labels = evaluated(network, spec, trained.dataset, "test")
    with np.load(trained.student.file("test_logits.npz")) as stored:
        np.testing.assert_allclose(stored["logits"], logits, atol=1e-5)
    assert trained.student.facts.test_accuracy == pytest.approx((logits.argmax(1) == labels).mean())
    assert trained.student.facts.training_images == len(np.load(trained.student.file("images.npy")))


@pytest.mark.parametrize(("precision", "cure"), [("float32", "lower train.learning_rate"), ("fp16", "bf16")])
def test_divergence_is_refused(trained: Trained, tmp_path: Path, precision: str, cure: str) -> None:
    settings = {**SMALL_TRAIN, "optimizer": "sgd", "learning_rate": 1e12, "precision": precision}
    with pytest.raises(UserError, match=f"loss became .* in epoch [0-9]+, batch [0-9]+: .*{cure}"):
        train(small(method="labels", train=settings), trained.dataset, None, tmp_path / "student")
    assert not list(tmp_path.iterdir())


# ---- a device that works on while nobody asks it ------------------------------------------------------------


class NoImages:
    """A data set of which the loop asks no image."""

    facts = SimpleNamespace(task="classification")

    def samples(self, part: str) -> list[Sample]:
        return []


# These turn autocast off by themselves, which torch does not know of on this device.
@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("rkd", "cc", "crd")])
def test_a_step_waits_for_nothing(method: str) -> None:
    """On the meta device, whose tensors have no values: whatever looked at one would be stopped.

    The teacher is on the device before a method looks at it, as in training.
    """
    settings = {"epochs": 4, "clip_gradient": 1.0, "decay_all": True}
    config = small(method=method, train=settings, shuffled_teacher=True, standardize_logits=True)
    (student, spec), (other, _) = models.create(config, 10), models.create(config, 10)
    teacher = Teacher(other, spec, spec).to("meta")
    ranks = Ranks(device="meta")
    learner = METHODS[method](config, student, spec, teacher, task="classification", all_labeled=True)
    teacher.wanted.update(learner.teacher_indices)
    steps = 40 * loop.READ_EVERY  # so many that no phase ends in those that are made
    run = loop.Run(config, learner, NoImages(), spec, steps, steps // 4, ranks, None, Nothing())  # type: ignore[arg-type]
    run.begin()
    run.begin_epoch()
    labels = torch.arange(8)
    view = TrainingView(torch.zeros(8, 3, 32, 32), labels, labels, [torch.zeros(8, dtype=torch.int64), labels])
    for _ in range(2):
        assert run.learn(loop.Batch(view, 8, ranks, teacher)) == ""
    with pytest.raises(RuntimeError, match="meta"):
        run.end_epoch()  # where what waits is read


class ReadLate(loop.Tally):
    """On a CPU, as on a device that is not asked after every step."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._interval = loop.READ_EVERY


def test_reading_late_changes_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(method="stagewise", label_fraction=0.3, train={**SMALL_TRAIN, "epochs": 4, "checkpoint_seconds": 0})
    found = []
    for tally in (loop.Tally, ReadLate):
        monkeypatch.setattr(loop, "Tally", tally)
        done = train(config, trained.dataset, trained.teacher, tmp_path / tally.__name__)
        rows = [json.loads(line) for line in done.file("history.jsonl").read_text().splitlines()]
        found.append((rows, done.file("model.safetensors").read_bytes()))
    assert found[0] == found[1]


def test_divergence_is_told_where_it_began(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However late it is read, it is the epoch and the batch of the first loss that was not finite."""
    settings = {**SMALL_TRAIN, "optimizer": "sgd", "learning_rate": 1e12, "checkpoint_seconds": 0}
    told = []
    for tally in (loop.Tally, ReadLate):
        monkeypatch.setattr(loop, "Tally", tally)
        with pytest.raises(UserError, match="loss became") as caught:
            train(small(method="labels", label_fraction=1, train=settings), trained.dataset, None, tmp_path / "student")
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_no_state_holds_what_was_not_read(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    save = loop.Run._save
    monkeypatch.setattr(loop, "Tally", ReadLate)
    monkeypatch.setattr(loop.Run, "_save", lambda run: saved.append((run.step, run._tally.is_empty)) or save(run))
    settings = {**SMALL_TRAIN, "epochs": 1, "batch_size": 8, "checkpoint_seconds": 0}
    train(small(method="labels", label_fraction=0.3, train=settings), trained.dataset, None, tmp_path / "student")
    assert saved == [(loop.READ_EVERY * (at + 1), True) for at in range(len(saved))] and len(saved) > 1


def test_batches_for_a_device_are_pinned(trained: Trained) -> None:
    """From pinned memory a device fetches by itself; a CPU has nothing to fetch."""
    config = small(train={**SMALL_TRAIN, "epochs": 1})
    for device, pinned in (("cpu", False), ("cuda:0", True)):
        views = TrainingViews(some(trained, 40), config.train, SPEC, 10, seed=5)
        lockstep = loop.Lockstep(views, config, Ranks(device=device), None, Choices(None, "", "cpu"))
        assert lockstep._loader.pin_memory is pinned


def test_a_timed_step_is_one_that_the_device_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is read after the device was waited for, before a step and behind it."""
    events: list[str] = []
    clock = time.perf_counter
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(precisions.time, "perf_counter", lambda: events.append("clock") or clock())
    chosen = precisions.fastest(nn.Linear(2, 2), lambda *_: events.append("step"), "cpu")
    rounds = (1 + precisions.TIMED_STEPS) * len(precisions.CANDIDATES)
    assert events == rounds * ["wait", "clock", "step", "wait", "clock"]
    assert len(chosen.seconds_a_step) == len(precisions.CANDIDATES)


def test_half_precision_trains(trained: Trained, tmp_path: Path) -> None:
    """With float16 and scaled gradients a student learns about as well as in float32."""
    accuracies = []
    for precision in ("float32", "fp16"):
        config = small(label_fraction=0.15, train={**SMALL_TRAIN, "epochs": 4, "precision": precision})
        done = train(config, trained.dataset, trained.teacher, tmp_path / precision)
        accuracies.append(done.facts.test_accuracy)
    assert accuracies[1] > accuracies[0] - 0.05


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
from kdpipe.core.config import TrainConfig
from kdpipe.data.dataset import Dataset
from kdpipe.core.errors import UserError
import kdpipe.distill.loop as loop
from kdpipe.chain import train_order
from kdpipe.distill.train import train
learn = loop.Run._learn
def limited(self, *arguments):
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, -1))  # a real limit, from the first step on
    return learn(self, *arguments)
loop.Run._learn = limited
try:
    dataset = Dataset.open(sys.argv[2])
    train(train_order(TrainConfig.model_validate_json(sys.argv[1]), dataset, None), dataset, None, Path(sys.argv[3]))
except UserError as error:
    print(error)
"""


def test_out_of_memory_says_what_to_lower(trained: Trained, tmp_path: Path) -> None:
    config = small(method="labels", input={"size": 96}, label_fraction=1.0, train={**SMALL_TRAIN, "batch_size": 512})
    arguments = [config.model_dump_json(), trained.dataset.path, tmp_path / "student"]
    command = [sys.executable, "-c", OUT_OF_MEMORY, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out of memory training test_resnet on 512 images of 96 pixels"), done.stderr
    assert "lower train.batch_size" in done.stdout
    assert not (tmp_path / "student.part").exists()


def test_a_teacher_of_two_classes_has_no_dkd(photos: Path, tmp_path: Path) -> None:
    from test_data import prepared

    dataset = prepared(tmp_path, source=str(photos))
    # One step an epoch: as many as stagewise has phases.
    values = {"model": "test_resnet", "input": {"size": 32}, "train": {**SMALL_TRAIN, "epochs": 6}}
    alone = train(validated(TrainConfig, {**values, "method": "labels"}, "test"), dataset, None, tmp_path / "teacher")
    for method in METHODS:
        config = validated(TrainConfig, {**values, "method": method}, "test")
        if method == "dkd":
            with pytest.raises(UserError, match="method 'dkd' needs three classes at least, found 2"):
                train(config, dataset, alone, tmp_path / method)
        else:
            train(config, dataset, alone, tmp_path / method)


def test_classes_in_another_order(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "teacher"
    shutil.copytree(trained.teacher.path, other)
    labels = json.dumps(trained.dataset.classes[::-1]).encode()
    replace_file(other, "labels.json", labels)
    with pytest.raises(UserError, match="knows the same classes in another order"):
        train(small(), trained.dataset, Checkpoint.open(other), tmp_path / "student")


def test_fewer_images_than_a_batch(trained: Trained, tmp_path: Path) -> None:
    """They make one batch of what there is."""
    config = small(label_fraction=0.01, train={**SMALL_TRAIN, "epochs": 2, "batch_size": 64})
    done = train(config, trained.dataset, trained.teacher, tmp_path / "student")
    assert 10 <= done.facts.training_images < 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelSettings(model="resnet19"), "unknown model 'resnet19'.*did you mean 'resnet"),
        (ModelSettings(model="resnet18", model_args={"nonsense": 1}), "cannot make 'resnet18'"),
        (ModelSettings(model="resnet18", model_args={"checkpoint_path": "x.pth"}), "model_args: 'checkpoint_path'"),
        (ModelSettings(model="vit_tiny_patch16_224", input=InputSettings(size=8)), "cannot (make|take)"),
    ],
)
def test_models_that_cannot_be_made(config: ModelSettings, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        models.create(config, 10)
    assert "\n" not in str(caught.value)


def test_vision_transformers_take_small_inputs() -> None:
    network, spec = models.create(ModelSettings(model="test_vit", input=InputSettings(size=32)), 10)
    assert network(torch.zeros(1, 3, *[spec.size] * 2)).shape == (1, 10)


class Evil:
    def __reduce__(self):
        return (Path.touch, (Path("owned"),))


def altered(change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """A fitting state dict but for one of its tensors."""
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    name = next(name for name, value in state.items() if value.ndim == 4)
    return {**state, name: change(state[name])}


def quantized(value: torch.Tensor) -> torch.Tensor:
    return torch.quantize_per_tensor(value, 0.1, 0, torch.qint8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no checkpoint at"),
        (lambda path: path.write_bytes(b"not weights"), "cannot read weights"),
        (lambda path: torch.save({"x": Evil()}, path), "more than tensors"),
        (
            lambda path: torch.save(timm.create_model("resnet10t", num_classes=10).state_dict(), path),
            "another architecture",
        ),
        (
            lambda path: torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path),
            "another class count",
        ),
        (lambda path: torch.save([1, 2], path), "no state dict"),
        (lambda path: torch.save(altered(lambda value: value.to_sparse()), path), "no plain tensor"),
        (lambda path: torch.save(altered(lambda value: value.to("meta")), path), "no plain tensor"),
        (lambda path: torch.save(altered(quantized), path), "(no plain tensor|cannot read weights)"),
        (
            lambda path: torch.save(altered(lambda value: torch.nested.nested_tensor([value])), path),
            "(no plain tensor|cannot read weights)",
        ),
        (lambda path: torch.save({1: torch.zeros(1)}, path), "no state dict"),
        (lambda path: torch.save({"model": {("a",): torch.zeros(1)}}, path), "no state dict"),
        (lambda path: torch.save(altered(lambda value: value.to(torch.complex64)), path), "not of numbers like"),
        (lambda path: torch.save(altered(lambda value: value * torch.nan), path), "not finite"),
        (lambda path: torch.save({}, path), "another architecture"),
        (lambda path: path.mkdir(), "no checkpoint at"),
    ],
)
def test_checkpoints_that_do_not_fit(trained: Trained, workdir: Path, make, message: str) -> None:
    path = workdir / "teacher.pth"
    make(path)
    config = AdoptConfig(model="test_resnet", checkpoint=path, input=InputSettings(size=32))
    with pytest.raises(UserError, match=message) as caught:
        trainer.adopt(Order("adopt", config, {"data": trained.dataset}), trained.dataset, workdir / "out")
    assert "\n" not in str(caught.value)
    assert not (workdir / "owned").exists()
    assert not (workdir / "out").exists()


@pytest.mark.parametrize("wrapped", [False, True])
def test_adopted_checkpoint_keeps_its_accuracy(trained: Trained, tmp_path: Path, wrapped: bool) -> None:
    network, _ = models.restore(trained.teacher)
    state = network.state_dict()
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}} if wrapped else state, tmp_path / "t.pth")
    config = AdoptConfig(model="test_resnet", checkpoint=tmp_path / "t.pth", input=InputSettings(size=32))
    adopted = trainer.adopt(Order("adopt", config, {"data": trained.dataset}), trained.dataset, tmp_path / "out")
    assert adopted.facts.test_accuracy == trained.teacher.facts.test_accuracy
    assert str(tmp_path) not in (adopted.path / "manifest.json").read_text()


def test_teacher_of_other_classes(trained: Trained, photos: Path, tmp_path: Path) -> None:
    from test_data import prepared

    other = prepared(tmp_path, source=str(photos))
    with pytest.raises(UserError, match="knows 10 other classes than the data"):
        train(small(), other, trained.teacher, tmp_path / "student")


def test_worker_processes_leave_no_signal_handler(trained: Trained, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    train(small(train={**SMALL_TRAIN, "epochs": 1, "workers": 2}), trained.dataset, trained.teacher, tmp_path / "a")
    assert signal.getsignal(signal.SIGCHLD) == before
    subprocess.run(["true"], check=True)
