"""docs/scale.md, run: its commands on two processes for two nodes, a local object store, stand-ins of schedulers."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, SMALL_TRAIN, system_command
from PIL import Image
from s3 import BUCKET, Link, free_port, object_store
from test_commands import TINY
from test_remote import seal_files, tree

from kdpipe.chain import sealed
from kdpipe.core.artifact import read_manifest
from kdpipe.core.kinds import Cache, Checkpoint, Measurement, Report
from kdpipe.core.remote import fetch_folder, push_folder

pytestmark = pytest.mark.lab
DOCUMENT = (ROOT / "docs" / "scale.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL)
[WORKFLOW] = re.findall(r"```yaml\n(.*?)```", DOCUMENT, re.DOTALL)
# Targets and variants that are named, so that every leg is known beforehand.
RECIPE = {**TINY, "export": {**TINY["export"], "targets": ["onnxruntime", "openvino"]}}
IMAGES = {"train": 60, "val": 30}  # of each class
DETERMINED = ("dataset", "checkpoint", "graph", "model", "bundle")  # kinds that are no events, nor made from one
TIMED = (Checkpoint.HISTORY,)  # files that say how long something took


def block(*words: str) -> str:
    """The one block of commands with all these words."""
    [found] = [text for text in BLOCKS if all(word in text for word in words)]
    return found


def environment(folder: Path, **more: object) -> dict[str, str]:
    """That of a user: ``kdpipe``, ``torchrun`` and the stand-ins are found by their names."""
    commands = folder / "commands"
    commands.mkdir(exist_ok=True)
    for name, module in (("kdpipe", "kdpipe"), ("torchrun", "torch.distributed.run")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    own = {"PATH": f"{commands}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own, **{name: str(value) for name, value in more.items()}}


def shell(text: str, folder: Path, variables: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run commands as GitHub does, in that folder."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text],
        cwd=folder, env=dict(variables), capture_output=True, text=True, timeout=1800, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def link() -> Iterator[Link]:
    with object_store() as found:
        yield found


@pytest.fixture(scope="module")
def shared(link: Link, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a first machine that ran the recipe with a store, and that store."""
    folder, store = tmp_path_factory.mktemp("first"), f"s3://{BUCKET}/shared"
    images = tmp_path_factory.mktemp("images")  # at the same path on every machine
    write_pictures(images)
    (folder / "my.yaml").write_text(yaml.safe_dump({**RECIPE, "data": {"source": str(images)}}))
    variables = environment(folder, STORE=store)
    for text in (block("--until teacher"), block('kdpipe run my.yaml --store "$STORE"\n')):
        done = shell(text, folder, variables)
        assert done.returncode in (0, 75), done.stderr
        assert "without its store" not in done.stderr and "not shared" not in done.stderr
    return folder, store


