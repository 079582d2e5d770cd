"""Claims that are named before the runs, and the study that makes runs for them: plan, cost, locks, page, advice."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Told, Trained, assert_one_line, kdpipe, listening, replace_file
from scipy import stats

from kdpipe import pipeline, study
from kdpipe.chain import Chain
from kdpipe.core import proc
from kdpipe.core.claims import Claim, Table, difference, groups_of, judge, parse_claim
from kdpipe.core.config import StudyPlan, TrainConfig, in_epochs, read_recipe, validated
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Checkpoint, Study
from kdpipe.data.dataset import Dataset
from kdpipe.inventory import unneeded
from kdpipe.report.study import advise, drawings, figures, spread
from kdpipe.runtime.task import TASKS

SHARES = (0.02, 0.1, 1.0)
CLAIMS = [Claim(f"m{at}", "labels", 0.02) for at in range(3)] + [Claim("m0", "labels", 1.0), Claim("m1", "m2", 0.1)]


def simulated(generator: np.random.Generator, seeds: int, gain: float, spread: float, images: float) -> Table:
    """Six methods: a seed moves all of a share, and each a little more, the more the fewer images there are.

    Args:
        gain: of every method over labels, points.
        spread: by how much the methods differ in how steady they are, as a logarithm.
        images: what other test images would add, standard error of each method in points.
    """
    table, groups = {}, 20
    steadiness = np.exp(generator.normal(0, spread, 6))
    for share in SHARES:
        scale = {0.02: 2.0, 0.1: 1.0, 1.0: 0.5}[share]
        common = generator.normal(50, scale, seeds)
        for at, name in enumerate(["labels", *(f"m{number}" for number in range(5))]):
            by_group = generator.normal(0, images * np.sqrt(groups), groups)
            runs = {}
            for seed in range(seeds):
                whole = by_group + common[seed] + generator.normal(0, steadiness[at] * scale) + gain * (at > 0)
                runs[seed] = np.array([whole.mean(), *((whole.sum() - whole) / (groups - 1))])
            table[name, share] = runs
    return table


@pytest.mark.parametrize(("seeds", "spread", "images"), [(2, 0.0, 0.0), (3, 0.6, 0.0), (6, 0.6, 0.5)])
def test_methods_that_do_not_differ_hold_nothing(seeds: int, spread: float, images: float) -> None:
    """At most one study in 20 may name a gain that is none; so many may show a few more by chance (99 %)."""
    generator, studies, false = np.random.default_rng(seeds), 120, 0
    for _ in range(studies):
        judged = judge(CLAIMS, simulated(generator, seeds, 0.0, spread, images), 1.0, 1000)
        false += any(each.answer == "holds" for each in judged)
    assert false <= stats.binom.ppf(0.99, studies, 0.05)


def test_a_real_difference_is_found_and_none_is_denied() -> None:
    generator, found, denied = np.random.default_rng(0), 0, 0
    for _ in range(40):
        judged = judge(CLAIMS[:4], simulated(generator, 6, 8.0, 0.0, 0.0), 1.0, 1000)
        found += sum(each.answer == "holds" for each in judged)
        denied += sum(each.answer == "does not hold" for each in judged)
    assert found >= 0.9 * 160
    assert denied == 0
    steady = simulated(generator, 12, 0.0, 0.0, 0.0)
    [judged] = judge([Claim("m0", "labels", 1.0)], steady, 3.0, 1000)
    assert judged.answer == "does not hold", judged


def test_two_methods_alone_are_a_paired_t_test() -> None:
    """Nothing else is there to pool with, and the test images leave nothing open: scipy's own test is the referee."""
    generator = np.random.default_rng(4)
    first, second = generator.normal(52, 1, 5), generator.normal(50, 1, 5)
    table: Table = {
        ("a", 0.1): {seed: np.full(11, value) for seed, value in enumerate(first)},
        ("b", 0.1): {seed: np.full(11, value) for seed, value in enumerate(second)},
    }
    [judged] = judge([Claim("a", "b", 0.1)], table, 1.0, 100)
    wanted = stats.ttest_rel(first, second)
    assert judged.p_value == pytest.approx(wanted.pvalue)
    low, high = wanted.confidence_interval()
    assert (judged.interval.low, judged.interval.high) == pytest.approx((low, high))


