"""From a folder of images and a file of weights to a recipe: kdpipe init, recipe check, the schema for editors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
import yaml
from conftest import ROOT, assert_one_line, command, kdpipe
from PIL import Image

from kdpipe import proposal
from kdpipe.core.config import read_recipe
from kdpipe.core.errors import UserError
from kdpipe.networks.recognise import recognise, shapes_of

CLASSES = ("keep-left", "no-entry", "stop", "yield")


def write_signs(root: Path, parts: dict[str, int], side: int = 36, classes: tuple[str, ...] = CLASSES) -> Path:
    """Coloured signs on noise, as a camera on the road would crop them: so many of each class a part."""
    generator = np.random.default_rng(0)
    for part, count in parts.items():
        for label, name in enumerate(classes):
            folder = root / part / name
            folder.mkdir(parents=True, exist_ok=True)
            for at in range(count):
                size = side + int(generator.integers(-4, 5))
                pixels = generator.normal(110, 40, (size, size, 3))
                edge = size // 4 + int(generator.integers(-2, 3))
                colour = np.array([[220, 40, 40], [40, 40, 220], [220, 200, 40], [40, 200, 60]][label % 4])
                pixels[edge:-edge, edge : size - edge if label % 2 else size - 2 * edge // 3] = colour
                image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
                image.save(folder / f"{at:03d}.{'jpg' if at % 2 else 'png'}")
    return root


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as a person has it: signs by part and class, and the weights of a teacher beside them."""
    root = tmp_path_factory.mktemp("road")
    write_signs(root / "signs", {"train": 6, "test": 3})
    torch.save(timm.create_model("resnet18", num_classes=4).state_dict(), root / "best.pth")
    return root


def test_init_writes_a_recipe_that_is_right(road: Path, workdir: Path) -> None:
    """One command, no question, no line of YAML by hand."""
    done = kdpipe("init", road / "signs", "--checkpoint", road / "best.pth", "--yes")
    assert done.returncode == 0, done.stderr
    assert "next: kdpipe run signs.yaml" in done.stdout
    assert "teacher resnet18 from best.pth" in done.stdout
    recipe = read_recipe(workdir / "signs.yaml")
    assert recipe.data.source == str(road / "signs") and recipe.data.test_split == "test"
    assert (recipe.teacher.model, recipe.teacher.checkpoint) == ("resnet18", road / "best.pth")
    assert recipe.teacher.input.size == recipe.student.input.size == 32
    assert recipe.student.model == "resnet10t"
    text = (workdir / "signs.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=kdpipe.schema.json\n")
    assert text.count("#") >= 6, "it says why"
    assert kdpipe("recipe", "check", "signs.yaml").returncode == 0
    done = kdpipe("run", "signs.yaml", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert not (workdir / "artifacts" / "data").exists() and not list(workdir.glob("artifacts/*-*"))
    assert sorted(path.name for path in workdir.iterdir() if path.name != "artifacts") == [
        "kdpipe.schema.json", "signs.yaml"
    ]  # fmt: skip


def test_init_where_everything_lies(road: Path, tmp_path: Path) -> None:
    """Without a word: the folder with a training part and the one file of weights here are taken, by relative paths."""
    import shutil

    here = tmp_path / "here"
    shutil.copytree(road, here)
    done = kdpipe("init", "--yes", "--json", cwd=here)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["recipe"], found["following"]) == ("signs.yaml", "kdpipe run signs.yaml")
    text = (here / "signs.yaml").read_text()
    assert "source: signs\n" in text and "checkpoint: best.pth\n" in text
    moved = here.rename(tmp_path / "elsewhere")
    assert kdpipe("recipe", "check", moved / "signs.yaml").returncode == 0


def test_init_never_replaces_a_file(road: Path, workdir: Path) -> None:
    mine = workdir / "signs.yaml"
    mine.write_text("mine")
    (workdir / "kdpipe.schema.json").write_text('{"mine": 1}')
    arguments = ("init", road / "signs", "--checkpoint", road / "best.pth", "--yes")
    assert_one_line(kdpipe(*arguments), 2, "signs.yaml is there already", "--out")
    assert mine.read_text() == "mine"
    assert kdpipe(*arguments, "--out", "other.yaml").returncode == 0
    assert json.loads((workdir / "kdpipe.schema.json").read_text()) == {"mine": 1}
    # Somebody else writes it in the meantime.
    (workdir / "late.yaml").write_text("theirs")
    with pytest.raises(UserError, match="is there already"):
        proposal.write(proposal.Proposal("x", (workdir / "other.yaml").read_text(), ""), workdir / "late.yaml")
    assert (workdir / "late.yaml").read_text() == "theirs"
    assert not [path for path in workdir.iterdir() if path.name.startswith(".")]


def test_a_recipe_that_is_wrong_is_not_written(workdir: Path) -> None:
    with pytest.raises(UserError, match="field required"):
        proposal.write(proposal.Proposal("x", "nonsense: 1\n", ""), workdir / "x.yaml")
    assert not list(workdir.iterdir())


