"""Pruned networks as large as people ship: built again in another process, through every target, killed and gone on."""

from __future__ import annotations

import contextlib
import multiprocessing
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_TRAIN, Trained, kdpipe, train
from test_pruning import pruned, whole
from test_resume import LIBRARIES, train_telling

from kdpipe.chain import Chain
from kdpipe.core.config import (
    ExportConfig,
    ExportPlan,
    PackageConfig,
    QuantizePlan,
    TrainConfig,
    read_recipe,
    validated,
)
from kdpipe.core.kinds import Checkpoint, Study
from kdpipe.devices import find_device
from kdpipe.export import TARGETS
from kdpipe.networks import models

pytestmark = pytest.mark.lab

KEEPS = {  # of these networks
    "resnet18": (0.7, 0.5),
    "mobilenetv4_conv_small": (0.7, 0.5),
    "repvit_m0_9": (0.5,),
    "mobilenetv3_small_050": (0.7, 0.5),
}
ANEW = """
import sys, numpy as np, torch
sys.modules["torch_pruning"] = None
from pathlib import Path
from kdpipe.core.config import StudentSettings, InputSettings
from kdpipe.networks import models
from kdpipe.networks.narrow import narrow_as
from kdpipe.networks.weights import load_weights

folder = Path(sys.argv[1])
for path in folder.glob("*.safetensors"):
    settings = StudentSettings(model=path.stem.partition("-")[0], input=InputSettings(size=64))
    network, spec = models.create(settings, 10)
    narrow_as(network, path, spec, 10)
    load_weights(network, path)
    with torch.no_grad():
        found = network.eval()(torch.from_numpy(np.load(folder / "images.npy")))
    np.save(path.with_suffix(".anew.npy"), found.numpy())
"""


def test_another_process_builds_them_again(tmp_path: Path) -> None:
    """Bit for bit, from the name and the weights, without the library that pruned them."""
    images = torch.randn(2, 3, 64, 64)
    np.save(tmp_path / "images.npy", images.numpy())
    for name in KEEPS:
        for keep in KEEPS[name]:
            network, spec = whole(name, 64)
            facts = pruned(network, name, spec, keep=keep)
            assert keep - 0.01 < facts.macs_share <= keep and facts.spared_groups == 0
            models.save_weights(network, tmp_path / f"{name}-{keep}.safetensors")
            with torch.no_grad():
                np.save(tmp_path / f"{name}-{keep}.npy", network(images).numpy())
    done = subprocess.run([sys.executable, "-c", ANEW, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for path in tmp_path.glob("*.anew.npy"):
        whole_name = path.name.replace(".anew", "")
        assert np.array_equal(np.load(path), np.load(tmp_path / whole_name)), whole_name
    assert len(list(tmp_path.glob("*.anew.npy"))) == sum(map(len, KEEPS.values()))


def test_attention_is_spared() -> None:
    """Of a transformer the layers between go, and what heads and normalisation look at stays."""
    network, spec = whole("test_vit", 32)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    facts = pruned(network, "test_vit", spec, keep=0.8)
    assert facts.spared_groups > 0 and facts.macs_share <= 0.8
    changed = {name for name, value in network.state_dict().items() if tuple(value.shape) != shapes[name]}
    assert changed and all(".mlp." in name for name in changed)


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_it_in_int8_too(
    trained: Trained, target: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Export compares each file with torch on real images and refuses one that differs."""
    chain = Chain(tmp_path_factory.getbasetemp() / "pruned")
    config = _configuration(trained)
    student = chain.distill(config, trained.dataset, trained.teacher)
    model = chain.export(ExportConfig.of(ExportPlan(parity_images=16), target=target), student, trained.dataset)
    assert model.facts.model == "test_resnet-pruned-to-0.50"
    plan = validated(QuantizePlan, {"variants": ["int8"], "calibrate": {"images": 32}, "check_images": 32}, "t")
    [int8] = chain.variants(plan, model, trained.dataset, find_device("local").probe())
    assert int8.facts.variant.startswith("int8")
    assert chain.package(PackageConfig(golden_images=2), int8, trained.dataset).facts.target == target


def _configuration(trained: Trained) -> TrainConfig:
    values = {
        "model": "test_resnet",
        "input": {"size": 32},
        "label_fraction": 0.25,
        "prune": {"from": trained.teacher.path, "keep": 0.5, "round_to": 8},
        "train": {**SMALL_TRAIN, "epochs": 2, "batch_size": 32},
    }
    return validated(TrainConfig, values, "test")


def test_killed_it_ends_the_same(trained: Trained, tmp_path: Path) -> None:
    """What was pruned is pruned again, and its weights are those of the state that was saved."""
    config, out = _configuration(trained), tmp_path / "killed"
    wanted = train(config, trained.dataset, trained.teacher, tmp_path / "whole")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    for steps in (5, None):
        told, telling = context.Pipe(duplex=False)
        process = context.Process(
            target=train_telling, args=(config, trained.dataset.path, trained.teacher.path, out, telling)
        )
        process.start()
        telling.close()
        if steps is not None:
            with contextlib.suppress(EOFError):
                for _ in range(steps):
                    told.recv()
            process.kill()
            process.join()
            assert not out.exists() and (tmp_path / "killed.part" / "resume" / "state.pt").is_file()
    process.join()
    assert process.exitcode == 0
    assert (out / "model.safetensors").read_bytes() == wanted.file("model.safetensors").read_bytes()


def test_a_study_of_a_pruned_student(trained: Trained, tmp_path: Path) -> None:
    """Every run of it is as narrow, and the recipe that it advises prunes too."""
    asked = (
        *("study", trained.dataset.path, trained.teacher.path, "--artifacts", tmp_path, "--student", "test_resnet"),
        *(
            "--student.input.size",
            32,
            "--student.prune.from",
            trained.teacher.path,
            "--student.prune.keep",
            0.5,
            "--student.prune.round-to",
            8,
        ),
        *("--fractions", 0.05, "--methods", "kd", "--temperatures", 4, "--controls", "smoothing", "--seeds", 2),
        *("--views", 60, "--distill.train.batch-size", 16, "--distill.train.workers", 0, "--int8", "none"),
    )
    done = kdpipe(*asked)
    assert done.returncode == 0, done.stderr
    runs = [Checkpoint.open(path) for path in tmp_path.glob("cell-*")]
    assert len(runs) == 6 and {run.facts.model for run in runs} == {"test_resnet-pruned-to-0.50"}
    [sealed] = tmp_path.glob("study-*")
    student = read_recipe(sealed / Study.RECIPE).student
    assert student.prune == TrainConfig.model_validate(runs[0].settings).prune and student.start == trained.teacher.path