def test_the_images_share_of_an_error_is_that_of_a_mean() -> None:
    """As many groups as images: the jackknife of a share is its standard error."""
    generator = np.random.default_rng(2)
    right = [generator.random(40) < share for share in (0.7, 0.5)]
    groups = groups_of(40)
    assert sorted(groups) == list(range(40))
    table = {
        (name, 1.0): {0: figures(TASKS["classification"], scores, groups)}
        for name, scores in zip("ab", right, strict=True)
    }
    found = difference(table, "a", "b", 1.0)
    apart = 100 * (right[0].astype(float) - right[1])
    assert found is not None
    assert found.points == pytest.approx(apart.mean())
    assert found.image_error == pytest.approx(apart.std(ddof=1) / np.sqrt(40))
    [judged] = judge([Claim("a", "b", 1.0)], table, 1.0, 40)
    assert (judged.answer, judged.interval.low) == ("one draw", None)


def test_how_many_seeds_more_would_tell() -> None:
    """With that many the claim is told in most of the studies that follow."""
    generator = np.random.default_rng(5)
    unsure = [
        each
        for _ in range(60)
        for each in judge(CLAIMS[:1], simulated(generator, 3, 2.0, 0.0, 0.0), 0.5, 1000)
        if each.answer == "not enough data" and each.more_seeds is not None and 1.5 < each.interval.value < 2.5
    ]
    seeds = 3 + round(np.median([each.more_seeds for each in unsure if each.more_seeds is not None]))
    more = [judge(CLAIMS[:1], simulated(generator, seeds, 2.0, 0.0, 0.0), 0.5, 1000) for _ in range(30)]
    assert sum(each.answer != "not enough data" for [each] in more) >= 15
    few = judge(CLAIMS[:1], simulated(np.random.default_rng(6), 3, 0.0, 0.0, 5.0), 0.5, 1000)[0]
    assert (few.answer, few.more_seeds) == ("not enough data", None)
    assert few.images_needed is not None
    assert few.images_needed > 1000


def test_claims_as_they_are_written() -> None:
    assert parse_claim("kd-T4 > labels at 2% by 1.5") == Claim("kd-T4", "labels", 0.02, 1.5)
    assert parse_claim(str(Claim("hint", "kd-T20", 0.1))) == Claim("hint", "kd-T20", 0.1)
    for text in (
        "kd better than labels",
        "kd > labels",
        "kd > labels at 0",
        "kd > labels at 1.2",
        "kd > kd at 1",
        "a > b at 1 by .",
        "a > b at ..1",
    ):
        with pytest.raises(UserError, match="claim"):
            parse_claim(text)


# ---- a study of digits ---------------------------------------------------------------------------------------


def design_of(trained: Trained, folder: Path) -> tuple[Dataset, Checkpoint, Chain]:
    """What a study is of, beside its settings."""
    return trained.dataset, trained.teacher, Chain(folder)


def options(**more: object) -> list[object]:
    settings: dict[str, object] = {
        "student": "resnet8",
        "student.input.size": 16,
        "fractions": "0.05,0.1",
        "methods": "kd,hint",
        "temperatures": "4,1",
        "seeds": 2,
        "views": 240,
        "int8": "none",
        "distill.train.workers": 0,
        "distill.train.batch-size": 16,
        "distill.train.augment.crop": "pad",
        **more,
    }
    return [word for name, value in settings.items() if value is not None for word in (f"--{name}", value)]


