"""A student that is chosen by what it takes here: made, measured, sealed, found again."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import Trained, assert_one_line, kdpipe, rewrite_manifest

from kdpipe.chain import Chain, sealed
from kdpipe.core.artifact import read_manifest
from kdpipe.core.config import DataPlan, DrawConfig, InputSettings, ModelSettings, PickPlan, read_recipe, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import DRAWN, Checkpoint, Measurement, Pick
from kdpipe.data.dataset import Dataset
from kdpipe.networks import prior
from kdpipe.networks.cost import cost_of, family_of
from kdpipe.networks.models import restore
from kdpipe.picking import CONFIRMED, COSTS, WORKSHOP

# What cannot be exported: which way it goes is told by the image.
OWN = """
import torch

class Odd(torch.nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.head = torch.nn.Linear(3, classes)

    def forward(self, image):
        mean = image.mean((2, 3))
        for _ in range(int(mean.abs().sum().item() * 10) % 3):
            mean = mean * 2
        return self.head(mean)

def odd(num_classes):
    return Odd(num_classes)
"""
PRIOR = "# mine\nmodel,points,size\nresnet8,60,16\ntest_resnet,70,32\nodd:odd,50\n"
CANDIDATES = ("--candidates", "resnet8,test_resnet,odd:odd,test_vit", "--allow-code", "odd:odd")
NO_TABLES = ["", "resnet18\n", "resnet18,high\n", "resnet18,inf\n", "a,1,2,3\n", "resnet18,70,-1\n"]
NO_TABLES += [
    f"resnet18,{'7' * 200_000}\n",
    "resnet18.a1_in1k,70\nresnet18.tv_in1k,69\n",
    "resnet18,70,224\nresnet18,65,160\n",
]


class Bench:
    """A folder with images, a prior and a network of one's own; runs picks there."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder, self.dataset = folder, dataset
        self.workshop = dataset.path.parent / WORKSHOP
        (folder / "prior.csv").write_text(PRIOR)
        (folder / "odd.py").write_text(OWN)

    def pick(self, *arguments: object, p90: str = "60s") -> subprocess.CompletedProcess[str]:
        return kdpipe(
            "pick", self.dataset.path, "--p90", p90, "--prior", "prior.csv", "--variant", "float32", "--input.size",
            "16", "--threads", "1", "--rounds", "2", *arguments, cwd=self.folder,
        )  # fmt: skip

    def measured(self) -> list[Path]:
        return [path for path, manifest in sealed(self.workshop) if manifest.kind == Measurement.kind]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("pick")
    plan = DataPlan(source="digits", test_split=None, most_images=100)
    return Bench(folder, Chain(folder / "artifacts").data(plan))


@pytest.fixture(scope="module")
def picked(bench: Bench) -> dict[str, Any]:
    """Of four, one is not known of and one cannot be exported."""
    done = bench.pick("--json", *CANDIDATES)
    assert done.returncode in (0, 75), done.stderr  # a busy machine is told, and the answer is whole
    return dict(json.loads(done.stdout))


def test_the_best_within_the_limit_is_chosen_from_what_was_measured(bench: Bench, picked: dict[str, Any]) -> None:
    facts = picked["facts"]
    assert facts["chosen"] == "test_resnet-16" and facts["measured"] == 2
    rows = {row["name"]: row for row in picked["networks"]}
    chosen = rows["test_resnet-16"]
    # In two sessions at least; in one more where the machine was too busy for two to bound anything.
    assert chosen["sessions"] >= 2 and chosen["chance"] > 0.9 and chosen["on_front"]
    found = chosen["p90_ms"]
    assert 0 < found["low"] < found["value"] < found["high"] and found["n"] == chosen["sessions"]
    assert rows["resnet8-16"]["sessions"] >= 1 and rows["resnet8-16"]["why"]
    # The prior is of 32 pixels, the network takes 16: less is to be expected of it.
    assert chosen["prior"] < 70 and rows["resnet8-16"]["prior"] == 60
    left_out = picked["left_out"]
    assert "cannot be made for onnxruntime" in left_out["odd-odd-16"]
    assert left_out["test_vit"] == "the prior (prior.csv) says nothing of it"
    assert "prior (prior.csv)" in picked["sentence"] and "limit 60000 ms" in picked["sentence"]
    pick = Pick.open(bench.folder / picked["artifact"])
    assert pick.networks["test_resnet-16"].macs > 0
    figure = pick.file(Pick.FIGURE).read_text()
    assert "test_resnet-16: p90" in figure and "<svg" in figure


def test_what_a_pick_measured_has_random_weights_and_leaves_little(bench: Bench, picked: dict[str, Any]) -> None:
    """Only bundles and sessions stay; they say that nobody trained them."""
    kinds = sorted(manifest.kind for _, manifest in sealed(bench.workshop))
    assert set(kinds) == {"bundle", "dataset", "measurement"} and kinds.count("bundle") == 2
    for path in bench.measured():
        for role, source in read_manifest(path).inputs.items():
            if source.kind == "bundle":
                student = source.inputs["model"]
                while student.kind != Checkpoint.kind:
                    student = student.inputs.get("graph") or student.inputs.get("model") or student.inputs["student"]
                assert Checkpoint.facts_of(student).method == DRAWN, role


def test_a_pick_that_was_made_is_found_and_the_next_begins_with_its_sessions(
    bench: Bench, picked: dict[str, Any]
) -> None:
    before = bench.measured()
    again = bench.pick("--json", *CANDIDATES)
    assert json.loads(again.stdout)["key"] == picked["key"]
    assert bench.measured() == before
    # Nothing is so fast: told, sealed and refused, with nothing measured anew.
    none = bench.pick("--candidates", "resnet8,test_resnet", p90="0.00001ms")
    assert none.returncode == 1
    line = none.stderr.strip().splitlines()[-1]
    assert "nothing is surely within 1e-05 ms" in line and "the fastest found is" in line
    assert len(bench.measured()) <= len(before) + 1
    [path] = re.findall(r"^(\S*pick-[0-9a-f]{12})$", none.stdout, re.MULTILINE)
    assert Pick.open(bench.folder / path).facts.chosen is None
    assert "too slow" in none.stdout


def test_the_recipe_of_a_pick_is_one(bench: Bench, picked: dict[str, Any]) -> None:
    pick = Pick.open(bench.folder / picked["artifact"])
    recipe = read_recipe(pick.file(Pick.RECIPE))
    assert recipe.student.model == "test_resnet" and recipe.student.input.size == 16
    assert recipe.export.targets == ("onnxruntime",) and recipe.quantize is None
    assert recipe.bench is not None and recipe.bench.threads == (1,), "as it was measured"
    assert recipe.data.source == "digits" and recipe.data.most_images == 100
    done = kdpipe("run", pick.file(Pick.RECIPE), "--dry-run", "--json", cwd=bench.folder)
    assert done.returncode == 0, done.stderr
    legs = json.loads(done.stdout)["legs"]
    assert next(leg for leg in legs if leg["stage"] == "data")["sealed"]


def test_another_teacher_is_another_answer(bench: Bench, picked: dict[str, Any], trained: Trained) -> None:
    before = bench.measured()
    done = bench.pick(*CANDIDATES, "--teacher", trained.teacher.path, "--json")
    assert done.returncode in (0, 75), done.stderr
    found = json.loads(done.stdout)
    assert found["key"] != picked["key"] and bench.measured() == before
    recipe = read_recipe(Pick.open(bench.folder / found["artifact"]).file(Pick.RECIPE))
    assert recipe.teacher.checkpoint == trained.teacher.file(Checkpoint.WEIGHTS).absolute()


def test_who_is_chosen_by_training_is_measured_as_often(bench: Bench, picked: dict[str, Any], tmp_path: Path) -> None:
    """Whichever the prior prefers: the one that training chooses is in two sessions, and in one more when asked."""
    folder = shutil.copytree(bench.folder, tmp_path / "copy")
    bench = Bench(folder, Dataset.open(folder / bench.dataset.path.relative_to(bench.folder)))
    names = {"resnet8-16", "test_resnet-16"}
    training = ("--train", 2, "--distill.method", "labels", "--distill.train.epochs", 10, "--distill.train.workers", 0)
    for best in ("resnet8", "test_resnet"):
        points = {"resnet8": 60, "test_resnet": 60, best: 80}
        (bench.folder / "own.csv").write_text("".join(f"{name},{value},16\n" for name, value in points.items()))
        asked = ("--candidates", "resnet8,test_resnet", "--prior", "own.csv", *training, "--json")
        done = bench.pick(*asked)
        assert done.returncode in (0, 75), done.stderr
        found = json.loads(done.stdout)
        rows = {row["name"]: row for row in found["networks"] if row["name"] in names}
        chosen = found["facts"]["chosen"]
        assert chosen == max(rows, key=lambda name: rows[name]["validation"])
        assert rows[chosen]["sessions"] >= CONFIRMED
        shortly = {
            Checkpoint.open(path).facts.model: Checkpoint.open(path).facts.last_validation
            for path in bench.dataset.path.parent.glob("short-*")
        }
        assert {f"{name}-16": value for name, value in shortly.items()} == {
            name: row["validation"] for name, row in rows.items()
        }, "of the weights that were kept"
    once_more = json.loads(bench.pick(*asked, "--again").stdout)
    after = {row["name"]: row["sessions"] for row in once_more["networks"]}
    assert once_more["facts"]["chosen"] == chosen and after[chosen] > rows[chosen]["sessions"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--target", "coreml"), ("unknown target 'coreml'",)),
        (("--variant", "int4"), ("unknown variant 'int4'",)),
        (("--candidates", "no_such_*"), ("unknown candidate 'no_such_*'",)),
        (("--device", "pi9"), ("pi9",)),
        (("--prior", "runs"), ("nothing in", "trained on these images")),
        (("--prior", "nowhere.csv"), ("prior", "nowhere.csv")),
        (("--train", "2"), ("takes a teacher", "--teacher")),
        (("--budget", "0"), ("budget", "found 0")),
        (("--p90", "10kg"), ("p90", "10ms")),
        (("--p90", "-5ms"), ("p90", "10ms")),
        (("--input.size", "4"), ("at least 8 pixels",)),
    ],
)
def test_mistakes_are_one_line(bench: Bench, arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    assert_one_line(bench.pick("--candidates", "test_resnet", *arguments), 2, *words)


def test_another_task_is_refused(bench: Bench, tmp_path: Path) -> None:
    masks = shutil.copytree(bench.dataset.path, tmp_path / "masks")
    rewrite_manifest(masks, lambda value: value["facts"].update({"task": "segmentation"}))
    assert_one_line(kdpipe("pick", masks, "--p90", "1s"), 2, "is for segmentation", "classification")


def test_options_are_read_as_people_write_them() -> None:
    plan = validated(
        PickPlan, {"p90": "0.02s", "candidates": "mobilenet*, repvit*", "input": {"size": "160,192"}}, "options"
    )
    assert plan.p90 == 20 and plan.candidates == ("mobilenet*", "repvit*") and plan.input.size == (160, 192)
    assert validated(PickPlan, {"p90": 5, "input": {"size": [[96, 128], 96]}}, "x").input.size == ((96, 128), 96)
    with pytest.raises(UserError, match="10ms"):
        validated(PickPlan, {"p90": "3h"}, "options")


# ---- the prior and the graph ----------------------------------------------------------------------------------


def test_the_shipped_prior_says_where_it_is_from_and_knows_networks() -> None:
    head = prior.TABLE.read_text()[:400]
    assert "Apache-2.0" in head and "commit" in head and "2026" in head
    known = prior.imagenet()
    assert len(known) > 400
    # Of several weights those of ImageNet's own images count.
    assert known["mobilenetv4_hybrid_medium"].points < 82
    small = known["mobilenetv4_conv_small"]
    assert 60 < small.at(128) < small.at(160) < small.at(224) < 75
    assert prior.Prior(0.5, None).at(8) == 0.5
    assert [prior.without_tag(name) for name in ("resnet18.a1_in1k", "my.nets:small", "torchvision/resnet18")] == [
        "resnet18", "my.nets:small", "torchvision/resnet18"
    ]  # fmt: skip


@pytest.mark.parametrize("text", NO_TABLES)
def test_a_prior_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prior.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="wanted"):
        prior.of_file(path)


