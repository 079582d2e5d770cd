"""What a task says of outputs: labels, scores, figures, changes; the same on a device as here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Made
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from kdpipe.report.page import render
from kdpipe.runtime.task import TASKS, Classification

TASK = Classification()


def test_the_largest_logit_decides() -> None:
    outputs = np.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0], [0.0, 0.0, 1.0]])
    assert TASK.decide(outputs).tolist() == [1, 0, 2]
    assert TASK.scores(outputs, np.array([1, 1, 2])).tolist() == [True, False, True]
    other = outputs[:, ::-1]
    assert TASK.agreement(outputs, outputs) == 1 and TASK.agreement(outputs, other) == pytest.approx(1 / 3)
    assert TASK.differing(outputs, other).tolist() == [1, 2]


def test_summary_is_wilsons() -> None:
    found = TASK.summary(np.array([True] * 9 + [False]))
    assert (found.low, found.high) == (pytest.approx(0.5958, abs=1e-4), pytest.approx(0.9821, abs=1e-4))
    assert TASK.summary(np.zeros(10, bool)).low == pytest.approx(0, abs=1e-12)
    assert TASK.summary(np.ones(10, bool)).high == pytest.approx(1)
    with pytest.raises(ValueError, match="at least one"):
        TASK.summary(np.zeros(0, bool))


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_summary_is_scipys(counts: tuple[int, int]) -> None:
    right, n = counts
    found = TASK.summary(np.arange(n) < right)
    known = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (found.low, found.high) == (pytest.approx(known.low, abs=1e-9), pytest.approx(known.high, abs=1e-9))


@given(st.integers(0, 4000), st.integers(0, 4000))
def test_p_value_is_scipys(lost: int, won: int) -> None:
    before = np.array([True] * lost + [False] * won + [True])
    found = TASK.change(before, np.array([False] * lost + [True] * won + [True]))
    known = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert found.p_value == pytest.approx(known, rel=1e-6, abs=1e-12)


def test_change_by_hand() -> None:
    before = np.array([True] * 90 + [True] * 8 + [False] * 2)
    found = TASK.change(before, np.array([True] * 90 + [False] * 8 + [True] * 2))
    assert (found.lost, found.won, found.n) == (8, 2, 100)
    assert found.difference == pytest.approx(-0.06)
    assert found.p_value == pytest.approx(2 * (1 + 10 + 45) / 1024)  # exact binomial
    assert found.low < -0.06 < found.high
    same = TASK.change(before, before)
    assert (same.difference, same.p_value) == (0, 1)
    with pytest.raises(ValueError, match="equally long"):
        TASK.change(before, before[1:])


def test_a_decision_in_words() -> None:
    decisions = TASK.decide(np.array([[0.1, 0.9], [2.0, 1.0]]))
    assert [TASK.tell(decision, ["cat", "dog"]) for decision in decisions] == ["dog", "cat"]


def test_the_page_says_the_tasks_own_figure(made: Made) -> None:
    """Neither the page nor its figures know what is counted."""
    numbers = made.report.numbers
    numbers["task"] |= {"metric": "mean overlap", "summary_note": "by hand", "change_note": "Lost: fewer pixels."}
    page = render(numbers, dict.fromkeys(range(len(made.dataset.samples("test"))), "data:,"))
    assert page.count("mean overlap") >= 6 and "fewer pixels" in page
    for word in ("top-1", "Wilson", "Agresti", "right before"):
        assert word not in page.partition("Every version and setting")[0], word


def test_every_artifact_knows_its_task(made: Made) -> None:
    artifacts = [made.dataset, made.teacher, made.student, made.graph, made.measurement, *made.models.values()]
    assert {artifact.facts.task for artifact in [*artifacts, *made.bundles.values()]} == {"classification"}
    assert set(TASKS) == {"classification", "segmentation"}


def test_nobody_else_decides() -> None:
    """Only the task turns outputs into labels: elsewhere an argmax is over something else, and named here."""
    allowed = {
        "distill/losses.py",  # the teacher's decision as a label, inside a loss
        "distill/methods.py",  # the class that a mixed label has most of
        "core/choosing.py",  # the best of the pool
        "quantize/calibrate.py",  # the farthest point
        "quantize/ranges.py",  # the best range
        "data/masks.py",  # the rarest class
        "data/prepare.py",  # the first empty class
        "export/parity.py",  # the worst image
        "networks/models.py",  # in the graph itself, where that is asked for
        "export/rewrites.py",  # which pixel a resizing takes
        "runtime/overlay.py",  # the farthest colour
        "runtime/task.py",
    }
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        if name.startswith((".", "tests/", "benchmarks/", "docs/")):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == "argmax":
                found.add(name)
    assert found <= allowed, found - allowed


SAYS_WHICH = re.compile("dense|mask|segment|classification|miou", re.IGNORECASE)
ANOTHER_MASK = re.compile("attn_mask|umask|masked", re.IGNORECASE)  # of attention, of a process, of what is left out


def test_few_know_that_there_are_two_tasks() -> None:
    """Six files at most, outside the rooms that make a task what it is: by every name and string of their code."""
    found = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")]:
        name = path.relative_to(ROOT).as_posix()
        rooms = (".", "tests/", "benchmarks/", "docs/", "data/", "distill/", "networks/", "report/", "runtime/task.py")
        if not name.startswith(rooms) and any(SAYS_WHICH.search(ANOTHER_MASK.sub("", word)) for word in words_of(path)):
            found.add(name)
    assert {"core/config.py", "proposal.py"} <= found, "which have settings of each, and find out which one it is"
    assert len(found) <= 6, sorted(found)


def words_of(path: Path) -> Iterator[str]:
    """Every name and string of a file's code, without docstrings."""
    tree = ast.parse(path.read_text())
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) not in told:
            values = [node.value] if isinstance(node, ast.Constant) else list(vars(node).values())
            yield from (value for value in values if isinstance(value, str))
            yield from (name for value in values if isinstance(value, list) for name in value if isinstance(name, str))


@pytest.mark.parametrize("right", [0, 1, -1])
def test_an_interval_holds_its_share(right: int) -> None:
    """To the last digit, also where all answers are right or wrong: a figure draws the distance."""
    for n in range(2, 600):
        scores = np.arange(n) < right % n if right else np.ones(n, bool)
        for each in (scores, ~scores):
            found = TASKS["classification"].summary(each)
            assert 0 <= found.low <= found.value <= found.high <= 1, n
