"""Configuration: unknown keys are named with their neighbours, and every shipped recipe is valid."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import ROOT, SMALL_RECIPE

from kdpipe.core.config import Recipe, TrainConfig, read_recipe, validated
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
        ({"distill": {"hint": {"stages": 0}}}, r"'distill.hint.stages': stages are counted from 1, .*found 0"),
        ({"distill": {"hint": {"two_stages": 1}}}, r"'distill.hint.two_stages': .*less than 1, found 1"),
        ({"distill": {"deep": {"width": "double"}}}, r"'distill.deep.width': .*'own' or 'doubling', found 'double'"),
        ({"distill": {"deep": {"weight": 0}}}, r"'distill.deep.weight': .*greater than 0, found 0"),
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


@pytest.mark.parametrize("mode", ["python", "json"])
def test_what_came_later_is_in_no_key_until_it_is_said(mode: str) -> None:
    """What was trained before there was an option is found again."""
    plain = validated(TrainConfig, {"model": "resnet8"}, "test").model_dump(mode=mode)
    assert not set(TrainConfig.LATER) & set(plain)
    said = validated(TrainConfig, {"model": "resnet8", "deep": {"weight": 0.3}, "hint": {"stages": -1}}, "test")
    dumped = said.model_dump(mode=mode)
    assert set(dumped) - set(plain) == {"deep", "hint"} and dumped["deep"]["weight"] == 0.3
    assert TrainConfig.model_validate(dumped) == said
    again = validated(TrainConfig, {"model": "resnet8", "deep": {"weight": 1, "width": "own"}}, "test")
    assert again.model_dump(mode=mode) == plain
