"""Changed files and rewritten manifests: every one ends in one line, none in a traceback or in belief."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made, assert_one_line, flip_a_byte, kdpipe, rewrite_manifest
from fuzz import READERS, STRANGE, drop, everywhere, exercise, put
from test_strangers import runner

from kdpipe.chain import Chain
from kdpipe.core.artifact import MANIFEST
from kdpipe.core.config import DataPlan
from kdpipe.core.errors import UserError
from kdpipe.core.kinds import Bundle
from kdpipe.data.dataset import Dataset

pytestmark = pytest.mark.lab

INPUTS = int(os.environ.get("KDPIPE_FUZZ_INPUTS", "2000"))  # of each reader; ten thousand take a quarter of an hour
MUTANTS = int(os.environ.get("KDPIPE_FUZZ_MUTANTS", "25"))  # of each kind of artifact
TARGETS = ("onnxruntime-int8", "openvino-float32", "tflite-int8", "tensorrt-int8")


@pytest.mark.parametrize("name", READERS)
def test_thousands_of_inputs_end_in_no_traceback_and_in_no_belief(made: Made, tmp_path: Path, name: str) -> None:
    told = exercise(READERS[name](made, tmp_path), INPUTS)
    print(f"{name}: {told['taken']} of {told.total()} taken, {told['refused']} refused")
    assert told.total() == INPUTS


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))
    else:
        yield path


@pytest.mark.parametrize("name", TARGETS)
def test_a_strangers_facts_end_in_one_line(made: Made, tmp_path: Path, name: str) -> None:
    """Whoever can recompute the hashes can write anything: it may be believed or refused, never crash.

    Every value at every place once, by one of the targets in turn: their facts have the same reader.
    """
    bundle = made.bundles[name].path
    facts = json.loads((bundle / MANIFEST).read_text())["facts"]
    stand_in = ["--stand-in"] if name.startswith("tensorrt") else []
    cases = [(path, strange) for path in leaves(facts) for strange in STRANGE]
    for path, strange in cases[TARGETS.index(name) :: len(TARGETS)]:
        copy = tmp_path / "bundle"
        shutil.copytree(bundle, copy, symlinks=True)
        rewrite_manifest(copy, lambda value: put(value["facts"], path, strange))  # noqa: B023 (called at once)
        with contextlib.suppress(UserError):
            Bundle.open(copy)
        done = runner("verify", copy, *stand_in)
        assert done.returncode in (0, 1), (path, strange)
        assert len(done.stderr.splitlines()) == done.returncode, (path, strange, done.stderr)
        shutil.rmtree(copy)


@pytest.fixture(scope="module")
def few(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A data set of the same classes with a handful of images: what is done with it takes little, nor does a copy."""
    folder = tmp_path_factory.mktemp("few")
    for part, images in (("train", 4), ("test", 2)):
        for sample in made.dataset.balanced(part, images * len(made.dataset.classes), seed=0):
            place = folder / "photos" / part / made.dataset.classes[sample.label]
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(sample.path, place)
    return Chain(folder / "artifacts").data(DataPlan(source=str(folder / "photos"), val_fraction=0))


@pytest.mark.parametrize("kind", ["bundle", "model", "student", "measurement", "data", "graph"])
def test_every_command_on_a_strangers_manifest_ends_in_one_line(
    made: Made, few: Dataset, tmp_path: Path, kind: str
) -> None:
    """A seeded choice of places in the whole manifest, lineage included: another value there, or none."""
    data, out = ("--data", few.path), ("--out", tmp_path / "out")
    source, command = {
        "bundle": (
            made.bundles["onnxruntime-int8"],
            ("bench", ..., *data, "--device", "null", "--effort", "quick", "--seconds", 0.01),
        ),
        "model": (made.models["onnxruntime-float32"], ("package", ..., *data)),
        "student": (made.student, ("report", made.measurement.path, ..., *out)),
        "measurement": (made.measurement, ("report", ..., made.teacher.path, made.student.path, *out)),
        "data": (few, ("package", made.models["onnxruntime-float32"].path, "--data", ..., *out)),
        "graph": (made.graph, ("report", tmp_path / "measurement", made.student.path, *out)),
    }[kind]
    generator = np.random.default_rng(0)
    whole = json.loads((source.path / MANIFEST).read_text())
    places = [path for path in everywhere(whole) if path[0] not in ("files", "digest", "key", "tools", "host")]
    places += 3 * [path for path in places if path[0] in ("facts", "config")]  # more is read of these
    for turn in range(MUTANTS):
        place = places[int(generator.integers(len(places)))]
        strange = STRANGE[int(generator.integers(len(STRANGE)))]

        def change(value: dict[str, Any], place: Any = place, strange: Any = strange, turn: int = turn) -> None:
            put(value, place, strange)
            if turn % 4 == 0:
                drop(value, place)

        copy = tmp_path / "copy"
        shutil.copytree(source.path, copy)
        if kind == "graph":
            shutil.copytree(made.measurement.path, tmp_path / "measurement")
        rewrite_manifest(copy, change)
        done = kdpipe(*[copy if argument is ... else argument for argument in command])
        assert done.returncode in (0, 1, 2, 75), (place, strange, done.stderr)
        if done.returncode:
            assert_one_line(done, done.returncode)
        for folder in tmp_path.iterdir():
            shutil.rmtree(folder)


def test_a_flip_in_every_kind_of_artifact_is_seen(made: Made, tmp_path: Path) -> None:
    for artifact in (made.dataset, made.student, made.graph, made.measurement, made.report):
        names = sorted(artifact.manifest.files)
        for name in names[:: max(1, len(names) // 20)]:  # the digits have a file an image
            copy = tmp_path / artifact.kind
            shutil.copytree(artifact.path, copy)
            if (copy / name).stat().st_size:
                flip_a_byte(copy / name)
                with pytest.raises(Exception, match="differs from its manifest"):
                    type(artifact).open(copy)
            shutil.rmtree(copy)
