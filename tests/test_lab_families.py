"""The recipes for large teachers take steps as they stand: networks, losses and training, on a few images.

Nobody can count on fetching the weights they name, and no step of two thousand images fits: that much is changed.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import ROOT, kdpipe
from PIL import Image

from kdpipe.core.config import read_recipe
from kdpipe.core.kinds import Checkpoint
from kdpipe.networks.models import save_weights

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few images of three classes, as large as the recipes want them."""
    root, generator = tmp_path_factory.mktemp("imagenet"), np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for label, brightness in (("dark", 50), ("grey", 130), ("light", 210)):
            folder = root / split / label
            folder.mkdir(parents=True)
            for at in range(count):
                pixels = np.clip(generator.normal(brightness, 30, (250, 240, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{at}.jpg")
    return root


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of the teachers that the recipes name, made once."""
    folder = tmp_path_factory.mktemp("weights")
    recipes = [read_recipe(ROOT / "recipes" / f"{name}.yaml") for name in ("vanilla-a1", "vit")]
    files = {recipe.teacher.model: folder / f"{recipe.teacher.model}.safetensors" for recipe in recipes}
    for name, path in files.items():
        save_weights(timm.create_model(name.partition(".")[0], num_classes=3), path)
    return files


@pytest.mark.parametrize("name", ["vanilla-a1", "vanilla-a2", "vit"])
def test_a_recipe_takes_its_steps(name: str, imagenet: Path, random_weights: dict[str, Path], tmp_path: Path) -> None:
    path = ROOT / "recipes" / f"{name}.yaml"
    recipe = read_recipe(path)
    changes = {
        "data.source": imagenet,
        "data.val_fraction": 0,  # a hundredth of nine images is none
        "teacher.pretrained": "false",
        "teacher.checkpoint": random_weights[recipe.teacher.model],
        "teacher.train.batch_size": 3,  # by which a smoke run counts its images
        "distill.train.batch_size": 3,
        "distill.train.workers": 0,
        "distill.train.precision": "float32",  # timing the others takes most of the time
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    done = kdpipe("run", path, "--artifacts", tmp_path / "made", "--smoke", "--until", "distill", *sets)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "made" / ".smoke").glob("*/student-kd-seed0-*")
    student = Checkpoint.open(folder)
    assert student.facts.steps == 2 and all(np.isfinite(epoch.loss) for epoch in student.history)
    train, wanted = student.settings["train"], recipe.distill.train.model_dump(mode="json")
    for what in (
        "optimizer",
        "learning_rate",
        "weight_decay",
        "repeats",
        "mixup",
        "cutmix",
        "label_smoothing",
        "augment",
    ):
        assert train[what] == wanted[what]
    assert (student.facts.model, student.facts.input.size) == (recipe.student.model, 224)
