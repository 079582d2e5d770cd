"""A run that is killed again and again: whether it ends with the artifacts of an undisturbed one.

    python benchmarks/kill.py recipes/digits.yaml --kills 50 --folder /tmp/killed

The recipe is run once undisturbed. Then it is started, killed with SIGKILL at a random moment, and the same command is
started again, until it is through: in turns with all that it started (a power cut, as far as processes go) and alone
(it crashed, and what it had started goes on by itself). The moment is some time after it sealed some more artifacts,
both drawn, so that all of its stages are met whatever else the machine does. A chain that is through is compared with
the undisturbed one, key by key and hash by hash of everything that is no measurement and was made from none, and the
next begins with nothing. What was done is kept in the folder: the same command goes on, also with more kills.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from deploy_cuts import descendants  # the benchmark beside this one
from pydantic import BaseModel

from kdpipe import diary
from kdpipe.chain import sealed
from kdpipe.core.kinds import Measurement, Report

DONE = (0, 75)  # whatever this machine's latencies are worth
KINDS = ("everything", "the run alone")


class State(BaseModel):
    """What was done so far."""

    seconds: float = 0.0  # of the undisturbed run
    kills: list[str] = []  # what was being made at each
    equal: list[bool] = []  # of each chain that was compared
    differing: list[str] = []


def contents(artifacts: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """Key and hash of every file of what is no measurement and was made from none, by folder."""
    return {
        path.name: (manifest.key, {name: file.sha256 for name, file in manifest.files.items()})
        for path, manifest in sealed(artifacts)
        if manifest.kind not in (Measurement.kind, Report.kind)
    }


def start(recipe: Path, artifacts: Path) -> subprocess.Popen[bytes]:
    line = [sys.executable, "-m", "kdpipe", "run", str(recipe), "--artifacts", str(artifacts)]
    return subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def end_of(process: subprocess.Popen[bytes]) -> None:
    """Wait for it; exits 1 with its last words where it failed."""
    _, said = process.communicate()
    if process.returncode not in DONE:
        print(said.decode(errors="replace")[-3000:], file=sys.stderr)
        raise typer.Exit(1)


def killed(process: subprocess.Popen[bytes], artifacts: Path, steps: int, seconds: float, kind: str) -> str | None:
    """Kill it so many seconds after it sealed so many more; returns what it was making, None where it was through."""
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)  # a full pipe would hold it
    awaited, end = len(list(artifacts.glob("*/manifest.json"))) + steps, math.inf
    while process.poll() is None and time.monotonic() < end:
        with contextlib.suppress(BlockingIOError):
            os.read(process.stderr.fileno(), 1 << 16)
        if end == math.inf and len(list(artifacts.glob("*/manifest.json"))) >= awaited:
            end = time.monotonic() + seconds
        time.sleep(0.005)
    if process.poll() is not None:
        return None
    below = descendants(process.pid) if kind == KINDS[0] else []
    for pid in (process.pid, *below):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.communicate()
    making = [run.now for run in diary.status(artifacts).runs if run.process == process.pid and run.now]
    return making[0].rpartition("-")[0] if making else "between two steps"


def compare(state: State, wanted: Path, found: Path) -> None:
    """Note whether a chain is equal to the undisturbed one, and what is not."""
    one, other = contents(wanted), contents(found)
    differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    left = [path.name for path in found.glob("*.part")]
    state.equal.append(not differing and not left)
    state.differing += [*differing, *left]


def main(
    recipe: Annotated[Path, typer.Argument(help="what is run")],
    folder: Annotated[Path, typer.Option(help="of everything; the same command goes on there")],
    kills: Annotated[int, typer.Option(help="in all")] = 50,
    most_steps: Annotated[int, typer.Option(help="artifacts that a run seals before it is killed, at most")] = 4,
    seed: Annotated[int, typer.Option(help="of the moments")] = 0,
) -> None:
    """Kill, go on, compare; exits 1 where a start after a kill fails, or a chain is not equal."""
    wanted, artifacts, kept = folder / "undisturbed", folder / "killed", folder / "state.json"
    state = State.model_validate_json(kept.read_text()) if kept.exists() else State()
    folder.mkdir(parents=True, exist_ok=True)

    def keep() -> None:
        new = kept.with_suffix(".new")
        new.write_text(state.model_dump_json())
        new.replace(kept)

    if not state.seconds:
        shutil.rmtree(wanted, ignore_errors=True)
        begun = time.monotonic()
        end_of(start(recipe, wanted))
        state.seconds = time.monotonic() - begun
        keep()
    while len(state.kills) < kills:
        moments = random.Random(f"{seed} {len(state.kills)}")
        process = start(recipe, artifacts)
        steps, seconds = moments.randint(0, most_steps), moments.uniform(0, 2 * state.seconds / len(contents(wanted)))
        making = killed(process, artifacts, steps, seconds, KINDS[len(state.kills) % 2])
        if making is None:
            if process.returncode not in DONE:
                end_of(process)
            compare(state, wanted, artifacts)
            shutil.rmtree(artifacts)
        else:
            state.kills.append(making)
        keep()
    if artifacts.exists():
        end_of(start(recipe, artifacts))
        compare(state, wanted, artifacts)
        shutil.rmtree(artifacts)
        keep()
    print(f"kdpipe {version('kdpipe')}, torch {version('torch')}, Linux {os.uname().release}, seed {seed}")
    count = len(contents(wanted))
    print(f"{len(state.kills)} kills, in: {json.dumps(collections.Counter(state.kills).most_common())}")
    print(f"{sum(state.equal)} of {len(state.equal)} chains equal the undisturbed one in all of its {count} artifacts")
    if state.differing:
        print(f"differing: {', '.join(sorted(set(state.differing)))}")
    if not all(state.equal):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
