"""The Python interface as docs/python.md shows it: its blocks run, and their last lines show themselves."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, Made

from kdpipe.chain import Chain
from kdpipe.core.config import DataPlan
from kdpipe.core.errors import UserError
from kdpipe.pipeline import Outcome
from kdpipe.report.plots import gain_names
from kdpipe.report.shown import figure, table

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a block as a notebook does; the value of its last line."""
    *statements, last = ast.parse(source).body
    exec(compile(ast.Module(statements, []), "docs/python.md", "exec"), names)
    assert isinstance(last, ast.Expr)
    return eval(compile(ast.Expression(last.value), "docs/python.md", "eval"), names)


@pytest.mark.lab  # for its seconds
def test_the_documents_blocks_run(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside what the small recipe sealed: the document's networks are its networks."""
    kept = [made.dataset.path, made.teacher.path, made.graph.path, made.models["onnxruntime-float32"].path]
    students = [step.path for step in made.chain.steps if step.name.startswith("student-")]
    for path in [*kept, *students]:
        shutil.copytree(path, tmp_path / "artifacts" / path.name, copy_function=os.link)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    by_recipe, gain, by_hand, found = (run_cell(block, names) for block in BLOCKS)

    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [step[step.index("sealed") - 1] for step in told if "sealed" in step] == [
        *("data", "teacher", "student-labels-seed0", "student-kd-seed0", "student-labels-seed1", "student-kd-seed1"),
        *("graph", "onnxruntime-float32"),
    ]
    for shown in (by_recipe, by_hand):
        assert shown._repr_html_().count("<tr>") == 3
        assert "int8" in str(shown)
    assert "<td>onnxruntime-int8" in by_recipe._repr_html_() and "Gain" in by_recipe._repr_html_()
    assert str(by_recipe).splitlines()[0].split()[:2] == ["bundle", "top-1"]
    assert gain._repr_html_().startswith("<svg") and "seed 1" in gain.svg
    accuracy, damage, path, trained = found
    assert accuracy == made.student.facts.test_accuracy
    assert list(trained) == np.bincount(made.dataset.samples("train").labels).tolist()
    assert damage.images and path.is_dir()
    # Both ways made the same artifacts.
    assert len(list((tmp_path / "artifacts").glob("onnxruntime-int8-*"))) == 1
    assert names["bundles"]["int8"].key == names["outcome"].bundles["onnxruntime-int8"].key


def test_outcome_shows_what_the_command_prints(made: Made, tmp_path: Path) -> None:
    outcome = Outcome(made.report, {"local": made.measurement}, made.bundles, "")
    assert "onnxruntime-int8" in str(outcome.table) and str(outcome.table) == str(table(made.report))
    outcome.figure("pareto").save(tmp_path / "pareto.svg")
    text = (tmp_path / "pareto.svg").read_text()
    assert text.startswith("<?xml") and text.count("<svg") == 1
    with pytest.raises(UserError, match=r"unknown figure 'pareo', wanted .*did you mean 'pareto'"):
        figure(made.report, "pareo")
    assert made.report.page.read_text().count("<svg") >= 3
    # A notebook writes what a cell gives: no pages of manifest.
    assert len(repr(outcome)) < 200 * (3 + len(made.bundles))


def test_gains_of_one_method_have_figures_of_their_own() -> None:
    assert gain_names([{"method": "kd"}, {"method": "dkd"}, {"method": "kd"}]) == ["gain kd", "gain dkd", "gain kd 2"]


def test_a_relative_folder_is_the_same_from_anywhere(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(photos.parent)
    chain = Chain("artifacts")
    made = chain.data(DataPlan(source="photos", val_fraction=0))
    assert made.samples("train")[0].path.is_absolute()
    assert chain.data(DataPlan(source=str(photos), val_fraction=0)).key == made.key


def test_importing_it_is_light() -> None:
    code = "import sys, kdpipe.pipeline, kdpipe.chain, kdpipe.report.shown; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "timm", "matplotlib", "onnxruntime", "openvino", "rich", "scipy"}
