"""Engines of TensorRT, as far as that goes without it: whose they are, one builder at a time, within its memory."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import assert_one_line, kdpipe

from kdpipe.core.kinds import Bundle
from kdpipe.runtime import store, tensorrt
from kdpipe.runtime.beside import beside
from kdpipe.runtime.bundle import read_facts
from kdpipe.runtime.tensorrt import EngineError, engine_name, find_engine, run_within

ORIN = {"gpu": "Orin", "compute_capability": "8.7", "tensorrt": "10.3.0", "driver": 12060}


@pytest.fixture
def bundle(bundles: dict[str, Bundle], tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundles["tensorrt-float32"].path, tmp_path / "bundle"))


def put(bundle: Path, machine: dict[str, Any], content: bytes = b"an engine") -> Path:
    """What building leaves beside a bundle."""
    path = beside(bundle) / engine_name(machine)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    record = {"machine": machine, "sha256": store.sealed.sha256_file(path)}
    path.with_name(path.name + ".json").write_text(json.dumps(record))
    return path


def test_an_engine_is_of_a_gpu_a_tensorrt_and_a_driver() -> None:
    others = [{**ORIN, name: f"{value}1"} for name, value in ORIN.items()]
    assert len({engine_name(machine) for machine in (ORIN, *others)}) == 5
    assert engine_name(dict(reversed(ORIN.items()))) == engine_name(ORIN)


def test_engines_lie_beside_the_bundle(tmp_path: Path) -> None:
    assert beside(tmp_path / "bundle") == tmp_path / "bundle.beside"
    stored = tmp_path / "root" / "store" / ("0" * 64)
    stored.mkdir(parents=True)
    (tmp_path / "root" / "live").symlink_to(f"store/{stored.name}")
    for path in (stored, tmp_path / "root" / "live"):
        assert beside(path) == tmp_path / "root" / "beside" / stored.name


def test_an_engine_of_another_machine_is_refused_with_the_cure(bundle: Path) -> None:
    cure = f"build it here: python3 -m runtime build {bundle}"
    with pytest.raises(EngineError, match="no engine of") as refused:
        find_engine(bundle, ORIN)
    assert cure in str(refused.value)
    put(bundle, {**ORIN, "tensorrt": "11.4.0", "driver": 13000})
    with pytest.raises(EngineError) as refused:
        find_engine(bundle, ORIN)
    assert "is for Orin with TensorRT 11.4.0 and driver 13000, this is Orin with TensorRT 10.3.0" in str(refused.value)
    assert cure in str(refused.value)
    own = put(bundle, ORIN)
    assert find_engine(bundle, ORIN) == own
    # Called by the right name, it is another machine's all the same.
    shutil.copy(put(bundle, {**ORIN, "gpu": "RTX"}), own)
    shutil.copy(beside(bundle) / (engine_name({**ORIN, "gpu": "RTX"}) + ".json"), own.with_name(own.name + ".json"))
    with pytest.raises(EngineError, match="is for "):
        find_engine(bundle, ORIN)


@pytest.mark.parametrize("fault", ["cut", "link", "no record", "rubbish"])
def test_a_damaged_engine_is_not_opened(bundle: Path, tmp_path: Path, fault: str) -> None:
    path = put(bundle, ORIN)
    record = path.with_name(path.name + ".json")
    if fault == "cut":
        path.write_bytes(b"an eng")
    elif fault == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif fault == "no record":
        record.unlink()
    else:
        record.write_text('{"machine": {"gpu": "\\u001b[2J"}, "sha256": 3')
    with pytest.raises(EngineError, match="build it here"):
        find_engine(bundle, ORIN)


def test_without_tensorrt_one_line_says_what_to_install(bundle: Path, tmp_path: Path, workdir: Path) -> None:
    line = [sys.executable, "-m", "kdpipe.runtime", "build", str(bundle)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "pip install tensorrt cuda-python" in done.stderr
    assert not beside(bundle).exists()
    (workdir / "devices.yaml").write_text(f"board: {{kind: local, folder: {tmp_path / 'device'}}}\n")
    done = kdpipe("deploy", bundle, "--device", "board")
    assert_one_line(done, 2, "cannot open a bundle of tensorrt", "-m pip install tensorrt cuda-python")


def test_who_waits_for_the_builder_takes_what_it_built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine is, is given; nothing is built: there is no TensorRT here."""
    monkeypatch.setattr(tensorrt, "this_machine", lambda: ORIN)
    facts, found = read_facts(bundle), []
    place = beside(bundle)
    place.mkdir()
    other = os.open(place, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    waiting = threading.Thread(target=lambda: found.append(tensorrt.build_engine(bundle, facts)))
    waiting.start()
    time.sleep(0.2)
    assert waiting.is_alive()
    own = put(bundle, ORIN)
    os.close(other)
    waiting.join(20)
    assert found == [own]


def test_a_build_that_fails_leaves_no_engine(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt, "this_machine", lambda: ORIN)
    with pytest.raises(EngineError, match=r"building the engine failed: .*No module named 'tensorrt'"):
        tensorrt.build_engine(bundle, read_facts(bundle))
    assert list(beside(bundle).iterdir()) == []


def test_building_is_ended_where_it_takes_too_much_memory(tmp_path: Path) -> None:
    greedy = "import time; taken = [bytearray(2**20) for _ in range(300)]; time.sleep(60)"
    begun = time.monotonic()
    with pytest.raises(EngineError, match="wanted more than the 100 MiB"):
        run_within(100 * 2**20, [sys.executable, "-c", greedy])
    assert time.monotonic() - begun < 50, "it would have slept for 60"
    run_within(400 * 2**20, [sys.executable, "-c", "taken = bytearray(2**20)"])
    with pytest.raises(EngineError, match=r"failed: the last line$"):
        run_within(400 * 2**20, [sys.executable, "-c", "import sys; sys.exit('a line\\nthe last line')"])


def test_the_builder_ends_with_who_asked_for_it(tmp_path: Path) -> None:
    """Killed, as the alarm of ``--limit-seconds`` does: nobody builds on."""
    sleeping = (
        "import ctypes, os, pathlib, signal, sys, time; from kdpipe.runtime.tensorrt import DIE_WITH_PARENT\n"
        "ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)\n"
        "pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    told = tmp_path / "process"
    code = (
        "import sys; from kdpipe.runtime.tensorrt import run_within\n"
        "run_within(2**40, [sys.executable, '-c', *sys.argv[1:]])"
    )
    asking = subprocess.Popen([sys.executable, "-c", code, sleeping, str(told)])
    end = time.monotonic() + 50
    while not (told.exists() and told.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    building = Path("/proc") / told.read_text()
    assert building.exists()
    asking.kill()
    asking.wait()
    while building.exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not building.exists()


WHAT_IS_THERE = """
from importlib.util import find_spec
from kdpipe.core.proc import is_installed
from kdpipe.runtime import is_available
found = [is_installed("nncf-of-mine"), is_installed("onnxruntime"), is_available("onnxruntime")]
print(find_spec("nncf_of_mine") is not None, *found)
print(find_spec("tensorrt").origin is None and is_available("tensorrt"))
"""


def test_a_folder_of_its_name_is_no_runtime(tmp_path: Path) -> None:
    """``python -m kdpipe`` finds what lies in the working directory first, such as what was exported for a target."""
    for name in ("tensorrt", "nncf_of_mine"):
        (tmp_path / name).mkdir()
    told = subprocess.run(
        [sys.executable, "-c", WHAT_IS_THERE], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert told.stdout == "True False True True\nFalse\n"
