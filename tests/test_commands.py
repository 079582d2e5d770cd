"""What a person does with recipes and a folder of artifacts: plan, run in part, list, show, compare, clean."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import (
    SMALL_RECIPE,
    Made,
    assert_one_line,
    copied_steps,
    flip_a_byte,
    kdpipe,
    kdpipe_process,
    listening,
    rewrite_manifest,
)
from pydantic import BaseModel

from kdpipe import forecast, pipeline
from kdpipe.chain import REPLACED, Chain, sealed
from kdpipe.core import artifact
from kdpipe.core.artifact import Manifest, host_record, order_key, read_manifest
from kdpipe.core.config import (
    BenchPlan,
    CachePlan,
    DataPlan,
    ExportConfig,
    QuantizeConfig,
    Recipe,
    ReportConfig,
    TeacherPlan,
    TrainConfig,
    read_recipe,
    validated,
)
from kdpipe.core.progress import Silence
from kdpipe.options import configured, options_of
from kdpipe.quantize import stage as quantize_stage

TINY_TRAIN = {"epochs": 1, "workers": 0, "augment": {"crop": "pad", "flip": 0}}
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {"source": "digits", "test_split": None, "test_fraction": 0.3},
    "teacher": {"model": "test_resnet", "input": {"size": 32}, "train": TINY_TRAIN},
    "student": {"model": "test_resnet", "input": {"size": 32}},
    "distill": {"label_fraction": 0.2, "train": TINY_TRAIN},
    "export": {"targets": ["onnxruntime"], "parity_images": 8, "hop_images": 8},
    "quantize": {"variants": ["int8"], "calibrate": {"images": 32}, "check_images": 32, "allow_damage": True},
    "bench": {**SMALL_RECIPE["bench"], "threads": 1, "seconds": 0.05, "max_seconds": 0.05},
}


class Tiny:
    """A small recipe in a folder of its own, whose artifacts were made by the commands of its plan."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.recipe = folder, folder / "tiny.yaml"
        self.artifacts = folder / "artifacts"

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        return kdpipe("run", "tiny.yaml", *arguments, cwd=self.folder)

    def planned(self, *arguments: object) -> list[dict[str, Any]]:
        done = self.run("--dry-run", "--json", *arguments)
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout)["legs"])

    def names(self) -> set[str]:
        """Of what lies sealed in its folder."""
        return {path.name for path, _ in sealed(self.artifacts)}

    def of(self, prefix: str) -> Path:
        """The one artifact whose folder is called so."""
        [path] = self.artifacts.glob(f"{prefix}-*")
        return path


@pytest.fixture(scope="module")
def by_commands(tmp_path_factory: pytest.TempPathFactory) -> tuple[Tiny, list[dict[str, Any]]]:
    """Made stage by stage, as the plan says it; and that plan, from before anything was there."""
    tiny = Tiny(tmp_path_factory.mktemp("tiny"))
    tiny.recipe.write_text(yaml.safe_dump(TINY))
    before = tiny.planned()
    assert not tiny.names()
    for leg in before:
        if leg["command"] is not None:
            done = kdpipe(*leg["command"][1:], cwd=tiny.folder)
            assert done.returncode in ((0, 75) if leg["stage"] == "bench" else (0,)), (leg["command"], done.stderr)
    return tiny, before


@pytest.fixture
def tiny(by_commands: tuple[Tiny, list[dict[str, Any]]], tmp_path: Path) -> Tiny:
    """A copy to work in."""
    shutil.copytree(by_commands[0].folder, tmp_path / "tiny")
    return Tiny(tmp_path / "tiny")


# ---- the plan --------------------------------------------------------------------------------------------


def test_the_commands_of_a_plan_make_what_the_run_makes(by_commands: tuple[Tiny, list[dict[str, Any]]]) -> None:
    """Every key was known before the work; what the commands made is found by the run, which does nothing."""
    tiny, before = by_commands
    assert tiny.names() == {leg["id"] for leg in before}
    for leg in before:
        assert read_manifest(tiny.folder / leg["path"]).key == leg["key"], leg["id"]
        assert not leg["sealed"] and not leg["perhaps"]
    done = tiny.run()
    assert done.returncode in (0, 75), done.stderr
    assert f"{len(before)} stages, 0 done now" in done.stdout
    assert done.stderr.count(" sealed ") == len(before)
    assert all(leg["sealed"] for leg in tiny.planned())


def test_a_plan_says_what_comes_after_what(by_commands: tuple[Tiny, list[dict[str, Any]]]) -> None:
    _, before = by_commands
    seen: set[str] = set()
    for leg in before:
        assert set(leg["after"]) <= seen, leg["id"]
        seen.add(leg["id"])
    assert len(seen) == len(before)
    assert [leg["name"] for leg in before if leg["command"] is None] == ["graph"]
    by_name = {leg["name"]: leg for leg in before}
    ids = {leg["id"]: leg["name"] for leg in before}
    assert [ids[id] for id in by_name["onnxruntime-int8"]["after"]] == ["onnxruntime-float32", "data"]
    assert {ids[id] for id in by_name["student-labels-seed0"]["after"]} == {"data"}