def test_a_prior_is_a_file_as_a_spreadsheet_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "prior.csv"
    path.write_bytes(b"\xef\xbb\xbfmodel,points\r\nresnet18,70\r\n")
    assert prior.of_file(path) == {"resnet18": prior.Prior(70.0, None)}
    with pytest.raises(UserError, match="is no file"):
        prior.of_file(Path("/dev/zero"))  # which has no end


def test_costs_are_those_of_the_network() -> None:
    """Counted without weights, as counted by hand: two convolutions and a head."""
    config = ModelSettings(model="resnet8", input=InputSettings(size=16))
    found = cost_of(config, 10)
    from kdpipe.networks import models

    network, spec = models.create(config, 10)
    assert found.parameters == sum(parameter.numel() for parameter in network.parameters())
    assert found.macs == models.multiply_accumulates(network, spec)
    twice = cost_of(ModelSettings(model="resnet8", input=InputSettings(size=32)), 10)
    assert twice.activations - 10 == 4 * (found.activations - 10)  # the head gives as many whatever the size
    assert family_of("mobilenetv4_conv_small") == family_of("mobilenetv3_small_100") != family_of("resnet18")
    with pytest.raises(UserError):
        cost_of(ModelSettings(model="vit_tiny_patch16_224", input=InputSettings(size=8)), 10)


