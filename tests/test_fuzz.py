"""Whoever reads a stranger's file, on a few hundred changed ones each; ten thousand in the lab."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Made
from fuzz import READERS, exercise

INPUTS = 500  # of each reader


@pytest.mark.parametrize("name", READERS)
def test_changed_inputs_end_in_no_traceback_and_in_no_belief(made: Made, tmp_path: Path, name: str) -> None:
    told = exercise(READERS[name](made, tmp_path), INPUTS)
    assert told["refused"] > INPUTS / 20, "inputs that nobody minds are no test"