def test_the_plan_of_a_sealed_run_is_its_steps(made: Made, small: tuple[Recipe, Path]) -> None:
    """All targets and variants: in the same order, with the keys that they have."""
    recipe, folder = small
    chain = Chain(folder)
    legs = pipeline.plan(recipe, chain)
    pipeline.run(recipe, chain)
    assert [leg.path for leg in legs] == [step.path for step in chain.steps]
    assert all(leg.sealed for leg in legs)
    for leg in legs:
        assert leg.path is not None
        assert read_manifest(leg.path).key == leg.key


def test_a_sealed_run_reads_every_manifest_once(
    made: Made, small: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it plans, finds, looks up beside something and reports, however often it meets the same artifact."""
    recipe, folder = small[0], copied_steps(made, tmp_path / "artifacts")
    time.sleep(artifact.SETTLED_SECONDS + 0.1)
    monkeypatch.setattr(artifact, "_remembered", {})
    reads: Counter[Path] = Counter()
    real = artifact.sealed.read_manifest

    def counted(path: Path) -> dict[str, Any]:
        reads[path.absolute()] += 1
        return real(path)

    monkeypatch.setattr(artifact.sealed, "read_manifest", counted)
    chain = Chain(folder)
    pipeline.run(recipe, chain)
    assert all(step.sealed_before for step in chain.steps)
    assert {step.path.absolute() for step in chain.steps} <= reads.keys()
    assert set(reads.values()) == {1}


def test_a_plan_before_the_work_knows_every_key(made: Made, small: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = small
    before = pipeline.plan(recipe, Chain(tmp_path / "nothing"))
    assert not any(leg.sealed for leg in before)
    then = {leg.name: leg.key for leg in pipeline.plan(recipe, Chain(folder))}
    now = {leg.name: leg.key for leg in before}
    events = {name for name in now if name.startswith(("measurement", "report"))}  # kept artifacts may have attempts
    assert {name: key for name, key in now.items() if name not in events} == {
        name: key for name, key in then.items() if name not in events
    }
    assert None not in now.values()


def test_what_only_the_model_can_tell_is_perhaps(tmp_path: Path) -> None:
    recipe = validated(
        Recipe, {**TINY, "quantize": {"variants": "auto"}, "export": {"targets": ["onnxruntime", "tflite"]}}, "x"
    )
    legs = pipeline.plan(recipe, Chain(tmp_path))
    perhaps = {leg.name for leg in legs if leg.perhaps}
    assert perhaps == {"onnxruntime-int8-dynamic", "bundle-onnxruntime-int8-dynamic",
                       "tflite-int8-dynamic", "bundle-tflite-int8-dynamic"}  # fmt: skip
    session = next(leg for leg in legs if leg.stage == "bench")
    assert session.key is session.path is session.command is None


def read_options(kind: type[BaseModel], words: list[str], **more: Any) -> BaseModel:
    """The configuration that these options of a command make, with ``more`` that it gives by itself."""
    found: list[BaseModel] = []

    def command(config: Callable[..., BaseModel]) -> None:
        found.append(config(**more))

    wrapped = configured(kind, tuple(more))(command)
    texts: dict[str, Any] = dict.fromkeys(wrapped.__annotations__)
    for option, text in zip(words[::2], words[1::2], strict=True):
        texts[option.removeprefix("--").replace(".", "__").replace("-", "_")] = text
    wrapped(**texts)
    return found[0]


def test_a_plan_has_the_cache_that_students_learn_from(tmp_path: Path) -> None:
    """Its command makes the very cache that the run would make."""
    from kdpipe.distill.cache import config_of

    distill = TINY["distill"] | {"cache_views": 2, "view_seed": 3, "seeds": [0, 1]}
    legs = pipeline.plan(validated(Recipe, TINY | {"distill": distill}, "tiny"), Chain(tmp_path))
    caches = [leg for leg in legs if leg.name == "cache"]
    assert len(caches) == 2, "each seed draws its own images"
    by_name = {leg.name: leg for leg in legs}
    for cache, student in zip(caches, ("student-kd-seed0", "student-kd-seed1"), strict=True):
        assert cache.id in by_name[student].after and cache.command is not None
        assert not {leg.id for leg in caches} & set(by_name["student-labels-seed0"].after)
        options = list(cache.command[5:-2])  # kdpipe cache TEACHER --data DATA ... --out PATH
        config = config_of(read_options(CachePlan, options))  # type: ignore[arg-type]
        keys = {"data": by_name["data"].key or "", "teacher": by_name["teacher"].key or ""}
        assert order_key("cache", config, keys) == cache.key


def test_a_plan_knows_the_copies_of_photographs(tmp_path: Path) -> None:
    """What networks are shown of held-out images is an artifact too; the command alone makes the same data set."""
    from test_start import write_signs

    write_signs(tmp_path / "photos", {"train": 3, "val": 2}, side=640)
    values = TINY | {"data": {"source": str(tmp_path / "photos")}, "student": {"model": "test_resnet"}}
    recipe = validated(Recipe, values, "tiny")
    legs = pipeline.plan(recipe, Chain(tmp_path / "planned"), until="data")
    assert [leg.name for leg in legs] == ["data", "fitted-32", "fitted-160"]
    chain = Chain(tmp_path / "made")
    pipeline.run_part(recipe, chain, until="data")
    assert [step.path.name for step in chain.steps] == [leg.id for leg in legs]
    assert legs[0].command is not None
    done = kdpipe(*legs[0].command[1:])
    assert done.returncode == 0, done.stderr
    assert read_manifest(tmp_path / "planned" / legs[0].id).key == legs[0].key


def test_commands_carry_what_the_run_was_allowed(tmp_path: Path) -> None:
    """Code of one's own is named on every command that may make the network; nothing of it runs for the plan."""
    (tmp_path / "mine.py").write_text("raise SystemExit('it ran')\n")
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    allowed = ("--allow-code", "mine:make", "--set", "student.model=mine:make")
    environment = {"PYTHONPATH": str(tmp_path)}
    done = kdpipe_process("run", tmp_path / "tiny.yaml", "--dry-run", "--json", *allowed, **environment)
    assert done.returncode == 0, done.stderr
    legs = {leg["name"]: leg["command"] for leg in json.loads(done.stdout)["legs"]}
    for name in ("teacher", "student-kd-seed0", "onnxruntime-float32", "onnxruntime-int8"):
        assert legs[name][-2:] == ["--allow-code", "mine:make"], name
    assert "--allow-code" not in legs["bundle-onnxruntime-int8"] + legs["measurement-local-1"] + legs["data"]


def test_a_dry_run_makes_nothing(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = kdpipe("run", "tiny.yaml", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]
    assert "11 artifacts: 0 sealed, 11 to make" in done.stdout
    assert "for 10: their time is unknown" in done.stdout  # of a session the settings tell
    assert re.search(r"bench +measurement\S+ +to make +\d", done.stdout)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--until", "quantise"], ["unknown stage 'quantise'", "did you mean 'quantize'"]),
        (["--again", "trian"], ["unknown stage 'trian'"]),
        (["--from", "nonsense"], ["unknown stage 'nonsense'"]),
        (["--from", "bench", "--until", "data"], ["--from bench comes after --until data"]),
        (["--again", "bench", "--until", "data"], ["--again bench comes after --until data"]),
        (["--from", "distill"], ["2 of the 2 artifacts before it are not sealed", "'data'"]),
        (["--set", "distill.temprature=3"], ["tiny.yaml with --set", "did you mean 'temperature'"]),
        (["--set", "distill.temperature"], ["wanted KEY=VALUE"]),
        (["--set", "=3"], ["wanted KEY=VALUE"]),
        (["--set", "name.first=3"], ["--set name.first: 'name' is 'tiny'", "section"]),
        (["--set", "bench.rounds=[1"], ["--set bench.rounds", "not YAML"]),
        (["--set", "export.targets=[tflit]"], ["unknown target 'tflit'"]),
        (["--set", "data.source=/nowhere/at/all"], ["no data at '/nowhere/at/all'"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []], ids=["dry", "run"])
def test_mistakes_in_what_is_run(tmp_path: Path, dry: list[str], arguments: list[str], words: list[str]) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    assert_one_line(kdpipe("run", "tiny.yaml", *dry, *arguments, cwd=tmp_path), 2, *words)
    assert not list(tmp_path.glob("artifacts/*-*"))


def test_set_is_as_if_it_stood_there(tmp_path: Path) -> None:
    """Also where an alias shares a section with another: that one stays."""
    path = tmp_path / "a.yaml"
    path.write_text(
        "name: a\ndata: {source: digits, test_split: null}\nteacher: {model: test_resnet, train: &t {epochs: 3}}\n"
        "student: {model: test_resnet}\ndistill: {train: *t}\n"
    )
    changes = ["teacher.train.epochs=5", "export.targets=[tflite]", "quantize=", "data.test_fraction=0.5"]
    recipe = read_recipe(path, changes)
    assert (recipe.teacher.train.epochs, recipe.distill.train.epochs) == (5, 3)
    assert recipe.export.targets == ("tflite",) and recipe.quantize is None and recipe.data.test_fraction == 0.5
    assert read_recipe(path).teacher.train.epochs == 3


# ---- a run in part ---------------------------------------------------------------------------------------


def test_until_a_stage(tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    done = kdpipe("run", "tiny.yaml", "--until", "data", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert [path.name[:5] for path in (tmp_path / "artifacts").glob("*-*")] == ["data-"]
    assert re.search(r"^1/1 data ", done.stderr, re.MULTILINE)
    found = json.loads(kdpipe("run", "tiny.yaml", "--until", "data", "--json", cwd=tmp_path).stdout)
    assert [Path(path).name[:5] for path in found["artifacts"]] == ["data-"]


def test_what_was_refused_is_not_tried_again(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody named the variant: the run goes on without it, and so does the next one, without a try."""
    auto = ("--set", "quantize.variants=auto", "--set", "quantize.allow_damage=false", "--until", "package")
    monkeypatch.setattr(quantize_stage, "LEAST_AGREEMENT", 1.01)  # nothing agrees so well
    done = tiny.run(*auto)
    assert done.returncode == 0, done.stderr
    assert "onnxruntime goes without int8: int8 of test_resnet for onnxruntime agrees with float32" in done.stderr
    refused = tiny.of("onnxruntime-int8-refused")
    assert not list(tiny.artifacts.glob("*.part"))

    monkeypatch.setattr(quantize_stage, "LEAST_AGREEMENT", 0.0)  # a try would seal it now
    legs = {leg["name"]: leg for leg in tiny.planned(*auto)}
    leg = legs["onnxruntime-int8-refused"]
    assert leg["sealed"] and leg["id"] == refused.name and "agrees with float32" in leg["refused"]
    assert not {"onnxruntime-int8", "bundle-onnxruntime-int8"} & legs.keys()
    assert re.search(r"onnxruntime-int8-refused-\S+ +refused", tiny.run("--dry-run", *auto).stdout)
    assert tiny.run("--from", "package", *auto).returncode == 0
    done = tiny.run(*auto)
    assert "(refused before: --again quantize tries it again)" in done.stderr and "0 done now" in done.stdout
    assert "goes without int8: int8 of test_resnet" in kdpipe("list", "--artifacts", tiny.artifacts).stdout
    gone = json.loads(kdpipe("clean", "--artifacts", tiny.artifacts, "--everything", "--json").stdout)
    assert refused.name not in json.dumps(gone), "it belongs to the model that a report needs"

    again = {leg["name"]: leg for leg in tiny.planned(*auto, "--again", "quantize")}
    assert not again["onnxruntime-int8"]["sealed"] and "bundle-onnxruntime-int8" in again
    done = tiny.run(*auto, "--again", "quantize")
    assert done.returncode == 0 and "goes without" not in done.stderr, done.stderr
    assert not refused.exists() and read_manifest(tiny.artifacts / again["onnxruntime-int8"]["id"]).kind == "model"


def test_a_named_variant_is_tried_whatever_was_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("--set", "quantize.allow_damage=false", "--until", "quantize")
    with monkeypatch.context() as patch:
        patch.setattr(quantize_stage, "LEAST_AGREEMENT", 1.01)
        assert tiny.run("--set", "quantize.variants=auto", *settings).returncode == 0
        assert_one_line(tiny.run(*settings), 1, "agrees with float32")
    assert tiny.run(*settings).returncode == 0
    done = tiny.run("--set", "quantize.variants=auto", *settings)
    assert done.returncode == 0 and "goes without" not in done.stderr, "what is there says more than what was"


def test_from_a_stage_refuses_to_train_again(tiny: Tiny) -> None:
    before = tiny.names()
    assert tiny.run("--from", "export").returncode in (0, 75)
    done = tiny.run("--from", "export", "--set", "distill.temperature=7")
    assert_one_line(done, 2, "--from export: 1 of the 4 artifacts before it", "'student-kd-seed0'")
    assert tiny.names() == before


def test_again_sets_aside_what_came_from_it(tiny: Tiny) -> None:
    """The same keys, made anew; what came before is untouched, what is replaced is kept until it is cleaned."""
    before = tiny.names()
    kept = {path: (path / "manifest.json").read_bytes() for path in tiny.artifacts.glob("*-*")}
    again = [leg["name"] for leg in tiny.planned("--again", "quantize") if not leg["sealed"]]
    wanted = ["onnxruntime-int8", "bundle-onnxruntime-int8", "measurement-local-1", "report"]
    assert again == wanted
    done = tiny.run("--again", "quantize")
    assert done.returncode in (0, 75), done.stderr
    assert f"4 artifacts of 'quantize' and after it are set aside in artifacts/{REPLACED}" in done.stderr
    [aside] = (tiny.artifacts / REPLACED).iterdir()
    moved = {path.name for path in aside.iterdir()}
    assert len(moved) == 4 and moved <= before
    assert "11 stages, 4 done now" in done.stdout
    assert {name for name in tiny.names() if not name.startswith("report")} == {
        name for name in before if not name.startswith("report")
    }
    for path, manifest in kept.items():
        if path.name not in moved:
            assert (path / "manifest.json").read_bytes() == manifest
        else:
            assert (aside / path.name / "manifest.json").read_bytes() == manifest


def test_again_bench_measures_more(tiny: Tiny) -> None:
    assert tiny.run("--again", "bench").returncode in (0, 75)
    assert len(list(tiny.artifacts.glob("measurement-*"))) == 2
    assert not (tiny.artifacts / REPLACED).exists()
    legs = tiny.planned("--again", "bench")
    assert [leg["name"] for leg in legs if not leg["sealed"]] == ["measurement-local-3", "report"]
    assert all(leg["sealed"] for leg in tiny.planned())


class Heard(Silence):
    """Remembers what was begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def begin(self, what: str, total: int | None) -> None:
        self.begun.append(what)


def test_progress_says_which_step_of_how_many_and_what_is_left(tiny: Tiny) -> None:
    """Once the same was made here, the time that is left is known."""
    chain = Chain(tiny.artifacts)
    recipe = read_recipe(tiny.recipe, ["package.golden_images=4"])
    heard = Heard()
    with listening(heard):
        pipeline.run_part(recipe, chain, until="package")
    packing = [what for what in heard.begun if what.startswith("bundle-")]
    assert len(packing) == 2
    left = r"\(8 of 9, about .+ left, until \d\d:\d\d\)"
    assert re.fullmatch(f"bundle-onnxruntime-float32 {left}", packing[0]), packing
    assert packing[1].startswith("bundle-onnxruntime-int8 (9 of 9, about ")
    assert [step.place for step in chain.steps] == [f"{at}/9" for at in range(1, 10)]


# ---- what it takes ---------------------------------------------------------------------------------------


def manifest(stage: str, kind: str, **change: Any) -> Manifest:
    """One as this machine would have written it."""
    values = {
        "kind": kind, "stage": stage, "key": "0" * 64, "config": {}, "facts": {}, "inputs": {}, "seconds": 1.0,
        "schema_version": 2, "files": {}, "tools": {}, "host": host_record(), "digest": str(change),
        "created_utc": "2026-01-01T00:00:00+00:00",
    }  # fmt: skip
    return Manifest.model_validate({**values, **change})


def trained(method: str, seconds: float, ended: int, **change: Any) -> Manifest:
    config = TrainConfig(model="test_resnet", method=method).model_dump(mode="json")
    created = (datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=ended)).isoformat()
    return manifest(
        "train", "checkpoint", config=config, seconds=seconds, created_utc=created,
        facts={"training_images": 100, "epochs": 10, "model": "test_resnet"}, **change,
    )  # fmt: skip


def work(method: str, epochs: int, key: str = "d" * 64) -> forecast.Work:
    config = TrainConfig(model="test_resnet", method=method, train={"epochs": epochs})  # type: ignore[arg-type]
    return forecast.training(config.model_dump(mode="json"), None, data=key)


def test_a_forecast_is_what_the_same_took() -> None:
    data = manifest("data", "dataset", key="d" * 64, facts={"images": {"train": 200, "val": 20, "test": 50}})
    known = forecast.Forecast([data, trained("labels", 50.0, 50)])
    assert known.cost(work("labels", 10)).seconds == pytest.approx(100)  # twice the images, as many passes
    assert known.cost(work("labels", 20)).seconds == pytest.approx(200)
    assert known.cost(work("kd", 10)) == forecast.UNKNOWN
    assert known.cost(work("labels", 10, key="e" * 64)) == forecast.UNKNOWN  # nobody knows how many images
    assert forecast.Forecast([trained("labels", 50.0, 50)]).cost(work("labels", 10)) == forecast.UNKNOWN


def test_networks_trained_side_by_side_share_their_time() -> None:
    data = manifest("data", "dataset", key="d" * 64, facts={"images": {"train": 100}})
    together = [trained("kd", 60.0, 60), trained("labels", 61.0, 61), trained("dkd", 62.0, 62)]
    alone = trained("kd", 40.0, 200)
    known = forecast.Forecast([data, *together])
    whole = sum(known.cost(work(method, 10)).seconds or 0 for method in ("kd", "labels", "dkd"))
    assert whole == pytest.approx(61)  # the three took 62 s in all, sealing included
    assert forecast.Forecast([data, alone]).cost(work("kd", 10)).seconds == pytest.approx(40)


def test_another_machine_tells_nothing() -> None:
    other = {**host_record(), "cpu": "another"}
    data = manifest("data", "dataset", key="d" * 64, facts={"images": {"train": 100}}, host=other)
    known = forecast.Forecast([data, trained("labels", 50.0, 50, host=other)])
    assert known.cost(work("labels", 10)) == forecast.UNKNOWN
    assert known.cost(forecast.reading("/photos", None, 100)) == forecast.UNKNOWN


def test_a_strangers_manifest_tells_nothing_and_breaks_nothing() -> None:
    for stage in ("data", "fitted", "adopt", "train", "cache", "graph", "export", "quantize", "package", "bench"):
        forecast.Forecast([manifest(stage, "checkpoint", facts={"images": 3})])
    assert forecast.Forecast([manifest("report", "report")]).cost(forecast.reporting()).seconds == 1.0


def test_a_session_takes_at_least_what_its_settings_say() -> None:
    config = BenchPlan(rounds=6, seconds=2, warm_up_seconds=1).model_dump(mode="json")
    cost = forecast.Forecast([]).cost(forecast.benching(config, "local", 3))
    assert cost.seconds == pytest.approx(3 * 6 * 3) and cost.bytes is None and "at least" in cost.basis
    assert not forecast.total([cost]).exact


def test_the_time_of_what_was_made_is_known(tiny: Tiny) -> None:
    legs = {
        leg["name"]: leg for leg in tiny.planned("--set", "distill.train.epochs=2", "--set", "student.model=resnet18")
    }
    assert legs["teacher"]["known"] == "sealed" and legs["teacher"]["seconds"] == 0
    assert legs["student-kd-seed0"]["seconds"] is None and legs["student-kd-seed0"]["known"] == "unknown"
    legs = {leg["name"]: leg for leg in tiny.planned("--set", "distill.train.epochs=2")}
    student = read_manifest(tiny.of("student-kd-seed0"))
    assert 0.2 * student.seconds < legs["student-kd-seed0"]["seconds"] < 10 * student.seconds
    assert legs["bundle-onnxruntime-int8"]["seconds"] == read_manifest(tiny.of("bundle-onnxruntime-int8")).seconds
    assert legs["bundle-onnxruntime-int8"]["bytes"] > 10_000


# ---- options ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "leave_out"),
    [
        (DataPlan(source="x"), ("source",)),
        (DataPlan(source="x", test_split=None, root="null or so", val_fraction=0, unlabeled="no"), ("source",)),  # type: ignore[arg-type]
        (TeacherPlan(model="a", checkpoint="yes", model_args={"a": [1, "b: c"], "é": None}), ()),  # type: ignore[arg-type]
        (TrainConfig(model="x", input={"mean": (0.1, 0.2, 0.3), "size": 8}, train={"milestones": (3, 5)}), ()),  # type: ignore[arg-type]
        (TrainConfig(model="x", cache_views=4, train={"average": 0.9, "augment": {"auto_augment": "rand-m7"}}), ()),  # type: ignore[arg-type]
        (ExportConfig(target="tflite"), ()),
        (QuantizeConfig(reduce_range=False, max_drop=0.5), ()),
        (BenchPlan(), ("devices",)),
        (BenchPlan(effort="quick"), ("devices",)),
        (BenchPlan(effort="quick", seconds=2.0, threads=(1, 0), sustained="10m"), ("devices",)),  # type: ignore[arg-type]
        (BenchPlan(effort="thorough", rounds=10, max_seconds=10), ("devices",)),
        (ReportConfig(title="a: 'b' # c", max_drop=1), ()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseModel) else "",
)
def test_options_make_the_configuration_again(config: BaseModel, leave_out: tuple[str, ...]) -> None:
    words = options_of(config, leave_out)
    assert read_options(type(config), words, **{name: getattr(config, name) for name in leave_out}) == config
    assert config != BenchPlan() or not words, "what is usual is not said"


# ---- list, show, compare ---------------------------------------------------------------------------------


def test_list_names_everything(tiny: Tiny) -> None:
    flip = tiny.of("bundle-onnxruntime-int8") / "manifest.json"
    flip.write_text(flip.read_text().replace('"int8"', '"int9"'))
    (tiny.artifacts / "teacher-feedbeef.part").mkdir()
    done = kdpipe("list", cwd=tiny.folder)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[-1].startswith("11 artifacts, ")
    assert any(re.match(r"checkpoint +student-kd-seed0-\w+ .* test_resnet, kd, \d", line) for line in lines)
    assert any("edited after sealing" in line for line in lines)
    found = json.loads(kdpipe("list", "--json", cwd=tiny.folder).stdout)
    kinds = sorted(each.get("kind", "?") for each in found["artifacts"])
    assert kinds == sorted(
        ["?", "bundle", "dataset", "graph", "measurement", "report", *["model"] * 2, *["checkpoint"] * 3]
    )
    assert found["schema_version"] == 1
    assert all(each["bytes"] > 0 and each["found"] for each in found["artifacts"] if "kind" in each)


def test_list_of_nothing(tmp_path: Path) -> None:
    assert_one_line(kdpipe("list", cwd=tmp_path), 2, "no folder artifacts", "--artifacts")
    (tmp_path / "artifacts").mkdir()
    assert kdpipe("list", cwd=tmp_path).stdout.splitlines()[-1].startswith("0 artifacts")


def test_show_tells_lineage_and_descendants(tiny: Tiny) -> None:
    shutil.rmtree(tiny.of("teacher"))
    student = tiny.of("student-kd-seed0")
    done = kdpipe("show", student, cwd=tiny.folder)
    assert done.returncode == 0
    assert f"checkpoint {student.name}: test_resnet, kd, " in done.stdout
    assert re.search(r"label_fraction +0\.2", done.stdout) and "temperature" not in done.stdout  # which is a default
    assert re.search(r"teacher: checkpoint \w{12}, not here +test_resnet, labels", done.stdout)
    assert re.search(rf"made from it: {tiny.of('graph').name}, {tiny.of('report').name}", done.stdout)
    assert re.search(r"^  test_accuracy +0\.\d", done.stdout, re.MULTILINE)
    text = kdpipe("show", tiny.of("measurement"), cwd=tiny.folder).stdout
    assert re.search(r"^  onnxruntime-int8\.latency_p50_ms +\d", text, re.MULTILINE)
    found = json.loads(kdpipe("show", tiny.of("report"), "--json", cwd=tiny.folder).stdout)
    session = found["inputs"]["measurement-local-1"]
    bundle = session["inputs"]["onnxruntime-int8"]
    assert bundle["inputs"]["model"]["inputs"]["model"]["inputs"]["graph"]["inputs"]["student"]["path"] == str(student)
    assert found["facts"]["devices"][0]["device"] == "local" and found["used_by"] == []


def test_show_of_what_is_not_whole(tiny: Tiny) -> None:
    assert_one_line(kdpipe("show", tiny.artifacts / "nothing"), 2, "no artifact at")
    (tiny.of("data") / "index.json").unlink(missing_ok=True)
    name = next(iter(read_manifest(tiny.of("teacher")).files))
    (tiny.of("teacher") / name).unlink()
    assert_one_line(kdpipe("show", tiny.of("teacher")), 2, "lacks", "make the artifact again")


def test_strangers_texts_are_printed_as_they_are(tiny: Tiny) -> None:
    """A title can hold markup and brackets; a fact of the wrong type is told in one line."""
    rewrite_manifest(tiny.of("report"), lambda value: value["config"].update(title="[bold]x[/bold] :smile:"))
    assert "[bold]x[/bold] :smile:" in kdpipe("list", cwd=tiny.folder).stdout
    rewrite_manifest(tiny.of("graph"), lambda value: value["facts"].update(nodes_by_kind="many"))
    assert_one_line(kdpipe("show", tiny.of("graph")), 2, "nodes_by_kind")
    assert "nodes_by_kind" in kdpipe("list", cwd=tiny.folder).stdout


def test_compare_names_what_differs(tiny: Tiny) -> None:
    taught, control = tiny.of("student-kd-seed0"), tiny.of("student-labels-seed0")
    found = json.loads(kdpipe("compare", control, taught, "--json").stdout)
    settings = {each["name"]: (each["first"], each["second"]) for each in found["settings"]}
    assert settings["method"] == ("labels", "kd") and "model" not in settings and "train.epochs" not in settings
    assert settings["teacher"] == (None, read_manifest(tiny.of("teacher")).key[:12])
    results = {each["name"]: (each["first"], each["second"]) for each in found["results"]}
    assert results["method"] == ("labels", "kd") and "parameters" not in results
    one, other = (read_manifest(path).facts["test_accuracy"] for path in (control, taught))
    assert found["paired"]["difference"] == pytest.approx(other - one)
    assert found["paired"]["won"] - found["paired"]["lost"] == round((other - one) * found["paired"]["n"])
    back = json.loads(kdpipe("compare", taught, control, "--json").stdout)
    assert back["paired"]["difference"] == pytest.approx(one - other)
    text = kdpipe("compare", control, taught).stdout
    assert re.search(r"^method +labels +kd *$", text, re.MULTILINE) and "same test images" in text


def test_compare_takes_the_second_against_the_first(made: Made) -> None:
    """In a difference of two networks a gain is positive."""
    worse, better = sorted((made.teacher, made.student), key=lambda each: each.facts.test_accuracy)
    gain = 100 * (better.facts.test_accuracy - worse.facts.test_accuracy)
    assert gain > 0
    assert (
        f"{better.path.name} against {worse.path.name}: {gain:+.2f} points"
        in kdpipe("compare", worse.path, better.path).stdout
    )
    assert (
        f"{worse.path.name} against {better.path.name}: {-gain:+.2f} points"
        in kdpipe("compare", better.path, worse.path).stdout
    )


def test_compare_tells_latencies_of_two_sessions(tiny: Tiny) -> None:
    assert tiny.run("--again", "bench").returncode in (0, 75)
    first, second = sorted(tiny.artifacts.glob("measurement-*"))
    found = json.loads(kdpipe("compare", first, second, "--json").stdout)
    assert [each["name"] for each in found["settings"]] == ["attempt"]
    names = {each["name"] for each in found["results"]}
    assert names <= {f"onnxruntime-{variant}.{what}" for variant in ("float32", "int8") for what in
                     ("latency_p50_ms", "latency_p90_ms", "whole_frame_ms", "trust", "status")}  # fmt: skip
    assert "onnxruntime-int8.latency_p50_ms" in names


def test_compare_looks_into_lineage(tiny: Tiny) -> None:
    assert kdpipe("export", tiny.of("student-labels-seed0"), "--target", "onnxruntime").returncode == 0
    [first, second] = sorted(tiny.artifacts.glob("onnxruntime-float32-*"))
    found = json.loads(kdpipe("compare", first, second, "--json").stdout)
    assert {each["name"] for each in found["settings"]} >= {"graph.student.method"}
    assert found["paired"] is None


def test_compare_of_two_kinds_and_of_the_same(tiny: Tiny) -> None:
    assert_one_line(kdpipe("compare", tiny.of("data"), tiny.of("teacher")), 2, "wanted two of a kind")
    assert kdpipe("compare", tiny.of("data"), tiny.of("data")).stdout == "nothing differs\n"


# ---- clean -----------------------------------------------------------------------------------------------


def cleaned(tiny: Tiny, *arguments: object) -> dict[str, Any]:
    done = kdpipe("clean", "--json", *arguments, cwd=tiny.folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def package_another(tiny: Tiny) -> Path:
    """A bundle that no report needs."""
    before = tiny.names()
    assert kdpipe("package", tiny.of("onnxruntime-int8"), "--golden-images", 3).returncode == 0
    [name] = tiny.names() - before
    return tiny.artifacts / name


def test_what_a_report_needs_stays(tiny: Tiny) -> None:
    before = tiny.names()
    assert cleaned(tiny, "--yes", "--everything")["removed"] == []
    assert tiny.names() == before


def test_clean_removes_what_nothing_needs(tiny: Tiny) -> None:
    extra = package_another(tiny)
    assert cleaned(tiny, "--yes")["stay"] == {"made since the last report": 1}
    assert extra.exists()
    assert cleaned(tiny, "--everything")["removed"] == [], "without --yes nothing goes"
    assert extra.exists()
    assert cleaned(tiny, "--everything", "--yes")["removed"] == [str(extra.relative_to(tiny.folder))]
    assert not extra.exists() and not list(tiny.artifacts.glob("*.part"))
    assert "0 done now" in tiny.run().stdout


def test_clean_asks(tiny: Tiny) -> None:
    extra = package_another(tiny)
    done = kdpipe("clean", "--everything", cwd=tiny.folder)
    assert_one_line(done, 2, "1 would go", "--yes")
    assert extra.exists() and extra.name in done.stdout

    import pty

    for answer, gone in (("n", False), ("y", True)):
        master, slave = pty.openpty()
        process = subprocess.Popen(
            [sys.executable, "-m", "kdpipe", "clean", "--everything"],
            cwd=tiny.folder, stdin=slave, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        os.close(slave)
        os.write(master, f"{answer}\n".encode())
        output, errors = process.communicate(timeout=1800)
        os.close(master)
        assert process.returncode == 0, errors
        assert "Remove these 1" in errors
        assert ("1 removed" in output) == gone == (not extra.exists())


@pytest.mark.lab  # for its seconds
def test_only_the_newest_reports_count(tiny: Tiny) -> None:
    """What only an older report needs goes with it, what both need stays."""
    old = tiny.of("report")
    done = tiny.run("--set", "name=newer", "--set", "package.golden_images=5")
    assert done.returncode in (0, 75), done.stderr
    assert cleaned(tiny)["unneeded"] == []
    found = cleaned(tiny, "--reports", 1)
    gone = {Path(each["path"]).name.rpartition("-")[0] for each in found["unneeded"]}
    assert old.name in {Path(each["path"]).name for each in found["unneeded"]}
    assert {name for name in gone if name.startswith("bundle")} == {
        "bundle-onnxruntime-float32", "bundle-onnxruntime-int8"
    }  # fmt: skip
    cleaned(tiny, "--reports", 1, "--yes")
    assert not old.exists()
    keys = {manifest.key for _, manifest in sealed(tiny.artifacts)}
    for path, manifest in sealed(tiny.artifacts):
        assert manifest.lineage_keys <= keys, f"something that {path} came from is gone"


def test_without_a_report_nothing_but_leftovers_goes(tiny: Tiny) -> None:
    shutil.rmtree(tiny.of("report"))
    (tiny.artifacts / "x-1.part").mkdir()
    whole = tiny.names()
    found = cleaned(tiny, "--yes", "--everything")
    assert [Path(path).name for path in found["removed"]] == ["x-1.part"]
    assert found["stay"] == {"there is no report to say what is needed": len(whole)}
    assert tiny.names() == whole


def test_what_was_left_behind_goes_and_what_can_be_resumed_stays(tiny: Tiny) -> None:
    killed, resumable = tiny.artifacts / "a-1.part", tiny.artifacts / "b-2.part"
    for path in (killed, resumable):
        (path / "resume").mkdir(parents=True)
        (path / "resume" / "key").write_text("0")
    (resumable / "resume" / "state.pt").write_text("hours of work")
    replaced = tiny.artifacts / REPLACED / "then"
    shutil.move(tiny.of("report"), replaced / "report-1")
    shutil.copytree(replaced / "report-1", tiny.artifacts / "report-1")
    found = cleaned(tiny, "--yes")
    assert {Path(path).name for path in found["removed"]} == {"a-1.part", "then"}
    assert found["stay"] == {"unfinished, the same command goes on with it": 1}
    assert resumable.exists() and not (tiny.artifacts / REPLACED).exists()
    cleaned(tiny, "--yes", "--unfinished")
    assert not resumable.exists()


def test_what_is_no_artifact_is_not_touched(tiny: Tiny, tmp_path: Path) -> None:
    """Files and folders of the user's, links, caches, broken and edited artifacts."""
    mine = tmp_path / "mine"
    shutil.copytree(tiny.of("teacher"), mine)
    (tiny.artifacts / "notes.txt").write_text("mine")
    (tiny.artifacts / "photos").mkdir()
    (tiny.artifacts / ".fingerprints").mkdir(exist_ok=True)
    (tiny.artifacts / "curves").mkdir()
    (tiny.artifacts / "link-1").symlink_to(mine)
    (tiny.artifacts / "link-2.part").symlink_to(mine)
    (tiny.artifacts / "file.part").write_text("")
    flip_a_byte(package_another(tiny) / "manifest.json")
    before = {path.name for path in tiny.artifacts.iterdir()}
    found = cleaned(tiny, "--yes", "--everything", "--unfinished")
    assert found["removed"] == [] and found["stay"] == {"cannot be read, or of another version": 1}
    assert {path.name for path in tiny.artifacts.iterdir()} == before
    assert (mine / "manifest.json").exists()


def test_nothing_is_cleaned_while_a_stage_is_at_work(tiny: Tiny) -> None:
    import fcntl

    extra = package_another(tiny)
    part = tiny.artifacts / "teacher-1.part"
    part.mkdir()
    descriptor = os.open(part, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        done = kdpipe("clean", "--everything", "--yes", cwd=tiny.folder)
        assert_one_line(done, 2, "is being written now")
        assert extra.exists()
    finally:
        os.close(descriptor)


@pytest.fixture
def cached(tiny: Tiny) -> Iterator[tuple[Tiny, Path]]:
    """With a cache that the report's student learned from, by its own word."""
    cache = tiny.artifacts / "cache-1"
    shutil.copytree(tiny.of("graph"), cache)
    key = "c" * 64
    rewrite_manifest(cache, lambda value: value.update(key=key))
    rewrite_manifest(tiny.of("report"), lambda value: value["inputs"]["student-kd-seed0"]["facts"].update(cache=key))
    yield tiny, cache


def test_a_cache_that_taught_stays(cached: tuple[Tiny, Path]) -> None:
    tiny, cache = cached
    assert cleaned(tiny, "--yes", "--everything")["removed"] == []
    assert cache.exists()