def test_a_memory_of_costs_that_was_spoilt_is_counted_anew(bench: Bench, picked: dict[str, Any]) -> None:
    memory = bench.workshop / COSTS
    memory.write_text('{"x": [1')
    assert bench.pick("--json", *CANDIDATES).returncode in (0, 75)
    assert "resnet8-16" in memory.read_text()


def test_drawn_weights_are_not_degenerate(bench: Bench) -> None:
    """No scale is zero, and outputs differ from image to image by more than rounding."""
    import torch

    chain = Chain(bench.folder / "drawn")
    config = DrawConfig(model="convnext_atto", input=InputSettings(size=32), images=8)
    made = chain.draw(config, bench.dataset)
    network, _ = restore(made)
    for name, parameter in network.named_parameters():
        if parameter.ndim == 1 and "bias" not in name:
            assert float(parameter.detach().abs().min()) >= 0.4, name
    logits, _ = made.tested
    assert logits.std(0).min() > 1e-3
    assert chain.draw(config, bench.dataset).key == made.key
    assert made.facts.method == DRAWN
    torch.manual_seed(1)  # what is drawn is a function of its seed alone
    other = Chain(bench.folder / "other").draw(config, bench.dataset)
    assert other.manifest.files[Checkpoint.WEIGHTS] == made.manifest.files[Checkpoint.WEIGHTS]