def write_pictures(folder: Path) -> None:
    """Dark ones and light ones."""
    generator = np.random.default_rng(0)
    for split, count in IMAGES.items():
        for label, brightness in (("dark", 90), ("light", 160)):
            (folder / split / label).mkdir(parents=True)
            for at in range(count):
                pixels = np.clip(generator.normal(brightness, 40, (36, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{at:02d}.png")


def determined(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of the files of all that does not come from an event, by folder.

    OpenVINO numbers what it makes by a counter of its process, so that a layer's name depends on what was made before.
    """
    return {
        path.name: {
            name: hashlib.sha256(re.sub(rb'(name="\w+?)_\d+"', rb'\1"', (path / name).read_bytes())).hexdigest()
            for name in manifest.files
            if name not in TIMED
        }
        for path, manifest in sealed(folder / "artifacts")
        if manifest.kind in DETERMINED
    }


# ---- a store -----------------------------------------------------------------------------------------------


def test_a_second_machine_makes_nothing_again(shared: tuple[Path, str], tmp_path: Path) -> None:
    first, store = shared
    shutil.copy(first / "my.yaml", tmp_path)
    done = shell(block('kdpipe run my.yaml --store "$STORE"\n'), tmp_path, environment(tmp_path, STORE=store))
    assert done.returncode in (0, 75), done.stderr
    made = re.findall(r"^ *\d+/\d+ (\S+) +(\S+)", done.stderr, re.MULTILINE)
    assert {how for name, how in made if not name.startswith(("measurement", "report"))} == {"fetched"}
    assert {how for name, how in made if name.startswith(("measurement", "report"))}.isdisjoint({"fetched", "sealed"})
    assert determined(tmp_path) == determined(first)
    assert len(determined(first)) == 13, "data, 3 networks, graph, 2 models of each target, their bundles"
    for path, manifest in sealed(tmp_path / "artifacts"):
        if manifest.kind == Report.kind:
            Report.open(path)


def test_a_measurement_is_there_for_who_names_it(shared: tuple[Path, str], tmp_path: Path) -> None:
    first, store = shared
    [name] = [path.name for path, found in sealed(first / "artifacts") if found.kind == Measurement.kind]
    fetch_folder(f"{store}/{name}", tmp_path / name)
    assert Measurement.open(tmp_path / name).manifest == read_manifest(first / "artifacts" / name)


def test_commands_take_urls(shared: tuple[Path, str], tmp_path: Path) -> None:
    first, store = shared
    names = {path.name.rpartition("-")[0]: path.name for path, _ in sealed(first / "artifacts")}
    variables = environment(
        tmp_path, STORE=store, TEACHER_NAME=names["teacher"], STUDENT_NAME=names["student-kd-seed0"],
        DATA_NAME=names["data"],
    )  # fmt: skip
    done = shell(block("kdpipe show"), tmp_path, variables)
    assert done.returncode == 0, done.stderr
    assert names["teacher"] in done.stdout
    assert [path.name for path in (tmp_path / "artifacts").glob("onnxruntime-float32-*")], "beside, not where it came"


# ---- several nodes -----------------------------------------------------------------------------------------


def on_two_nodes(
    text: str, folders: tuple[Path, Path], variables: Mapping[str, str]
) -> list[subprocess.CompletedProcess[str]]:
    """Run the commands of a node on each of two, at once."""
    port = str(free_port())
    nodes = [
        subprocess.Popen(
            ["bash", "-ec", text], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**variables, "NODE_RANK": str(rank), "MASTER": "127.0.0.1", "PORT": port},
        )
        for rank, folder in enumerate(folders)
    ]  # fmt: skip
    ended = []
    for node in nodes:
        stdout, stderr = node.communicate(timeout=1800)
        ended.append(subprocess.CompletedProcess(node.args, node.returncode, stdout, stderr))
    return ended


@pytest.fixture(scope="module")
def training(shared: tuple[Path, str]) -> dict[str, str]:
    folder, _ = shared
    names = {path.name.rpartition("-")[0]: path for path, _ in sealed(folder / "artifacts")}
    train = {**SMALL_TRAIN, "epochs": 2, "batch_size": 32}
    flags = [f"--train.{name.replace('_', '-')} {value}" for name, value in train.items() if name != "augment"]
    common = ["--input.size 32", "--label-fraction 0.1"]
    return {
        "TEACHER": str(names["teacher"]),
        "DATA": str(names["data"]),
        "MODEL": "test_resnet",
        "SETTINGS": " ".join([*common, *flags, "--train.augment.crop pad", "--train.augment.flip 0"]),
        "VIEWS": " ".join([*common, "--views 3", "--workers 0", "--augment.crop pad", "--augment.flip 0"]),
    }


@pytest.mark.parametrize(("what", "kind"), [("distill", Checkpoint), ("cache", Cache)])
def test_two_nodes_as_two_processes_of_one(
    what: str, kind: type[Checkpoint] | type[Cache], training: dict[str, str], tmp_path: Path
) -> None:
    text, variables = block(f"kdpipe {what}"), environment(tmp_path, **training)
    for node in on_two_nodes(text, (tmp_path, tmp_path), variables):
        assert node.returncode == 0, node.stderr
    [made] = tmp_path.glob("*/two-nodes")
    of_one = re.sub(r"--nnodes.*--nproc-per-node 1", "--standalone --nproc-per-node 2", text)
    done = shell(of_one.replace("two-nodes", "one"), tmp_path, variables)
    assert done.returncode == 0, done.stderr
    here, there = kind.open(made), kind.open(made.with_name("one"))
    assert here.key == there.key
    results = [
        {name: record for name, record in each.manifest.files.items() if name not in TIMED} for each in (here, there)
    ]
    assert results[0] and results[0] == results[1]


@pytest.mark.parametrize("what", ["distill", "cache"])
def test_nodes_that_share_no_folder_are_told(what: str, training: dict[str, str], tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    begun = time.monotonic()
    nodes = on_two_nodes(block(f"kdpipe {what}"), folders, environment(tmp_path, **training))
    assert time.monotonic() - begun < 250, "before torchrun gives up by itself"
    assert all(node.returncode != 0 for node in nodes)
    told = nodes[0].stderr + nodes[1].stderr
    assert "1 of 2 processes do not see" in told and "must share that folder" in told
    assert not list(tmp_path.glob("*/*/two-nodes"))


# ---- schedulers --------------------------------------------------------------------------------------------

# Runs a job when it is submitted: what it comes after has run by then, and a job after one that failed never runs.
SBATCH = """#!/usr/bin/env python3
import argparse, os, pathlib, subprocess, sys
parser = argparse.ArgumentParser()
for flag in ("--parsable", "--exclusive"):
    parser.add_argument(flag, action="store_true")
for option in ("--array", "--dependency", "--wrap"):
    parser.add_argument(option)
told = parser.parse_args()
jobs = pathlib.Path("jobs")
jobs.mkdir(exist_ok=True)
number = len(list(jobs.iterdir())) + 1
waits = (told.dependency or "").removeprefix("afterok:")
fine = not waits or (jobs / waits).read_text() == "COMPLETED"
first, last = (told.array or "0-0").split("-")
for task in range(int(first), int(last) + 1) if fine else ():
    with (jobs.parent / f"slurm-{number}_{task}.out").open("w") as log:
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task)}
        code = subprocess.run(["sh", "-c", told.wrap], env=environment, stdout=log, stderr=log).returncode
    fine = fine and code in ((0,) if told.array else (0, 75))
(jobs / str(number)).write_text("COMPLETED" if fine else "FAILED")
print(number if told.parsable else f"Submitted batch job {number}")
"""


def test_slurm_arrays(shared: tuple[Path, str], tmp_path: Path) -> None:
    """In one folder, without a store: what the jobs made is what a run makes, and the last job finds all of it."""
    system_command("jq")
    first, _ = shared
    variables = environment(tmp_path)
    sbatch = tmp_path / "commands" / "sbatch"
    sbatch.write_text(SBATCH)
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    shutil.copy(first / "my.yaml", tmp_path)
    script = block("# submit.sh")
    (tmp_path / "submit.sh").write_text(script)
    done = shell(block("bash submit.sh"), tmp_path, variables)
    assert done.returncode == 0, done.stderr
    logs = {path.name: path.read_text() for path in tmp_path.glob("slurm-*.out")}
    states = {path.name: path.read_text() for path in (tmp_path / "jobs").iterdir()}
    assert set(states.values()) == {"COMPLETED"}, logs
    assert len(states) >= 6, "data, teacher, students, models, INT8, bundles and the rest"
    assert determined(tmp_path).keys() == determined(first).keys()
    assert determined(tmp_path) == determined(first)
    last = logs[f"slurm-{len(states)}_0.out"]
    made = re.findall(r"^ *\d+/\d+ (\S+) +(\S+)", last, re.MULTILINE)
    assert {name for name, how in made if how != "sealed"} == {"measurement", "report"}, last


def expanded(text: str, values: Mapping[str, str]) -> str:
    """What stands for an expression of GitHub's, in the few forms that the document has."""
    return re.sub(r"\$\{\{ ?(.*?) ?\}\}", lambda found: values[found[1]], text)


def run_job(
    job: Mapping[str, Any], folder: Path, store: str, values: Mapping[str, str], recipe: Path
) -> dict[str, str]:
    """Its steps in a folder of its own, as a runner has; gives what they put out, by step and name."""
    folder.mkdir()
    outputs: dict[str, str] = {}
    for at, step in enumerate(job["steps"]):
        if "uses" in step:
            assert step["uses"].startswith("actions/checkout@")
            shutil.copy(recipe, folder)
            continue
        if step["run"].startswith("pip install"):
            continue
        own = {name: expanded(value, values) for name, value in step.get("env", {}).items()}
        output = folder / f"output-{at}"
        output.touch()
        variables = environment(folder, KDPIPE_STORE=store, GITHUB_OUTPUT=output, **own)
        done = shell(expanded(step["run"], values), folder, variables)
        assert done.returncode == 0, (step, done.stderr)
        for line in output.read_text().splitlines():
            name, _, value = line.partition("=")
            outputs[f"steps.{step['id']}.outputs.{name}"] = value
    return outputs


def test_githubs_matrix(shared: tuple[Path, str], link: Link, tmp_path: Path) -> None:
    """Every job in a folder of its own with nothing in it but the recipe."""
    system_command("jq")
    first, _ = shared
    store = f"s3://{BUCKET}/github"
    workflow = yaml.safe_load(WORKFLOW)
    assert workflow["env"] == {"KDPIPE_STORE": "${{ vars.KDPIPE_STORE }}"}
    values: dict[str, str] = {}
    done: list[str] = []
    for name, job in workflow["jobs"].items():  # in the order in which they need each other
        assert job.get("needs") is None or job["needs"] in done
        legs = [None]
        if "strategy" in job:
            [(variable, source)] = job["strategy"]["matrix"].items()
            assert variable == "leg"
            legs = json.loads(values[re.findall(r"fromJson\((.*)\)", source)[0]])
            assert [leg["id"].rpartition("-")[0] for leg in legs] == ["student-labels-seed0", "student-kd-seed0"]
        for at, leg in enumerate(legs):
            own = {f"matrix.leg.{field}": value for field, value in (leg or {}).items()}
            found = run_job(job, tmp_path / f"{name}-{at}", store, {**values, **own}, first / "my.yaml")
            for field, source in job.get("outputs", {}).items():
                values[f"needs.{name}.outputs.{field}"] = expanded(source, found)
        done.append(name)
    rest = tmp_path / "rest-0"
    assert determined(rest) == determined(first)
    for name in ("student-0", "student-1"):
        [student] = (tmp_path / name / "artifacts").glob("student-*")
        assert read_manifest(student) == read_manifest(rest / "artifacts" / student.name), "it was fetched"


def test_the_workflow_is_one_of_githubs(tmp_path: Path) -> None:
    (tmp_path / "scale.yml").write_text(WORKFLOW)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows", "scale.yml"]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


# ---- many files --------------------------------------------------------------------------------------------


def test_two_thousand_files(link: Link, tmp_path: Path) -> None:
    made = seal_files(tmp_path / "a", {f"{at % 97}/{at}": str(at).encode() for at in range(2_000)})
    url = f"s3://{BUCKET}/many"
    push_folder(made.path, url)
    link.requests.clear()
    assert tree(fetch_folder(url, tmp_path / "b")) == tree(made.path)
    assert not any("list-type" in request for request in link.requests)
