"""Teachers of every family teach students of two kinds by every method: a sample of the product."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import train, train_together
from PIL import Image
from safetensors.numpy import load_file

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan, TrainConfig, validated
from kdpipe.core.kinds import Checkpoint
from kdpipe.data.dataset import Dataset
from kdpipe.distill.methods import METHODS

# Small members of each family, at 32 pixels: maps of several resolutions, and tokens.
TEACHERS: dict[str, dict[str, Any]] = {
    "resnet": {"model": "test_resnet"},
    "vit": {"model": "test_vit", "model_args": {"depth": 4, "patch_size": 8}},
    "convnextv2": {"model": "convnextv2_atto", "model_args": {"depths": [1, 1, 1, 1], "dims": [8, 16, 24, 32]}},
    "beit": {
        "model": "beitv2_base_patch16_224",
        "model_args": {"depth": 4, "embed_dim": 32, "num_heads": 2, "patch_size": 8},
    },
}
STUDENTS: dict[str, dict[str, Any]] = {"cnn": {"model": "resnet8"}, "mobile": {"model": "mobilenetv3_small_050"}}
METHODS_THAT_ASK = sorted(name for name, method in METHODS.items() if name not in ("labels", "masked"))
SETTINGS = {
    "input": {"size": 32},
    "train": {
        "epochs": 1,
        "batch_size": 9,
        "workers": 0,
        "weight_decay": 0,
        "augment": {"crop": "none", "flip": 0},
    },
}
EPOCHS = {"stagewise": 6}  # of one step: a phase for each of five stages at most, and the head

Row = tuple[str, str, str]  # teacher, student, method


def sample() -> list[Row]:
    """Each method with each student, and with a teacher of maps and one of tokens; each teacher with each student."""
    families = [("resnet", "vit"), ("convnextv2", "beit"), ("beit", "resnet"), ("vit", "convnextv2")]
    return [
        (teacher, student, method)
        for at, method in enumerate(METHODS_THAT_ASK)
        for teacher, student in zip(families[at % len(families)], STUDENTS, strict=True)
    ]


def config_of(student: str, method: str, epochs: int) -> TrainConfig:
    """What the teacher says alone: a method that did not reach the student would leave it as it was."""
    values = {**SETTINGS, **STUDENTS[student], "method": method, "label_weight": 0}
    values["train"] = {**SETTINGS["train"], "epochs": epochs}
    return validated(TrainConfig, values, "test")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Nine images to learn from, three to be tested on."""
    root, generator = tmp_path_factory.mktemp("few"), np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for label, brightness in (("dark", 50), ("grey", 130), ("light", 210)):
            folder = root / "images" / split / label
            folder.mkdir(parents=True)
            for at in range(count):
                pixels = np.clip(generator.normal(brightness, 30, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{at}.png")
    plan = DataPlan(source=str(root / "images"), val_fraction=0)
    return Chain(root / "artifacts").data(plan)


@pytest.fixture(scope="module")
def taught(few: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[Row, Checkpoint]:
    """The students of the sample, those of one teacher side by side."""
    root = tmp_path_factory.mktemp("taught")
    found: dict[Row, Checkpoint] = {}
    for name, network in TEACHERS.items():
        settings = {**SETTINGS, **network, "method": "labels"}
        teacher = train(validated(TrainConfig, settings, "test"), few, None, root / name)
        by_epochs: dict[int, dict[Path, Row]] = {}
        for row in sample():
            if row[0] == name:
                by_epochs.setdefault(EPOCHS.get(row[2], 1), {})[root / "-".join(row)] = row
        for epochs, rows in by_epochs.items():
            configs = {path: config_of(student, method, epochs) for path, (_, student, method) in rows.items()}
            made = train_together(configs, few, teacher)
            found |= {row: made[path] for path, row in rows.items()}
    return found


def weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    return load_file(checkpoint.file(checkpoint.WEIGHTS))


def test_the_sample_meets_what_it_says() -> None:
    rows = sample()
    assert len(set(rows)) == len(rows)
    assert {row[:2] for row in rows} == set(itertools.product(TEACHERS, STUDENTS))
    assert {row[1:] for row in rows} == set(itertools.product(STUDENTS, METHODS_THAT_ASK))
    for method in METHODS_THAT_ASK:
        families = {teacher for teacher, _, how in rows if how == method}
        assert families & {"resnet", "convnextv2"} and families & {"vit", "beit"}


def test_every_family_teaches_by_every_method(taught: dict[Row, Checkpoint], few: Dataset, tmp_path: Path) -> None:
    """Every epoch has a loss, and what the student was taught moved it: by the teacher alone, nothing else did."""
    # The same seed, at a rate that moves nothing: what each student was before it was taught.
    still = {"method": "labels", "label_weight": 1, "train": {**SETTINGS["train"], "learning_rate": 1e-12}}
    before = {
        name: weights(
            train(validated(TrainConfig, {**SETTINGS, **network, **still}, "test"), few, None, tmp_path / name)
        )
        for name, network in STUDENTS.items()
    }
    for row, checkpoint in taught.items():
        assert all(np.isfinite(epoch.loss) for epoch in checkpoint.history), row
        after, first = weights(checkpoint), before[row[1]]
        assert after.keys() == first.keys(), row
        learned = [name for name in first if first[name].dtype == np.float32 and "running" not in name]
        moved = [name for name in learned if np.abs(after[name] - first[name]).max() > 1e-6]
        assert len(moved) > len(learned) / 2, f"{row}: {len(moved)} of {len(learned)} tensors moved"
        assert all(np.isfinite(after[name]).all() for name in learned), row