def test_classes_without_parts(tmp_path: Path) -> None:
    """A folder a class and nothing else: a part is cut for testing, and the data can be read so."""
    root = write_signs(tmp_path, {"my signs": 8}) / "my signs"
    done = kdpipe("init", root, "--model", "resnet18", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    recipe = read_recipe(tmp_path / "my-signs.yaml")
    assert recipe.data.test_split is None and recipe.teacher.checkpoint is None
    done = kdpipe("run", "my-signs.yaml", "--until", "data", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / json.loads(done.stdout)["artifacts"][0] / "manifest.json").read_text())
    assert manifest["facts"]["classes"] == 4 and sum(manifest["facts"]["images"].values()) == 32


def test_large_images_take_the_networks_own_size(tmp_path: Path) -> None:
    write_signs(tmp_path / "photos", {"training": 2, "valid": 1}, side=200)
    assert kdpipe("init", "photos", "--model", "resnet18", "--yes", cwd=tmp_path).returncode == 0
    recipe = read_recipe(tmp_path / "photos.yaml")
    assert recipe.teacher.input.size is None and recipe.student.model == "mobilenetv4_conv_small"
    assert (recipe.data.train_split, recipe.data.test_split) == ("training", "valid")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["no folder nowhere"]),
        (["empty"], ["no images by class in empty", "found no folders"]),
        ([], ["no folder with a part 'train' here", "kdpipe init FOLDER"]),
        (["two"], ["several folders of images (a, b)"]),
        (["signs", "--checkpoint", "none.pth"], ["no file at none.pth"]),
        (["signs", "--checkpoint", "broken.pth"], ["broken.pth is cut short"]),
        (["signs", "--checkpoint", "seven.pth"], ["seven.pth has 7 outputs", "4 classes"]),
        (["signs", "--checkpoint", "other.pth"], ["other.pth is of no network of timm or torchvision", "--model"]),
        (["signs", "--model", "resnet19"], ["unknown model 'resnet19'"]),
        (["signs", "--model", "resnet18", "--student", "mobilnet"], ["unknown model 'mobilnet'"]),
        (["signs", "--model", "resnet18", "--size", "3"], ["8"]),
        (["signs", "--model", "resnet18", "--device", "pi5"], ["unknown device 'pi5'"]),
        (["signs", "--model", "resnet18", "--out", "no/such/folder.yaml"], ["cannot write no/such/folder.yaml"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes_of_init(workdir: Path, arguments: list[str], words: list[str]) -> None:
    write_signs(workdir / "signs", {"train": 2, "val": 1})
    if arguments[:1] in (["two"], []):
        for name in ("a", "b"):
            write_signs(workdir / "two" / name, {"train": 1})
    if not arguments:
        (workdir / "signs").rename(workdir / "two" / "deeper")
    (workdir / "empty").mkdir()
    (workdir / "broken.pth").write_bytes(b"PK\x03\x04 no more")
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), workdir / "seven.pth")
    torch.save({"weight": torch.zeros(3)}, workdir / "other.pth")
    before = sorted(workdir.rglob("*"))
    assert_one_line(kdpipe("init", *arguments, "--yes"), 2, *words)
    assert sorted(workdir.rglob("*")) == before, "nothing is half-written"


def test_init_without_anybody_to_ask(road: Path, workdir: Path) -> None:
    done = subprocess.run(
        command("init", road / "signs"), stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert_one_line(done, 2, "nobody is there to answer", "--yes")
    assert not list(workdir.iterdir())


def test_init_asks_at_most_five_questions(tmp_path: Path) -> None:
    """A person who only presses Enter has a recipe; what is answered is taken."""
    import pty

    write_signs(tmp_path / "signs", {"train": 2, "val": 1})
    for name, answers in (("enter", [""] * 5), ("words", ["unknown.pth", "resnet18", "48", "resnet14t", "local"])):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            command("init", "signs", "--out", f"{name}.yaml"),
            cwd=tmp_path, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(slave)
        os.write(master, "".join(f"{answer}\n" for answer in answers).encode())
        output, errors = process.communicate(timeout=1800)
        os.close(master)
        assert process.returncode == 0, errors
        assert f"next: kdpipe run {name}.yaml" in output
        torch.save({"weight": torch.zeros(3)}, tmp_path / "unknown.pth")  # for the second one
    words = read_recipe(tmp_path / "words.yaml")
    assert (words.teacher.model, words.teacher.input.size, words.student.model) == ("resnet18", 48, "resnet14t")
    assert words.teacher.checkpoint == tmp_path / "unknown.pth"


def test_odd_names_survive(tmp_path: Path) -> None:
    """What YAML would take for something else, or a shell for more than a name."""
    root = write_signs(tmp_path / "no: #1 'signs' é", {"train": 2, "val": 1})
    done = kdpipe("init", root, "--model", "resnet18", "--yes", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    [path] = tmp_path.glob("*.yaml")
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", path.name)
    assert read_recipe(path).data.source == str(root)
    bad = root.rename(tmp_path / "a\x1b[2Jb")
    assert_one_line(kdpipe("init", bad, "--model", "resnet18", "--yes", cwd=tmp_path), 2, "control characters")


def tensors(name: str) -> dict[str, torch.Tensor]:
    if name.startswith("torchvision/"):
        return dict(torchvision.models.get_model(name.partition("/")[2], num_classes=7).state_dict())
    return dict(timm.create_model(name, num_classes=7).state_dict())


@pytest.mark.lab  # for its seconds
def test_weights_tell_their_network() -> None:
    """Of which a name nowhere stands: whatever is found has the same tensors; one tensor more is no network."""
    state = tensors("resnet18")
    found = recognise({"": state}, "best model")
    assert found is not None and found.classes == 7
    assert shapes_of(tensors(found.model)) == shapes_of(state)
    assert recognise({"": {**state, "more": torch.zeros(1)}}, "resnet18") is None


@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "vit_tiny_patch16_224", "torchvision/mobilenet_v3_small"])
def test_a_files_name_decides_between_equals(name: str) -> None:
    """Also inside of what trainers save around the weights, under a prefix, and without BatchNorm's counters."""
    wrapped = {f"model.{key}": value for key, value in tensors(name).items() if "num_batches_tracked" not in key}
    saved = {"optimizer.x": {"a": torch.zeros(1)}, "state_dict": wrapped}
    found = recognise(saved, name.replace("/", "-") + "-epoch3")
    assert found is not None and (found.model, found.classes) == (name, 7)


