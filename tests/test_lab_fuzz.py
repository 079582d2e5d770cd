"""Flipped bytes and rewritten manifests: every one ends in one line, none in a traceback or in belief."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Made, flip_a_byte, kdpipe, rewrite_manifest

from kdpipe.core.artifact import MANIFEST

pytestmark = pytest.mark.lab

FLIPS = 300
STRANGE: tuple[Any, ...] = (None, -1, 10**9, 1e308, "x", "../../etc/passwd", [], {}, True)


def flip_at(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << (at % 8)
    path.write_bytes(data)


def test_flipped_bytes_are_refused(made: Made, tmp_path: Path) -> None:
    bundle = made.bundles["onnxruntime-int8"].path
    generator = np.random.default_rng(0)
    files = [path.relative_to(bundle) for path in sorted(bundle.rglob("*")) if path.is_file()]
    for turn in range(FLIPS):
        copy = tmp_path / "bundle"
        shutil.copytree(bundle, copy)
        name = files[int(generator.integers(len(files)))]
        at = int(generator.integers((copy / name).stat().st_size))
        flip_at(copy / name, at)
        done = kdpipe("verify", copy)
        assert done.returncode in (1, 2), f"flip {turn}: byte {at} of {name} was not seen"
        assert len(done.stderr.strip().splitlines()) == 1 and done.stderr.startswith("kdpipe: "), (
            name,
            at,
            done.stderr,
        )
        shutil.rmtree(copy)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(value, dict):
        for name, item in value.items():
            yield from leaves(item, (*path, name))
    elif isinstance(value, list) and value:
        yield from leaves(value[0], (*path, 0))
    else:
        yield path


def put(value: Any, path: tuple[str | int, ...], new: Any) -> None:
    for part in path[:-1]:
        value = value[part]
    value[path[-1]] = new


@pytest.mark.parametrize("name", ["onnxruntime-int8", "openvino-float32", "tflite-int8", "tensorrt-int8"])
def test_a_strangers_facts_end_in_one_line(made: Made, tmp_path: Path, name: str) -> None:
    """Whoever can recompute the hashes can write anything: it may be believed or refused, never crash."""
    bundle = made.bundles[name].path
    facts = json.loads((bundle / MANIFEST).read_text())["facts"]
    for path in leaves(facts):
        for strange in STRANGE:
            copy = tmp_path / "bundle"
            shutil.copytree(bundle, copy, symlinks=True)
            rewrite_manifest(copy, lambda value: put(value["facts"], path, strange))  # noqa: B023 (called at once)
            done = kdpipe("verify", copy)
            assert done.returncode in (0, 1, 2), (path, strange)
            if done.returncode:
                assert len(done.stderr.strip().splitlines()) == 1, (path, strange, done.stderr)
            shutil.rmtree(copy)


def test_a_flip_in_every_kind_of_artifact_is_seen(made: Made, tmp_path: Path) -> None:
    for artifact in (made.dataset, made.student, made.graph, made.measurement, made.report):
        for name in artifact.manifest.files:
            copy = tmp_path / artifact.kind
            shutil.copytree(artifact.path, copy)
            if (copy / name).stat().st_size:
                flip_a_byte(copy / name)
                with pytest.raises(Exception, match="differs from its manifest"):
                    type(artifact).open(copy)
            shutil.rmtree(copy)