@pytest.fixture(scope="module")
def studied(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object], Mapping[str, Any]]:
    """The artifacts of a study, the command that made it, and what that said."""
    folder = tmp_path_factory.mktemp("study")
    asked = ["study", trained.dataset.path, trained.teacher.path, "--artifacts", folder, *options()]
    planned = kdpipe(*asked, "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    assert not list(folder.glob("cell-*"))
    assert [each["sealed"] for each in json.loads(planned.stdout)["runs"]] == [False] * 24
    done = kdpipe(*asked, "--json")
    assert done.returncode == 0, done.stderr
    return folder, asked, json.loads(done.stdout)


def test_every_method_has_the_same_images_views_and_steps(
    studied: tuple[Path, list[object], Mapping[str, Any]],
) -> None:
    folder, _, told = studied
    runs = [Checkpoint.open(path) for path in sorted(folder.glob("cell-*"))]
    assert len(runs) == 6 * 2 * 2
    for share in (0.05, 0.1):
        for seed in (0, 1):
            alike = [run for run in runs if (run.settings["label_fraction"], run.settings["seed"]) == (share, seed)]
            assert len({run.file(Checkpoint.IMAGES).read_bytes() for run in alike}) == 1
            assert len({run.facts.steps for run in alike}) == 1
            assert abs(alike[0].facts.epochs * alike[0].facts.training_images - 240) < 0.2 * 240
    numbers = told["numbers"]
    assert numbers["methods"] == ["labels", "kd-T4", "kd-T1", "hint", "smoothing", "shuffled"]
    by_name = {(row["method"], row["fraction"]): row for row in numbers["rows"]}
    one = next(run for run in runs if run.settings["method"] == "hint" and run.settings["label_fraction"] == 0.1)
    row = by_name["hint", 0.1]["runs"][one.settings["seed"]]
    assert row["accuracy"] == pytest.approx(100 * one.facts.test_accuracy)
    control = next(run for run in runs if run.path.name.startswith("cell-shuffled"))
    assert control.settings["shuffled_teacher"]
    smoothed = next(run for run in runs if run.path.name.startswith("cell-smoothing"))
    assert smoothed.settings["train"]["label_smoothing"] == 0.1
    gains = [row for row in numbers["rows"] if row["gain"]]
    assert len(gains) == 10
    assert all(row["gain"]["low"] < row["gain"]["value"] < row["gain"]["high"] for row in gains)
    assert all(0 < row["agreement"] <= 100 for row in numbers["rows"])  # of labels alone too: what kd adds to
    # Two seeds say little, but no accuracy is below nothing or above all.
    gained = [gain for row in numbers["classes"]["rows"] for gain in row["gains"]]
    for least, found in [(0, row["accuracy"]) for row in numbers["rows"]] + [(-100, gain) for gain in gained]:
        assert found["low"] is None or least <= found["low"] < found["high"] <= 100
    assert numbers["data"]["key"] == runs[0].manifest.inputs["data"].key
    assert {row["temperature"] for row in numbers["temperatures"]} == {1, 4}


def test_claims_are_named_in_the_plan_and_judged_on_the_page(
    studied: tuple[Path, list[object], Mapping[str, Any]],
) -> None:
    folder, _, told = studied
    claims = told["numbers"]["claims"]
    assert [each["claim"] for each in claims] == [
        "kd-T4 > labels at 0.05",
        "hint > labels at 0.05",
        "kd-T4 > shuffled at 0.05",
    ]
    page = Path(told["page"]).read_text()
    assert not re.search(r'(src|href)="https?:', page)
    for words in (
        "Gain by images",
        *(each["answer"] for each in claims),
        "corrected by Holm",
        "Gain of kd over labels",
    ):
        assert words in page
    [sealed] = folder.glob("study-*")
    made = Study.open(sealed)
    assert [each.claim for each in made.facts.claims] == [each["claim"] for each in claims]
    assert made.facts.runs == 24


def test_the_advised_recipe_trains_what_was_run(
    studied: tuple[Path, list[object], Mapping[str, Any]], trained: Trained
) -> None:
    folder, _, told = studied
    [sealed] = folder.glob("study-*")
    recipe = read_recipe(sealed / Study.RECIPE)
    assert recipe.teacher.checkpoint is not None
    assert recipe.teacher.checkpoint.resolve() == (trained.teacher.path / Checkpoint.WEIGHTS).resolve()
    advised = told["numbers"]["advice"]["method"]
    run = next(Checkpoint.open(path) for path in folder.glob(f"cell-{advised}-0.1-seed0-*"))
    config = pipeline.student_runs(recipe.student, recipe.distill)[f"student-{run.settings['method']}-seed0"]
    assert config == TrainConfig.model_validate(run.settings)
    told_data = Chain(folder).data_order(recipe.data)
    assert told_data.key == trained.dataset.key


def test_the_same_command_makes_nothing_again(studied: tuple[Path, list[object], Mapping[str, Any]]) -> None:
    folder, asked, told = studied
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    done = kdpipe(*asked)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert told["numbers"]["advice"]["sentence"] in done.stdout
    listed = kdpipe("list", "--artifacts", folder)
    assert "study" in listed.stdout


def test_a_part_that_another_process_makes_is_left_to_it(
    studied: tuple[Path, list[object], Mapping[str, Any]], trained: Trained
) -> None:
    """Whoever comes takes what nobody holds, waits for the rest, and finds it there."""
    folder, _, _ = studied
    [sealed] = folder.glob("study-*")
    settings = StudyPlan.model_validate(Study.open(sealed).manifest.config["plan"])
    lock = sorted((folder / study.STUDIES).glob("*.lock"))[0]

    class MadeMeanwhile(Told):
        def note(self, text: str) -> None:
            super().note(text)
            if "waiting" in text:
                fcntl.flock(stream, fcntl.LOCK_UN)

    told = MadeMeanwhile()
    with lock.open("a") as stream, listening(told):
        fcntl.flock(stream, fcntl.LOCK_EX)
        found = study.run(settings, trained.dataset, trained.teacher, Chain(folder))
    assert found.path == sealed
    assert sum("waiting" in line for line in told.notes) == 1


def test_a_study_needs_its_runs(studied: tuple[Path, list[object], Mapping[str, Any]]) -> None:
    """Nobody cleans them away: the same command would make them again."""
    folder, _, _ = studied
    cleaning = unneeded(folder)
    assert [each.path.name for each in cleaning.go] == []
    assert "made since the last report" not in cleaning.stay


def test_runs_of_studies_are_no_part_of_other_pages(studied: tuple[Path, list[object], Mapping[str, Any]]) -> None:
    from kdpipe.chain import CELL

    folder, _, _ = studied
    assert all(path.name.startswith(CELL) for path in folder.glob("*seed*"))


def test_a_run_that_fails_leaves_the_others(trained: Trained, tmp_path: Path) -> None:
    """Its loss is not finite: the page says so, its claim has no data, and the command exits 2."""
    wild = "wild={method: kd, train: {optimizer: sgd, learning_rate: 1.0e+12}}"
    more = {"methods": "[]", "controls": "[]", "seeds": 1, "views": 60, "fractions": 0.05, "further": wild}
    asked = ["study", trained.dataset.path, trained.teacher.path, "--artifacts", tmp_path, *options(**more)]
    done = kdpipe(*asked, "--claim", "wild > labels at 0.05")
    assert_one_line(done, 2, "cell-wild-0.05-seed0", "loss became")
    assert "claim: wild > labels at 0.05: not enough data: the two have no seed in common" in done.stdout
    [made] = tmp_path.glob("study-*")
    assert "loss became" in (made / Study.PAGE).read_text()
    assert Study.open(made).facts.advice == "labels"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"methods": "kd,hnit"}, ["method", "hnit", "hint"]),
        ({"controls": "shufled"}, ["control", "shuffled"]),
        ({"claim": "kd-T4 > labels at 0.3"}, ["no share 0.3", "0.05, 0.1"]),
        ({"claim": "kd-T9 > labels at 0.1"}, ["kd-T9", "kd-T4"]),
        ({"claim": "kd beats labels"}, ["wanted METHOD > METHOD at SHARE"]),
        ({"views": 10}, ["less than a pass"]),
        ({"budget": "2h"}, ["not both"]),
        ({"views": None, "budget": "2 weeks"}, ["budget", "2h"]),
        ({"further": "labels={method: kd}"}, ["taken"]),
        ({"further": "own"}, ["NAME=VALUE"]),
        ({"methods": "masked"}, ["--starts"]),
        ({"methods": "stagewise", "distill.stagewise.epochs": 3}, ["stagewise.epochs", "same cost"]),
        ({"further": "kd-T4={method: hint}"}, ["taken"]),
        ({"further": "own=7"}, ["own"]),
        ({"further": "own={method: kd, model: resnet14, seed: 3}"}, ["'own' changes model, seed", "one network"]),
        ({"further": "own={method: masked}"}, ["--starts"]),
        ({"further": "own={temprature: 3}"}, ["temprature", "temperature"]),
        ({"student": "resnet9000"}, ["resnet9000"]),
        ({"fractions": "0.1,0.1"}, ["once"]),
        ({"fractions": "0.0001,0.0002"}, ["0.0001 and 0.0002", "same 10 images"]),
        ({"temperatures": "4,4.0000001"}, ["called 4"]),
        ({"temperatures": "1.0e+300"}, ["temperatures", "1000000"]),
        ({"distill.label_fraction": 0.5}, ["--fractions"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes(trained: Trained, tmp_path: Path, more: dict[str, object], words: list[str]) -> None:
    done = kdpipe("study", trained.dataset.path, trained.teacher.path, "--artifacts", tmp_path, *options(**more))
    assert_one_line(done, 2, *words)
    assert not list(tmp_path.glob("cell-*"))


def planned(trained: Trained, folder: Path, **more: object) -> study.Plan:
    values = {"student": "resnet8", "fractions": [0.1], "methods": ["kd"], "temperatures": [4], "views": 2000, **more}
    return study.plan(validated(StudyPlan, values, "test"), trained.dataset, trained.teacher, Chain(folder))


def test_longer_runs_and_other_teachers_are_methods_of_their_own(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = study.Decision(views=0, view_seconds={"labels": 1e-3, "kd-T4": 2e-3, "own": 4e-3}, test_seconds=1.0)
    monkeypatch.setattr(study.Design, "measured", lambda self: pace)
    more = {"longer": 2, "teachers": {"big": str(trained.teacher.path)}, "own_size": True, "controls": ["flattened"]}
    from_it = {"student": "test_resnet", "starts": {"taught": str(trained.student.path)}}
    pace.view_seconds["flattened"] = 2e-3
    found = planned(trained, tmp_path, **more, **from_it)
    names = ["labels", "kd-T4", "flattened", "labels-x2", "kd-T4-x2", "kd-T4-by-big", "kd-T4-by-own-size"]
    names += ["labels-from-taught", "kd-T4-from-taught"]
    assert {cell.config.start for cell in found.cells if cell.kind == "start"} == {trained.student.path}
    assert {cell.config.teacher_control for cell in found.cells if cell.method == "flattened"} == {"flattened"}
    assert found.design.names == names
    # Each is compared with labels alone that were trained alike.
    over = {arm.name: arm.control for arm in found.design.arms}
    assert (over["kd-T4-x2"], over["kd-T4-from-taught"]) == ("labels-x2", "labels-from-taught")
    assert (over["kd-T4-by-big"], over["labels-x2"]) == ("labels", "labels")
    views = {cell.method: cell.views for cell in found.cells}
    assert views["kd-T4-x2"] == pytest.approx(2 * views["kd-T4"], rel=0.05)
    assert len(found.cells) == len(names) * 3
    # Equal seconds: what takes four times as long for a view sees a quarter of them.
    own = {"further": {"own": {"method": "dkd"}}, "cost": "seconds", "controls": []}
    equal = {cell.method: cell.views for cell in planned(trained, tmp_path, **own).cells}
    assert equal["labels"] == pytest.approx(4 * equal["own"], rel=0.1)
    # A budget: all runs together, tests included, as far as whole passes over the images allow.
    within = planned(trained, tmp_path, views=None, budget="30s", controls=[])
    largest = max(within.design.images.values())
    seconds = within.design.seconds(within.decision)
    assert seconds is not None
    assert 30 - 2 * 3 * largest * 2e-3 < seconds <= 30
    with pytest.raises(UserError, match="too short"):
        planned(trained, tmp_path, views=None, budget="6s", controls=[])


def test_equal_seconds_are_what_every_run_costs(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slowest method sees all images once too, and a teacher that takes longer to ask leaves fewer views."""
    from kdpipe.distill import pace

    def measured(config: TrainConfig, _: object, teacher: Checkpoint, __: Path) -> float:
        asked = 0.0 if config.method == "labels" else 3e-3 if teacher.path == trained.teacher.path else 7e-3
        return 1e-3 + asked

    monkeypatch.setattr(pace, "view_seconds", measured)
    monkeypatch.setattr(pace, "test_seconds", lambda *_: 0.0)
    big = shutil.copytree(trained.teacher.path, tmp_path / "big")
    more = {"cost": "seconds", "controls": [], "teachers": {"big": str(big)}}
    found = planned(trained, tmp_path, **more, views=20_000)
    views = {cell.method: cell.planned_views for cell in found.cells}
    assert views == {"labels": 20_000, "kd-T4": 5_000, "kd-T4-by-big": 2_500}
    largest = max(found.design.images.values())
    with pytest.raises(UserError, match=f"slowest method: in equal seconds it takes {8 * largest:,}"):
        planned(trained, tmp_path, **more, views=8 * largest - 1)
    assert planned(trained, tmp_path, **more, views=8 * largest).cells[-1].views == largest
    with pytest.raises(UserError, match="too short"):
        planned(trained, tmp_path, **more, views=None, budget="5s")


def test_a_teacher_that_is_trained_for_a_study_takes_of_its_budget(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pace = study.Decision(views=0, view_seconds={"labels": 1e-3}, test_seconds=0.0)
    monkeypatch.setattr(study.Design, "measured", lambda self: pace)
    alone = {"methods": [], "controls": [], "distill": {"train": {"epochs": 10}}}
    without, beside = (planned(trained, tmp_path, **alone, own_size=own) for own in (False, True))
    assert without.seconds_left is not None and beside.seconds_left is not None
    training = 10 * len(trained.dataset.samples("train")) * 1e-3
    assert beside.seconds_left - without.seconds_left == pytest.approx(training)


def test_advice_says_what_was_shown_and_no_more() -> None:
    """A method that is better; methods that are surely not; and runs that cannot tell."""
    rows = [{"method": name, "fraction": 1.0, "kind": "method"} for name in ("kd-T4", "hint")]
    generator = np.random.default_rng(0)

    def advised(gain: float, spread: float) -> dict[str, Any]:
        table = {
            (name, 1.0): {seed: np.full(21, 50 + its + generator.normal(0, spread)) for seed in range(6)}
            for name, its in (("labels", 0.0), ("kd-T4", gain), ("hint", -3.0))
        }
        return dict(advise(table, rows, 1.0))

    shown, none, unknown = advised(5.0, 0.1), advised(0.0, 0.1), advised(2.0, 4.0)
    assert shown["method"] == "kd-T4" and "take kd-T4" in shown["sentence"]
    assert none["method"] == "labels" and "train on the labels alone: no method gains 1 points" in none["sentence"]
    assert unknown["method"] == "labels" and "nor to do no better" in unknown["sentence"]
    assert "train on the labels alone" not in unknown["sentence"]


def test_runs_of_other_kinds_have_figures_of_their_own() -> None:
    gain = {"value": 1.0, "low": 0.0, "high": 2.0, "n": 3}
    kinds = {"kd-T4": "method", "kd-T4-x2": "longer", "kd-T4-by-big": "teacher"}
    rows = [
        {"method": name, "kind": kind, "gain": gain, "over": "labels", "images": 10} for name, kind in kinds.items()
    ]
    drawn = drawings({"rows": rows, "temperatures": []})
    assert set(drawn) == {"gain", "gain_longer", "gain_teacher"}
    svg = {name: figure.svg for name, figure in drawn.items()}
    assert "kd-T4-x2" in svg["gain_longer"] and "kd-T4-x2" not in svg["gain"]


def test_nothing_has_no_sign() -> None:
    assert spread({"value": -1e-9, "low": -1.0, "high": 1.0}, sign=True) == "+0.00 [-1.00, +1.00]"


def test_what_a_pace_decides_is_decided_once(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second process, or the same command another day, does not come to other runs."""
    settings = validated(StudyPlan, {"student": "resnet8", "fractions": [0.1], "budget": "60s"}, "test")
    design = study.Design(settings, *design_of(trained, tmp_path))
    for pace in (1e-3, 5e-3):
        found = study.Decision(views=0, view_seconds=dict.fromkeys(design.configs, pace), test_seconds=0.0)
        monkeypatch.setattr(study.Design, "measured", lambda self, found=found: found)
        decision = design.decided(keep=True)
        assert decision.view_seconds["labels"] == 1e-3
    told = study.Design(settings.model_copy(update={"budget": None, "views": 500}), *design_of(trained, tmp_path))
    plain = told.decided(keep=True)
    assert plain.views == 500 and not plain.view_seconds, "nothing was to be decided by a pace"
    again = told.decided(keep=False)
    assert again.views == 500 and again.view_seconds["labels"] == 5e-3, "a dry run tells the time of one that was begun"
    design.memory.write_text("{}")
    with pytest.raises(UserError, match="remove"):
        design.decided(keep=True)


def test_what_is_said_in_epochs_keeps_its_share() -> None:
    train = {"epochs": 60, "warmup_epochs": 6, "milestones": [30, 45], "validate_every": 3}
    for method in ("dkd", "review"):
        config = TrainConfig.model_validate(
            {"model": "resnet8", "method": method, "train": train, method: {"warmup_epochs": 20}}
        )
        short, long = in_epochs(config, 6), in_epochs(config, 600)
        assert (getattr(short, method).warmup_epochs, getattr(long, method).warmup_epochs) == (2, 200)
        assert (short.train.epochs, short.train.warmup_epochs, short.train.milestones) == (6, 1, (3, 4))
        assert short.train.validate_every == 6, "the last one is kept: nothing is looked at before"
    best = config.model_copy(update={"train": config.train.model_copy(update={"select": "best"})})
    assert [in_epochs(best, epochs).train.validate_every for epochs in (6, 60, 600)] == [1, 3, 30]
    stages = TrainConfig.model_validate({"model": "resnet8", "method": "stagewise", "stagewise": {"epochs": 20}})
    assert in_epochs(stages, 6).stagewise.epochs == 2


def test_looks_at_held_out_images_take_time(trained: Trained, tmp_path: Path) -> None:
    plan = {"student": "resnet8", "fractions": [0.1], "methods": [], "controls": [], "views": 900}
    design = study.Design(validated(StudyPlan, plan, "test"), *design_of(trained, tmp_path))
    pace = study.Decision(views=900, view_seconds={"labels": 0.0}, test_seconds=1.0)
    share = len(trained.dataset.samples("val")) / len(trained.dataset.samples("test"))
    assert design.seconds(pace) == pytest.approx(3 * (1 + share))
    often = {**plan, "distill": {"train": {"select": "best", "epochs": 60, "validate_every": 2}}}
    design = study.Design(validated(StudyPlan, often, "test"), *design_of(trained, tmp_path))
    assert design.seconds(pace) == pytest.approx(3 * (1 + 30 * share))


def test_the_pace_is_that_of_the_method(trained: Trained, tmp_path: Path) -> None:
    """Measured, and nothing is left behind: a network seven times as deep takes longer a view."""
    from kdpipe.distill.pace import test_seconds, view_seconds

    values = {"model": "resnet8", "input": {"size": 16}, "method": "labels", "train": {"workers": 0, "batch_size": 8}}
    config = validated(TrainConfig, values, "test")
    deep = config.model_copy(update={"model": "resnet56"})
    turns = [[view_seconds(each, trained.dataset, None, tmp_path) for each in (config, deep)] for _ in range(3)]
    small, large = map(min, zip(*turns, strict=True))
    assert 0 < small < large
    assert test_seconds(config, trained.dataset) > 0
    assert not list(tmp_path.iterdir())


def test_the_pace_has_no_look_at_held_out_images(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of many they took ten times as long as the few steps that are timed."""
    from kdpipe.distill import loop, pace

    looked: list[object] = []
    evaluated = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *given: looked.append(given) or evaluated(*given))
    values = {"model": "resnet8", "input": {"size": 16}, "method": "labels", "train": {"workers": 0, "batch_size": 8}}
    assert trained.dataset.samples("val")
    assert pace.view_seconds(validated(TrainConfig, values, "test"), trained.dataset, None, tmp_path) > 0
    assert not looked


def test_processes_of_torchrun_work_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "5,7"}.items():
        monkeypatch.setenv(name, value)
    assert proc.spread() == 3
    assert proc.process_count() == 1
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    assert proc.spread() == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"


def test_a_teacher_of_other_classes_is_refused_before_anything_runs(trained: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained.teacher.path, other)
    replace_file(other, Checkpoint.LABELS, json.dumps(trained.dataset.classes[::-1]).encode())
    asked = ["study", trained.dataset.path, trained.teacher.path, "--artifacts", tmp_path, *options()]
    done = kdpipe(*asked, "--teachers", f"reversed={other}")
    assert_one_line(done, 2, "teacher other", "another order")
    assert not list(tmp_path.glob("cell-*"))