def test_what_holds_no_network_is_none() -> None:
    assert recognise({}, "resnet18") is None
    assert recognise({"": {"fc.weight": torch.zeros(()), "conv1.weight": torch.zeros(3)}}, "resnet18") is None


# ---- recipe check and schema -----------------------------------------------------------------------------


def test_recipe_check_imports_nothing_heavy() -> None:
    script = (
        "import sys; sys.argv[1:] = ['recipe', 'check', sys.argv[1]]\n"
        "from kdpipe.cli import main\ntry: main()\nfinally: print(*sys.modules)"
    )
    arguments = [sys.executable, "-c", script, str(ROOT / "recipes" / "digits.yaml")]
    loaded = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert not {"torch", "timm", "onnx", "sklearn", "matplotlib"} & set(loaded.stdout.split())


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_fits_the_schema(path: Path) -> None:
    schema = proposal.schema()
    assert misfit(yaml.safe_load(path.read_text()), schema, schema) == ""


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        ({"bench": {"threads": "1,2,all", "sustained": "10m", "rate": "5fps"}}, ""),
        ({"bench": {"threads": [1, "all"], "sustained": 10}}, ""),
        ({"quantize": None, "export": {"targets": ["tflite"]}}, ""),
        ({"distill": {"seeds": [0, 1], "students": {"hot": {"temperature": 20}}}}, ""),
        ({"distill": {"temprature": 3}}, "temprature"),
        ({"distill": {"method": "kdd"}}, "kdd"),
        ({"bench": {"rounds": "many"}}, "many"),
        ({"name": 3}, "3"),
    ],
    ids=str,
)
def test_the_schema_knows_right_from_wrong(change: dict[str, Any], wrong: str, tmp_path: Path) -> None:
    """As reading a recipe does."""
    network = {"model": "test_resnet"}
    values = {
        "name": "x", "data": {"source": "digits", "test_split": None}, "teacher": network, "student": network, **change
    }  # fmt: skip
    schema = json.loads(kdpipe("recipe", "schema").stdout)
    found = misfit(values, schema, schema)
    assert (wrong in found) if wrong else found == ""
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(values))
    done = kdpipe("recipe", "check", tmp_path / "x.yaml")
    assert done.returncode == (2 if wrong else 0), done.stderr


def misfit(value: Any, schema: dict[str, Any], root: dict[str, Any]) -> str:
    """Why a value does not fit a JSON schema of the kind that is written here; empty if it does."""
    if "$ref" in schema:
        found: Any = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        return misfit(value, found, root)
    if "anyOf" in schema:
        faults = [misfit(value, each, root) for each in schema["anyOf"]]
        return "" if "" in faults else max(faults, key=len)
    kinds = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    kind = schema.get("type")
    if kind and (not isinstance(value, kinds[kind]) or (isinstance(value, bool) and kind in ("integer", "number"))):
        return f"{value} is no {kind}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{value} is not one of {schema['enum']}"
    if "const" in schema and value != schema["const"]:
        return f"{value} is not {schema['const']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        for name, item in value.items():
            more = schema.get("additionalProperties", True)
            if name not in known and more is False:
                return f"{name} is not known"
            inner = known.get(name, more if isinstance(more, dict) else {})
            if fault := misfit(item, inner, root):
                return fault
        return next((f"{name} is missing" for name in schema.get("required", ()) if name not in value), "")
    if isinstance(value, list):
        inner = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
        return next(
            (fault for item, each in zip(value, inner, strict=False) if (fault := misfit(item, each, root))), ""
        )
    return ""
