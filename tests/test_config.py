"""Configuration: unknown keys are named with their neighbours, and every shipped recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RECIPE

from kdpipe.core.config import Recipe, read_recipe, validated
from kdpipe.core.errors import UserError


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_are_valid(path: Path) -> None:
    assert read_recipe(path).name == path.stem
    assert path.read_text().startswith("# "), "a recipe says in its first line what it is"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"distil": {}}, r"unknown key 'distil'; did you mean 'distill'\?"),
        ({"distill": {"temprature": 4}}, r"unknown key 'distill.temprature'; did you mean 'temperature'\?"),
        ({"teacher": {"model": "x", "train": {"augment": {"flop": 1}}}}, r"'teacher.train.augment.flop'.*'flip'"),
        ({"quantize": {"zzz": 1}}, r"unknown key 'quantize.zzz' \(known: calibrate"),
        ({"distill": {"temperature": -1}}, r"'distill.temperature': input should be greater than 0, found -1"),
        ({"distill": {"label_fraction": "all"}}, r"'distill.label_fraction': .*found 'all'"),
        ({"distill": {"method": "kdd"}}, r"'distill.method': .*'labels'.*'stagewise'.*found 'kdd'"),
        ({"distill": {"seeds": []}}, r"'distill.seeds'"),
        ({"name": "../escape"}, r"'name'"),
        ({"student": {}}, r"'student.model': field required, found nothing"),
        ({"data": 3}, r"'data'"),
    ],
)
def test_mistakes_are_one_line(change: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        validated(Recipe, {**SMALL_RECIPE, **change}, "my.yaml")
    assert str(caught.value).startswith("my.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "line 1: not YAML|line 2: not YAML"), ("- 1", "wanted a mapping"), ("", "wanted a mapping")],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "my.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_recipe(tmp_path / "my.yaml")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no recipe at"):
        read_recipe(tmp_path / "none.yaml")


def test_paths_are_taken_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "my.yaml").write_text(
        "name: my\ndata: {source: photos}\nteacher: {model: resnet18, checkpoint: t.pth}\nstudent: {model: resnet10t}\n"
    )
    recipe = read_recipe(tmp_path / "my.yaml")
    assert recipe.data.source == str(tmp_path / "photos")
    assert recipe.teacher.checkpoint == tmp_path / "t.pth"
